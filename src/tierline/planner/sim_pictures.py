"""The pictures of a simulation: plain numbers in, a titled SVG and its table out.

`sim_figures` picks the numbers out of runs; this module knows no run.  As in `pictures`, every
title states what the data says, and every picture carries its numbers as a table.

Blue is prompts, green is decoding, orange is data on its way, vermillion is a limit, a fault
or lost work, grey is waiting.  Policies have a colour and a dash each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tierline.base.units import format_seconds, significant
from tierline.planner.pictures import Picture
from tierline.planner.svg import (
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    box,
    frame,
    line,
    path,
    svg,
    text,
    text_width,
    x_axis,
    y_axis,
)

STYLES: tuple[str, ...] = (  # one for each policy there is
    *("blue", "orange dashed", "green", "purple dashed", "sky", "grey dashed"),
    *("orange", "green dashed", "purple", "grey"),
)
STRETCHES = {
    "queued": "grey",
    "loading": "orange",
    "prefill": "blue",
    "preempted": "lost",
    "decode": "green",
}
INK = {kind: "on dark" if fill in ("grey", "orange") else "on" for kind, fill in STRETCHES.items()}

Points = Sequence[tuple[float, float]]


# --- latencies ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """How late the requests of one policy are; `within` is the share inside the limit."""

    policy: str
    points: Points  # (seconds, share of requests that are within them), both growing
    percentiles: Mapping[str, float | None]  # "p99" -> seconds, None: not served
    within: float | None = None


def latencies(
    name: str,
    words: str,
    curves: Sequence[Curve],
    *,
    limit_s: float | None,
    promise: str = "",
    title: str = "",
) -> Picture:
    """The share of requests within a latency, one line for each policy in one frame."""
    shown = [s for c in curves for s, _ in c.points] + ([limit_s] if limit_s else [])
    low = max(min(shown), max(shown) / 1e5)
    x = x_axis(low, max(shown) * 1.05, f"{words} (log)", log=True, unit="s")
    y = y_axis(0, 1, "share of requests within it", unit="%")
    parts, names = frame(x, y), []
    if limit_s:
        at, words_at = x.at(limit_s), f"{promise} {format_seconds(limit_s)}".strip()
        left = at - x.start > text_width(words_at)  # below the curves, which have risen by then
        parts.append(line(at, y.start, at, y.end, "limit"))
        anchor, shift = ("end", -6) if left else ("start", 6)
        names.append(text(at + shift, y.start - 8, words_at, anchor=anchor, class_="halo"))
    for i, curve in reversed(list(enumerate(curves))):  # the first lies on top
        inside = [(s, share) for s, share in curve.points if s >= low] or list(curve.points[-1:])
        track = [(x.at(s), y.at(share)) for s, share in inside]
        end = [(x.end, track[-1][1])]
        parts.append(path([*track, *end], f"curve {STYLES[i % len(STYLES)]}"))
    title = title or _latencies_title(words, curves, limit_s)
    columns = list(curves[0].percentiles)
    return Picture(
        name=name,
        title=title,
        svg=svg([*parts, *names], label=title),
        note="Shares are of all requests that arrived; a line that ends below 100% lost the rest.",
        keys=tuple((STYLES[i % len(STYLES)], c.policy) for i, c in enumerate(curves)),
        columns=("policy", *(["within the limit"] if limit_s else []), *columns),
        rows=tuple(
            (
                c.policy,
                *([f"{c.within or 0:.1%}"] if limit_s else []),
                *("not served" if v is None else format_seconds(v) for v in c.percentiles.values()),
            )
            for c in curves
        ),
    )


def _latencies_title(words: str, curves: Sequence[Curve], limit_s: float | None) -> str:
    first = curves[0]
    others = sorted(curves[1:], key=lambda c: -(c.within or 0))
    if limit_s is not None:
        said = (
            f"{first.within or 0:.1%} of requests keep their {words} of {format_seconds(limit_s)}"
        )
        if not others:
            return said
        return f"{said} under {first.policy}, {others[0].within or 0:.1%} under {others[0].policy}"
    tail = list(first.percentiles)[-1]
    value = first.percentiles[tail]
    reached = "is not reached by all" if value is None else f"is {format_seconds(value)}"
    return f"{words} {tail} {reached} under {first.policy}"


# --- over time ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line over time."""

    words: str
    colour: str
    points: Points  # (seconds, value)


