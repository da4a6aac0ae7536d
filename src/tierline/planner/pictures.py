"""The pictures of a report: plain numbers in, a titled SVG and its table out.

Every title states what the data says, and is computed from the data; every picture carries
its numbers as a table, so that nothing is told by shape or colour alone. `figures` picks the
numbers out of a plan; this module knows no plan.

Blue is prompts and the chosen plan, green is outputs and KV, vermillion is a limit. Grey is
everything else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tierline.base.units import format_bytes, format_seconds, format_usd, significant
from tierline.planner.svg import (
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    box,
    dot,
    frame,
    line,
    mark_x,
    mark_y,
    path,
    svg,
    text,
    text_width,
    x_axis,
    y_axis,
)

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One figure; without an `svg`, `note` says what would fill it and how."""

    name: str  # its anchor on the page
    title: str  # what it shows, as a sentence
    svg: str = ""
    note: str = ""
    keys: tuple[tuple[str, str], ...] = ()  # legend: class and words
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    findings: tuple[int, ...] = ()  # where its numbers are worked out


# --- what comes in --------------------------------------------------------------------------


def lengths(
    inputs: Sequence[tuple[float, float]], outputs: Sequence[tuple[float, float]]
) -> Picture:
    """How many requests are longer than x: (tokens, share of requests that are longer)."""
    series = (("prompt", "blue", inputs), ("output", "green", outputs))
    shown = [(n, c, [(max(t, 1.0), s) for t, s in p if s > 0]) for n, c, p in series]
    every = [t for _, _, points in shown for t, _ in points]
    x = x_axis(min(every), max(every), "tokens of a request", log=True)
    y = y_axis(0.001, 1.0, "share of requests that are longer", log=True, unit="%")
    parts = frame(x, y)
    medians = [_longer_than(points, 50) for _, _, points in shown]
    for i, (_, colour, points) in enumerate(shown):
        parts.append(path([(x.at(t), y.at(s)) for t, s in points], f"curve {colour}"))
        right = medians[i] >= medians[1 - i]
        for percent in PERCENTILES:
            tokens = _longer_than(points, percent)
            at_x, at_y = x.at(tokens), y.at(1 - percent / 100)
            words = f"p{percent} {tokens:,.0f}"
            parts.append(dot(at_x, at_y, f"dot {colour}", tip=f"{words} tokens"))
            fits = (right and at_x < WIDTH - 90) or at_x < LEFT + 90
            parts.append(
                text(at_x + 8, at_y - 6, words, class_="halo")
                if fits
                else text(at_x - 8, at_y + 14, words, anchor="end", class_="halo")
            )
    median, tail = medians[0], _longer_than(shown[0][2], 99)
    title = (
        f"One prompt in a hundred exceeds {tail:,.0f} tokens, {significant(tail / median, 2)} "
        f"times the median of {median:,.0f}"
    )
    percents = (25, 50, 75, 90, 95, 99, 99.9)
    return Picture(
        name="lengths",
        title=title,
        svg=svg(parts, label=title),
        keys=(("blue", "prompt tokens"), ("green", "output tokens")),
        columns=("percentile", "prompt tokens", "output tokens"),
        rows=tuple(
            (f"p{p:g}", *(f"{_longer_than(points, p):,.0f}" for _, _, points in shown))
            for p in percents
        ),
        findings=(1,),
    )


def _longer_than(points: Sequence[tuple[float, float]], percent: float) -> float:
    """The smallest length that at most 100 - `percent` of requests exceed."""
    share = 1 - percent / 100
    return next((t for t, s in points if s <= share + 1e-9), points[-1][0])


