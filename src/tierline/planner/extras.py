"""What an engineer asks next: the band, low load, what if, two kinds of GPU, power, lead time.

Everything here starts from the finished search and prices a few variations again.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tierline.base.units import HOURS_PER_YEAR
from tierline.catalog.gpus import with_price
from tierline.perf.cost import (
    api_usd_per_request,
    break_even_rps,
    kwh_per_million_tokens,
    relative_cost,
    usd_per_million_tokens,
)
from tierline.perf.evidence import Evidence, Value, weakest
from tierline.perf.step import StepCost
from tierline.planner.candidates import Load, cheapest_of, evaluate, rank, with_lower_tiers
from tierline.planner.finding import Candidate, LoadPoint, Sensitivity
from tierline.planner.load import OperatingPoint, operating_point, saturated_rate
from tierline.planner.steps import COLD_START, View, best_per_gpu, lead_time_s

CURVE_POINTS = 24
CURVE_PAST_USABLE = 2.5
CONTENDERS = 6  # candidates that a variation may promote
SPLITS = (0.5, 0.8, 0.9, 0.95)
LOAD_SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


# --- the band -------------------------------------------------------------------------------


def banded_curve(candidate: Candidate) -> tuple[LoadPoint, ...]:
    """The load curve of one instance with both edges of the evidence.

    It ends at saturation, or well past the last rate that keeps the promises.
    """
    demand = candidate.demand
    expected = candidate.instance
    slow, fast = (
        replace(expected, cost=expected.cost.scaled(edge.slowdown))
        for edge in (candidate.pessimistic, candidate.optimistic)
    )
    peak = saturated_rate(expected, demand)
    assert peak is not None, "a candidate carries some load"
    end_rps = min(peak.rate_rps, CURVE_PAST_USABLE * candidate.expected.usable_rps)
    points = []
    for i in range(1, CURVE_POINTS + 1):
        rate = end_rps * i / CURVE_POINTS
        mid = operating_point(expected, demand, rate)
        low = operating_point(fast, demand, rate)
        high = operating_point(slow, demand, rate)
        if mid is not None and low is not None:
            points.append(_load_point(mid, low, high))
    return tuple(points)


def _load_point(mid: OperatingPoint, low: OperatingPoint, high: OperatingPoint | None) -> LoadPoint:
    return LoadPoint(
        rate_rps=mid.rate_rps,
        concurrency=mid.rate_rps * mid.e2e_mean_s,
        ttft_p50_s=mid.ttft_s(50),
        ttft_p99_s=mid.ttft_s(99),
        itl_p50_s=mid.itl_s(50),
        itl_p99_s=mid.itl_s(99),
        ttft_p99_low_s=low.ttft_s(99),
        ttft_p99_high_s=high.ttft_s(99) if high else None,
        itl_p99_low_s=low.itl_s(99),
        itl_p99_high_s=high.itl_s(99) if high else None,
    )


def cost_by_load(candidate: Candidate) -> tuple[Mapping[str, float], ...]:
    """Dollars per million tokens of the fixed fleet against the share of its capacity offered."""
    edge = candidate.pessimistic
    if edge.usd_per_hour is None:
        return ()
    per_request = candidate.demand.input_mean + candidate.demand.output_mean
    capacity = edge.instances * edge.usable_rps * per_request
    return tuple(
        {
            "share": share,
            "usd_per_million_tokens": usd_per_million_tokens(
                edge.usd_per_hour, capacity_tokens_per_s=capacity, utilization=share
            ),
            "penalty": relative_cost(share),
        }
        for share in LOAD_SHARES
    )


# --- what changes the answer ----------------------------------------------------------------


def sensitivities(view: View) -> tuple[Sensitivity, ...]:
    """One input moved at a time, the contenders planned again."""
    best = view.best
    rows = [
        _again(view, "growth", "+25%", load=_scaled(view.load, 1.25)),
        _again(view, "growth", "-25%", load=_scaled(view.load, 0.75)),
        _again(view, "prompt length", "-30%", load=_prompts(view.load, 0.7)),
        _again(view, "prompt length", "+30%", load=_prompts(view.load, 1.3)),
        _again(view, "output length", "+30%", load=_outputs(view.load, 1.3)),
    ]
    if view.load.hit_rate is not None:
        rows.append(_again(view, "prefix reuse", "none", load=replace(view.load, hit_rate=None)))
    price = best.gpu.price.typical_usd
    if price is not None:
        dearer = {best.gpu.name: price * 1.25}
        rows.append(_again(view, f"price of {best.gpu.name}", "+25%", prices=dearer))
    rivals = [c for c in best_per_gpu(view.found).values() if c.gpu.name != best.gpu.name]
    rival = next(iter(rivals), None)
    if rival is not None and rival.gpu.price.typical_usd is not None:
        cheaper = {rival.gpu.name: rival.gpu.price.typical_usd * 0.75}
        rows.append(_again(view, f"price of {rival.gpu.name}", "-25%", prices=cheaper))
    return tuple(rows)


def _scaled(load: Load, factor: float) -> Load:
    return replace(load, rate_rps=load.rate_rps * factor, mean_rps=load.mean_rps * factor)


def _prompts(load: Load, factor: float) -> Load:
    lengths = tuple(max(tokens * factor, 1.0) for tokens in load.demand.input_tokens)
    return replace(load, demand=replace(load.demand, input_tokens=lengths))


def _outputs(load: Load, factor: float) -> Load:
    lengths = tuple(max(tokens * factor, 1.0) for tokens in load.demand.output_tokens)
    return replace(load, demand=replace(load.demand, output_tokens=lengths))


def _again(
    view: View,
    what: str,
    change: str,
    *,
    load: Load | None = None,
    prices: Mapping[str, float] | None = None,
) -> Sensitivity:
    prices = prices or {}
    outcomes = []
    for candidate in contenders(view):
        gpu = candidate.gpu
        cost = candidate.instance.cost
        if gpu.name in prices:
            cost = StepCost(cost.model, with_price(gpu, prices[gpu.name]), cost.layout)
        outcome = evaluate(view.question, cost, load or view.load)
        if isinstance(outcome, Candidate):
            outcomes.append(outcome)
    outcomes += with_lower_tiers(view.question, outcomes, load or view.load)
    winner = min(outcomes, key=rank, default=None)
    if winner is None:
        return Sensitivity(
            what=what,
            change=change,
            gpus=None,
            usd_per_year=None,
            recommended="nothing keeps the promises",
            changes_choice=True,
        )
    best = view.best
    return Sensitivity(
        what=what,
        change=change,
        gpus=winner.pessimistic.gpus,
        usd_per_year=winner.pessimistic.usd_per_year,
        recommended=winner.name,
        changes_choice=(winner.gpu.name, winner.layout) != (best.gpu.name, best.layout),
    )


def contenders(view: View) -> list[Candidate]:
    """The winner and the best candidate of the next accelerators: who could win a variation."""
    others = [c for c in best_per_gpu(view.found).values() if c.gpu.name != view.best.gpu.name]
    return [view.best, *others[: CONTENDERS - 1]]


# --- two kinds of accelerator ---------------------------------------------------------------


def mixed_fleet(view: View) -> Mapping[str, Any] | None:
    """Short requests on one kind, long ones on another, where that beats the single fleet.

    Accelerators that cannot keep the promises for the longest prompts may serve the short.
    Each part keeps every promise on its own, which is stricter than keeping it over both.
    """
    single = view.best.pessimistic.usd_per_year
    if single is None or view.question.measured is not None:
        return None
    best: Mapping[str, Any] | None = None
    for share in SPLITS:
        parts = _split(view.load, share)
        if parts is None:
            continue
        short, long = (cheapest_of(view.question, view.found.shapes, part) for part in parts)
        if short is None or long is None or short.gpu.name == long.gpu.name:
            continue
        total = (short.pessimistic.usd_per_year or 0.0) + (long.pessimistic.usd_per_year or 0.0)
        if total < min(single, best["usd_per_year"] if best else single):
            best = {
                "split_tokens": parts[0].demand.input_tokens[-1],
                "short_share": share,
                "short": short,
                "long": long,
                "usd_per_year": total,
                "single_usd_per_year": single,
                "saved": 1 - total / single,
            }
    return best


def _split(load: Load, share: float) -> tuple[Load, Load] | None:
    """The short `share` of the prompts and the rest, each a load of its own."""
    ranked = sorted(load.demand.input_tokens)
    cut = round(len(ranked) * share)
    if not 0 < cut < len(ranked):
        return None
    exact = cut / len(ranked)

    def part(lengths: list[float], portion: float, longest_tokens: int) -> Load:
        return replace(
            load,
            rate_rps=load.rate_rps * portion,
            mean_rps=load.mean_rps * portion,
            demand=replace(load.demand, input_tokens=tuple(lengths)),
            longest_tokens=longest_tokens,
        )

    longest_short = math.ceil(ranked[cut - 1] + max(load.demand.output_tokens))
    return (
        part(ranked[:cut], exact, min(longest_short, load.longest_tokens)),
        part(ranked[cut:], 1 - exact, load.longest_tokens),
    )


# --- other numbers --------------------------------------------------------------------------


def facts(view: View) -> dict[str, Value]:
    """Power, lead time, break-even: numbers that no step owns, each with its evidence."""
    best, load = view.best, view.load
    edge = best.pessimistic
    tokens_per_s = load.mean_rps * view.tokens_per_request
    numbers: dict[str, Value] = {}
    watts = best.gpu.allin_w or best.gpu.tdp_w
    if watts is not None:
        source = "all-in power" if best.gpu.allin_w else "TDP of the accelerator alone"
        evidence = Evidence(kind="datasheet", source=source, low=0.5, high=1.0)
        kw = edge.gpus * watts / 1e3
        numbers["power"] = Value(amount=kw, unit="kW", evidence=evidence)
        per_million = kwh_per_million_tokens(kw * 1e3, tokens_per_s=tokens_per_s)
        numbers["energy_per_million_tokens"] = Value(
            amount=per_million, unit="kWh per million tokens", evidence=evidence
        )
    weights = best.memory.weights_bytes * best.layout.gpus
    numbers["weights"] = Value(
        amount=weights / 1e9,
        unit="GB per instance",
        evidence=Evidence(kind="exact", source="shapes and format"),
    )
    numbers["cold_start"] = Value(amount=lead_time_s(best), unit="s", evidence=COLD_START)
    numbers |= _break_even(view, weakest(best.evidence, COLD_START))
    return numbers


def _break_even(view: View, evidence: Evidence) -> dict[str, Value]:
    """The rate at which the fleet costs what a hosted API would charge for the same tokens."""
    prices, edge = view.question.api_usd_per_million, view.best.pessimistic
    if prices is None or edge.usd_per_hour is None:
        return {}
    demand = view.load.demand
    per_request = api_usd_per_request(
        input_tokens=demand.input_mean,
        output_tokens=demand.output_mean,
        usd_per_million_in=prices[0],
        usd_per_million_out=prices[1],
    )
    assumed = replace(evidence, kind="assumed", source="hosted token prices given by the user")
    return {
        "api_usd_per_year": Value(
            amount=per_request * view.load.mean_rps * HOURS_PER_YEAR * 3600,
            unit="$ a year",
            evidence=assumed,
        ),
        "break_even_rps": Value(
            amount=break_even_rps(edge.usd_per_hour, api_usd_per_request_=per_request),
            unit="requests/s on average",
            evidence=assumed,
        ),
    }
