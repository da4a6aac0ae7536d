"""Replicas are there when they are needed, go when they are not, and do not flap."""

import csv
import doctest
import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierline.base.clock import PS_PER_S
from tierline.scheduling import scaling as module
from tierline.scheduling.scaling import (
    Autoscaler,
    Decision,
    Observation,
    Scaling,
    cold_start_ps,
    drained,
    forecast,
    reactive,
    to_drain,
)

RULES = Scaling(replicas_max=20, standby=0, lead_ps=180 * PS_PER_S, rps_per_replica=2.0)
QUIET = Observation(
    now_ps=0,
    serving=4,
    starting=0,
    kv_permille=700,
    requests_waiting=0,
    requests_outstanding=10,
    arrivals=0,
)


# --- load -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, 4),
        ({"kv_permille": 770}, 4),  # within the tolerance
        ({"kv_permille": 780}, 5),
        ({"kv_permille": 631}, 4),
        ({"kv_permille": 400}, 3),
        ({"kv_permille": 0}, 0),
        ({"requests_waiting": 32}, 8),  # twice what four replicas may have waiting
        ({"requests_waiting": 32, "starting": 4}, 8),  # who starts already counts
        ({"serving": 0}, 1),
        ({"serving": 0, "requests_outstanding": 0}, 0),
    ],
)
def test_replicas_follow_load(changes: dict[str, int], wanted: int) -> None:
    assert reactive(replace(QUIET, **changes), RULES) == wanted


