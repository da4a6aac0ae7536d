"""A profile states what the trace holds, equal to what was published, and None for the rest."""

import json
import math
from pathlib import Path

import pytest

from tierline.base.errors import InputError, TraceError
from tierline.base.rng import stream
from tierline.workload.archetypes import business_rate, known_workloads, workload_profile
from tierline.workload.profile import Profile, describe, phase_balance, profile_trace
from tierline.workload.request import Request


def _requests(times_s: list[float], **facts: object) -> list[Request]:
    return [
        Request(arrival_ns=round(t * 1e9), input_tokens=100, output_tokens=10, **facts)  # type: ignore[arg-type]
        for t in times_s
    ]


# name, requests, rate, CV of gaps, 1-min peak over mean, then p50 / p95 / p99 of input and output
PUBLISHED = [
    ("azure2023_conv.csv", 19_366, 5.53, 1.09, 1.52, (1020, 4083, 4142), (129, 451, 601)),
    ("azure2023_code.csv", 8_819, 2.57, 13.2, 4.18, (1469, 7303, 7436), (13, 90, 251)),
    (
        "mooncake_conversation.jsonl",
        12_031,
        3.40,
        3.03,
        1.21,
        (6909, 39_551, 85_400),
        (350, 698, 1119),
    ),
    (
        "mooncake_synthetic.jsonl",
        3_993,
        3.91,
        1.01,
        1.17,
        (11_587, 48_905, 66_456),
        (69, 519, 768),
    ),
]


@pytest.mark.parametrize(
    ("name", "requests", "rate", "cv", "peak", "inputs", "outputs"),
    PUBLISHED,
    ids=[row[0] for row in PUBLISHED],
)
def test_real_traces_have_their_published_facts(
    data_dir: Path,
    name: str,
    requests: int,
    rate: float,
    cv: float,
    peak: float,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
) -> None:
    profile = profile_trace(data_dir / f"traces/{name}.gz")
    arrivals = profile.arrivals
    assert arrivals is not None

    assert profile.requests == requests
    assert arrivals.rate_rps == pytest.approx(rate, abs=0.01)
    assert arrivals.iat_cv == pytest.approx(cv, rel=0.01)
    # Windows that start elsewhere move the busiest minute a little.
    assert arrivals.peak_to_mean == pytest.approx(peak, rel=0.02)
    assert [profile.input.percentile(p) for p in (50, 95, 99)] == pytest.approx(inputs, abs=1)
    assert [profile.output.percentile(p) for p in (50, 95, 99)] == pytest.approx(outputs, abs=1)


def test_what_a_trace_does_not_hold_is_none(data_dir: Path) -> None:
    profile = profile_trace(data_dir / "traces/sharegpt_val10k_lengths.csv.gz")

    assert profile.arrivals is None
    assert profile.reuse is None
    assert profile.sessions is None
    assert profile.tenants is None
    assert "unknown: the trace has no arrival times" in describe(profile)


def test_every_profile_is_json_and_text(data_dir: Path) -> None:
    for name in ("mooncake_synthetic.jsonl.gz", "arxiv_summarization_lengths.csv.gz"):
        profile = profile_trace(data_dir / "traces" / name)
        facts = json.loads(json.dumps(profile.to_dict(), allow_nan=False))

        assert facts["input"]["p95"] == profile.input.percentile(95)
        assert len(facts["input"]["quantiles"]) == 101
        assert f"{profile.requests:,}" in describe(profile)


def test_poisson_arrivals_have_cv_one_and_no_bursts_and_a_burst_is_found() -> None:
    gaps = stream(1, "gaps").exponential(0.1, 20_000).cumsum().tolist()
    steady = profile_trace(_requests(gaps)).arrivals
    burst = profile_trace(_requests(sorted([*gaps, *(500 + i / 50 for i in range(1500))]))).arrivals
    assert steady is not None
    assert burst is not None

    assert steady.iat_cv == pytest.approx(1, abs=0.03)
    assert steady.bursts == ()
    (found,) = burst.bursts
    assert (found.start_s, found.length_s) == (500, 30)
    assert found.factor > 4


def test_windows_hold_the_peaks() -> None:
    """Ten quiet minutes at 1/s and one at 6/s: the mean is 1.45, the busiest minute 6."""
    times = [float(t) for t in range(600)] + [600 + i / 6 for i in range(361)]
    arrivals = profile_trace(_requests(times)).arrivals
    assert arrivals is not None

    assert arrivals.by_minute.max == 6
    assert arrivals.by_minute.p50 == 1
    assert arrivals.peak_to_mean == pytest.approx(6 / (961 / 660))


