"""The tierline policy is worth what it costs: every mechanism, on a trace on which it matters.

Small versions of `benchmarks/bench_policies.py`: the same classes from the same real lengths, a
70B on four H100, some minutes of traffic.  Each mechanism is switched off as its control.
"""

from dataclasses import replace
from functools import cache
from itertools import islice, takewhile
from pathlib import Path
from random import Random

import numpy as np
import pytest

from tierline.base.clock import PS_PER_S
from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.kv.transfer import DRAM
from tierline.perf.step import Layout, StepCost
from tierline.scheduling.policy import BASELINES, FCFS, TIERLINE, Policy
from tierline.scheduling.scheduler import Limits
from tierline.sim.api import simulate
from tierline.sim.columns import column
from tierline.sim.instance import Instance, build_instance
from tierline.sim.measure import good_requests, latencies_ps
from tierline.sim.record import FINISHED, Run
from tierline.workload.mix import Part, lengths_of, mixed
from tierline.workload.request import Request
from tierline.workload.slo import parse_service_levels
from tierline.workload.trace import read_trace

LEVELS = parse_service_levels(
    [
        "interactive@2:ttft_p99=1s,tpot_p99=50ms",
        "agentic@1:ttft_p99=4s,tpot_p99=100ms",
        "batch@0:ttft_p99=900s",
    ]
)


@cache
def parts(folder: Path) -> tuple[Part, Part, Part]:
    traces = folder / "traces"
    chat = lengths_of(read_trace(traces / "azure2023_conv.csv.gz"))
    agents = lengths_of(read_trace(traces / "mooncake_conversation.jsonl.gz"), below_tokens=30_000)
    papers = lengths_of(read_trace(traces / "arxiv_summarization_lengths.csv.gz"))
    return (
        Part(name="interactive", priority=2, share=5, lengths=chat),
        Part(name="agentic", priority=1, share=3, lengths=agents),
        Part(name="batch", priority=0, share=2, lengths=papers),
    )


