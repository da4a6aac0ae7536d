"""What is said of a run is what its columns hold: every request counted once, percentiles
observed and not made up, promises counted over all that arrived, money from time paid for."""

import json
from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runs import LEVELS, TENANTS, finished, run_of, served_run
from tierline.base.clock import PS_PER_S
from tierline.sim.fairness import fairness
from tierline.sim.measure import Promise, good_requests, nearest_rank, promises, summary
from tierline.sim.record import FAILED, REFUSED, ReplicaTotals, Run
from tierline.sim.text import compare, render
from tierline.workload.slo import parse_service_levels


def ordered(values: list[int]):  # type: ignore[no-untyped-def]
    import numpy as np

    return np.sort(np.array(values, dtype=np.int64))


# --- percentiles ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "percent", "rank"),
    [(100, 99, 99), (100, 99.5, 100), (1000, 99.9, 999), (1, 50, 1), (3, 50, 2), (20, 5, 1)],
)
def test_the_percentile_of_one_to_n_is_its_rank(count: int, percent: float, rank: int) -> None:
    assert nearest_rank(ordered(list(range(1, count + 1))), percent) == rank


@given(st.lists(st.integers(0, 10**15), min_size=1), st.sampled_from([50, 90, 95, 99, 99.9]))
def test_a_percentile_is_the_least_value_that_enough_do_not_exceed(
    values: list[int], percent: float
) -> None:
    found = nearest_rank(ordered(values), percent)
    enough = ceil(percent * len(values) / 100 - 1e-9)

    assert found in values
    assert sum(v <= found for v in values) >= enough
    assert sum(v < found for v in values) < enough


def test_latencies_are_known_by_hand() -> None:
    """Three requests: two stream, one is a single token and has no gap."""
    run = run_of(
        [
            finished(0, 1, 3, 5, itl_max_ps=PS_PER_S),
            finished(1, 4, 4, 1),
            finished(2, 4, 10, 4, itl_max_ps=3 * PS_PER_S),
        ]
    )
    everyone = summary(run).all

    assert (everyone.ttft.p50_s, everyone.ttft.p99_s, everyone.ttft.mean_s) == (2, 3, 2)
    assert (everyone.itl.requests, everyone.itl.p50_s, everyone.itl.p99_s) == (2, 1, 3)
    assert (everyone.tpot.p50_s, everyone.tpot.p99_s) == (0.5, 2)
    assert (everyone.e2e.p50_s, everyone.e2e.p99_s) == (3, 8)
    assert (everyone.queueing.p50_s, everyone.queueing.p99_s) == (1, 1.5)


# --- who counts -----------------------------------------------------------------------------


def outcomes_add_up(run: Run) -> bool:
    """INV-SIM-20 on a summary."""
    s = summary(run)
    return all(
        sum(getattr(g, name) for g in part) == getattr(s.all, name)
        for part in (s.levels, s.tenants)
        for name in (
            *("requests", "finished", "refused", "failed", "unfinished", "good"),
            *("input_tokens", "output_tokens"),
        )
    ) and s.all.requests == (s.all.finished + s.all.refused + s.all.failed + s.all.unfinished)


def test_every_request_is_counted_once() -> None:
    run = served_run()

    assert outcomes_add_up(run)


def test_a_request_of_no_class_would_be_missed() -> None:
    """Negative control: a label outside the names belongs to no group."""
    run = served_run()
    run.requests.level[5] = len(LEVELS)

    assert not outcomes_add_up(run)


