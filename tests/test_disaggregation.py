"""Prefill hands over where it pays, to the replica with the most room left, and pools are as
large as their rates ask."""

import doctest
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierline.base.clock import PS_PER_MS, PS_PER_S
from tierline.perf import transfer
from tierline.scheduling import disaggregation
from tierline.scheduling.disaggregation import (
    hand_over,
    pipelined_ps,
    pool_sizes,
    receiver,
    split,
)


@dataclass(kw_only=True)
class Standing:
    number: int
    accepting: bool = True
    kv_tokens_total: int = 100_000
    kv_tokens_free: int = 50_000


standings = st.lists(
    st.tuples(st.booleans(), st.integers(1, 20), st.integers(0, 20)), max_size=6
).map(
    lambda drawn: [
        Standing(number=2 * i, accepting=a, kv_tokens_total=max(t, f), kv_tokens_free=f)
        for i, (a, t, f) in enumerate(drawn)
    ]
)


def fits_best(replicas: list[Standing], number: int | None, *, tokens: int) -> bool:
    """INV-SCHED-47, by looking at everybody."""
    able = [r for r in replicas if r.accepting and r.kv_tokens_free >= tokens]
    if number is None:
        return not able
    chosen = next((r for r in able if r.number == number), None)
    if chosen is None:
        return False

    def roomier(one: Standing, other: Standing) -> bool:
        left, right = one.kv_tokens_free - tokens, other.kv_tokens_free - tokens
        return left * other.kv_tokens_total > right * one.kv_tokens_total

    return not any(
        roomier(r, chosen) or (r.number < number and not roomier(chosen, r)) for r in able
    )


@given(standings, st.integers(1, 20))
def test_who_receives_has_the_most_room_left(replicas: list[Standing], tokens: int) -> None:
    assert fits_best(replicas, receiver(replicas, tokens=tokens), tokens=tokens)


def test_the_room_check_can_fail() -> None:
    """Negative control: the first that fits, and the largest, are found out."""
    replicas = [
        Standing(number=0, kv_tokens_free=20_000),
        Standing(number=1, kv_tokens_free=60_000),
        Standing(number=2, kv_tokens_total=400_000, kv_tokens_free=90_000),
    ]

    assert receiver(replicas, tokens=5000) == 1
    assert not fits_best(replicas, 0, tokens=5000)
    assert not fits_best(replicas, 2, tokens=5000)
    assert not fits_best(replicas, None, tokens=5000)


# --- the pipeline ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefill_ms", "transfer_ms", "total_ms"),
    [(400, 105, 401.3), (400, 419, 424.0), (283, 1049, 1052.5)],
)
def test_published_pipelines(prefill_ms: int, transfer_ms: int, total_ms: float) -> None:
    found_ps = pipelined_ps(
        prefill_ps=prefill_ms * PS_PER_MS, transfer_ps=transfer_ms * PS_PER_MS, layers=80
    )

    assert found_ps / PS_PER_MS == pytest.approx(total_ms, abs=0.06)


times = st.integers(0, 10**13)


@given(times, times, st.integers(1, 200))
def test_the_pipeline_is_the_closed_form(prefill_ps: int, transfer_ps: int, layers: int) -> None:
    found_ps = pipelined_ps(prefill_ps=prefill_ps, transfer_ps=transfer_ps, layers=layers)
    law_s = transfer.pipelined_s(prefill_ps / 1e12, transfer_ps / 1e12, layers=layers)

    assert found_ps / 1e12 == pytest.approx(law_s, rel=1e-12, abs=1.1e-12)
    assert found_ps >= max(prefill_ps, transfer_ps)


@given(st.integers(1, 10**10), st.integers(1, 10**10), st.integers(1, 60))
def test_the_pipeline_is_what_happens_layer_by_layer(p_ps: int, x_ps: int, layers: int) -> None:
    computed_ps = sent_ps = 0
    for _ in range(layers):
        computed_ps += p_ps
        sent_ps = max(sent_ps, computed_ps) + x_ps

    assert sent_ps == pipelined_ps(
        prefill_ps=layers * p_ps, transfer_ps=layers * x_ps, layers=layers
    )


