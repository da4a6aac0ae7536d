"""Plan -> one HTML file that opens offline: the answer, what could be wrong, pictures, working.

`write_plan` and `tierline plan` call `render_report`. The page is laid out by
`templates/report.html.j2`, which escapes everything; the pictures are made by `figures`. What
is here chooses what the page says and in which figures, so that equal plans are equal bytes.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tierline.base.units import format_seconds, format_usd, significant
from tierline.perf.evidence import KINDS, Value
from tierline.planner.figures import figures, strictest, why_not
from tierline.planner.finding import Candidate, Edge, Finding, Plan, Rejected, Worth
from tierline.planner.pages import render_page

ALTERNATIVES_MAX = 20
GROUP_MIN = 3  # fewer rejections for one reason are told together
NUMBER = re.compile(r"[\d.,]+( (min|ms|s|MB|GB|TB|kB)\b)?")

# Which step a caveat is about, by a word in it; what reading the trace said is step 1's.
CAVEAT_STEPS = (
    ("budget", 12),
    ("price", 12),
    ("reuse", 8),
    ("step times", 10),
    ("replay", 14),
    ("policy", 14),
    ("queueing", 10),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One key number with the step that worked it out."""

    label: str
    amount: str
    exact: str
    detail: str
    step: int


def render_report(plan: Plan) -> str:
    """The report of `plan` as one self-contained HTML page."""
    best = plan.recommended
    return render_page(
        "report.html.j2",
        filters={"value": format_value, "exact": exact_value, "band": band},
        plan=plan,
        best=best,
        promises=[f"{level.name}: {level}" for level in plan.question.levels],
        tiles=tiles(plan),
        edges=edge_table((best.pessimistic, best.expected, best.optimistic)),
        caveats=[(line, caveat_step(line)) for line in plan.caveats],
        weakest=weakest_finding(plan.findings),
        pictures=figures(plan),
        alternatives=alternatives(plan),
        mixed=mixed_fleet(plan),
        survival=plan.survival,
        tiers=worth_rows(plan.survival.tiers) if plan.survival else [],
        policies=worth_rows(plan.survival.policies) if plan.survival else [],
        rejected=group_rejected(plan.rejected),
        facts=[(name.replace("_", " "), value) for name, value in sorted(plan.facts.items())],
        deployment=plan.deployment.to_toml(),
        versions=versions(plan),
    )


# --- numbers --------------------------------------------------------------------------------


def format_value(value: Value) -> str:
    """Three significant digits and the unit, or that it is unknown."""
    if math.isnan(value.amount):
        return "unknown"
    whole = value.amount == int(value.amount) and abs(value.amount) < 1e6
    amount = f"{value.amount:,.0f}" if whole else significant(value.amount)
    return f"{amount} {value.unit}".rstrip()


def exact_value(value: Value) -> str:
    """All digits, for a hover."""
    return "unknown" if math.isnan(value.amount) else f"{value.amount!r} {value.unit}".rstrip()


def band(value: Value) -> str:
    """Where the truth lies, or empty where the number is exact or unknown."""
    if math.isnan(value.amount) or value.low == value.high:
        return ""
    return f"{significant(value.low)} to {significant(value.high)} {value.unit}".rstrip()


def tiles(plan: Plan) -> list[Tile]:
    """The numbers that a budget meeting asks for."""
    best, edge = plan.recommended, plan.recommended.pessimistic
    headroom = edge.instances * edge.usable_rps / plan.demand_rps - 1
    shape = f"{edge.instances} instance{'s' * (edge.instances > 1)} of {best.layout.gpus}"
    known = plan.profile.reuse is not None
    found = Tile(
        label="Prompt tokens cached",
        amount=f"{best.hit_rate:.0%}" if known else "unknown",
        exact=f"{best.hit_rate!r}" if known else "the workload carries no prefix blocks",
        detail="need no prefill" if known else "none are counted on",
        step=8,
    )
    return [
        Tile(label="GPUs", amount=f"{edge.gpus:,}", exact=f"{edge.gpus}", detail=shape, step=11),
        *_money_tiles(edge),
        *_latency_tiles(plan),
        Tile(
            label="Headroom at peak",
            amount=f"{headroom:.0%}",
            exact=f"{headroom!r}",
            detail=f"breaks on {edge.point.bound}",
            step=11,
        ),
        found,
    ]


