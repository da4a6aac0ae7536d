"""Every engine profile shows what is characteristic of the engine it imitates."""

from dataclasses import replace
from random import Random

import pytest

from deciding import drive, request, scheduler_of
from fleets import small_instance, small_workload
from tierline.base.clock import PS_PER_S
from tierline.scheduling.policy import TIERLINE
from tierline.scheduling.profiles import (
    POLICIES,
    PROFILES,
    SGLANG,
    SGLANG_LPM,
    STATIC,
    TRTLLM_MAX_UTILIZATION,
    TRTLLM_NO_EVICT,
    VLLM_V1,
)
from tierline.sim.api import simulate
from tierline.sim.record import FINISHED

CRAMPED = {"blocks": 24, "slots": 8}  # 384 tokens


def cramped(count: int = 3) -> list:
    """Requests that fit alone, two of which outgrow the pool together."""
    return [request(i, 64, 150, at_ps=i) for i in range(count)]


def preempted(policy, requests, **pool) -> list[int]:
    return [i for _, _, ids in drive(scheduler_of(policy, **pool), requests) for i in ids]


def test_profiles_are_named_as_their_policies_and_say_what_was_read():
    for name, profile in PROFILES.items():
        assert POLICIES[name] is profile.policy
        assert profile.policy.name == name
        assert len(profile.imitates) > 80


@pytest.mark.parametrize("policy", [VLLM_V1, TRTLLM_MAX_UTILIZATION], ids=lambda p: p.name)
def test_memory_is_taken_from_the_last_to_arrive_and_recomputed(policy):
    requests = cramped()
    scheduler = scheduler_of(policy, **CRAMPED)
    decided = drive(scheduler, requests)
    first_victims = [ids[0] for _, _, ids in decided if ids]

    assert first_victims[0] == 2
    assert 0 not in first_victims
    again = [chunks[2] for _, chunks, _ in decided if 2 in chunks]
    assert sum(again) > 64, "its prompt and what it had said were computed again"


def test_nobody_enters_in_a_step_that_preempted():
    decided = drive(scheduler_of(VLLM_V1, **CRAMPED), cramped(6))

    assert any(ids for _, _, ids in decided)
    assert all(not chunks for _, chunks, ids in decided if ids)


def idle_prompts(policy) -> int:
    """Steps in which a prompt under way holds memory and computes nothing."""
    scheduler = scheduler_of(policy, blocks=22, slots=4, batch_tokens=64)
    idle = 0

    def look(step, _):
        nonlocal idle
        idle += len(scheduler.prefilling) > len(step.chunks)

    drive(scheduler, [request(0, 200, 120), request(1, 300, 4, at_ps=1)], each=look)
    return idle


def test_a_prompt_under_way_gives_up_its_own_memory_rather_than_wait():
    assert idle_prompts(VLLM_V1) == 0
    assert idle_prompts(replace(VLLM_V1, prompts_preempt=False)) > 0


@pytest.mark.parametrize("policy", [TRTLLM_NO_EVICT, STATIC], ids=lambda p: p.name)
def test_what_is_guaranteed_to_end_is_never_preempted(policy):
    assert preempted(policy, cramped(6), **CRAMPED) == []
    control = replace(policy, reserves_output=0.0)
    assert preempted(control, cramped(6), **CRAMPED)


def test_no_evict_admits_what_can_run_to_its_limit_and_max_utilization_more():
    def most_at_once(policy) -> int:
        scheduler = scheduler_of(policy, **CRAMPED)
        most = 0

        def look(step, _):
            nonlocal most
            most = max(most, scheduler.running)

        drive(scheduler, cramped(6), each=look)
        return most

    assert most_at_once(TRTLLM_NO_EVICT) == 1  # 214 tokens each, of 384
    assert most_at_once(TRTLLM_MAX_UTILIZATION) > 1


