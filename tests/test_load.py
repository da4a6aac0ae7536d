"""The load model agrees with queueing theory and with a step-by-step simulation."""

import heapq
import math
from dataclasses import replace
from itertools import pairwise

import pytest

from tierline.base.rng import stream
from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.perf.step import Layout, StepCost, load_engine
from tierline.planner.load import (
    Demand,
    Instance,
    at_concurrency,
    load_curve,
    operating_point,
    saturated_rate,
    usable_rate,
)
from tierline.workload.slo import parse_service_levels

COST = StepCost(
    load_model("llama-3.1-70b"), load_gpu("h100-sxm"), Layout(weights="fp8", kv="fp8", tp=4)
)
ENGINE = replace(load_engine("vllm"), host_s=0.0, wait_steps=0.0)
INSTANCE = Instance(
    cost=COST, engine=ENGINE, kv_tokens=1.2e6, sequences_max=1024, chunk_tokens=2048
)
APART = replace(INSTANCE, engine=replace(ENGINE, mixes_prefill=False))
CHAT = Demand(
    input_tokens=tuple(150 * 1.45**i for i in range(10)),
    output_tokens=tuple(40 * 1.35**i for i in range(10)),
)
LONG = Demand(input_tokens=(6000.0, 9000.0, 15000.0), output_tokens=(150.0, 200.0))
SHORT = Demand(input_tokens=(200.0, 300.0), output_tokens=(200.0, 400.0))


# --- theory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("instance", [INSTANCE, APART], ids=["mixed", "apart"])
@pytest.mark.parametrize("demand", [CHAT, LONG, SHORT], ids=["chat", "long", "short"])
def test_littles_law_holds_at_every_point(instance, demand):
    points = load_curve(instance, demand, rate_max_rps=saturated_rate(instance, demand).rate_rps)

    assert len(points) > 15
    for point in points:
        in_flight = point.rate_rps * demand.output_mean * point.step_s
        assert point.running == pytest.approx(in_flight, rel=1e-6)
        assert 0 < point.busy <= 1


@pytest.mark.parametrize("instance", [INSTANCE, APART], ids=["mixed", "apart"])
def test_more_load_is_never_faster(instance):
    points = load_curve(instance, CHAT, rate_max_rps=saturated_rate(instance, CHAT).rate_rps)

    for quiet, busy in pairwise(points):
        assert busy.step_s >= quiet.step_s * 0.999
        assert busy.ttft_s(99) >= quiet.ttft_s(99) * 0.99
        assert busy.saturation >= quiet.saturation * 0.999


def test_an_idle_instance_answers_after_the_prompts_own_prefill():
    demand = Demand(input_tokens=(4096.0,), output_tokens=(100.0,))
    point = operating_point(INSTANCE, demand, 1e-3)
    first = COST.step_s(1, 4146.0, 2048, 2048 * 1024)
    second = COST.step_s(1, 4146.0, 2048, 2048 * (2048 + 1024))

    assert point.ttft_mean_s == pytest.approx(first + second + point.decode_step_s / 2, rel=0.02)


def test_a_long_prompts_wait_is_that_of_a_single_server():
    demand = Demand(input_tokens=(8192.0,), output_tokens=(1.0,))
    work_s = operating_point(APART, demand, 1e-3).prompts_s[0]
    rate_rps = 0.6 / work_s
    point = operating_point(APART, demand, rate_rps)

    assert point.queue_s == pytest.approx(0.6 / 0.4 * work_s / 2, rel=0.03)
    bursty = operating_point(APART, replace(demand, arrival_cv2=3.0), rate_rps)
    assert bursty.queue_s == pytest.approx(3 * point.queue_s, rel=0.03)


def test_memory_never_hurts_and_is_named_when_it_binds():
    rates = [
        saturated_rate(replace(INSTANCE, kv_tokens=tokens), CHAT).rate_rps
        for tokens in (3e4, 1e5, 3e5, 1e6)
    ]
    tight = saturated_rate(replace(INSTANCE, kv_tokens=3e4), CHAT)

    assert rates == sorted(rates)
    assert rates[0] < rates[-1] / 2
    assert tight.bound == "KV memory"


def test_a_rate_beyond_the_server_has_no_point():
    limit = saturated_rate(INSTANCE, LONG).rate_rps

    assert operating_point(INSTANCE, LONG, limit * 1.1) is None
    assert operating_point(INSTANCE, LONG, limit * 0.9).rate_rps == pytest.approx(
        limit * 0.9, rel=0.01
    )