def arrivals(rates_rps: Sequence[float], *, step_s: float, sized_rps: float) -> Picture:
    """Requests per second over the trace, step by step, and the rate that is sized for."""
    high = max(*rates_rps, sized_rps)
    total_s = len(rates_rps) * step_s
    unit_s, unit = (3600.0, "hours") if total_s > 7200 else (60.0, "minutes")
    x = x_axis(0, total_s / unit_s, f"{unit} since the first request of the trace")
    y = y_axis(0, high * 1.15, "requests/s")
    parts = frame(x, y)
    steps = [(i * step_s / unit_s, r) for i, r in enumerate(rates_rps)]
    outline = [(x.at(t + d), y.at(r)) for t, r in steps for d in (0, step_s / unit_s)]
    ground = [(outline[-1][0], y.start), (outline[0][0], y.start)]
    parts.append(path([*outline, *ground], "area blue", closed=True))
    parts.append(path(outline, "curve thin blue"))
    peak = max(range(len(rates_rps)), key=lambda i: rates_rps[i])
    at_x, at_y = x.at((peak + 0.5) * step_s / unit_s), y.at(rates_rps[peak])
    words = f"peak {significant(rates_rps[peak])}"
    right = at_x > WIDTH * 0.7
    parts.append(dot(at_x, at_y, "dot blue", tip=f"{words} requests/s"))
    parts.append(
        text(
            at_x - 8 if right else at_x + 8,
            at_y - 7,
            words,
            anchor="end" if right else "start",
            class_="halo",
        )
    )
    at, middle = y.at(sized_rps), (x.start + x.end) / 2
    parts += [
        line(x.start, at, x.end, at, "mark strong"),
        text(
            x.start + 5 if at_x > middle else x.end,
            at - 5,
            f"sized for {significant(sized_rps)}",
            anchor="start" if at_x > middle else "end",
            class_="halo",
        ),
    ]
    mean = sum(rates_rps) / len(rates_rps)
    title = (
        f"The busiest {_span(step_s)} brings {significant(rates_rps[peak])} requests/s, "
        f"{significant(rates_rps[peak] / mean, 2)} times the mean"
    )
    return Picture(
        name="arrivals",
        title=title,
        svg=svg(parts, label=title),
        note="Time runs from the first request; the trace's own clock zone is not known.",
        columns=("", "requests/s"),
        rows=(
            ("mean", significant(mean)),
            (f"busiest {_span(step_s)}", significant(rates_rps[peak])),
            ("sized for, growth applied", significant(sized_rps)),
        ),
        findings=(1,),
    )


def _span(step_s: float) -> str:
    return "minute" if step_s == 60 else f"{significant(step_s / 60, 2)} minutes"


# --- memory ---------------------------------------------------------------------------------


def reuse(
    points: Sequence[tuple[float, float]],
    marks: Sequence[tuple[str, float]],
    *,
    ideal: float,
) -> Picture:
    """Hit rate against cached tokens, with what each tier of the fleet could hold."""
    sizes = [s for s, _ in points if s > 0] + [s for _, s in marks if s > 0]
    x = x_axis(max(min(sizes), max(sizes) / 1e6), max(sizes), "cached tokens", log=True)
    y = y_axis(0, min(1.0, max(ideal * 1.6, 0.1)), "prompt tokens found", unit="%")
    parts = frame(x, y)
    seen = [(s, h) for s, h in points if s >= x.low]
    last = [(x.at(x.high), y.at(ideal))]
    parts.append(path([(x.at(s), y.at(h)) for s, h in seen] + last, "curve green"))
    named = [(f"{name}: {hit_rate_at(points, size):.0%}", size) for name, size in marks]
    lines, names = mark_x(x, y, named)
    dots = [
        dot(x.at(size), y.at(hit_rate_at(points, size)), "dot green", tip=f"{size:,.0f} tokens")
        for _, size in marks
    ]
    parts += [*lines, *dots, *names]
    name, size = marks[0]
    first = hit_rate_at(points, size)
    more = (
        f"; more memory could find at most {ideal:.0%}"
        if ideal - first > 0.005
        else ", and more memory would find nothing more"
    )
    title = f"{name} would find {first:.0%} of prompt tokens already cached{more}"
    return Picture(
        name="reuse",
        title=title,
        svg=svg(parts, label=title),
        note="One shared LRU cache of that size, replayed over the trace.",
        columns=("holds the cache", "cached tokens", "prompt tokens found"),
        rows=(
            *((n, f"{s:,.0f}", f"{hit_rate_at(points, s):.1%}") for n, s in marks),
            ("everything, for ever", f"{points[-1][0]:,.0f}", f"{ideal:.1%}"),
        ),
        findings=(8,),
    )


