"""Predicted lengths are distributions that hold on real traces, also of answers under way."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierline.scheduling import lengths
from tierline.scheduling.lengths import PRIOR_ANSWERS, Kind, LengthPredictor, kind_of
from tierline.workload.trace import read_trace

KIND = kind_of("", 1000)


def having_seen(answers: dict[Kind, list[int]]) -> LengthPredictor:
    predictor = LengthPredictor()
    for kind, seen in answers.items():
        for tokens in seen:
            predictor.observe(kind, tokens)
    return predictor


# --- against the distribution written out ---------------------------------------------------


def spread(seen: list[int], base: list[float], *, longest: int) -> list[float]:
    """The probability of every length, counts spread evenly over their buckets."""
    chances = [PRIOR_ANSWERS * b for b in base]
    for tokens in seen:
        low, beyond = bucket_of(tokens)
        for length in range(low, min(beyond, longest + 1)):
            chances[length] += 1 / (beyond - low)
    return [c / (len(seen) + PRIOR_ANSWERS) for c in chances]


def bucket_of(tokens: int) -> tuple[int, int]:
    """The lengths that are counted together, from the text: exact below 16, then eighths."""
    width = 1
    while tokens >= 16 * width:
        width *= 2
    return tokens // width * width, tokens // width * width + width


LONGEST = 700


@cache
def prior() -> list[float]:
    from math import log2

    chances = [0.0] * (LONGEST + 1)
    for length in range(1, LONGEST + 1):
        low, beyond = bucket_of(length)
        chances[length] = log2(beyond / low) / 20 / (beyond - low)
    return chances


answers = st.lists(st.integers(1, LONGEST - 1), max_size=30)


@given(answers, answers, st.integers(0, LONGEST - 2), st.data())
def test_remaining_is_that_of_the_longer_ones(
    own: list[int], others: list[int], generated: int, data: st.DataObject
) -> None:
    at_most = data.draw(st.integers(generated + 1, LONGEST - 1))
    share = data.draw(st.sampled_from([0.1, 0.5, 0.9]))
    predictor = having_seen({("other", 1): others, KIND: own})
    chances = spread([*others, *own], prior(), longest=LONGEST)
    if own:
        chances = spread(own, chances, longest=LONGEST)
    tail = [*chances[:at_most], 1 - sum(chances[:at_most])]  # what is longer ends there
    tail[: generated + 1] = [0.0] * (generated + 1)
    mass = sum(tail)
    mean = sum(length * c for length, c in enumerate(tail)) / mass - generated
    below, within = 0.0, generated
    while below < share * mass - 1e-12:
        within += 1
        below += tail[within]

    asked = {"generated": generated, "at_most": at_most}
    assert predictor.expected_remaining(KIND, **asked) == pytest.approx(mean, abs=1.001)
    found = predictor.quantile_remaining(KIND, share, **asked)
    assert found == pytest.approx(within - generated, abs=1)


@given(answers, st.integers(0, 10**6), st.integers(1, 10**6))
def test_something_remains_and_no_more_than_is_allowed(
    seen: list[int], generated: int, room: int
) -> None:
    predictor = having_seen({KIND: seen})
    asked = {"generated": generated, "at_most": generated + room}
    found = [predictor.quantile_remaining(KIND, q, **asked) for q in (0.1, 0.5, 0.9, 0.99)]

    assert found == sorted(found)
    for remaining in (*found, predictor.expected_remaining(KIND, **asked)):
        assert 1 <= remaining <= room


# --- what a reader would ask ----------------------------------------------------------------


def test_before_anything_is_known_the_maximum_is_likely() -> None:
    nothing = LengthPredictor()

    assert nothing.quantile_remaining(KIND, 0.9, generated=0, at_most=4096) == 4096
    assert nothing.quantile_remaining(KIND, 0.5, generated=0, at_most=4096) < 1100


def test_past_the_longest_ever_seen_as_much_again_is_likely() -> None:
    predictor = having_seen({KIND: [100] * 300})
    left = predictor.quantile_remaining(KIND, 0.5, generated=1000, at_most=10**6)

    assert predictor.quantile_remaining(KIND, 0.9, generated=0, at_most=10**6) < 112
    assert left > 1000


def test_a_kind_is_told_apart_once_there_is_enough_of_it() -> None:
    """Four answers of one's own weigh as much as all the others."""
    short, long = kind_of("chat", 50), kind_of("chat", 5000)

    def median(own: int) -> int:
        predictor = having_seen({short: [10] * 200, long: [900] * own})
        return predictor.quantile_remaining(long, 0.5, generated=0, at_most=4096)

    assert median(0) == median(2) == 10
    assert median(8) > 800


