"""Where a queue has a closed form, the simulated fleet has its waits."""

from heapq import heappop, heappush
from random import Random

import pytest

from fleets import small_instance
from queueing import MMc, md1_wait_s, mm1_wait_s
from tierline.base.clock import PS_PER_S
from tierline.sim.api import simulate
from tierline.sim.record import Run
from tierline.workload.request import Request

PROMPT_TOKENS = 400


def arrivals(rng: Random, rate_rps: float, count: int, output_mean: float = 0) -> list[Request]:
    at_s, requests = 0.0, []
    for _ in range(count):
        at_s += rng.expovariate(rate_rps)
        output_tokens = 1 + int(rng.expovariate(1 / output_mean)) if output_mean else 1
        requests.append(
            Request(
                arrival_ns=int(at_s * 1e9),
                input_tokens=PROMPT_TOKENS if not output_mean else 1,
                output_tokens=output_tokens,
            )
        )
    return requests


def wait_s(run: Run) -> float:
    """Mean time in the queue."""
    r = run.requests
    waited = sum(a - b for a, b in zip(r.admitted_ps, r.arrival_ps, strict=True))
    return waited / len(r) / PS_PER_S


def service_s(run: Run) -> float:
    r = run.requests
    served = sum(a - b for a, b in zip(r.finish_ps, r.admitted_ps, strict=True))
    return served / len(r) / PS_PER_S


@pytest.mark.parametrize(("load", "within"), [(0.3, 0.04), (0.6, 0.04), (0.8, 0.06)])
def test_equal_prompts_on_one_replica_wait_like_constant_service(
    load: float, within: float
) -> None:
    instance = small_instance(sequences_max=1)
    one_s = instance.line().line(0, 0, [(0, PROMPT_TOKENS)])[0] / PS_PER_S
    rate = load / one_s
    run = simulate(instance, arrivals(Random(5), rate, 20_000), levels=(), policy="fcfs")

    assert service_s(run) == pytest.approx(one_s, rel=1e-9)
    assert wait_s(run) == pytest.approx(md1_wait_s(rate, service_s=one_s), rel=within)
    # Control: service of another kind waits twice as long.
    assert wait_s(run) < 0.7 * mm1_wait_s(rate, service_s=one_s)


def lindley_wait_s(run: Run, servers: int) -> float:
    """The mean wait of those arrivals and services at so many servers with one queue."""
    r = run.requests
    free_at, waited = [0] * servers, 0
    for i in range(len(r)):
        start = max(heappop(free_at), r.arrival_ps[i])
        waited += start - r.arrival_ps[i]
        heappush(free_at, start + r.finish_ps[i] - r.admitted_ps[i])
    return waited / len(r) / PS_PER_S


@pytest.mark.parametrize(("servers", "load", "within"), [(1, 0.6, 0.04), (4, 0.6, 0.15)])
def test_slots_of_one_replica_are_servers_with_one_queue(
    servers: int, load: float, within: float
) -> None:
    """Outputs are exponential, and a decode step takes nearly the same whoever is in it.  A
    busy batch is a little slower than an idle one, so several servers wait a little longer
    than the closed form with the mean service says."""
    instance = small_instance(sequences_max=servers, blocks=8000)
    first = simulate(instance, arrivals(Random(1), 0.001, 300, 1500), levels=(), policy="fcfs")
    rate = load * servers / service_s(first)
    run = simulate(instance, arrivals(Random(7), rate, 20_000, 1500), levels=(), policy="fcfs")
    closed = MMc(rate=rate, service_s=service_s(run), servers=servers)
    step_s = service_s(run) / 1500

    assert wait_s(run) == pytest.approx(lindley_wait_s(run, servers), abs=step_s)
    assert wait_s(run) == pytest.approx(closed.wait_s, rel=within)
    # Control: one server more is another queue.
    assert lindley_wait_s(run, servers + 1) < wait_s(run) / 2
    assert MMc(rate=rate, service_s=service_s(run), servers=servers + 1).wait_s < wait_s(run) / 2