def hit_rate_at(points: Sequence[tuple[float, float]], size: float) -> float:
    """The measured rate at the largest size that is not above `size`: a lower bound."""
    return max((h for s, h in points if s <= size), default=0.0)


PARTS = (
    ("weights", "blue"),
    ("KV pool", "green"),
    ("activations", "orange"),
    ("overhead", "grey"),
)


def memory(bars: Sequence[tuple[str, Mapping[str, float], float]]) -> Picture:
    """Bytes on one GPU: (configuration, bytes by part, capacity); the first is the chosen one."""
    step = 56
    height = TOP + 22 + step * len(bars) + 44
    widest = max(capacity for _, _, capacity in bars)
    x = Axis(
        low=0,
        high=widest / 1e9,
        log=False,
        label="GB on one GPU",
        start=8,
        end=WIDTH - RIGHT,
        ticks=x_axis(0, widest / 1e9, "").ticks,
    )
    ground = TOP + step * len(bars) + 8
    parts = []
    for value, words in x.ticks:
        parts += [
            line(x.at(value), TOP, x.at(value), ground, "grid"),
            text(x.at(value), ground + 18, words, anchor="middle", class_="tick"),
        ]
    for row, (name, sizes, capacity) in enumerate(bars):
        top = TOP + step * row
        parts.append(text(x.start, top + 12, name, class_="t strong" if row == 0 else "t"))
        left = x.start
        for part, colour in PARTS:
            right = left + x.at(sizes[part] / 1e9) - x.start
            tip = f"{part}: {format_bytes(sizes[part])}"
            parts.append(box(left, top + 18, right - left, 22, f"fill {colour}", tip=tip))
            left = right
        at = x.at(capacity / 1e9)
        parts.append(line(at, top + 14, at, top + 44, "limit solid"))
    parts.append(text((x.start + x.end) / 2, ground + 37, x.label, anchor="middle", class_="axis"))
    _, chosen, capacity = bars[0]
    title = (
        f"Weights take {chosen['weights'] / capacity:.0%} of each GPU; "
        f"{format_bytes(chosen['KV pool'])} are left for KV"
    )
    names = [part for part, _ in PARTS]
    return Picture(
        name="memory",
        title=title,
        svg=svg(parts, label=title, height=height),
        keys=(*((colour, part) for part, colour in PARTS), ("limit", "capacity")),
        columns=("configuration", *(f"{n} GB" for n in names), "capacity GB"),
        rows=tuple(
            (name, *(significant(sizes[n] / 1e9) for n in names), significant(capacity / 1e9))
            for name, sizes, capacity in bars
        ),
        findings=(4, 6),
    )


# --- what binds -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkPoint:
    """One kind of step on one GPU: its arithmetic intensity and the rate it reaches."""

    kind: str  # prefill or decode
    size: int  # tokens of a chunk, or sequences
    intensity: float  # FLOP per byte
    flops_per_s: float
    step_s: float
    planned: bool = False  # what the plan runs at its peak