def test_large_sparse_batches_have_a_state():
    """A search over rates lost these: the step grows fast with the first sequences."""
    cost = StepCost(
        load_model("qwen3-235b-a22b"), load_gpu("h200"), Layout(weights="fp8", kv="fp8", tp=8)
    )
    instance = replace(INSTANCE, cost=cost, kv_tokens=1e9, sequences_max=4096, chunk_tokens=8192)
    demand = Demand(input_tokens=(500.0,), output_tokens=(2000.0,))
    points = [at_concurrency(instance, demand, clients) for clients in (16, 256, 2048)]

    assert [round(p.rate_rps * p.e2e_mean_s, -1) for p in points] == pytest.approx(
        [16, 256, 2048], rel=0.5
    )
    assert points[2].rate_rps > 1.5 * points[1].rate_rps > 1.5 * points[0].rate_rps


def test_promises_bind_in_order():
    loose, tight = (
        usable_rate(INSTANCE, CHAT, parse_service_levels([text]))
        for text in ("ttft_p99=10s", "ttft_p99=10s,itl_p99=60ms")
    )

    assert tight.rate_rps < loose.rate_rps <= saturated_rate(INSTANCE, CHAT).rate_rps
    assert tight.meets(parse_service_levels(["itl_p99=60ms"]))
    assert usable_rate(INSTANCE, CHAT, parse_service_levels(["ttft_p99=1ms"])) is None


# --- simulation ---------------------------------------------------------------------------------


def simulate(instance, demand, rate_rps, *, requests=1500, seed=1):
    """FCFS with chunked prefill and Poisson arrivals, step by step; sorted TTFTs and gaps."""
    rng = stream(seed, "arrivals")
    now_s, arrivals = 0.0, []
    for _ in range(requests):
        now_s += float(rng.exponential(1 / rate_rps))
        lengths = (round(rng.choice(demand.input_tokens)), round(rng.choice(demand.output_tokens)))
        arrivals.append((now_s, *lengths))
    mixes, step_s = instance.engine.mixes_prefill, instance.cost.step_s
    queue, running, ttft, gaps = [], [], [], []
    now_s, tick, context, following, since_s = 0.0, 0, 0, 0, 0.0
    while following < requests or queue or running:
        if not queue and not running:
            now_s = max(now_s, arrivals[following][0])
        while following < requests and arrivals[following][0] <= now_s:
            arrived_s, inputs, outputs = arrivals[following]
            queue.append([arrived_s, inputs, outputs, 0])
            following += 1
        beside = len(running) if mixes or not queue else 0
        tokens, pairs = 0, 0.0
        for prompt in queue:
            chunk = min(instance.chunk_tokens - tokens, prompt[1] - prompt[3])
            pairs += chunk * (prompt[3] + chunk / 2)
            prompt[3] += chunk
            tokens += chunk
        spent_s = step_s(beside, context if beside else 0, tokens, pairs)
        now_s, since_s = now_s + spent_s, since_s + spent_s
        if beside:
            gaps += [since_s] * beside
            since_s = 0.0
            tick += 1
            context += beside
        elif not running:
            since_s = 0.0
        while running and running[0][0] <= tick:
            context -= heapq.heappop(running)[1]
        while queue and queue[0][3] == queue[0][1]:
            arrived_s, inputs, outputs, _ = queue.pop(0)
            ttft.append(now_s - arrived_s)
            heapq.heappush(running, (tick + outputs, inputs + outputs))
            context += inputs
    return sorted(ttft), sorted(gaps)


def at(ordered, percentile):
    return ordered[min(int(len(ordered) * percentile / 100), len(ordered) - 1)]


# Demand, and how far the mean gap and the p99 gap may lie from the simulation. Long prompts
# come in bursts that the closed form spreads evenly, so it is optimistic about their gaps.
NEAR = {"chat": (CHAT, 0.25, 0.35), "short": (SHORT, 0.2, 0.35), "long": (LONG, 0.4, 0.35)}


@pytest.mark.parametrize("instance", [INSTANCE, APART], ids=["mixed", "apart"])
@pytest.mark.parametrize("case", NEAR)
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_model_is_near_the_simulation(instance, case, share):
    demand, gap_tolerance, itl_tolerance = NEAR[case]
    point = operating_point(instance, demand, share * saturated_rate(instance, demand).rate_rps)
    ttft, gaps = simulate(instance, demand, point.rate_rps)

    assert point.ttft_s(50) == pytest.approx(at(ttft, 50), rel=0.25)
    assert point.ttft_s(99) == pytest.approx(at(ttft, 99), rel=0.25)
    assert point.step_s == pytest.approx(math.fsum(gaps) / len(gaps), rel=gap_tolerance)
    assert point.itl_s(99) == pytest.approx(at(gaps, 99), rel=itl_tolerance)


def test_the_comparison_notices_a_model_without_queueing():
    point = operating_point(INSTANCE, LONG, 0.7 * saturated_rate(INSTANCE, LONG).rate_rps)
    ttft, _ = simulate(INSTANCE, LONG, point.rate_rps)

    assert replace(point, queue_s=0.0).ttft_s(99) < 0.65 * at(ttft, 99)
