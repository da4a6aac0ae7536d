"""Runs -> one HTML file that opens offline: the answer, what could be wrong, pictures, tables.

`tierline sim` writes it.  The first run is the one the page is about, the others stand beside
it.  The page is laid out by `templates/sim.html.j2`; the pictures are made by `sim_figures`.
What is here chooses what the page says and in which words; equal runs are equal bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tierline.base.clock import PS_PER_S
from tierline.base.units import format_bytes, format_seconds, format_usd, significant
from tierline.kv.transfer import TIER_NAMES
from tierline.planner.pages import render_page
from tierline.planner.sim_figures import sim_figures
from tierline.sim.compare import Difference, good_difference
from tierline.sim.measure import Group, Summary
from tierline.sim.record import Run
from tierline.sim.text import headline
from tierline.workload.slo import parse_target

TENANTS_MAX = 20
REPLICAS_MAX = 40
MOMENTS_MAX = 80
THIN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SimPage:
    """What a page is made from, besides the runs."""

    model: str
    fleet: str  # 8 × H100 SXM, tp 4
    trace: str
    command: str  # that makes the page again
    inputs: tuple[tuple[str, str], ...]  # what the run is a function of: name, value
    deployment: str  # its TOML
    caveats: tuple[str, ...] = ()
    request: int | None = None  # whose life is drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One key number, with the part of the page that has more of it."""

    label: str
    amount: str
    exact: str
    detail: str
    anchor: str


def render_sim_page(page: SimPage, runs: Sequence[Run], told: Sequence[Summary]) -> str:
    """The page of these runs, and what was told of each, as one self-contained HTML text."""
    first = told[0]
    tenants = group_rows(first.tenants)
    return render_page(
        "sim.html.j2",
        filters={},
        page=page,
        headline=answer(told),
        promises=[f"{level.name}: {level}" for level in runs[0].levels if level.targets],
        tiles=tiles(first),
        caveats=[*page.caveats, *doubts(runs[0], first)],
        policies=policies(runs, told),
        by_class=by_class(told),
        pictures=sim_figures(runs, page.request),
        kept=promise_rows(first),
        classes=group_rows(first.levels),
        tenants=tenants[:TENANTS_MAX] if len(tenants) > 1 else [],
        tenants_more=max(len(tenants) - TENANTS_MAX, 0),
        fairness=fairness_words(first),
        replicas=replica_rows(runs[0]),
        replicas_more=max(len(runs[0].replicas) - REPLICAS_MAX, 0),
        moved=[(kind, format_bytes(count)) for kind, count in first.fleet.moved_bytes.items()],
        events=[
            (chr(65 + i) if i < 26 else "", format_seconds(f.at_ps / PS_PER_S), f.what, f.why)
            for i, f in enumerate(runs[0].faults)
        ],
        moments=moment_rows(runs[0], page.request),
        summary=first,
    )


# --- the answer -----------------------------------------------------------------------------


def answer(told: Sequence[Summary]) -> str:
    """The headline of the first policy, and the best of the others in a clause."""
    first, *others = told
    words = headline(first)
    if not others:
        return words
    best = max(others, key=lambda s: s.all.good_share)
    return f"{words[:-1]}; {best.policy} {best.all.good_share:.1%}."


def tiles(told: Summary) -> list[Tile]:
    """The numbers to look at first."""
    everyone, fleet, money = told.all, told.fleet, told.money
    tile = [
        Tile(
            label="Good requests",
            amount=f"{everyone.good_share:.1%}",
            exact=f"{everyone.good} of {everyone.requests}",
            detail=f"{significant(everyone.goodput_rps)} a second",
            anchor="promises",
        )
    ]
    for name, words in (
        ("ttft", "TTFT p99"),
        ("itl", "Longest gap p99"),
        ("e2e", "End to end p99"),
    ):
        spread = getattr(everyone, name)
        shown = "–" if spread.p99_s is None else format_seconds(spread.p99_s)
        median = "–" if spread.p50_s is None else format_seconds(spread.p50_s)
        tile.append(
            Tile(
                label=words,
                amount=shown,
                exact=f"{spread.p99_s!r} s of {spread.requests} requests",
                detail=f"median {median}",
                anchor="latency",
            )
        )
    hit = sum(fleet.hit_share.values())
    tile += [
        Tile(
            label="Time in steps",
            amount=f"{fleet.utilization:.0%}",
            exact=f"{fleet.utilization!r}",
            detail=f"of {significant(fleet.gpu_hours)} GPU-hours",
            anchor="fleet",
        ),
        Tile(
            label="Prompt tokens found",
            amount=f"{hit:.0%}",
            exact=f"{fleet.hit_share!r}",
            detail=", ".join(f"{n} {s:.0%}" for n, s in fleet.hit_share.items() if s >= 0.005)
            or "in no tier",
            anchor="fleet",
        ),
        Tile(
            label="Cost",
            amount="unknown" if money.usd is None else format_usd(money.usd),
            exact="the accelerator has no price" if money.usd is None else f"${money.usd!r}",
            detail="no price"
            if money.usd_per_million_output_tokens is None
            else f"{format_usd(money.usd_per_million_output_tokens)} a million output tokens",
            anchor="fleet",
        ),
    ]
    return tile


