"""Runs -> the pictures of the simulation page: which numbers go into which picture.

`sim_page` calls `sim_figures`.  Every number is taken from the columns that `sim.measure`
takes, so the page and the summary cannot disagree.  Curves are thinned to what a screen can
show; percentiles in tables are of all requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierline.base.clock import FOREVER_PS, PS_PER_NS, PS_PER_S
from tierline.base.units import format_seconds, significant
from tierline.kv.transfer import TIER_NAMES
from tierline.planner.pictures import Picture
from tierline.planner.sim_pictures import (
    STYLES,
    Bar,
    Curve,
    Series,
    gantt,
    latencies,
    over_time,
)
from tierline.sim.columns import Column, column
from tierline.sim.life import KINDS, beside_its_wait, life
from tierline.sim.measure import nearest_rank, promised_ps
from tierline.sim.record import UNFINISHED, Run

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

CURVE_POINTS = 160
BINS = 180
BESIDE_MAX = 14
LATENCY_PICTURES_MAX = 6
WORDS = {"ttft": "TTFT", "itl": "longest gap", "tpot": "TPOT", "e2e": "end to end"}


def sim_figures(runs: Sequence[Run], request: int | None) -> list[Picture]:
    """The pictures of the first run, with the others beside it where they share a frame."""
    pictures = [*latency_figures(runs), queue_figure(runs)]
    pictures += [batch_figure(runs[0]), memory_figure(runs[0])]
    if request is not None:
        pictures.append(life_figure(runs[0], request))
    return pictures


# --- latencies ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """One latency of one class: what a picture shows."""

    level: int
    metric: str
    percentile: float
    limit_ps: int | None


def latency_figures(runs: Sequence[Run]) -> list[Picture]:
    """A picture for each promise, the least kept first; without promises, of all requests."""
    if not len(runs[0].requests):
        note = "The trace holds no request within the time that was replayed."
        return [Picture(name="latency", title="Nothing arrived", note=note)]
    met = _met(runs[0])
    frames = [
        (met[(level.name, target.text)], number, i, target)
        for number, level in enumerate(runs[0].levels)
        for i, target in enumerate(level.targets)
        if (level.name, target.text) in met
    ]
    if not frames:
        return [
            _latency(runs, _Frame(level=-1, metric=m, percentile=99, limit_ps=None)) for m in WORDS
        ]
    return [
        _latency(
            runs,
            _Frame(
                level=number,
                metric=target.metric,
                percentile=target.percentile,
                limit_ps=target.limit_ns * PS_PER_NS,
            ),
        )
        for _, number, _, target in sorted(frames, key=lambda f: f[:3])[:LATENCY_PICTURES_MAX]
    ]


def _met(run: Run) -> dict[tuple[str, str], float]:
    """Requests within each promise of the classes that anybody is in, as a share."""
    levels, values = column(run.requests, "level"), promised_ps(run.requests)
    return {
        (level.name, target.text): float(
            (values[target.metric][levels == number] <= target.limit_ns * PS_PER_NS).mean()
        )
        for number, level in enumerate(run.levels)
        for target in level.targets
        if (levels == number).any()
    }


def _latency(runs: Sequence[Run], shown: _Frame) -> Picture:
    named = runs[0].levels[shown.level].name if shown.level >= 0 else "all"
    several = len(runs[0].levels) > 1 and shown.level >= 0
    return latencies(
        f"{shown.metric}-{shown.level + 1}",
        f"{WORDS[shown.metric]}{f' of {named}' if several else ''}",
        [_curve(run, shown) for run in runs],
        limit_s=None if shown.limit_ps is None else shown.limit_ps / PS_PER_S,
        promise=f"p{shown.percentile:g} limit",
    )


def _curve(run: Run, shown: _Frame) -> Curve:
    import numpy as np

    values = promised_ps(run.requests)[shown.metric]
    if shown.level >= 0:
        values = values[column(run.requests, "level") == shown.level]
    ordered = np.sort(values)
    served = ordered[ordered < FOREVER_PS]
    ranks = np.unique(np.linspace(0, max(len(served) - 1, 0), CURVE_POINTS).round().astype(int))
    ranks = ranks[: len(served)]
    points = [(int(served[i]) / PS_PER_S, (int(i) + 1) / len(ordered)) for i in ranks if served[i]]
    percents = sorted({50.0, 90.0, 95.0, 99.0, shown.percentile})
    found = {f"p{p:g}": nearest_rank(ordered, p) for p in percents}
    return Curve(
        policy=run.policy,
        points=points or [(1e-6, 0.0)],
        percentiles={n: None if v == FOREVER_PS else v / PS_PER_S for n, v in found.items()},
        within=None if shown.limit_ps is None else float((ordered <= shown.limit_ps).mean()),
    )


# --- over time ------------------------------------------------------------------------------


def queue_figure(runs: Sequence[Run]) -> Picture:
    """How many wait for their first step, the most in each stretch of time."""
    end_ps = max(run.end_ps for run in runs)
    series = [
        Series(words=run.policy, colour=STYLES[i % len(STYLES)], points=queue_points(run, end_ps))
        for i, run in enumerate(runs)
    ]
    at_s, most = max(series[0].points, key=lambda point: point[1])
    title = (
        f"At most {most:,.0f} request{'s' * (most != 1)} wait under {runs[0].policy}, "
        f"{format_seconds(at_s)} into the run"
        if most
        else f"No request ever waits under {runs[0].policy}"
    )
    return over_time(
        "queue",
        title,
        series,
        label="requests waiting",
        faults=_fault_times(runs[0]),
        note="Arrived and not admitted; the most in each of "
        f"{BINS} stretches of {format_seconds(end_ps / PS_PER_S / BINS)}.",
    )


def queue_points(run: Run, end_ps: int) -> list[tuple[float, float]]:
    """(seconds, most requests that waited at once) for equal stretches of time."""
    import numpy as np

    requests = run.requests
    arrival, admitted = column(requests, "arrival_ps"), column(requests, "admitted_ps")
    never = (admitted < 0) & (column(requests, "outcome") != UNFINISHED)  # refused or lost
    at = np.concatenate([arrival[~never], admitted[admitted >= 0]])
    change = np.concatenate([np.ones((~never).sum(), int), -np.ones((admitted >= 0).sum(), int)])
    order = np.lexsort((change, at))  # who leaves at an instant is gone before who comes
    at, waiting = at[order], np.cumsum(change[order])
    edges = np.linspace(0, end_ps, BINS + 1)
    first = np.searchsorted(at, edges[:-1], side="left")
    last = np.searchsorted(at, edges[1:], side="right")
    points = []
    for edge, i, j in zip(edges[:-1].tolist(), first.tolist(), last.tolist(), strict=True):
        before = int(waiting[i - 1]) if i else 0
        points.append((edge / PS_PER_S, float(max(before, *waiting[i:j].tolist(), 0))))
    return points


def batch_figure(run: Run) -> Picture:
    """Tokens of the steps over time, prefill and decode."""
    if run.steps is None or not len(run.steps):
        return _no_steps("batch", "What a step holds")
    edges = _edges(0, run.end_ps)
    replicas = len(run.replicas)
    series = [
        Series(
            words=words,
            colour=colour,
            points=mean_over_time(run, edges, values, replica=None),
        )
        for words, colour, values in (
            ("decode", "green", "decodes"),
            ("prefill", "blue", "prefill_tokens"),
        )
    ]
    prefill, decode = (
        sum(r.prefill_tokens for r in run.replicas),
        sum(r.decode_tokens for r in run.replicas),
    )
    share = prefill / max(prefill + decode, 1)
    title = (
        f"{share:.0%} of computed tokens are prompts; a replica works on "
        f"{significant(sum(v for s in series for _, v in s.points) / BINS)} tokens at a time"
    )
    return over_time(
        "batch",
        title,
        series,
        label="tokens in a step",
        faults=_fault_times(run),
        stacked=True,
        note=f"Mean over {replicas} replica{'s' * (replicas != 1)} and over time, "
        f"idle time as nothing; {run.policy}.",
    )


def memory_figure(run: Run) -> Picture:
    """Blocks in every tier over time, as a share of the most each one held or holds."""
    import numpy as np

    if run.steps is None or not len(run.steps):
        return _no_steps("memory", "What each tier holds")
    edges = _edges(0, run.end_ps)
    device = held_over_time(run, edges, column(run.steps, "pages_used"))
    total = sum(r.pages_total for r in run.replicas)
    times = (edges[1:] / PS_PER_S).tolist()
    series = [
        Series(
            words=f"device, of {total:,} blocks",
            colour="green",
            points=list(zip(times, (device / max(total, 1)).tolist(), strict=True)),
        )
    ]
    for tier, colour in ((1, "orange"), (2, "purple"), (3, "grey")):
        stored = np.frombuffer(
            run.steps.stored_blocks[tier - 1], dtype=run.steps.stored_blocks[tier - 1].typecode
        )
        held = held_over_time(run, edges, stored)
        if held.any():
            points = list(zip(times, (held / held.max()).tolist(), strict=True))
            words = f"{TIER_NAMES[tier]}, of at most {held.max():,.0f} blocks"
            series.append(Series(words=words, colour=colour, points=points))
    fullest = max(v for _, v in series[0].points)
    title = (
        f"Device KV memory is {fullest:.0%} full at most; "
        f"{sum(r.preemptions for r in run.replicas):,} preemptions, "
        f"{sum(r.evicted_blocks[0] for r in run.replicas):,} blocks evicted from it"
    )
    return over_time(
        "memory",
        title,
        series,
        label="blocks held or cached",
        unit="%",
        limit=("full", 1.0),
        faults=_fault_times(run),
        note="Lower tiers are drawn against the most that they ever held."
        if len(series) > 1
        else "No tier below the device held anything.",
    )


def _no_steps(name: str, title: str) -> Picture:
    note = "The run kept no steps. Run it with an output folder and they are kept."
    return Picture(name=name, title=title, note=note)


def _fault_times(run: Run) -> list[tuple[float, str]]:
    return [(fault.at_ps / PS_PER_S, fault.what) for fault in run.faults]


def _edges(start_ps: int, end_ps: int, bins: int = BINS) -> "npt.NDArray[np.float64]":
    import numpy as np

    return np.linspace(start_ps, max(end_ps, start_ps + 1), bins + 1)


def mean_over_time(
    run: Run, edges: "npt.NDArray[np.float64]", name: str, *, replica: int | None
) -> list[tuple[float, float]]:
    """A column of the steps as a mean over each stretch; of all replicas unless one is named.

    A step counts for as long as it lasts, so the sum over a stretch is exact however long
    its steps are.
    """
    import numpy as np

    assert run.steps is not None
    start, end = column(run.steps, "start_ps"), column(run.steps, "end_ps")
    values, owner = column(run.steps, name), column(run.steps, "replica")
    numbers = [r.number for r in run.replicas] if replica is None else [replica]
    means = np.zeros(len(edges) - 1)
    for number in numbers:
        mine = owner == number
        if not mine.any():
            continue
        knots = np.column_stack([start[mine], end[mine]]).ravel()
        area = np.cumsum(values[mine] * (end[mine] - start[mine]).astype(float))
        heights = np.column_stack([np.append(0, area[:-1]), area]).ravel()
        means += np.diff(np.interp(edges, knots, heights)) / np.diff(edges)
    middle = (edges[:-1] + edges[1:]) / 2 / PS_PER_S
    return list(zip(middle.tolist(), (means / len(numbers)).tolist(), strict=True))


def held_over_time(
    run: Run, edges: "npt.NDArray[np.float64]", values: "Column"
) -> "npt.NDArray[np.float64]":
    """What the replicas hold together at the end of each stretch."""
    import numpy as np

    assert run.steps is not None
    end, owner = column(run.steps, "end_ps"), column(run.steps, "replica")
    held = np.zeros(len(edges) - 1)
    for replica in run.replicas:
        mine = owner == replica.number
        last = np.searchsorted(end[mine], edges[1:], side="right") - 1
        held += np.where(last >= 0, np.append(values[mine], 0)[last], 0)
    return held


# --- one request ----------------------------------------------------------------------------


def life_figure(run: Run, request: int) -> Picture:
    """Why one request took so long: its life, and what its replica did meanwhile."""
    stretches = life(run, request)
    level = run.levels[run.requests.level[request]].name
    if not stretches:
        return Picture(name="life", title=f"Request {request} has no life", note="It was refused.")
    start_ps, end_ps = stretches[0].start_ps, stretches[-1].end_ps
    edges = _edges(start_ps, end_ps, 120)
    replica = run.requests.replica[request]
    batch = []
    if run.steps is not None and replica >= 0:
        batch = [
            Series(words=w, colour=c, points=mean_over_time(run, edges, name, replica=replica))
            for w, c, name in (
                ("decode", "green", "decodes"),
                ("prefill", "blue", "prefill_tokens"),
            )
        ]
    totals = {
        kind: sum(s.end_ps - s.start_ps for s in stretches if s.kind == kind) for kind in KINDS
    }
    longest = max(totals, key=lambda kind: totals[kind])
    length = end_ps - start_ps
    prompt, output = run.requests.input_tokens[request], run.requests.output_tokens[request]
    title = (
        f"Request {request} spent {totals[longest] / length:.0%} of its "
        f"{format_seconds(length / PS_PER_S)} {DOING[longest]}"
    )
    return gantt(
        _drawn(run, request, f"request {request}: {prompt:,} tokens in, {output:,} out, {level}"),
        [_drawn(run, other, f"request {other}") for other in beside_its_wait(run, request)],
        batch,
        title=title,
        note=f"On replica {replica} under {run.policy}. Hover over a bar for its request.",
    )


DOING = {
    "queued": "in the queue",
    "loading": "waiting for its cached tokens",
    "prefill": "computing its prompt",
    "preempted": "preempted",
    "decode": "decoding",
}


def _drawn(run: Run, request: int, words: str) -> Bar:
    return Bar(
        words=words,
        stretches=[
            (s.kind, s.start_ps / PS_PER_S, s.end_ps / PS_PER_S) for s in life(run, request)
        ],
    )