def test_a_refused_request_breaks_its_promise_and_a_mean_does_not_see_it() -> None:
    fine = [finished(i, i + 0.5, i + 1, 10) for i in range(99)]
    kept = run_of([*fine, finished(0, 0.5, 1, 10)])
    refused = run_of([*fine, {"outcome": REFUSED}])
    failed = run_of([*fine, {"outcome": FAILED, "first_ps": 1}, {"outcome": REFUSED}])

    assert [p.kept for p in promises(kept)] == [True, True]
    assert [p.kept for p in promises(refused)] == [True, True]  # one in a hundred may be late
    assert [p.kept for p in promises(failed)] == [False, False]  # two in 101 may not
    assert promises(failed)[0].value_s is None
    assert promises(failed)[0].met_share == 99 / 101
    assert summary(failed).all.ttft.requests == 100  # the failed one had its first token


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=60))
def test_a_promise_is_kept_exactly_when_its_percentile_is_within_its_limit(
    late_ms: list[int],
) -> None:
    """INV-SIM-21, against counting: 99 % of the chat requests within one second."""
    run = run_of([finished(0, ms / 1000, ms / 1000, 1) for ms in late_ms])
    within = sum(ms <= 1000 for ms in late_ms)

    assert promises(run)[0].kept == (within * 100 >= 99 * len(late_ms))
    assert promises(run)[0].met_share == within / len(late_ms)


def itl_promise(run: Run, percentile: float) -> Promise:
    """The chat class promises this percentile of its gaps alone."""
    level = parse_service_levels([f"chat:itl_p{percentile:g}=30ms"])[0]
    run.levels = (level, *(replace(other, targets=()) for other in run.levels[1:]))
    (promise,) = promises(run)
    return promise


@pytest.mark.parametrize("percentile", [50, 90, 99, 99.9])
def test_a_promise_on_itl_counts_every_gap(percentile: float) -> None:
    """Against the gaps as the tokens came out, one by one."""
    gaps: dict[int, list[int]] = {}
    run = served_run(gaps=gaps)
    for lost in (3, 11):
        run.requests.output_tokens[lost] = 1  # no gap of theirs never came
    promise = itl_promise(run, percentile)
    every = sorted(gaps[0])

    assert len(every) > 5000
    assert promise.of == "gaps"
    assert promise.value_s == every[ceil(percentile * len(every) / 100 - 1e-9) - 1] / PS_PER_S
    assert promise.met_share == pytest.approx(sum(g <= 3e10 for g in every) / len(every))


def test_gaps_that_never_came_have_no_end() -> None:
    """Control: one lost request of many tokens breaks the promise that the others keep."""
    run = served_run(rate_rps=2)
    assert itl_promise(run, 90).kept

    run.requests.output_tokens[11] = 10**6
    lost = itl_promise(run, 90)
    assert (lost.value_s, lost.kept) == (None, False)
    assert lost.met_share < 0.02

    run.steps = None  # without steps the longest gaps of requests stand for all gaps
    assert itl_promise(run, 90).of == "requests"