def test_a_standby_is_beyond_demand_and_does_not_grow() -> None:
    rules = replace(RULES, standby=1, up_window_ps=0, forecasting=False)
    scaler = Autoscaler(rules)
    there = 4
    for second in range(10):  # so much is held that four replicas are at their target
        seen = replace(QUIET, now_ps=second * PS_PER_S, serving=there, kv_permille=4 * 700 // there)
        there = scaler.decide(seen).replicas

    assert there == 5


# --- bounds and windows ---------------------------------------------------------------------

observations = st.lists(
    st.tuples(
        st.integers(1, 200),  # seconds since the one before
        st.integers(0, 1000),
        st.integers(0, 60),
        st.integers(0, 300),
    ),
    min_size=1,
    max_size=25,
)
rules = st.builds(
    Scaling,
    replicas_min=st.integers(0, 2),
    replicas_max=st.integers(2, 9),
    standby=st.integers(0, 1),
    lead_ps=st.just(120 * PS_PER_S),
    rps_per_replica=st.just(1.0),
    forecasting=st.booleans(),
    up_window_ps=st.sampled_from([0, 30 * PS_PER_S]),
    down_window_ps=st.sampled_from([60 * PS_PER_S, 300 * PS_PER_S]),
    idle_ps=st.just(600 * PS_PER_S),
    season_buckets=st.just(12),
)


def followed(
    drawn: list[tuple[int, int, int, int]], scaling: Scaling
) -> list[tuple[Observation, Decision]]:
    """Decisions of a fleet that does at once what it is told."""
    scaler, there, now_ps, taken = Autoscaler(scaling), scaling.replicas_min, 0, []
    for seconds, kv_permille, waiting, arrivals in drawn:
        now_ps += seconds * PS_PER_S
        seen = Observation(
            now_ps=now_ps,
            serving=there,
            starting=0,
            kv_permille=kv_permille if there else 0,
            requests_waiting=waiting,
            requests_outstanding=waiting + (kv_permille + 99) // 100 * bool(there),
            arrivals=arrivals,
        )
        decision = scaler.decide(seen)
        taken.append((seen, decision))
        there = decision.replicas
    return taken


@given(observations, rules)
def test_the_number_stays_within_its_bounds(
    drawn: list[tuple[int, int, int, int]], scaling: Scaling
) -> None:
    for seen, decision in followed(drawn, scaling):
        assert scaling.replicas_min <= decision.replicas <= scaling.replicas_max
        if not decision.replicas:
            assert not seen.requests_outstanding
        elif seen.requests_outstanding:
            assert decision.replicas > 0


def flaps(taken: list[tuple[Observation, Decision]], *, window_ps: int) -> int:
    """How often fewer replicas were kept than had been started within the window."""
    found = 0
    for i, (seen, decision) in enumerate(taken):
        if decision.replicas > seen.serving:
            ends_ps = seen.now_ps + window_ps
            later = [d.replicas for s, d in taken[i + 1 :] if s.now_ps <= ends_ps]
            found += any(0 < n < decision.replicas for n in later)
    return found


@given(observations, rules)
def test_what_was_started_stays_for_a_window(
    drawn: list[tuple[int, int, int, int]], scaling: Scaling
) -> None:
    taken = followed(drawn, scaling)

    assert flaps(taken, window_ps=scaling.down_window_ps) == 0


SAW = [(30, 1000 if i % 2 else 100, 0, 10) for i in range(20)]


@pytest.mark.parametrize(("down_s", "flapping"), [(300, False), (0, True)])
def test_without_a_window_the_number_flaps(down_s: int, flapping: bool) -> None:
    """Negative control: load that goes up and down every half minute."""
    scaling = replace(
        RULES, up_window_ps=0, down_window_ps=down_s * PS_PER_S, forecasting=False, replicas_min=4
    )

    assert bool(flaps(followed(SAW, scaling), window_ps=300 * PS_PER_S)) == flapping


def test_a_moment_of_load_starts_nobody() -> None:
    scaling = replace(RULES, forecasting=False, replicas_min=4)
    spike = [(10, 700, 0, 0), (10, 1000, 0, 0), (10, 700, 0, 0), (10, 700, 0, 0)]
    lasting = [(10, 1000, 0, 0)] * 4

    assert [d.replicas for _, d in followed(spike, scaling)] == [4, 4, 4, 4]
    assert followed(lasting, scaling)[-1][1].replicas > 4


# --- to nothing and back --------------------------------------------------------------------


def test_the_last_replica_goes_when_nothing_came_for_long() -> None:
    scaling = replace(RULES, replicas_min=0, idle_ps=600 * PS_PER_S, forecasting=False)
    taken = followed([(60, 500, 0, 5), *[(60, 0, 0, 0)] * 15, (1, 0, 1, 1)], scaling)
    numbers = [d.replicas for _, d in taken]

    assert numbers[:11] == [0, *[0] * 10]  # nobody waited, so nobody was started
    assert numbers[-1] == 1


def test_idle_time_counts_from_the_last_request() -> None:
    scaling = replace(RULES, replicas_min=0, idle_ps=600 * PS_PER_S, forecasting=False)
    scaler = Autoscaler(scaling)
    empty = replace(QUIET, serving=1, kv_permille=0, requests_outstanding=0)
    busy = scaler.decide(replace(QUIET, now_ps=PS_PER_S, serving=1))
    early = scaler.decide(replace(empty, now_ps=600 * PS_PER_S))
    late = scaler.decide(replace(empty, now_ps=601 * PS_PER_S))

    assert (busy.replicas, early.replicas, late.replicas) == (1, 1, 0)
    assert late.reason == "idle"


def test_nothing_is_expected_before_the_last_replica_goes() -> None:
    """A habit keeps one replica although nothing has come for long: the control forgets it."""
    scaling = replace(
        RULES,
        replicas_min=0,
        idle_ps=120 * PS_PER_S,
        bucket_ps=60 * PS_PER_S,
        season_buckets=48,
        rps_per_replica=0.5,
    )

    def last(*, forecasting: bool) -> int:
        scaler = Autoscaler(replace(scaling, forecasting=forecasting))
        decision = Decision(replicas=0, reason="")
        for minute in range(1, 3 * 48 + 22):  # silent but for minutes 24 to 35 of each season
            arrivals = 60 if 24 <= minute % 48 < 36 else 0
            seen = replace(QUIET, now_ps=minute * 60 * PS_PER_S, arrivals=arrivals)
            if not arrivals:
                seen = replace(seen, kv_permille=0, requests_outstanding=0)
            seen = replace(seen, serving=decision.replicas)
            decision = scaler.decide(seen)
        return decision.replicas

    assert last(forecasting=True) > 0
    assert last(forecasting=False) == 0


# --- ahead of demand ------------------------------------------------------------------------


@dataclass(kw_only=True)
class Day:
    """What came of a run: time spent waiting, and what it cost."""

    waited_s: float = 0.0
    replica_hours: float = 0.0


def days(
    rate_rps: Callable[[float], float], scaling: Scaling, *, count: int, tick_s: int = 15
) -> list[Day]:
    """A fluid fleet: a queue, replicas that serve at their rate, and cold starts."""
    scaler, serving, starting, queue = Autoscaler(scaling), 4, list[int](), 0.0
    run, arrived, reported = [Day() for _ in range(count)], 0.0, 0
    for second in range(0, count * 86_400, tick_s):
        now_ps = second * PS_PER_S
        serving += sum(t <= now_ps for t in starting)
        starting = [t for t in starting if t > now_ps]
        came = rate_rps(second) * tick_s
        arrived += came
        capacity = serving * scaling.rps_per_replica * tick_s
        served = min(queue + came, capacity)
        queue += came - served
        decision = scaler.decide(
            Observation(
                now_ps=now_ps,
                serving=serving,
                starting=len(starting),
                kv_permille=round(1000 * served / capacity) if capacity else 0,
                requests_waiting=round(queue),
                requests_outstanding=math.ceil(queue + served),
                arrivals=int(arrived) - reported,
            )
        )
        reported = int(arrived)
        missing = decision.replicas - serving - len(starting)
        starting += [now_ps + scaling.lead_ps] * max(missing, 0)
        serving += min(missing, 0)
        day = run[second // 86_400]
        day.waited_s += queue * tick_s
        day.replica_hours += (serving + len(starting)) * tick_s / 3600
    return run


def mornings(second: float) -> float:
    """Ten times as much by day, and everybody comes at nine."""
    hour = second / 3600 % 24
    return 24.0 if 9 <= hour < 18 else 2.4


def test_replicas_start_before_they_are_missed() -> None:
    """Negative control: without a forecast everybody who comes at nine waits a cold start."""
    scaling = replace(RULES, replicas_max=40, lead_ps=300 * PS_PER_S)
    ahead = days(mornings, scaling, count=3)
    behind = days(mornings, replace(scaling, forecasting=False), count=3)

    assert ahead[0].waited_s > 0.5 * behind[0].waited_s  # nobody knows on the first day
    assert ahead[2].waited_s < 0.25 * behind[2].waited_s
    assert ahead[2].replica_hours < 1.15 * behind[2].replica_hours


@pytest.mark.parametrize(
    ("counts", "season", "ahead", "expected"),
    [
        ([10] * 30, 24, 1, 10),
        ([], 24, 1, 0),
        ([7], 24, 3, 7),
        ([0, 10, 20, 30, 40, 50], 24, 2, 70),  # on a line, before a season is over
        ([50, 40, 30, 20, 10, 0], 24, 5, 0),  # and never under nothing
        ([*[5] * 20, *[10] * 28, *[10] * 10], 48, 1, 10),
        ([*[5] * 24, *[50] * 24, *[5] * 24], 48, 4, 50),  # as yesterday at this time
        ([*[0] * 24, *[50] * 24, *[0] * 24], 48, 4, 50),
        ([*[5] * 24, *[50] * 24, *[40] * 24], 48, 4, 100),  # and within twice of either
    ],
)
def test_forecasts(counts: list[int], season: int, ahead: int, expected: float) -> None:
    assert forecast(counts, season=season, ahead=ahead) == pytest.approx(expected)


def test_a_season_comes_again_at_todays_level() -> None:
    season = [100 + round(80 * math.sin(2 * math.pi * i / 144)) for i in range(144)]
    seen = [*season, *season, *[2 * n for n in season[:60]]]
    expected = [forecast(seen, season=144, ahead=a) for a in (1, 6, 12)]

    assert expected == pytest.approx([2 * season[59 + a] for a in (1, 6, 12)], rel=0.06)


def arrivals_of(path: Path, workload: str) -> list[int]:
    """Requests in each ten minutes of two weeks, over the largest clients of a service."""
    counts = [0.0] * 2016
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            if row["workload"] == workload:
                counts[int(float(row["t_s"])) // 600] += 600 * float(row["rate_rps"])
    return [round(n) for n in counts]


def error(counts: list[int], predict: Callable[[list[int]], float]) -> float:
    """Mean error an hour ahead, relative, from the fourth day; lost windows left out."""
    errors = []
    for now in range(432, len(counts) - 6, 5):
        truth = counts[now + 5]
        if truth > 2000:
            errors.append(abs(predict(counts[:now]) - truth) / truth)
    return sum(errors) / len(errors)


def test_forecasts_on_two_real_weeks(data_dir: Path) -> None:
    """An hour ahead, against going on as now (the control), and as yesterday."""
    counts = arrivals_of(data_dir / "traces" / "servegen_client_rates.csv.gz", "m-small")
    ours = error(counts, lambda seen: forecast(seen, season=144, ahead=6))
    as_now = error(counts, lambda seen: seen[-1])
    as_yesterday = error(counts, lambda seen: seen[5 - 144])

    assert ours < 0.14
    assert ours < 0.95 * as_now
    assert ours < 0.75 * as_yesterday


# --- leaving --------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Standing:
    number: int
    accepting: bool = True
    requests_outstanding: int = 0
    prompt_tokens_queued: int = 0


def test_whoever_is_empty_soonest_leaves() -> None:
    replicas = [
        Standing(number=0),
        Standing(number=1, requests_outstanding=3),
        Standing(number=2, requests_outstanding=1, prompt_tokens_queued=50),
        Standing(number=3, requests_outstanding=1),
        Standing(number=4),
        Standing(number=5, accepting=False),
    ]

    assert to_drain(replicas, count=4) == [4, 0, 3, 2]  # type: ignore[arg-type]
    assert to_drain(replicas, count=9) == [4, 0, 3, 2, 1]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("outstanding", "now_s", "gone"), [(1, 29, False), (1, 30, True), (0, 1, True)]
)
def test_a_drain_ends_when_empty_or_at_its_bound(outstanding: int, now_s: int, gone: bool) -> None:
    found = drained(
        outstanding=outstanding, since_ps=0, now_ps=now_s * PS_PER_S, bound_ps=30 * PS_PER_S
    )

    assert found == gone


def test_a_cold_start_is_weights_and_the_rest() -> None:
    assert cold_start_ps(140e9, bytes_per_s=12.5e9, init_s=0) == 11_200 * 10**9
    assert cold_start_ps(140e9, bytes_per_s=12.5e9, init_s=60) == 71_200 * 10**9


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(module)

    assert result.attempted
    assert not result.failed