def roofline(
    points: Sequence[WorkPoint], *, peak_flops_per_s: float, bytes_per_s: float, math: str
) -> Picture:
    """The roof of one GPU and where prefill and decode sit under it."""
    ridge = peak_flops_per_s / bytes_per_s
    low = min(min(p.intensity for p in points), ridge / 10)
    high = max(max(p.intensity for p in points) * 4, ridge * 3)
    x = x_axis(low / 4, high, "FLOP per byte moved", log=True)
    floor = min(min(p.flops_per_s for p in points), low * bytes_per_s / 4)
    y = y_axis(floor / 1.5e12, peak_flops_per_s * 1.8 / 1e12, "TFLOP/s of one GPU", log=True)
    parts = frame(x, y)
    roof = [(x.low, x.low * bytes_per_s), (ridge, peak_flops_per_s), (x.high, peak_flops_per_s)]
    parts.append(path([(x.at(i), y.at(f / 1e12)) for i, f in roof], "curve roof"))
    words = f"{math} peak {significant(peak_flops_per_s / 1e12)}"
    parts.append(text(x.end, y.at(peak_flops_per_s / 1e12) - 6, words, anchor="end", class_="halo"))
    for kind, colour in (("decode", "green"), ("prefill", "blue")):
        mine = [p for p in points if p.kind == kind]
        track = [(x.at(p.intensity), y.at(p.flops_per_s / 1e12)) for p in mine]
        parts.append(path(track, f"curve thin {colour}"))
        for i, (p, (at_x, at_y)) in enumerate(zip(mine, track, strict=True)):
            unit = "tokens" if kind == "prefill" else "sequences"
            tip = f"{kind}, {p.size:,} {unit}: {format_seconds(p.step_s)}"
            radius = 6.5 if p.planned else 3.5
            parts.append(dot(at_x, at_y, f"dot {colour}", tip=tip, radius=radius))
            near_plan = any(q.planned for q in mine[max(i - 1, 0) : i + 2])
            if p.planned or (i in (0, len(mine) - 1) and not near_plan):
                words = f"plan: {p.size:,}" if p.planned else f"{p.size:,}"
                # Decode climbs at the left, prefill at the right; the space beyond them is free.
                right = kind == "prefill" and x.end - at_x > text_width(words)
                shift, anchor = (8, "start") if right else (-9, "end")
                drop = 18 if kind == "prefill" else -4
                parts.append(text(at_x + shift, at_y + drop, words, anchor=anchor, class_="halo"))
    decode = next(p for p in points if p.kind == "decode" and p.planned)
    prefill = next(p for p in points if p.kind == "prefill" and p.planned)
    bound = "memory" if decode.intensity < ridge else "compute"
    title = (
        f"Decode of {decode.size:,} sequences is bound by {bound}; prefill in chunks of "
        f"{prefill.size:,} reaches "
        f"{prefill.flops_per_s / peak_flops_per_s:.0%} of peak math"
    )
    return Picture(
        name="roofline",
        title=title,
        svg=svg(parts, label=title),
        note=f"The roof bends at {significant(ridge)} FLOP per byte. Points come from the step "
        "law that prices the plan; datasheet rates make the roof.",
        keys=(("green", "decode, by sequences"), ("blue", "prefill, by chunk tokens")),
        columns=("step", "size", "FLOP/byte", "TFLOP/s", "of attainable", "step ms"),
        rows=tuple(
            (
                p.kind,
                f"{p.size:,}",
                significant(p.intensity),
                significant(p.flops_per_s / 1e12),
                f"{p.flops_per_s / min(peak_flops_per_s, p.intensity * bytes_per_s):.0%}",
                significant(p.step_s * 1e3),
            )
            for p in points
        ),
        findings=(2, 9),
    )


# --- which plan, how much load --------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One plan among others."""

    name: str
    usd_per_year: float
    ttft_p99_s: float
    on_front: bool
    why_not: str  # empty for the chosen one