def doubts(run: Run, told: Summary) -> list[str]:
    """What the run itself says against being believed."""
    said = [*_thin(told)]
    if told.all.unfinished:
        said.append(
            f"{told.all.unfinished:,} requests were unfinished at the end and count as not served."
        )
    if any(t.metric == "itl" for level in run.levels for t in level.targets):
        said.append(
            "A promise on ITL is judged over all gaps between tokens; a request is good only when "
            "its longest gap is within the limit, which is stricter."
        )
    return said


def _thin(told: Summary) -> list[str]:
    """Percentiles that rest on a handful of requests, in one line."""
    sizes = {group.name: group.requests for group in told.levels}
    beyond = [
        (sizes[p.level] * (100 - parse_target(p.target).percentile) / 100, p) for p in told.promises
    ]
    thin = [(count, p) for count, p in beyond if count < THIN]
    if not thin:
        return []
    count, worst = min(thin, key=lambda item: item[0])
    return [
        f"{len(thin)} of {len(beyond)} promises rest on fewer than {THIN} requests beyond their "
        f"percentile ({worst.target} of {worst.level}: {significant(count, 2)} of "
        f"{sizes[worst.level]:,}); a longer trace would tell them better."
    ]


# --- tables ---------------------------------------------------------------------------------


def policies(runs: Sequence[Run], told: Sequence[Summary]) -> list[dict[str, str]]:
    """A row for each policy, with the difference to the first and its interval."""
    rows = []
    for run, one in zip(runs, told, strict=True):
        cost = one.money.usd_per_good_request
        rows.append(
            {
                "policy": one.policy,
                "good": f"{one.all.good_share:.1%}",
                "gain": "–" if run is runs[0] else _gain(good_difference(run, runs[0])),
                "goodput": significant(one.all.goodput_rps),
                "ttft": _seconds(one.all.ttft.p99_s),
                "itl": _seconds(one.all.itl.p99_s),
                "e2e": _seconds(one.all.e2e.p99_s),
                "preemptions": f"{one.fleet.preemptions:,}",
                "cost": "–" if cost is None else format_usd(cost * 1000),
                "hash": one.hash,
            }
        )
    return rows


def by_class(told: Sequence[Summary]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Good requests by class and policy; nothing when there is one class."""
    names = [group.name for group in told[0].levels]
    if len(names) < 2:
        return [], []
    return names, [(s.policy, [f"{g.good_share:.1%}" for g in s.levels]) for s in told]


def promise_rows(told: Summary) -> list[tuple[str, ...]]:
    """Class, promise, verdict, what it is, share within."""
    return [
        (
            p.level,
            p.target,
            "✓ kept" if p.kept else "✗ broken",
            "not served" if p.value_s is None else format_seconds(p.value_s),
            f"{p.met_share:.2%} of {p.of}",
        )
        for p in told.promises
    ]


def group_rows(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """How each class or tenant fared."""
    return [
        (
            g.name or "(none)",
            f"{g.requests:,}",
            f"{g.good_share:.1%}",
            significant(g.goodput_rps),
            *(_seconds(v) for v in (g.queueing.p99_s, g.ttft.p50_s, g.ttft.p99_s)),
            *(_seconds(v) for v in (g.itl.p99_s, g.tpot.p99_s, g.e2e.p50_s, g.e2e.p99_s)),
            f"{g.refused + g.failed + g.unfinished:,}",
        )
        for g in groups
        if g.requests
    ]


def replica_rows(run: Run) -> list[tuple[str, ...]]:
    """What each replica did."""
    return [
        (
            f"{r.number} {r.name}".rstrip(),
            f"{r.gpus}",
            f"{r.busy_ps / max(r.up_ps, 1):.1%}",
            f"{r.steps:,}",
            f"{r.prefill_tokens:,}",
            f"{r.decode_tokens:,}",
            ", ".join(f"{n} {t:,}" for n, t in zip(TIER_NAMES, r.loaded_tokens, strict=True) if t)
            or "–",
            f"{r.preemptions:,}",
        )
        for r in run.replicas[:REPLICAS_MAX]
    ]


def fairness_words(told: Summary) -> str:
    """Fairness as a sentence, or nothing with one tenant."""
    fair = told.fairness
    if fair.jain is None or fair.lag_tokens is None:
        return ""
    return (
        f"Jain's index over the tokens of {fair.tenants} tenants is {fair.jain:.3f} (1 is equal). "
        f"While two tenants both waited, none fell more than {fair.lag_tokens:,.0f} tokens behind "
        "another."
    )


def moment_rows(run: Run, request: int | None) -> list[tuple[str, str, str]]:
    """What happened to the chosen request; chunks in a row are told once."""
    if request is None:
        return []
    start_ps, rows = run.requests.arrival_ps[request], []
    last = ""
    for moment in run.moments.get(request, []):
        if moment.what == last == "chunk":
            continue
        last = moment.what
        rows.append((format_seconds((moment.at_ps - start_ps) / PS_PER_S), last, moment.why))
    return rows[:MOMENTS_MAX]


def _gain(gain: Difference | None) -> str:
    if gain is None:
        return "too few requests"
    low, high = gain.low * 100, gain.high * 100
    return f"{gain.mean * 100:+.1f} points ({low:+.1f} to {high:+.1f})"


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else format_seconds(seconds)