def _money_tiles(edge: Edge) -> list[Tile]:
    if edge.usd_per_year is None or edge.usd_per_million_tokens is None:
        unknown = "the accelerator has no price; give one with --price"
        return [Tile(label="Cost", amount="unknown", exact=unknown, detail="no price", step=12)]
    return [
        Tile(
            label="Cost of a year",
            amount=format_usd(edge.usd_per_year),
            exact=f"${edge.usd_per_year:,.2f}",
            detail=f"{format_usd(edge.usd_per_year / edge.gpus / 8760)} per GPU-hour",
            step=12,
        ),
        Tile(
            label="Per million tokens",
            amount=format_usd(edge.usd_per_million_tokens),
            exact=f"${edge.usd_per_million_tokens!r}",
            detail="in and out, at average load",
            step=12,
        ),
    ]


def _latency_tiles(plan: Plan) -> list[Tile]:
    point = plan.recommended.pessimistic.point
    made = []
    for metric, label in (("ttft", "TTFT p99 at peak"), ("itl", "ITL p99 at peak")):
        seconds, limit = point.latency_s(metric, 99), strictest(plan, metric)
        if (seen := _replayed_s(plan, metric)) is not None:
            seconds, label = seen, f"{metric.upper()} p99 replayed"
        made.append(
            Tile(
                label=label,
                amount=format_seconds(seconds),
                exact=f"{seconds!r} s",
                detail=f"limit {format_seconds(limit)}" if limit is not None else "no limit given",
                step=10,
            )
        )
    return made


def _replayed_s(plan: Plan, metric: str) -> float | None:
    """The worst p99 of the metric over all classes in the replay that decided, if promised."""
    outcomes = plan.survival.deciding.outcomes if plan.survival else ()
    seen = [o.value_s for o in outcomes if o.target.startswith(f"{metric}_p99=")]
    return max((s for s in seen if s is not None), default=None)


# --- what could be wrong --------------------------------------------------------------------


def caveat_step(caveat: str) -> int:
    """The step whose working a caveat concerns."""
    words = caveat.casefold()
    return next((step for word, step in CAVEAT_STEPS if word in words), 1)


def weakest_finding(findings: Sequence[Finding]) -> Finding:
    """The finding on the worst kind of evidence; among equals, the one with the widest band."""

    def weakness(finding: Finding) -> tuple[int, float]:
        evidence = finding.result.evidence
        return (KINDS.index(evidence.kind), evidence.high - evidence.low)

    return max(findings, key=weakness)


