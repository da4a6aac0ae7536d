"""Limits at the door and triggers in production, from what was planned.

The report lists them with their numbers, and a gateway enforces them before any queue. A
threshold is strict where it says "over": a value on the line does not trip it.
"""

import math
from dataclasses import dataclass

INPUT_CAP_LOW, INPUT_CAP_HIGH = 2, 3  # times p95 input
SHED_LOW, SHED_HIGH = 0.8, 0.9  # of the depth limit
TTFT_RATIO_MAX = 1.30
UTILIZATION_DROP_MAX = 20  # percentage points
EVICTION_WARN, EVICTION_DEGRADED = 0.05, 0.20
FLEET_LOW, FLEET_HIGH = 0.40, 0.90
# Ratios of decimals: 1.30 / 1.0 must not read as over 1.30.
_SLACK = 1e-9


def input_cap_tokens(p95_input_tokens: float) -> tuple[int, int]:
    """The band for the input cap.

    >>> input_cap_tokens(1000)
    (2000, 3000)
    """
    return round(INPUT_CAP_LOW * p95_input_tokens), round(INPUT_CAP_HIGH * p95_input_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShedDepth:
    """The queue depth that must not be exceeded, and the band at which to refuse."""

    limit: float
    trip_low: int
    trip_high: int


def shed_depth(*, wait_s: float, drain_rps: float, prefill_p99_s: float = 0.0) -> ShedDepth:
    """Depth = (acceptable wait - prefill p99) x the rate at which the queue drains.

    Arrivals do not matter: the wait of the last one in line is depth over drain rate.

    >>> shed_depth(wait_s=2, drain_rps=50)
    ShedDepth(limit=100.0, trip_low=80, trip_high=90)
    """
    limit = (wait_s - prefill_p99_s) * drain_rps
    assert limit > 0, "prefill alone takes the whole wait"
    return ShedDepth(
        limit=limit,
        trip_low=math.floor(SHED_LOW * limit + _SLACK),
        trip_high=math.floor(SHED_HIGH * limit + _SLACK),
    )


def resize_reasons(
    *,
    ttft_p99_s: float | None = None,
    benchmark_ttft_p99_s: float | None = None,
    ttft_limit_s: float | None = None,
    utilization_pct: float | None = None,
    benchmark_utilization_pct: float | None = None,
    eviction: float | None = None,
    fleet_utilization: float | None = None,
) -> tuple[str, ...]:
    """Why to size again, from production against the benchmark at the same rate; () is none.

    `ttft_limit_s` is what was promised: a benchmark that sat on it could slip by 30 % unseen.
    """
    reasons = []
    if ttft_p99_s is not None and benchmark_ttft_p99_s is not None:
        ratio = ttft_p99_s / benchmark_ttft_p99_s
        if ratio > TTFT_RATIO_MAX + _SLACK:
            reasons.append(f"TTFT p99 is {ratio:.2f} times the benchmark")
    if ttft_p99_s is not None and ttft_limit_s is not None and ttft_p99_s > ttft_limit_s:
        reasons.append(f"TTFT p99 of {ttft_p99_s:.2f} s is over its limit of {ttft_limit_s:.2f} s")
    if utilization_pct is not None and benchmark_utilization_pct is not None:
        drop = benchmark_utilization_pct - utilization_pct
        if drop > UTILIZATION_DROP_MAX + _SLACK:
            reasons.append(f"utilisation is {drop:.0f} points under the benchmark")
    if eviction is not None and eviction_state(eviction) == "degraded":
        reasons.append(f"KV eviction at {eviction:.1%}")
    if fleet_utilization is not None and not FLEET_LOW <= fleet_utilization <= FLEET_HIGH:
        reasons.append(f"fleet utilisation at {fleet_utilization:.0%}")
    return tuple(reasons)


def eviction_state(rate: float) -> str:
    """State of the KV pool by its eviction rate.

    >>> [eviction_state(r) for r in (0.049, 0.05, 0.20, 0.201)]
    ['ok', 'warn', 'warn', 'degraded']
    """
    if rate < EVICTION_WARN:
        return "ok"
    return "warn" if rate <= EVICTION_DEGRADED else "degraded"
