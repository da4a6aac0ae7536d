"""The longest gap of a request is the longest time between two of its tokens, and no other's."""

from itertools import pairwise

import pytest

from test_watch import crowd, instance
from tierline.sim.api import simulate
from tierline.sim.record import Run
from tierline.workload.slo import parse_service_levels


def single_steps(policy: str, count: int = 120) -> Run:
    """Without repeats every step is written down alone, so token instants are known."""
    levels = parse_service_levels(["ttft_p99=1s,itl_p99=80ms"])
    return simulate(
        instance(),
        crowd(count),
        levels=levels,
        replicas=2,
        policy=policy,
        keep_steps=True,
        repeats_max=1,
    )


def counted_gap_ps(run: Run, request: int) -> int:
    """From the ends of the steps that gave it a token."""
    steps, requests = run.steps, run.requests
    assert steps is not None
    first, finish = requests.first_ps[request], requests.finish_ps[request]
    tokens = [first] + [
        steps.end_ps[i]
        for i in range(len(steps))
        if steps.replica[i] == requests.replica[request]
        and steps.decodes[i]
        and first < steps.end_ps[i] <= finish
    ]
    assert len(tokens) == requests.output_tokens[request]
    return max((b - a for a, b in pairwise(tokens)), default=0)


@pytest.mark.parametrize("policy", ["tierline", "fcfs", "sglang"])
def test_the_longest_gap_is_the_longest_between_two_of_its_tokens(policy: str) -> None:
    run = single_steps(policy)
    requests = run.requests
    looked_at = [i for i in range(len(requests)) if not requests.preemptions[i]]

    assert len(looked_at) > 60
    for request in looked_at:
        assert requests.itl_max_ps[request] == counted_gap_ps(run, request), request


def test_time_before_its_first_token_is_nobodys_gap() -> None:
    """Control of what the test above found: a lone stream pauses for a step and no longer."""
    run = single_steps("fcfs", count=1)
    steps = run.steps

    assert steps is not None
    longest_step = max(
        end - start
        for start, end, decodes in zip(steps.start_ps, steps.end_ps, steps.decodes, strict=True)
        if decodes
    )
    assert run.requests.itl_max_ps[0] == longest_step
    assert run.requests.first_ps[0] > 2 * longest_step