@pytest.mark.parametrize(
    ("row", "good"),
    [
        (finished(0, 1.0, 2, 10), True),  # on the limit is within it
        (finished(0, 1.000000000001, 2, 10), False),  # a picosecond over
        (finished(0, 0.5, 2, 10, itl_max_ps=PS_PER_S // 10), False),  # one long gap
        (finished(0, 4.0, 29, 10, level=1), True),
        (finished(0, 4.0, 31, 10, level=1), False),  # the end is too late
        (finished(0, 100, 4000, 10, level=2), True),  # batch promises its first token alone
        (finished(0, 0.5, 0.5, 1), True),  # one token has no gap to break
        (finished(0, 0.5, 1, 9) | {"outcome": FAILED}, False),
        ({}, False),
    ],
)
def test_good_means_within_every_limit_of_its_class(row: dict[str, int], good: bool) -> None:
    assert good_requests(run_of([row])).tolist() == [good]


def test_without_promises_finishing_is_good() -> None:
    """Negative control of the above: what is late is good when nobody promised."""
    run = run_of([finished(0, 900, 4000, 10), {}])
    run.levels = (LEVELS[0].__class__(name="free", targets=()),)

    assert good_requests(run).tolist() == [True, False]


# --- fairness -------------------------------------------------------------------------------


def test_equal_service_has_index_one_and_all_for_one_has_the_least() -> None:
    equal = run_of([finished(0, 1, 2, 10, tenant=t) for t in (0, 1, 2)])
    one = run_of([finished(0, 1, 2, 10), {"tenant": 1}, {"tenant": 2}])
    weighted = run_of([finished(0, 1, 2, 100), finished(0, 1, 2, 300, tenant=1)])

    assert fairness(equal, {}).jain == pytest.approx(1)
    assert fairness(one, {}).jain == pytest.approx(1 / 3)
    assert fairness(weighted, {TENANTS[1]: 2.0}).jain == pytest.approx(1)
    assert fairness(weighted, {}).jain < 0.95
    assert fairness(run_of([finished(0, 1, 2, 10)]), {}).jain is None


def test_the_lag_is_what_one_waiting_tenant_got_ahead() -> None:
    """Two tenants wait from 0; one is served three times before the other's first is begun."""
    first = [
        finished(0, at, at, 1, admitted_ps=round((at - 0.5) * PS_PER_S)) for at in (1, 2, 3, 9)
    ]
    second = finished(0, 9, 9, 1, tenant=1, admitted_ps=8 * PS_PER_S)
    run = run_of([*first, second])

    assert fairness(run, {}).lag_tokens == 3 * 101


def test_no_lag_where_only_one_waits() -> None:
    """Negative control: the same service, but the other tenant arrives when all is done."""
    first = [finished(0, at, at, 1, admitted_ps=round(at * PS_PER_S) - 1) for at in (1, 2, 3)]
    run = run_of([*first, finished(5, 9, 9, 1, tenant=1)])

    assert fairness(run, {}).lag_tokens == 0


# --- fleet and money ------------------------------------------------------------------------


def test_the_fleet_is_added_up_and_paid_for_by_the_hour() -> None:
    replicas = [
        ReplicaTotals(
            number=n,
            gpus=4,
            usd_per_hour=2.0,
            up_ps=3600 * PS_PER_S,
            busy_ps=(1 + n) * 900 * PS_PER_S,
            loaded_tokens=[0, 30, 10 * n, 0],
            moved_bytes={"load": 100, "demote": n},
        )
        for n in (0, 1)
    ]
    found = {"cached_tokens": 60, "loaded_tokens": 35}
    run = run_of([finished(0, 0.5, 1, 1000), finished(0, 3, 4, 1000, **found)], replicas=replicas)
    s = summary(run)

    assert s.fleet.gpu_hours == 8
    assert s.fleet.utilization == 0.375
    assert (s.fleet.utilization_least, s.fleet.utilization_most) == (0.25, 0.5)
    assert s.fleet.hit_share == {"device": 0.125, "dram": 0.15, "nvme": 0.025, "remote": 0}
    assert s.fleet.moved_bytes == {"demote": 1, "load": 200}
    assert (s.money.usd, s.money.usd_per_million_output_tokens) == (4, 2000)  # by the replica
    assert s.money.usd_per_good_request == 4  # one of the two is late


def test_an_unpriced_replica_makes_the_cost_unknown() -> None:
    run = served_run(count=20)
    run.replicas[1].usd_per_hour = 0.0

    assert summary(run).money.usd is None
    assert "no price" in render(summary(run))


# --- what is printed ------------------------------------------------------------------------


def test_json_holds_what_the_table_shows() -> None:
    s = summary(served_run())
    loaded = json.loads(s.to_json())
    text = render(s)

    assert loaded["all"]["good_share"] == s.all.good_share
    assert loaded["promises"][0]["value_s"] is None
    assert s.hash in text
    assert "2 of 5 promises" in text or "3 of 5 promises" in text
    for word in ("chat", "agent", "batch", "acme", "BROKEN", "Jain", "1 refused"):
        assert word in text, word


def test_policies_are_compared_on_the_same_requests() -> None:
    both = [summary(served_run(policy=name)) for name in ("fcfs", "urgent-first")]
    text = compare(both)

    assert both[1].levels[0].good_share > both[0].levels[0].good_share
    assert both[0].hash != both[1].hash
    assert "urgent-first" in text


def test_a_run_of_nothing_has_nothing_to_say() -> None:
    s = summary(run_of([]))

    assert s.all.requests == 0
    assert s.all.ttft.p99_s is None
    assert render(s)