def test_the_shape_of_a_day_is_seen_over_a_day_and_only_then() -> None:
    times = [t * 60.0 for t in range(2 * 1440) if (t // 60) % 24 < 12 or t % 4 == 0]
    arrivals = profile_trace(_requests([*times, 172_800.0])).arrivals
    short = profile_trace(_requests(times[:500])).arrivals
    assert arrivals is not None
    assert short is not None
    assert arrivals.day_shape is not None

    assert arrivals.day_shape[3] == pytest.approx(4 * arrivals.day_shape[15])
    assert sum(arrivals.day_shape) == pytest.approx(24)
    assert short.day_shape is None


def test_sessions_are_read_from_names_or_from_prefixes() -> None:
    def turn(t: float, blocks: tuple[int, ...], session: str = "") -> Request:
        return Request(
            arrival_ns=round(t * 1e9),
            input_tokens=512 * len(blocks) - 100,
            output_tokens=10,
            prefix_blocks=blocks,
            session=session,
        )

    talk = [
        turn(0, (0, 1, 2)),
        turn(5, (0, 10, 11)),
        turn(30, (0, 1, 3, 4, 5)),  # continues the first: its last block was part full
    ]
    inferred = profile_trace(talk).sessions
    named = profile_trace([turn(t, (), s) for t, s in ((0, "a"), (1, "b"), (7, "a"))]).sessions
    assert inferred is not None
    assert named is not None

    assert (inferred.count, inferred.inferred, inferred.think_s_p50) == (2, True, 30)
    assert (named.count, named.inferred, named.think_s_p50) == (2, False, 7)


def test_tenants_have_a_zipf_exponent() -> None:
    names = [f"t{k}" for k in range(1, 21) for _ in range(round(10_000 / k))]
    profile = profile_trace(
        [
            Request(arrival_ns=i, input_tokens=1, output_tokens=1, tenant=name)
            for i, name in enumerate(names)
        ]
    )

    assert profile.tenants == 20
    assert profile.tenant_zipf == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("share", "balance"),
    [(0.8, "prefill-heavy"), (0.79, "balanced"), (0.21, "balanced"), (0.2, "decode-heavy")],
)
def test_the_balance_of_phases_has_its_thresholds(share: float, balance: str) -> None:
    assert phase_balance(share) == balance


def _uniform() -> Profile:
    return profile_trace(_requests([i / 10 for i in range(6001)]))


def test_prefill_share_and_concurrency_are_their_formulas() -> None:
    profile = _uniform()  # 100 in, 10 out, 10.0 requests/s

    share = profile.prefill_share(prefill_tokens_per_s=1000, decode_tokens_per_s=100)
    assert share == pytest.approx(0.5)
    assert profile.concurrency(ttft_s=0.5, tpot_s=0.1) == pytest.approx(10 * 1.4, rel=1e-3)
    assert profile.concurrency(ttft_s=0.5, tpot_s=0.1, rate_rps=2) == pytest.approx(2.8)


def test_a_rate_scales_every_rate_and_nothing_else() -> None:
    profile = _uniform()
    twice = profile.at_rate(2 * profile.arrivals.rate_rps)  # type: ignore[union-attr]

    assert twice.arrivals.by_minute.p95 == pytest.approx(2 * profile.arrivals.by_minute.p95)  # type: ignore[union-attr]
    assert twice.input == profile.input
    with pytest.raises(InputError):
        profile.at_rate(0)


def test_no_requests_is_an_error() -> None:
    with pytest.raises(TraceError, match="no requests"):
        profile_trace([])


def test_one_request_has_lengths_and_no_rate() -> None:
    profile = profile_trace(_requests([3.0]))

    assert profile.input.percentile(99) == 100
    assert profile.arrivals is None


# --- built-in workloads ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(known_workloads()))
def test_every_kind_is_a_profile_that_names_its_source(kind: str) -> None:
    profile = workload_profile(kind)
    quantiles = profile.input.quantiles

    assert known_workloads()[kind] in profile.source
    assert profile.arrivals is None
    assert list(quantiles) == sorted(quantiles)
    assert profile.total.mean == pytest.approx(profile.input.mean + profile.output.mean, rel=1e-3)
    assert workload_profile(kind, rps=7).arrivals.rate_rps == 7  # type: ignore[union-attr]
    assert describe(profile)


def test_chat_is_the_trace_it_names(data_dir: Path) -> None:
    trace = profile_trace(data_dir / "traces/azure2023_conv.csv.gz")
    chat = workload_profile("chat")

    assert chat.input.quantiles == pytest.approx(trace.input.quantiles, abs=0.06)
    assert chat.output.mean == pytest.approx(trace.output.mean, abs=0.01)


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(InputError) as caught:
        workload_profile("chatt")

    assert "chat" in caught.value.hint


def test_the_business_rate_is_its_formula_and_refuses_nonsense() -> None:
    rate = business_rate(users=864, sessions_per_day=10, requests_per_session=5, peak_to_mean=2)

    assert rate == pytest.approx(1.0)
    for wrong in ({"users": 0}, {"users": math.nan}, {"peak_to_mean": 0.5}):
        with pytest.raises(InputError):
            business_rate(**({"users": 10.0, "sessions_per_day": 1.0} | wrong))