def test_what_was_long_ago_fades() -> None:
    predictor = having_seen({KIND: [100] * 20_000 + [800] * 5000})

    assert predictor.quantile_remaining(KIND, 0.5, generated=0, at_most=4096) > 750


def test_kinds_are_limited() -> None:
    predictor = having_seen({(f"user-{i}", 1): [10] for i in range(2 * lengths.KINDS_MAX)})

    assert len(predictor._kinds) == lengths.KINDS_MAX
    assert predictor.expected_remaining(("user-1023", 1), generated=0, at_most=100) >= 10


def test_sums_are_at_most_an_eighth_behind() -> None:
    predictor = having_seen({KIND: [10] * 800})
    predictor.expected_remaining(KIND, generated=0, at_most=4096)
    for _ in range(115):
        predictor.observe(KIND, 2000)
    within = predictor.quantile_remaining(KIND, 0.9, generated=0, at_most=4096)

    assert within > 1900  # 115 of 915


# --- on real traces -------------------------------------------------------------------------

MARKS = (0, 64, 128, 256)
SHARES = (0.5, 0.75, 0.9, 0.95)
TRACES = {
    "azure2023_conv.csv.gz": 0.045,
    "azure2023_code.csv.gz": 0.045,
    "mooncake_conversation.jsonl.gz": 0.03,
    "mooncake_synthetic.jsonl.gz": 0.07,  # four data sets one after the other
}


def coverage(path: Path, *, refined: bool = True) -> dict[tuple[int, float], float]:
    """(generated, q) -> share of answers that ended within the quantile q predicted then.

    Each answer is predicted from those before it.  Not refined: the quantile of the whole
    answer, less what there is.
    """
    predictor = LengthPredictor()
    within = dict.fromkeys([(g, q) for g in MARKS for q in SHARES], 0)
    asked = dict.fromkeys(MARKS, 0)
    for i, request in enumerate(read_trace(path)):
        kind, tokens = kind_of(request.tenant, request.input_tokens), request.output_tokens
        for generated in MARKS if i > 300 else ():
            if tokens > generated:
                asked[generated] += 1
                known, at_most = generated if refined else 0, 4096
                for q in SHARES:
                    left = predictor.quantile_remaining(kind, q, generated=known, at_most=at_most)
                    within[generated, q] += tokens - known <= left
        predictor.observe(kind, tokens)
    return {(g, q): n / asked[g] for (g, q), n in within.items() if asked[g] > 500}


@pytest.mark.parametrize("name", TRACES)
def test_quantiles_hold_on_a_real_trace(data_dir: Path, name: str) -> None:
    found = coverage(data_dir / "traces" / name)

    assert len(found) >= 8
    assert {key: round(s, 3) for key, s in found.items() if abs(s - key[1]) > TRACES[name]} == {}


@pytest.mark.parametrize("name", ["azure2023_conv.csv.gz", "mooncake_conversation.jsonl.gz"])
def test_a_predictor_that_ignores_what_was_generated_fails(data_dir: Path, name: str) -> None:
    """Negative control: at 256 tokens hardly anything ends within the median of all."""
    found = coverage(data_dir / "traces" / name, refined=False)

    assert abs(found[0, 0.5] - 0.5) <= TRACES[name]
    assert found[256, 0.5] < 0.4
