"""Quantiles of the last minutes are those of the samples, within a percent, and rates add up."""

from collections.abc import Sequence
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierline.telemetry.window import Counts, Quantiles

WINDOW_S = 60.0
SLICE_S = 5.0
RANKS = (0.01, 0.5, 0.9, 0.95, 0.99, 1.0)
VALUES = st.one_of(st.just(0.0), st.floats(min_value=1e-6, max_value=1e5))
STEPS = st.tuples(st.floats(min_value=0, max_value=20), st.lists(VALUES, max_size=30))


def in_window(samples: Sequence[tuple[float, float]], now_s: float) -> list[float]:
    """The values of the slices that a window keeps, by its definition, in order."""
    oldest = now_s // SLICE_S - WINDOW_S / SLICE_S + 1
    return sorted(value for at_s, value in samples if at_s // SLICE_S >= oldest)


def nearest_rank(values: Sequence[float], rank: float) -> float:
    return values[ceil(rank * len(values)) - 1]


def within(value: float, truth: float, error: float) -> bool:
    return abs(value - truth) <= error * truth + 1e-12


@given(st.floats(min_value=0, max_value=1e9), st.lists(STEPS, max_size=30))
def test_a_quantile_is_a_sample_within_a_percent(
    start_s: float, steps: list[tuple[float, list[float]]]
) -> None:
    window = Quantiles(window_s=WINDOW_S, slice_s=SLICE_S)
    samples: list[tuple[float, float]] = []
    now_s = start_s
    for wait_s, values in steps:
        now_s += wait_s
        window.add(now_s, values)
        samples += [(now_s, value) for value in values]
        kept = in_window(samples, now_s)
        found = window.at(now_s, RANKS)

        assert window.count(now_s) == len(kept)
        if not kept:
            assert found is None
            continue
        assert found is not None
        for rank, value in zip(RANKS, found, strict=True):
            assert within(value, nearest_rank(kept, rank), 0.010001)


def test_a_mean_of_quantiles_would_be_noticed() -> None:
    """Control: nine slices of fast answers and one of slow ones; the mean of p95 is neither."""
    window = Quantiles(window_s=WINDOW_S, slice_s=SLICE_S)
    for number in range(10):
        samples = [1.0] * 100 if number == 4 else [0.01] * 10
        window.add(number * SLICE_S, samples)
    found = window.at(9 * SLICE_S, (0.95,))
    each = [value for _, value in window.series(10 * SLICE_S, 0.95) if value is not None]

    assert found is not None
    assert within(found[0], 1.0, 0.01)
    assert len(each) == 10
    assert not within(sum(each) / len(each), 1.0, 0.5)


def test_a_whole_slice_falls_out_at_a_time() -> None:
    window = Quantiles(window_s=10.0, slice_s=5.0)
    window.add(1.0, [1.0])
    window.add(6.0, [2.0])

    assert window.count(9.9) == 2
    assert window.count(10.0) == 1
    assert window.count(15.0) == 0
    assert window.at(15.0, (0.5,)) is None


def test_a_late_sample_counts_in_the_newest_slice() -> None:
    window = Quantiles(window_s=10.0, slice_s=5.0)
    window.add(11.0, [1.0])
    window.add(4.0, [2.0])

    assert window.count(11.0) == 2
    assert window.series(15.0, 1.0) == [(10.0, pytest.approx(2.0, rel=0.01))]


def test_a_late_sample_after_a_pause_counts() -> None:
    window = Quantiles(window_s=10.0, slice_s=5.0)
    window.add(1.0, [1.0])

    assert window.count(100.0) == 0
    window.add(3.0, [2.0])
    assert window.count(4.0) == 1


@given(st.lists(st.floats(min_value=0, max_value=1e7), min_size=1), st.floats(0.01, 10))
def test_no_slice_is_there_twice(instants: list[float], slice_s: float) -> None:
    window = Counts(window_s=1000 * slice_s, slice_s=slice_s, start_s=0.0)
    for at_s in sorted(instants):
        window.add(at_s)
    numbers = [part.number for part in window._slices]

    assert numbers == sorted(set(numbers))
    assert set(numbers) <= {int(at_s // slice_s) for at_s in instants}


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 100)), min_size=1, max_size=30))
def test_counts_are_sums_of_what_the_window_keeps(steps: list[tuple[float, int]]) -> None:
    window = Counts(window_s=WINDOW_S, slice_s=SLICE_S, start_s=0.0)
    samples = []
    now_s = 0.0
    for wait_s, amount in steps:
        now_s += wait_s
        window.add(now_s, amount)
        samples.append((now_s, float(amount)))

        assert window.total(now_s) == sum(in_window(samples, now_s))
    series = window.series(now_s)
    kept = [s for s in samples if s[0] // SLICE_S < now_s // SLICE_S]
    assert sum(rate * SLICE_S for _, rate in series) == pytest.approx(
        sum(in_window(kept, now_s)), abs=1e-6
    )
    assert [at_s for at_s, _ in series] == sorted(at_s for at_s, _ in series)


def test_a_steady_rate_is_that_rate_from_the_start_on() -> None:
    window = Counts(window_s=WINDOW_S, slice_s=SLICE_S, start_s=100.0)
    for tenth in range(3000):
        at_s = 100.0 + tenth / 10
        window.add(at_s, 5)
        if tenth >= 100:
            assert window.per_s(at_s) == pytest.approx(50, rel=0.015)
    assert len(window.series(400.0)) == 11
    assert all(rate == 50 for _, rate in window.series(400.0))


def test_nothing_for_a_while_is_a_rate_of_zero() -> None:
    window = Counts(window_s=WINDOW_S, slice_s=SLICE_S, start_s=0.0)
    window.add(1.0, 100)

    assert window.per_s(50.0) > 0
    assert window.per_s(200.0) == 0
    assert {rate for _, rate in window.series(200.0)} == {0}
