"""The fleet that is recommended is one that a replay of the trace has seen keep its promises."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from tierline.base.errors import InfeasibleError
from tierline.catalog.gpus import load_gpus
from tierline.catalog.models import load_model
from tierline.perf.step import StepCost
from tierline.planner import replay as replaying
from tierline.planner import traffic as traffics
from tierline.planner.finding import Plan, Question, Replay
from tierline.planner.plan import fleet_load, make_plan
from tierline.planner.replay import sim_instance
from tierline.planner.survive import Judge, judged_levels, knows_classes, loosest
from tierline.planner.traffic import Traffic, busiest, busy_requests, copied, traffic_of
from tierline.sim.instance import instance_of
from tierline.workload.archetypes import workload_profile
from tierline.workload.profile import profile_trace
from tierline.workload.request import Request
from tierline.workload.slo import parse_service_levels

S = 1_000_000_000


def bursts(*, apart_s: float = 60.0, together: int = 40, tokens: int = 4000) -> list[Request]:
    """Crowds that arrive within a second: what a closed form takes for a mild queue."""
    return [
        Request(
            arrival_ns=round(crowd * apart_s * S) + i * S // together,
            input_tokens=tokens + 13 * i,
            output_tokens=40 + i,
        )
        for crowd in range(30)
        for i in range(together)
    ]


def sessions(*, shared: bool = True) -> list[Request]:
    """Conversations in turns, each with a long past that is worth keeping somewhere."""
    draw, requests, names = Random(5), [], itertools.count()
    past = [[next(names) for _ in range(30)] for _ in range(120)]
    for i in range(1200):
        turn = past[i % 120]
        turn.append(next(names))
        blocks = turn if shared else [next(names) for _ in turn]
        requests.append(
            Request(
                arrival_ns=round((i + draw.random()) * 0.4 * S),
                input_tokens=512 * len(turn),
                output_tokens=60,
                prefix_blocks=tuple(blocks),
            )
        )
    return sorted(requests, key=lambda r: r.arrival_ns)


def asked(slo: Sequence[str], *, gpu: str, **more: object) -> Question:
    return Question(
        model=load_model("llama-3.1-8b"),
        levels=parse_service_levels(slo),
        gpus=tuple(load_gpus([gpu])),
        workload_name="test",
        **more,  # type: ignore[arg-type]
    )


def planned(question: Question, requests: list[Request]) -> Plan:
    profile = profile_trace(requests, source="test", block_tokens=512)
    return make_plan(question, profile, requests=requests, block_tokens=512)


@pytest.fixture(scope="module")
def crowded() -> tuple[Plan, Plan]:
    """One question with and without the replay."""
    question = asked(["ttft_p99=4s"], gpu="l40s")
    return planned(question, bursts()), planned(replace(question, replay=False), bursts())


# --- what decides ---------------------------------------------------------------------------


def test_a_closed_form_that_is_too_optimistic_is_corrected(crowded: tuple[Plan, Plan]) -> None:
    """INV-PLAN-5. Without the replay the same question is answered with too small a fleet."""
    replayed, believed = crowded
    told = replayed.survival

    assert told is not None
    assert believed.survival is None
    assert told.closed_form_instances == believed.recommended.pessimistic.instances
    assert told.deciding.instances > told.closed_form_instances
    assert told.deciding.kept
    assert all(outcome.kept for outcome in told.deciding.outcomes)
    assert replayed.deployment.replicas == told.deciding.instances
    assert "the replay says" in replayed.findings[-1].answer


def test_one_instance_less_breaks_a_promise(crowded: tuple[Plan, Plan]) -> None:
    """Negative control: the replay that decides can say no."""
    told = crowded[0].survival

    assert told is not None
    assert told.smaller is not None
    assert told.smaller.instances == told.deciding.instances - 1
    assert not told.smaller.kept
    assert told.smaller.broken


def test_nothing_that_is_shown_as_cheaper_survives(crowded: tuple[Plan, Plan]) -> None:
    """INV-PLAN-6; by the closed form alone such candidates are shown."""
    replayed, believed = crowded
    cost = replayed.recommended.pessimistic.usd_per_year
    assert cost is not None

    def cheaper(plan: Plan) -> list[str]:
        everybody = (plan.recommended, *plan.alternatives)
        return [
            c.name
            for c in everybody
            if not c.needs_quality_test and (c.pessimistic.usd_per_year or math.inf) < cost
        ]

    assert cheaper(replayed) == []
    assert cheaper(believed) != []


def test_a_replay_can_find_that_fewer_are_enough() -> None:
    """Evenly spaced requests queue less than the closed form's Poisson stream."""
    even = [
        Request(arrival_ns=i * S // 4, input_tokens=3000, output_tokens=100) for i in range(2400)
    ]
    told = planned(asked(["ttft_p99=900ms"], gpu="l40s"), even).survival

    assert told is not None
    assert told.deciding.instances < told.closed_form_instances
    assert told.deciding.kept


def test_a_promise_that_no_fleet_keeps_is_told_with_what_broke() -> None:
    calm = [Request(arrival_ns=i * S, input_tokens=300, output_tokens=20) for i in range(2000)]
    crowd = [Request(arrival_ns=2000 * S, input_tokens=8000, output_tokens=20) for _ in range(60)]

    with pytest.raises(InfeasibleError, match="a replay") as raised:
        planned(asked(["ttft_p99=1500ms"], gpu="l40s"), [*calm, *crowd])

    assert "--quick" in raised.value.hint


def test_the_replay_is_of_the_fleet_in_the_deployment_file(crowded: tuple[Plan, Plan]) -> None:
    """What `tierline sim` builds from the file is what was replayed."""
    plan = crowded[0]
    ours = sim_instance(plan.recommended, plan.recommended.lower_tiers, slowdown=1.0)
    read = instance_of(plan.deployment)

    for name in ("layout", "pages_total", "limits", "tier_blocks", "prefix_cache", "placement"):
        assert getattr(ours, name) == getattr(read, name), name
    slow = sim_instance(plan.recommended, (), slowdown=1.25)
    assert slow.line().line(8, 8000) > ours.line().line(8, 8000)


# --- giving up ------------------------------------------------------------------------------


def outcome(instances: int, requests: list[Request]) -> Replay:
    question = asked(["ttft_p99=4s"], gpu="l40s", safety=1.2)
    profile = profile_trace(requests, source="test", block_tokens=512)
    load = fleet_load(question, profile)
    traffic = traffic_of(
        profile, load, safety=1.2, positions_max=131_072, requests=requests, block_tokens=512
    )
    best = planned(replace(question, replay=False), requests).recommended
    judge = Judge(question, load, traffic, judged_levels(question, profile))
    return judge.at(best, instances, traffic.decision)


def test_giving_up_early_never_changes_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-PLAN-4."""
    early = [outcome(n, bursts()) for n in (1, 2, 8)]
    monkeypatch.setattr(replaying, "_gives_up", lambda *_: None)

    to_the_end = [outcome(n, bursts()) for n in (1, 2, 8)]

    assert [r.kept for r in early] == [r.kept for r in to_the_end]
    assert early[0].gave_up
    assert not to_the_end[0].gave_up
    assert to_the_end[-1].kept


def test_giving_up_too_early_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a fleet that keeps its promises is lost by a hasty rule."""
    monkeypatch.setattr(replaying, "DRAIN_FACTOR", -100)

    assert not outcome(8, bursts()).kept


# --- classes --------------------------------------------------------------------------------


def two_classes(*, told: bool) -> list[Request]:
    """Short urgent requests beside long ones that may take a minute."""
    return [
        Request(
            arrival_ns=i * S // 3,
            input_tokens=400 if i % 4 else 12_000,
            output_tokens=80,
            priority=(10 if i % 4 else 0) if told else 0,
        )
        for i in range(2000)
    ]


def test_each_class_is_judged_by_its_own_promise() -> None:
    """Requests whose class is not told are all held to the strictest promise."""
    slo = ["chat@10:ttft_p99=700ms", "batch:ttft_p99=60s"]
    question = asked(slo, gpu="l40s")
    known = planned(question, two_classes(told=True))
    assert known.survival is not None

    assert {o.level for o in known.survival.deciding.outcomes} == {"chat", "batch"}
    assert not any("strictest promise" in line for line in known.caveats)
    with pytest.raises(InfeasibleError):
        planned(question, two_classes(told=False))


def test_classes_are_known_when_priorities_reach_two_of_them() -> None:
    question = asked(["chat@10:ttft_p99=1s", "batch:e2e_p95=60s"], gpu="l40s")
    profile = profile_trace(two_classes(told=True), source="test")
    blind = profile_trace(two_classes(told=False), source="test")

    assert knows_classes(question, profile)
    assert not knows_classes(question, blind)
    assert judged_levels(question, profile) == question.levels
    assert [level.name for level in judged_levels(question, blind)] == ["every class"]


def test_the_closed_form_is_asked_for_what_everybody_is_owed() -> None:
    slo = ["a@2:ttft_p99=1s,itl_p99=50ms", "b:ttft_p99=9s"]

    (owed,) = loosest(asked(slo, gpu="l40s"))

    assert [t.text for t in owed.targets] == ["ttft_p99=9s"]


# --- tiers and policies ---------------------------------------------------------------------


def test_more_memory_never_needs_more_instances_and_here_fewer() -> None:
    """The value of a tier is a number of GPUs saved; without reuse there is nothing to save."""
    question = asked(["ttft_p99=6s"], gpu="l40s")
    with_reuse = planned(question, sessions()).survival
    without = planned(question, sessions(shared=False)).survival
    assert with_reuse is not None
    assert without is not None

    needed = [w.instances for w in with_reuse.tiers]
    assert None not in needed
    assert needed == sorted(needed, reverse=True)
    assert needed[-1] < needed[0]
    assert [w.chosen for w in with_reuse.tiers].count(True) == 1
    assert with_reuse.deciding.loaded_share > 0.01
    assert len({w.instances for w in without.tiers}) == 1
    assert [w.lower_tiers for w in without.tiers if w.chosen] == [()]


def test_the_policy_is_chosen_by_what_it_needs(crowded: tuple[Plan, Plan]) -> None:
    told = crowded[0].survival
    assert told is not None
    chosen = next(w for w in told.policies if w.chosen)

    assert {w.policy for w in told.policies} == {"tierline", "fcfs"}
    assert chosen.instances == min(w.instances for w in told.policies if w.instances)
    assert crowded[0].deployment.policies.scheduler == chosen.policy


# --- what is replayed -----------------------------------------------------------------------


def recorded(requests: list[Request], *, factor: float) -> Traffic:
    profile = profile_trace(requests, source="test", block_tokens=512)
    assert profile.arrivals is not None
    load = fleet_load(asked(["ttft_p99=4s"], gpu="l40s", growth=factor), profile)
    return traffic_of(
        profile, load, safety=1.0, positions_max=131_072, requests=requests, block_tokens=512
    )


def test_growth_is_more_users_and_not_the_same_ones_faster() -> None:
    twice = copied(sessions(), copies=2, faster=1.0)
    prefixes = [set(r.prefix_blocks) for r in twice]
    names = set().union(*prefixes)

    assert len(twice) == 2400
    assert len(names) == 2 * len({b for r in sessions() for b in r.prefix_blocks})
    assert [r.arrival_ns for r in twice] == sorted(r.arrival_ns for r in twice)


@pytest.mark.parametrize(("factor", "instances"), [(0.5, 7), (1.5, 7), (3.0, 12), (10.0, 37)])
def test_a_slice_carries_its_share_of_the_load(factor: float, instances: int) -> None:
    requests = sessions()
    traffic = recorded(requests, factor=factor)
    replicas = traffic.slice_of(instances)
    stretch = traffic.decision(instances).requests

    def rate(part: Sequence[Request]) -> float:
        return len(part) / (part[-1].arrival_ns - part[0].arrival_ns)

    assert 1 <= replicas <= instances
    assert rate(stretch) / rate(requests) == pytest.approx(factor * replicas / instances, rel=0.03)


def test_screening_takes_the_busiest_requests() -> None:
    calm = [Request(arrival_ns=i * S, input_tokens=100, output_tokens=10) for i in range(3000)]
    busy = [
        Request(arrival_ns=3000 * S + i * S // 10, input_tokens=900, output_tokens=10)
        for i in range(500)
    ]
    part = busiest((*calm, *busy), 500)

    assert len(part) == 500
    assert part[0].input_tokens == 900


def test_a_long_trace_is_read_for_its_busiest_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffics, "HELD_REQUESTS_MAX", 700)
    calm = [Request(arrival_ns=i * S, input_tokens=100, output_tokens=10) for i in range(3600)]
    busy = [
        Request(arrival_ns=3600 * S + i * S // 2, input_tokens=100, output_tokens=10)
        for i in range(600)
    ]
    requests = [*calm, *busy]
    profile = profile_trace(requests, source="test")

    held = busy_requests(requests, profile)

    assert 0 < len(held) <= 700
    assert held[0].arrival_ns >= 3590 * S


def test_a_trace_without_times_is_drawn_from_its_lengths() -> None:
    question = asked(["ttft_p99=4s"], gpu="l40s", peak_rps=8.0)
    profile = workload_profile("chat")
    load = fleet_load(question, profile)

    traffic = traffic_of(profile, load, safety=1.5, positions_max=4096)

    assert traffic.drawn
    assert traffic.factor == 1.5
    assert "drawn" in traffic.decision(2).what
    assert traffic.decision(2).requests == traffic.decision(2).requests
    assert all(r.input_tokens + r.output_tokens <= 4096 for r in traffic.decision(2).requests)


def test_blocks_that_cannot_be_named_are_left_out_and_told() -> None:
    """A trace in blocks of 100 tokens is planned without reuse, and the plan says so."""
    question = asked(["ttft_p99=4s"], gpu="l40s")
    profile = profile_trace(sessions(), source="test", block_tokens=100)
    load = fleet_load(question, profile)

    def notes(block_tokens: int) -> tuple[str, ...]:
        traffic = traffic_of(
            profile,
            load,
            safety=1.5,
            positions_max=131_072,
            requests=sessions(),
            block_tokens=block_tokens,
        )
        assert any(r.prefix_blocks for r in traffic.requests) == (not traffic.notes)
        return traffic.notes

    assert "100 tokens" in notes(100)[0]
    assert notes(512) == notes(8) == ()


def test_a_law_that_is_slowed_down_is_slower() -> None:
    """The slow edge is an edge: the same step takes as much longer as the band says."""
    question = asked(["ttft_p99=4s"], gpu="l40s")
    best = planned(replace(question, replay=False), bursts()).recommended
    cost = best.instance.cost
    assert isinstance(cost, StepCost)

    assert cost.scaled(1.3).step_s(4, 4000) == pytest.approx(1.3 * cost.step_s(4, 4000))


def test_a_policy_that_cannot_keep_the_promises_gives_way_to_one_that_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which policy is better depends on the promises, so both are asked before giving up."""
    question = asked(["ttft_p99=4s"], gpu="l40s")
    fewest = Judge.fewest

    def ours_fails(judge: Judge, *args: object, policy: str = "tierline", **more: object) -> object:
        return None if policy == "tierline" else fewest(judge, *args, policy=policy, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Judge, "fewest", ours_fails)
    plan = planned(question, bursts())

    assert plan.survival is not None
    assert plan.survival.deciding.policy == "fcfs"
    assert plan.deployment.policies.scheduler == "fcfs"
    assert [w.instances for w in plan.survival.policies if w.policy == "tierline"] == [None]