def test_static_batching_admits_nobody_mid_batch_and_pads():
    requests = [request(i, 32, 10 + 5 * i) for i in range(9)]
    scheduler = scheduler_of(STATIC, slots=4)
    entered_beside: list[int] = []
    padding: list[int] = []

    def look(step, _):
        if step.chunks:
            entered_beside.append(len(scheduler.decoding))
        padding.append(step.padding)

    decided = drive(scheduler, requests, each=look)

    assert set(entered_beside) == {0}
    assert max(padding) == 3, "all but the longest of a batch of four have ended"
    assert sum(1 for _, chunks, _ in decided if chunks) >= 3, "three batches"
    control = scheduler_of(replace(STATIC, gathers=False), slots=4)
    entered_beside.clear()
    drive(
        control,
        [request(i, 32, 10 + 5 * i) for i in range(9)],
        each=lambda step, _: entered_beside.append(len(control.decoding)) if step.chunks else None,
    )
    assert max(entered_beside) > 0


@pytest.mark.parametrize("policy", [SGLANG, SGLANG_LPM, STATIC], ids=lambda p: p.name)
def test_prompts_have_steps_of_their_own(policy):
    requests = [request(i, 100, 20, at_ps=i * 10**11) for i in range(6)]
    decided = drive(scheduler_of(policy), requests)

    assert all(not (decodes and chunks) for decodes, chunks, _ in decided)
    mixed = drive(scheduler_of(VLLM_V1), [request(i, 100, 20, at_ps=i * 10**11) for i in range(6)])
    assert any(decodes and chunks for decodes, chunks, _ in mixed)


def order_of_entry(policy) -> list[int]:
    """A document is cached; then a stranger, a distant and a near relative arrive together."""
    document = list(range(100, 112))
    first = request(0, 192, 1, chain=document)
    later = [
        request(1, 192, 1, at_ps=PS_PER_S, chain=[900 + i for i in range(12)]),
        request(2, 192, 1, at_ps=PS_PER_S, chain=document[:2] + [800 + i for i in range(10)]),
        request(3, 192, 1, at_ps=PS_PER_S, chain=document[:9] + [700 + i for i in range(3)]),
    ]
    decided = drive(scheduler_of(policy, slots=1), [first, *later])
    order: list[int] = []
    for _, chunks, _ in decided:
        order += [i for i in chunks if i not in order]
    return order


def test_longest_cached_prefix_goes_first():
    assert order_of_entry(SGLANG_LPM) == [0, 3, 2, 1]
    assert order_of_entry(SGLANG) == [0, 1, 2, 3]


def test_with_a_long_queue_the_cached_prefix_does_not_count():
    assert order_of_entry(replace(SGLANG_LPM, longest_prefix_first_below=2))[:2] == [0, 1]


def test_sglang_retracts_whoever_has_said_least():
    requests = [request(0, 40, 200), request(1, 40, 200, at_ps=1), request(2, 150, 200, at_ps=2)]
    eager = replace(SGLANG, reserves_output=0.01, reserves_newcomer=0.01)
    victims = preempted(eager, requests, blocks=24)

    assert victims[0] == 2, "as little said as the others, and the longest prompt"


def both_at_once(policy) -> bool:
    """Whether 64 + 240 tokens enter 384 beside 64 + 150."""
    scheduler = scheduler_of(policy, **CRAMPED)
    seen: list[int] = []
    pair = [request(0, 64, 150), request(1, 64, 240, at_ps=1)]
    drive(scheduler, pair, each=lambda *_: seen.append(scheduler.running), steps_max=5)
    return max(seen) == 2


def test_room_is_kept_for_what_a_newcomer_may_say():
    assert both_at_once(SGLANG)  # a tenth of 150, and all of 240
    assert not both_at_once(replace(SGLANG, reserves_newcomer=1.4))
    assert not both_at_once(TRTLLM_NO_EVICT)
    assert both_at_once(replace(SGLANG, reserves_newcomer=1.4, reserves_max_tokens=100))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_serves_everybody(name):
    requests = small_workload(Random(4), count=60)
    run = simulate(small_instance(blocks=80), requests, levels=(), policy=name)

    assert run.requests.outcome.count(FINISHED) == len(requests)


def test_our_own_policy_is_not_an_engine():
    assert TIERLINE.name not in PROFILES