def over_time(
    name: str,
    title: str,
    series: Sequence[Series],
    *,
    label: str,
    unit: str = "",
    limit: tuple[str, float] | None = None,
    faults: Points | Sequence[tuple[float, str]] = (),
    note: str = "",
    stacked: bool = False,
) -> Picture:
    """Values over the time of the run; faults are vertical lines named A, B, ..."""
    top = max(_tops(series, stacked=stacked), default=0.0)
    end_s = max(t for s in series for t, _ in s.points)
    scale, word = _clock(end_s)
    x = x_axis(0, end_s / scale, f"{word} since the run began")
    y = y_axis(0, max(top * 1.12, (limit[1] if limit else 0) * 1.12, 1e-9), label, unit=unit)
    parts = frame(x, y)
    times = [x.at(t / scale) for t, _ in series[0].points]
    if stacked:
        parts += _stack(series, times, y.at)
    else:
        for one in reversed(series):  # the first lies on top
            heights = [y.at(v) for _, v in one.points]
            parts.append(path(zip(times, heights, strict=True), f"curve thin {one.colour}"))
    if limit is not None:
        at = y.at(limit[1])
        parts += [
            line(x.start, at, x.end, at, "limit"),
            text(x.end, at - 5, limit[0], anchor="end", class_="halo"),
        ]
    parts += _faults(x, y, [float(at) / scale for at, _ in faults])
    return Picture(
        name=name,
        title=title,
        svg=svg(parts, label=title),
        note=note,
        keys=tuple((one.colour, one.words) for one in series),
        columns=("", "mean", "highest", "at"),
        rows=tuple(_row(one, unit) for one in series),
    )


def _stack(
    series: Sequence[Series], places: Sequence[float], height: Callable[[float], float]
) -> list[str]:
    """Areas on top of each other, the first at the bottom."""
    parts, floor = [], [0.0] * len(places)
    for one in series:
        values = [v + under for (_, v), under in zip(one.points, floor, strict=True)]
        upper = [(x, height(v)) for x, v in zip(places, values, strict=True)]
        lower = [(x, height(v)) for x, v in zip(places, floor, strict=True)]
        parts.append(path([*upper, *reversed(lower)], f"fill {one.colour}", closed=True))
        floor = values
    return parts


def _tops(series: Sequence[Series], *, stacked: bool) -> list[float]:
    if not stacked:
        return [v for one in series for _, v in one.points]
    return [sum(vs) for vs in zip(*([v for _, v in s.points] for s in series), strict=True)]


def _row(one: Series, unit: str) -> tuple[str, ...]:
    values = [v for _, v in one.points]
    highest = max(range(len(values)), key=lambda i: values[i])
    mean = sum(values) / len(values)

    def shown(value: float) -> str:
        return f"{value:.1%}" if unit == "%" else significant(value)

    at = format_seconds(one.points[highest][0])
    return (one.words, shown(mean), shown(values[highest]), at)


def _faults(x: Axis, y: Axis, at: Sequence[float]) -> list[str]:
    """A line for each fault, lettered while letters are few and apart."""
    parts, last = [], -1e9
    for i, value in enumerate(at):
        place = x.at(value)
        parts.append(line(place, y.start, place, y.end, "fault"))
        if i < 26 and place - last > 16:
            anchor = "end" if place > x.end - 14 else "start"
            shift = -4 if anchor == "end" else 4
            parts.append(text(place + shift, y.end + 11, chr(65 + i), anchor=anchor, class_="halo"))
            last = place
    return parts


def _clock(seconds: float) -> tuple[float, str]:
    if seconds > 3 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if seconds > 180 else (1.0, "seconds")