def instance(*, chunk=512, sequences=128, pool_tokens=0, dram_bytes=0) -> Instance:
    cost = StepCost(
        load_model("llama-3.1-70b"), load_gpu("h100-sxm"), Layout(weights="bf16", kv="bf16", tp=4)
    )
    built = build_instance(
        cost,
        name="70B",
        block_tokens=16,
        limits=Limits(batch_tokens=chunk, sequences_max=sequences, chunk_tokens=chunk),
        tier_bytes={DRAM: dram_bytes},
    )
    return replace(built, pages_total=pool_tokens // 16) if pool_tokens else built


def drawn(mix, *, rate_rps: float, span_s: float, seed: int) -> list[Request]:
    endless = mixed(mix, rate_rps=rate_rps, seed=seed)
    return list(takewhile(lambda r: r.arrival_ns < span_s * 1e9, endless))


def served(kind: Instance, requests: list[Request], policy: Policy, levels=LEVELS) -> Run:
    run = simulate(kind, requests, levels=levels, policy=policy)

    assert run.requests.outcome.count(FINISHED) == len(requests), "batch work finishes, too"
    return run


def goodput(run: Run) -> float:
    return float(good_requests(run).mean())


def of_class(run: Run, number: int) -> np.ndarray:
    return column(run.requests, "level") == number


@pytest.fixture(scope="module")
def overload(data_dir):
    """(instance, requests at 1.0 and at 1.3 of what FCFS can do)."""
    mix, kind = parts(data_dir), instance()
    backlog = islice(mixed(mix, rate_rps=1.0, seed=50), 1000)
    drain = served(kind, [replace(r, arrival_ns=0) for r in backlog], FCFS)
    capacity = 1000 / drain.duration_s
    return kind, {
        load: drawn(mix, rate_rps=capacity * load, span_s=600, seed=5) for load in (1.0, 1.3)
    }


@pytest.mark.parametrize(("load", "over_fcfs", "over_plain"), [(1.0, 1.8, 1.4), (1.3, 3.5, 1.4)])
def test_goodput_over_the_baselines(overload, load, over_fcfs, over_plain):
    """Ten minutes reach the budget of thirty but for the ratio to FCFS, whose backlog is short."""
    kind, requests = overload
    ours = goodput(served(kind, requests[load], TIERLINE))
    plain = {p.name: goodput(served(kind, requests[load], p)) for p in BASELINES}

    assert ours >= over_fcfs * plain["fcfs"]
    assert ours >= over_plain * max(plain.values())


@pytest.mark.parametrize("mechanism", ["adaptive_chunk", "overtakes", "sheds"])
def test_each_mechanism_carries_weight_under_overload(overload, mechanism):
    kind, requests = overload
    ours = goodput(served(kind, requests[1.3], TIERLINE))
    control = goodput(served(kind, requests[1.3], replace(TIERLINE, **{mechanism: False})))

    assert ours >= control + 0.1


def test_no_running_stream_is_slowed_beyond_its_promise(overload):
    kind, requests = overload
    run = served(kind, requests[1.3], TIERLINE)
    tpot = latencies_ps(run.requests)["tpot"]

    assert (tpot[of_class(run, 0)] <= 0.05 * PS_PER_S).mean() > 0.995
    assert (tpot[of_class(run, 1)] <= 0.1 * PS_PER_S).mean() > 0.995
    control = served(kind, requests[1.3], replace(TIERLINE, adaptive_chunk=False))
    slow = latencies_ps(control.requests)["tpot"][of_class(control, 0)] > 0.05 * PS_PER_S
    assert slow.mean() > 0.5


def test_a_floor_keeps_background_moving_under_threefold_load(data_dir):
    requests = drawn(parts(data_dir), rate_rps=6, span_s=300, seed=5)
    off = replace(TIERLINE, floors_percent=(0, 0, 0))

    def begun(policy: Policy) -> float:
        """Share of the prompt tokens begun within the five minutes that were batch work's."""
        run = served(instance(), requests, policy)
        first = column(run.requests, "first_ps") <= 300 * PS_PER_S
        prompt = column(run.requests, "input_tokens")
        return float(prompt[first & of_class(run, 2)].sum() / prompt[first].sum())

    assert begun(TIERLINE) >= 0.05
    assert begun(off) < 0.05


@pytest.fixture(scope="module")
def long_answers(data_dir):
    """Chats beside summaries that go on for long, in few slots and little memory."""
    chat, _, papers = parts(data_dir)
    batch = replace(papers, share=0.5, lengths=[(a, b * 4) for a, b in papers.lengths])
    mix = (replace(chat, share=1.5), batch)
    kind = instance(chunk=2048, sequences=24, pool_tokens=120_000, dram_bytes=300 * 10**9)
    return kind, drawn(mix, rate_rps=2.0, span_s=200, seed=1)


def test_background_gives_way_to_a_prompt_that_is_not(long_answers):
    kind, requests = long_answers
    ours = served(kind, requests, TIERLINE)
    control = served(kind, requests, replace(TIERLINE, gives_way=False))

    assert good_requests(ours)[of_class(ours, 0)].mean() > 0.99
    assert good_requests(control)[of_class(control, 0)].mean() < 0.9


def test_parking_in_dram_saves_computing_again(long_answers):
    kind, requests = long_answers
    ours = served(kind, requests, TIERLINE)
    control = served(kind, requests, replace(TIERLINE, swaps=False))
    asked = sum(r.input_tokens for r in requests)

    assert ours.replicas[0].moved_bytes["swap-out"] > 0
    again = [run.replicas[0].prefill_tokens / asked - 1 for run in (ours, control)]
    assert again[0] < 0.5 * again[1]
    waits = [latencies_ps(r.requests)["e2e"][of_class(r, 2)].mean() for r in (ours, control)]
    assert waits[0] < 0.8 * waits[1]


def test_foreseeing_answers_avoids_storms_of_preemptions(data_dir):
    chat, agents, _ = parts(data_dir)
    longer = replace(agents, share=0.5, priority=0, lengths=[(a, 3 * b) for a, b in agents.lengths])
    requests = drawn((replace(chat, share=1.0), longer), rate_rps=1.5, span_s=200, seed=1)
    kind = instance(chunk=2048, pool_tokens=80_000)
    ours = served(kind, requests, TIERLINE)
    control = served(kind, requests, replace(TIERLINE, foresees=False))

    assert ours.replicas[0].preemptions < control.replicas[0].preemptions / 3
    assert ours.replicas[0].prefill_tokens < 0.8 * control.replicas[0].prefill_tokens
    assert ours.duration_s < control.duration_s


def test_a_flooding_tenant_delays_itself(data_dir):
    """8 of 11 requests a second come from one tenant, twice what the replica can do."""
    rng, names = Random(9), ("flood", "b", "c", "d")
    chat = parts(data_dir)[:1]
    requests = [
        replace(r, tenant=rng.choices(names, (8, 1, 1, 1))[0])
        for r in drawn(chat, rate_rps=11, span_s=100, seed=3)
    ]
    levels = parse_service_levels(["chat:ttft_p99=5s"])

    def p99_s(policy: Policy) -> tuple[float, float]:
        run = served(instance(), requests, policy, levels)
        others = column(run.requests, "tenant") != run.tenants.index("flood")
        ttft_s = latencies_ps(run.requests)["ttft"] / PS_PER_S
        return float(np.percentile(ttft_s[others], 99)), float(np.percentile(ttft_s[~others], 99))

    others_s, flood_s = p99_s(TIERLINE)

    assert others_s < 5 < flood_s
    assert p99_s(replace(TIERLINE, debt_max_tokens=0))[0] > 10 * others_s
    assert p99_s(FCFS)[0] > 10 * others_s