def pareto(choices: Sequence[Choice], *, limit_s: float | None) -> Picture:
    """Cost against TTFT p99; the first is the chosen one, the next two are named."""
    x, y = _pareto_axes(choices, limit_s)
    places = [(x.at(c.usd_per_year), y.at(c.ttft_p99_s)) for c in choices]
    named = _apart(places)
    parts = frame(x, y)
    if limit_s:
        parts.append(mark_y(x, y, limit_s, f"limit {format_seconds(limit_s)}"))
    # Named ones last, so that they lie on top; the chosen one above all.
    for i in sorted(range(len(choices)), key=lambda i: (i in named, -i)):
        choice, (at_x, at_y) = choices[i], places[i]
        cost, late = format_usd(choice.usd_per_year), format_seconds(choice.ttft_p99_s)
        class_ = "dot blue" if i == 0 else "dot ring" if choice.on_front else "dot grey"
        tip = f"{choice.name}: {cost}, {late}"
        parts.append(dot(at_x, at_y, class_, tip=tip, radius=9 if i in named else 5))
        if i in named:
            ink = "letter" if class_ == "dot ring" else "letter inside"
            letter = "ABC"[named.index(i)]
            parts.append(text(at_x, at_y + 4, letter, anchor="middle", class_=ink))
    title = _pareto_title(choices)
    return Picture(
        name="pareto",
        title=title,
        svg=svg(parts, label=title),
        note=" ".join(
            f"{letter}: {choices[i].name}"
            f"{f', not chosen: it {choices[i].why_not}' if i else ', chosen'}."
            for letter, i in zip("ABC", named, strict=False)
        ),
        keys=(("blue", "chosen"), ("ring", "no other is better in all"), ("grey", "dominated")),
        columns=("plan", "$ a year", "TTFT p99", "why not"),
        rows=tuple(
            (
                c.name,
                format_usd(c.usd_per_year),
                format_seconds(c.ttft_p99_s),
                c.why_not or "chosen",
            )
            for c in choices[:12]
        ),
        findings=(2, 12),
    )


def _pareto_axes(choices: Sequence[Choice], limit_s: float | None) -> tuple[Axis, Axis]:
    costs = [c.usd_per_year for c in choices]
    times = [c.ttft_p99_s for c in choices] + ([limit_s] if limit_s else [])
    wide = max(costs) / min(costs) > 4
    tall = max(times) / min(times) > 4
    x_low, y_low = (min(costs) * 0.85 if wide else 0), (min(times) * 0.8 if tall else 0)
    x = x_axis(x_low, max(costs) * 1.08, "cost of a year", log=wide, unit="$")
    return x, y_axis(y_low, max(times) * 1.15, "TTFT p99 at peak", log=tall, unit="s")


def _apart(places: Sequence[tuple[float, float]]) -> list[int]:
    """The first place and the next two whose markers would not cover each other."""
    kept = [0]
    for i, (at_x, at_y) in enumerate(places):
        far = all(abs(at_x - places[k][0]) + abs(at_y - places[k][1]) > 22 for k in kept)
        if far and len(kept) < 3:
            kept.append(i)
    return kept


def _pareto_title(choices: Sequence[Choice]) -> str:
    best = choices[0]
    title = f"The plan costs {format_usd(best.usd_per_year)} a year"
    next_best = min(choices[1:], key=lambda c: c.usd_per_year, default=None)
    if next_best is None:
        return f"{title}, and nothing else keeps the promises"
    other = format_usd(next_best.usd_per_year)
    if next_best.usd_per_year < best.usd_per_year:
        return f"{title}; one for {other} was not chosen: it {next_best.why_not}"
    return f"{title}; the next one {other}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyPoint:
    """One latency of one instance at one rate, with its band. Seconds."""

    rate_rps: float
    p50_s: float
    p99_s: float
    low_s: float
    high_s: float | None  # None: the pessimistic instance cannot keep up