# --- one request ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One life as stretches: (kind, start, end) in seconds."""

    words: str
    stretches: Sequence[tuple[str, float, float]]


def gantt(
    chosen: Bar, others: Sequence[Bar], batch: Sequence[Series], *, title: str, note: str
) -> Picture:
    """The life of a request, who ran beside it, and the steps they shared."""
    start, end = chosen.stretches[0][1], chosen.stretches[-1][2]
    scale, unit = (1.0, "s") if end - start >= 1 else (1e-3, "ms")
    row, first = 15, TOP + 24
    others_top = first + 44
    steps_top = others_top + row * len(others) + (26 if others else 4)
    steps_height = 70 if batch else 0
    ground = steps_top + steps_height
    ticks = x_axis(0, (end - start) / scale, "").ticks
    x = Axis(
        low=0,
        high=(end - start) / scale,
        log=False,
        label=f"{unit} since it arrived",
        ticks=ticks,
        start=8,
        end=WIDTH - RIGHT,
    )
    parts = []
    for value, words in x.ticks:
        parts += [
            line(x.at(value), first, x.at(value), ground, "grid"),
            text(
                x.at(value),
                ground + 18,
                words,
                anchor="start" if value == 0 else "end" if x.at(value) > x.end - 12 else "middle",
                class_="tick",
            ),
        ]
    parts.append(text(x.start, TOP + 12, chosen.words, class_="t strong"))
    parts += _bar(chosen, x, top=first, height=26, origin=start, scale=scale)
    if others:
        parts.append(text(x.start, others_top, "beside it on the replica", class_="axis"))
    for i, bar in enumerate(others):
        top = others_top + 6 + row * i
        parts += _bar(bar, x, top=top, height=row - 5, origin=start, scale=scale)
    if batch:
        parts += _columns(batch, x, top=steps_top, ground=ground, origin=start, scale=scale)
    parts.append(text((x.start + x.end) / 2, ground + 37, x.label, anchor="middle", class_="axis"))
    used = {kind for bar in (chosen, *others) for kind, _, _ in bar.stretches}
    return Picture(
        name="life",
        title=title,
        svg=svg(parts, label=title, height=ground + 46),
        note=note,
        keys=tuple((colour, kind) for kind, colour in STRETCHES.items() if kind in used),
        columns=("stretch", "from", "for"),
        rows=tuple(
            (kind, format_seconds(a - start), format_seconds(b - a))
            for kind, a, b in chosen.stretches
        ),
    )


def _bar(bar: Bar, x: Axis, *, top: float, height: float, origin: float, scale: float) -> list[str]:
    """One life; a wide stretch carries its name, so that colour is not needed to read it."""
    parts = []
    for kind, begins, ends in bar.stretches:
        left, right = x.at((begins - origin) / scale), x.at((ends - origin) / scale)
        if right <= left:
            continue  # before or after what is shown
        tip = f"{bar.words}: {kind} for {format_seconds(ends - begins)}"
        thin = height * 0.4 if kind == "queued" and height < 20 else height
        y = top + (height - thin) / 2
        parts.append(box(left, y, max(right - left, 0.8), thin, f"fill {STRETCHES[kind]}", tip=tip))
        words = f"{kind} {format_seconds(ends - begins)}"
        if height >= 20 and right - left > text_width(words):
            parts.append(
                text((left + right) / 2, top + 18, words, anchor="middle", class_=INK[kind])
            )
    return parts


def _columns(
    batch: Sequence[Series], x: Axis, *, top: float, ground: float, origin: float, scale: float
) -> list[str]:
    """Tokens of the steps in those moments, stacked."""
    highest = max(_tops(batch, stacked=True), default=0.0) or 1.0
    words = f"tokens in a step, up to {significant(highest)}"
    parts = [text(x.start, top - 6, words, class_="axis")]
    places = [x.at((t - origin) / scale) for t, _ in batch[0].points]
    parts += _stack(batch, places, lambda v: ground - v / highest * (ground - top))
    parts.append(line(x.start, ground, x.end, ground, "base"))
    return parts
