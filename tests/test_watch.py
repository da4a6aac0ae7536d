"""Watching a request changes nothing, and tells every wait with who it waited for."""

from dataclasses import replace
from functools import cache

import pytest

from tierline.catalog.deployment import Deployment, parse_deployment
from tierline.sim.api import simulate
from tierline.sim.explain import explain
from tierline.sim.instance import Instance, instance_of
from tierline.sim.life import slowest
from tierline.sim.record import Run
from tierline.workload.request import Request
from tierline.workload.slo import parse_service_levels

DEPLOYMENT = """
schema = 1
gpu = "l40s"
replicas = 2
weight_format = "fp8"
kv_format = "fp8"
kv_block_tokens = 16
gpu_memory_utilization = 0.9
tiers = [{ name = "device", capacity_bytes = 2000000000, enabled = true }]
[model]
name = "llama-3.1-8b"
[parallel]
tp = 1
pp = 1
dp = 1
ep = 1
[limits]
batch_tokens_max = 1024
sequences_max = 64
context_tokens_max = 16384
[policies]
scheduler = "fcfs"
chunked_prefill = true
chunk_tokens = 512
prefix_cache = true
routing = "least-outstanding"
[[slo]]
name = "default"
priority = 0
targets = ["ttft_p99=1s", "itl_p99=80ms"]
"""


def small_deployment() -> Deployment:
    return parse_deployment(DEPLOYMENT, where="deployment.toml")


@cache
def instance() -> Instance:
    return instance_of(small_deployment())


def crowd(count: int = 200) -> list[Request]:
    """More than two small replicas can serve at once, some of it with a common prefix."""
    lengths = [300 + 97 * (i % 23) ** 2 % 5000 for i in range(count)]
    return [
        Request(
            arrival_ns=i * 40_000_000,
            input_tokens=tokens,
            output_tokens=20 + 31 * (i % 17),
            prefix_blocks=(i % 5, *range(100 * i + 100, 100 * i + 100 + tokens // 512)),
            tenant="ab"[i % 2],
        )
        for i, tokens in enumerate(lengths)
    ]


def run(policy: str = "tierline", *, watch: tuple[int, ...] = ()) -> Run:
    levels = parse_service_levels(["ttft_p99=1s,itl_p99=80ms"])
    return simulate(
        instance(), crowd(), levels=levels, replicas=2, policy=policy, watch=watch, keep_steps=True
    )


@pytest.mark.parametrize("policy", ["tierline", "fcfs", "edf", "vllm-v1"])
def test_watching_changes_nothing(policy: str) -> None:
    """INV-SIM-26, with everybody watched."""
    assert run(policy, watch=tuple(range(200))).hash() == run(policy).hash()


def test_another_policy_is_another_hash() -> None:
    """Negative control of the test above."""
    assert run("shortest").hash() != run("fcfs").hash()


@pytest.mark.parametrize("policy", ["tierline", "fcfs"])
def test_every_prompt_token_is_told_in_a_chunk(policy: str) -> None:
    """What chunks compute is what was not cached, for requests that were not preempted."""
    watched = run(policy, watch=tuple(range(0, 200, 9)))
    requests = watched.requests
    for request, moments in watched.moments.items():
        if requests.preemptions[request]:
            continue
        told = [m.why for m in moments if m.what == "chunk"]
        computed = sum(int(why.split(" ")[0].replace(",", "")) for why in told)

        assert computed == requests.input_tokens[request] - requests.cached_tokens[request]
        assert moments[0].what == "routed"
        assert "first token" in [m.what for m in moments]
        assert [m.at_ps for m in moments] == sorted(m.at_ps for m in moments)


def test_a_wait_names_who_went_first_and_who_holds_the_memory() -> None:
    late = slowest(run("fcfs"), 1, latency="ttft")[0]
    watched = run("fcfs", watch=(late,))
    requests = watched.requests
    behind = [m.why for m in watched.moments[late] if m.what == "behind"]
    first = [int(why.split(" ")[1]) for why in behind if "is admitted first" in why]
    heads = [why for why in behind if "does not fit" in why]

    assert first
    assert heads
    for other in first:
        assert requests.arrival_ps[other] <= requests.arrival_ps[late]
        assert requests.replica[other] == requests.replica[late]
        if not requests.preemptions[other]:  # else it may have been in before
            assert requests.arrival_ps[late] <= requests.admitted_ps[other]
        assert requests.admitted_ps[other] <= requests.admitted_ps[late]
    assert all("the most is held by request" in why for why in heads)
    told = explain(watched, late)
    assert told.waits[0].kind == "queued"
    served = {i for i in first if requests.first_ps[i] <= requests.admitted_ps[late]}
    assert served
    assert served <= set(told.waits[0].ahead)


def test_who_comes_into_an_empty_house_waits_behind_nobody() -> None:
    """Negative control of the test above."""
    watched = run("fcfs", watch=(0,))

    assert "behind" not in [m.what for m in watched.moments[0]]


def test_a_preemption_is_told_and_its_gap_with_it() -> None:
    """Memory for a tenth: decodes are preempted, and the life of one says so."""
    small = replace(instance(), pages_total=instance().pages_total // 8)
    levels = parse_service_levels(["ttft_p99=1s"])
    requests = crowd(120)
    plain = simulate(small, requests, levels=levels, replicas=2, policy="fcfs")
    hit = [i for i in range(120) if plain.requests.preemptions[i]]
    assert hit
    watched = simulate(small, requests, levels=levels, replicas=2, policy="fcfs", watch=hit[:1])
    told = explain(watched, hit[0])

    assert watched.hash() == plain.hash()
    assert "preempted" in [w.kind for w in told.waits]
    assert any(h.what == "preempted" for h in told.happenings)
    assert sum(p.for_s for p in told.parts) == pytest.approx(told.total_s)


def test_who_is_overtaken_waits_again_although_its_prompt_is_begun() -> None:
    watched = run("tierline", watch=tuple(range(200)))
    overtaken = [
        i for i, told in watched.moments.items() if any(m.what == "overtaken" for m in told)
    ]
    assert overtaken
    for request in overtaken[:20]:
        told = explain(watched, request)
        waits = [w for w in told.waits if w.kind == "queued"]
        (begun,) = [h for h in told.happenings if h.what == "overtaken"][:1]

        assert any(w.after_s == pytest.approx(begun.after_s) for w in waits)
        assert sum(p.for_s for p in told.parts) == pytest.approx(told.total_s)


def test_a_lone_request_is_overtaken_by_nobody() -> None:
    """Negative control of the test above."""
    levels = parse_service_levels(["ttft_p99=1s"])
    lone = simulate(instance(), crowd(1), levels=levels, policy="tierline", watch=[0])

    assert {m.what for m in lone.moments[0]} <= {"routed", "admitted", "chunk", "first token"} | {
        "longer gap",
        "finished",
        "stepped back",
    }