def latency(
    metric: str,
    points: Sequence[LatencyPoint],
    *,
    limit_s: float | None,
    usable_rps: float,
    marks: Sequence[tuple[str, float]],
) -> Picture:
    """p50 and p99 of `metric` against the rate of one instance; the band is shaded.

    `usable_rps` is the expected rate at which the first promise breaks. The picture ends well
    behind it: near saturation p99 grows without end and would flatten everything before.
    """
    shown = [p for p in points if p.rate_rps <= usable_rps * 3] or list(points[:2])
    x = x_axis(0, max(shown[-1].rate_rps, usable_rps), "requests/s of one instance")
    low = min(p.p50_s for p in shown)
    ceiling = max((limit_s or 0) * 4, points[0].p99_s * 4)
    top = max(min(max(p.p99_s for p in shown), ceiling), (limit_s or 0) * 1.3, low * 2)
    y = y_axis(low * 0.6, top * 3.5, f"{metric} (log)", log=True, unit="s")
    lines, names = mark_x(x, y, [(f"{name} {significant(rate)}", rate) for name, rate in marks])
    upper = [(x.at(p.rate_rps), y.at(p.high_s or y.high)) for p in shown]
    lower = [(x.at(p.rate_rps), y.at(p.low_s)) for p in shown]
    parts = [*frame(x, y), path([*upper, *reversed(lower)], "area blue", closed=True), *lines]
    for class_, values in (
        ("curve thin blue dashed", [p.p50_s for p in shown]),
        ("curve blue", [p.p99_s for p in shown]),
    ):
        pairs = [(p.rate_rps, v) for p, v in zip(shown, values, strict=True) if v <= y.high]
        parts.append(path([(x.at(r), y.at(v)) for r, v in pairs], class_))
    if limit_s:
        words = f"limit {format_seconds(limit_s)}"
        first = min((x.at(rate) for _, rate in marks), default=x.end)
        crowded = first < x.start + text_width(words)
        parts.append(mark_y(x, y, limit_s, words, below=crowded))
    title = _latency_title(metric, points, limit_s, usable_rps)
    return Picture(
        name=metric.casefold(),
        title=title,
        svg=svg([*parts, *names], label=title),
        note="The shaded band is p99 between the optimistic and the pessimistic edge.",
        keys=(("blue", f"{metric} p99, with its band"), ("blue dashed", f"{metric} p50")),
        columns=("requests/s", "p50", "p99", "p99 optimistic", "p99 pessimistic"),
        rows=tuple(
            (
                significant(p.rate_rps),
                format_seconds(p.p50_s),
                format_seconds(p.p99_s),
                format_seconds(p.low_s),
                format_seconds(p.high_s) if p.high_s is not None else "cannot keep up",
            )
            for p in points
        ),
        findings=(7, 10),
    )


def _latency_title(
    metric: str, points: Sequence[LatencyPoint], limit_s: float | None, usable_rps: float
) -> str:
    if limit_s is None:
        return (
            f"{metric} p99 goes from {format_seconds(points[0].p99_s)} idle to "
            f"{format_seconds(points[-1].p99_s)} at {significant(points[-1].rate_rps)} requests/s"
        )
    limit = format_seconds(limit_s)
    over = next((p.rate_rps for p in points if p.p99_s > limit_s), None)
    if over is None:
        return (
            f"{metric} p99 stays under its {limit} limit up to saturation at "
            f"{significant(points[-1].rate_rps)} requests/s an instance"
        )
    before = max((p.rate_rps for p in points if p.p99_s <= limit_s), default=0.0)
    if before <= usable_rps <= over:  # the promise that breaks first
        return (
            f"{metric} p99 leaves its {limit} limit first, at {significant(usable_rps)} requests/s"
        )
    return (
        f"{metric} p99 holds its {limit} limit up to {significant(before)} requests/s an instance"
    )


# --- money ----------------------------------------------------------------------------------