def edge_table(edges: Sequence[Edge]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Rows of (what, [(shown, exact)]) with one column for each edge."""

    def row(name: str, cells: list[tuple[str, str]]) -> tuple[str, list[tuple[str, str]]]:
        return (name, cells)

    def usd(amount: float | None) -> tuple[str, str]:
        return ("unknown", "no price") if amount is None else (format_usd(amount), f"${amount!r}")

    def seconds(amount: float) -> tuple[str, str]:
        return (format_seconds(amount), f"{amount!r} s")

    return [
        row("every step takes", [(f"× {e.slowdown:g}", f"{e.slowdown!r}") for e in edges]),
        row("GPUs", [(f"{e.gpus:,}", f"{e.instances} instances") for e in edges]),
        row("cost of a year", [usd(e.usd_per_year) for e in edges]),
        row("$ per million tokens", [usd(e.usd_per_million_tokens) for e in edges]),
        row(
            "usable requests/s of one",
            [(significant(e.usable_rps), f"{e.usable_rps!r}") for e in edges],
        ),
        row("TTFT p99 at peak", [seconds(e.point.ttft_s(99)) for e in edges]),
        row("ITL p99 at peak", [seconds(e.point.itl_s(99)) for e in edges]),
        row("binds first", [(e.point.bound, f"{e.point.saturation:.1%} full") for e in edges]),
    ]


# --- what else was considered ---------------------------------------------------------------


def alternatives(plan: Plan) -> list[dict[str, Any]]:
    """The chosen plan and the best others as rows, those that nothing beats marked."""
    rows = []
    for candidate in [plan.recommended, *plan.alternatives[:ALTERNATIVES_MAX]]:
        edge = candidate.pessimistic
        rows.append(
            {
                "name": candidate.name,
                "gpus": f"{edge.gpus:,}",
                "cost": "unknown" if edge.usd_per_year is None else format_usd(edge.usd_per_year),
                "exact": "no price" if edge.usd_per_year is None else f"${edge.usd_per_year:,.2f}",
                "headroom": f"{_headroom(candidate, plan):.0%}",
                "ttft": format_seconds(edge.point.ttft_s(99)),
                "itl": format_seconds(edge.point.itl_s(99)),
                "front": candidate.name in plan.pareto,
                "chosen": candidate is plan.recommended,
                "why": "chosen"
                if candidate is plan.recommended
                else why_not(candidate, plan.recommended),
            }
        )
    return rows


def _headroom(candidate: Candidate, plan: Plan) -> float:
    edge = candidate.pessimistic
    return edge.instances * edge.usable_rps / plan.demand_rps - 1


def worth_rows(worths: Sequence[Worth]) -> list[dict[str, Any]]:
    """The smallest fleet with each, and what it saves against the one that saves least."""
    gpus = [w.gpus for w in worths if w.gpus is not None]
    usd = [w.usd_per_year for w in worths if w.usd_per_year is not None]
    rows = []
    for worth in worths:
        saved = "–" if worth.gpus is None or worth.gpus == max(gpus) else ""
        if worth.gpus is not None and not saved:
            saved = f"{max(gpus) - worth.gpus:,} GPUs"
            if worth.usd_per_year is not None:
                saved += f", {format_usd(max(usd) - worth.usd_per_year)}"
        none = "none that was tried"
        rows.append(
            {
                "label": worth.label,
                "instances": none if worth.instances is None else f"{worth.instances:,}",
                "gpus": "–" if worth.gpus is None else f"{worth.gpus:,}",
                "cost": "–" if worth.usd_per_year is None else format_usd(worth.usd_per_year),
                "ttft": "–" if worth.ttft_p99_s is None else format_seconds(worth.ttft_p99_s),
                "hits": f"{worth.hit_share:.1%}",
                "saved": saved,
                "chosen": worth.chosen,
            }
        )
    return rows


def mixed_fleet(plan: Plan) -> str:
    """Whether two kinds of accelerator would beat one, as a sentence."""
    mixed = plan.mixed_fleet
    if mixed is None:
        return "Two kinds of accelerator, split by prompt length, do not beat this fleet."
    return (
        f"Two kinds would save {mixed['saved']:.0%}: prompts up to {mixed['split_tokens']:,.0f} "
        f"tokens ({mixed['short_share']:.0%} of requests) on {mixed['short'].name}, the others on "
        f"{mixed['long'].name}, for {format_usd(mixed['usd_per_year'])} a year instead of "
        f"{format_usd(mixed['single_usd_per_year'])}. It needs a router by prompt length."
    )


def group_rejected(rejected: Sequence[Rejected]) -> list[tuple[str, list[Rejected]]]:
    """Rejections that differ in their numbers alone, together; the most frequent reason first."""
    groups: dict[str, list[Rejected]] = {}
    for item in rejected:
        groups.setdefault(re.sub(r"[\d.,]+( (min|ms|s|MB|GB|TB|kB)\b)?", "#", item.why), []).append(
            item
        )
    large = [g for g in groups.values() if len(g) >= GROUP_MIN]
    small = [item for g in groups.values() if len(g) < GROUP_MIN for item in g]
    named = [(f"such as: {g[0].why}", g) for g in sorted(large, key=len, reverse=True)]
    return [*named, ("for other reasons", small)] if small else named


def versions(plan: Plan) -> list[tuple[str, str]]:
    """What this plan is a function of, so that it can be made again."""
    question, gpu = plan.question, plan.recommended.gpu
    planned = plan.deployment.planned
    return [
        ("made by", planned.created_by if planned else "unknown"),
        ("model shapes", question.model.source),
        ("workload", f"{plan.profile.source}, {plan.profile.requests:,} requests"),
        ("step law", plan.recommended.evidence.source),
        ("engine imitated", plan.recommended.instance.engine.source),
        ("price", f"{gpu.price.source} ({gpu.price.as_of})"),
        ("growth, safety", f"{question.growth:g}, {question.safety:g}"),
        ("accelerators considered", ", ".join(g.name for g in question.gpus)),
    ]