def test_a_pipeline_of_one_layer_is_none() -> None:
    """Control of the two above: layers matter."""
    serial = pipelined_ps(prefill_ps=400, transfer_ps=105, layers=1)

    assert serial == 505
    assert pipelined_ps(prefill_ps=400, transfer_ps=105, layers=80) < serial


# --- whether --------------------------------------------------------------------------------

CASE = {
    "prompt_tokens": 4000,
    "tokens": 4300,
    "prefill_ps": 400 * PS_PER_MS,
    "transfer_ps": 105 * PS_PER_MS,
    "layers": 80,
    "slack_ps": 2 * PS_PER_MS,
}
POOL = [Standing(number=4, kv_tokens_free=9000), Standing(number=5, kv_tokens_free=80_000)]


@pytest.mark.parametrize(
    ("changes", "number", "reason"),
    [
        ({}, 5, "least full"),
        ({"layers": 1}, None, "105 ms of transfer is exposed, the promise has 2.00 ms"),
        ({"slack_ps": PS_PER_MS}, None, "1.31 ms of transfer is exposed"),
        ({"slack_ps": -PS_PER_S}, None, "is exposed"),  # late already
        ({"prompt_tokens": 499}, None, "hardly disturbs"),
        ({"tokens": 80_001}, None, "no decode replica can hold 80001 tokens"),
    ],
)
def test_when_to_hand_over(changes: dict[str, int], number: int | None, reason: str) -> None:
    decision = hand_over(POOL, **{**CASE, **changes})

    assert decision.number == number
    assert reason in decision.reason


@given(times, times, st.integers(1, 90), st.integers(-(10**12), 10**13))
def test_nothing_is_exposed_beyond_the_slack(
    prefill_ps: int, transfer_ps: int, layers: int, slack_ps: int
) -> None:
    drawn = {"prefill_ps": prefill_ps, "transfer_ps": transfer_ps, "layers": layers}
    decision = hand_over(POOL, **{**CASE, **drawn, "slack_ps": slack_ps})

    assert decision.exposed_ps == pipelined_ps(**drawn) - prefill_ps
    assert (decision.number == 5) == (decision.exposed_ps <= slack_ps)


# --- how many -------------------------------------------------------------------------------

R70 = {"prefill_tokens_per_s": 14_129, "decode_tokens_per_s": 3796, "step_s": 0.01686}


@pytest.mark.parametrize(
    ("rps", "sequences_max", "sizes"),
    [
        (10, 64, (3, 1)),  # 2.83 and 0.79; 50.6 decode at once
        (10, 32, (3, 2)),  # which do not fit 32
        (0.001, 64, (1, 1)),
        (100, 64, (29, 8)),
    ],
)
def test_pools_are_as_large_as_their_rates(
    rps: float, sequences_max: int, sizes: tuple[int, int]
) -> None:
    found = pool_sizes(
        rps=rps, input_tokens=4000, output_tokens=300, sequences_max=sequences_max, **R70
    )

    assert found == sizes


@given(
    st.floats(0.1, 50),
    st.floats(0.1, 50),
    st.integers(2, 60),
)
def test_no_other_cut_is_less_busy(prefill: float, decode: float, replicas: int) -> None:
    need = transfer.Pools(prefill=prefill, decode=decode, decoding=0)
    busiest = {k: max(prefill / k, decode / (replicas - k)) for k in range(1, replicas)}
    one, other = split(replicas, need)

    assert one + other == replicas
    assert busiest[one] == min(busiest.values())


def test_a_cut_follows_the_need() -> None:
    need = transfer.pools(rps=10, input_tokens=4000, output_tokens=300, **R70)

    assert split(4, need) == (3, 1)
    assert split(4, replace(need, decode=9.0)) == (1, 3)  # control


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(disaggregation)

    assert result.attempted
    assert not result.failed