def cost_by_load(points: Sequence[tuple[float, float]], *, used: float) -> Picture:
    """Dollars per million tokens of a fixed fleet against the share of it that is used."""
    low, high = min(c for _, c in points), max(c for _, c in points)
    x = x_axis(0, 1, "share of the usable rate that is offered", unit="%")
    y = y_axis(low * 0.7, high * 1.2, "per million tokens (log)", log=True, unit="$")
    parts = frame(x, y)
    parts.append(path([(x.at(s), y.at(c)) for s, c in points], "curve blue"))
    parts += [
        dot(x.at(s), y.at(c), "dot blue", tip=f"{s:.0%}: {format_usd(c)}", radius=3)
        for s, c in points
    ]
    full = points[-1][1] * points[-1][0]
    now = full / used
    lines, names = mark_x(x, y, [(f"average {used:.0%}: {format_usd(now)}", used)])
    parts += [*lines, *names]
    title = (
        f"At the average load of {used:.0%} a million tokens cost {format_usd(now)}; "
        f"a full fleet would make them for {format_usd(full)}"
    )
    return Picture(
        name="cost",
        title=title,
        svg=svg(parts, label=title),
        note="The fleet is paid for whether it works or not.",
        columns=("load", "$ per million tokens"),
        rows=tuple((f"{s:.0%}", format_usd(c)) for s, c in points),
        findings=(12,),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Swing:
    """What one changed input does to the cost of a year."""

    name: str
    usd_per_year: float | None  # None: nothing keeps the promises then
    outcome: str
    changes_choice: bool


def tornado(swings: Sequence[Swing], *, base_usd: float) -> Picture:
    """Bars from the plan's cost to the cost after each change, the largest swing first."""
    known = [s for s in swings if s.usd_per_year is not None]
    ranked = sorted(known, key=lambda s: -abs((s.usd_per_year or 0) - base_usd))
    ranked += [s for s in swings if s.usd_per_year is None]
    step, top = 40, TOP + 6
    height = top + step * len(ranked) + 44
    costs = [base_usd, *(s.usd_per_year or 0 for s in known)]
    spread = max(max(costs) - min(costs), base_usd * 0.1)
    low, high = max(min(costs) - spread * 0.15, 0), max(costs) + spread * 0.35
    ticks = x_axis(low, high, "", unit="$").ticks
    x = Axis(
        low=low,
        high=high,
        log=False,
        label="",
        ticks=ticks[:: max(len(ticks) // 4, 1)],
        start=14,
        end=WIDTH - RIGHT,
    )
    ground = top + step * len(ranked)
    parts = []
    for value, words in x.ticks:
        parts += [
            line(x.at(value), top, x.at(value), ground, "grid"),
            text(x.at(value), ground + 18, words, anchor="middle", class_="tick"),
        ]
    for row, swing in enumerate(ranked):
        y = top + step * row
        parts.append(text(x.start, y + 13, swing.name, class_="halo"))
        cost = swing.usd_per_year
        if cost is None:
            parts.append(text(x.start, y + 30, swing.outcome, class_="halo strong"))
            continue
        base = x.at(base_usd)
        left, right = sorted((x.at(cost), base))
        fill = "fill orange" if cost > base_usd else "fill blue"
        tip = f"{swing.name}: {format_usd(cost)}"
        parts.append(box(left, y + 19, max(right - left, 2), 14, fill, tip=tip))
        parts.append(line(base, y + 17, base, y + 35, "mark strong"))
        words = f"{(cost / base_usd - 1):+.0%}" if cost != base_usd else "no change"
        words += ", another choice" if swing.changes_choice else ""
        roomy = x.end - right > text_width(words)
        parts.append(
            text(right + 6, y + 31, words, class_="halo")
            if roomy
            else text(left - 6, y + 31, words, anchor="end", class_="halo")
        )
    label = f"cost of a year; the plan costs {format_usd(base_usd)}"
    parts.append(text((x.start + x.end) / 2, ground + 37, label, anchor="middle", class_="axis"))
    title = _tornado_title(ranked, base_usd)
    return Picture(
        name="sensitivity",
        title=title,
        svg=svg(parts, label=title, height=height),
        note="One input moved at a time, everything sized again.",
        columns=("what changes", "$ a year", "then"),
        rows=tuple(
            (s.name, format_usd(s.usd_per_year) if s.usd_per_year is not None else "–", s.outcome)
            for s in ranked
        ),
        findings=(11, 12),
    )


def _tornado_title(ranked: Sequence[Swing], base_usd: float) -> str:
    """The largest swing, what breaks, and whether another choice would win."""
    words = []
    broken = [s.name for s in ranked if s.usd_per_year is None]
    if broken:
        words.append(f"{', '.join(broken)}: nothing keeps the promises")
    worst = ranked[0]
    if worst.usd_per_year is not None:
        moved = worst.usd_per_year / base_usd - 1
        words.append(f"{worst.name} moves the cost most, by {moved:+.0%}")
    switching = sum(s.changes_choice and s.usd_per_year is not None for s in ranked)
    words.append(f"{switching} of {len(ranked)} changes would choose another plan")
    title = "; ".join(words)
    return title[0].upper() + title[1:]
