"""Pictures that the server draws itself: memory that fills, and the life of a request.

Inline SVG without a style attribute, so that the pages' content policy can refuse all inline
code, and with words in it, so that no state is told by colour alone.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise

from tierline.base.clock import PS_PER_S
from tierline.base.markup import element
from tierline.base.units import format_bytes, format_seconds
from tierline.server.life import Life, StepSample

CELLS = 50  # of the memory strip: two per cent each


def memory_strip(step: StepSample | None) -> str:
    """KV blocks of the device as fifty cells: held, cached, free; empty before the first step."""
    if step is None:
        held, cached, total = 0, 0, 1
    else:
        total, cached = step.kv_pages, step.kv_pages_cached
        held = total - step.kv_pages_free - cached
    return "".join(_cells(held, cached, total))


def _cells(held: int, cached: int, total: int) -> Iterable[str]:
    """Whatever is held or cached shows at least one cell."""
    held_cells = min(-(-held * CELLS // total), CELLS)
    cached_cells = min(-(-cached * CELLS // total), CELLS - held_cells)
    width, gap = 12, 2
    cells = []
    for i in range(CELLS):
        kind = "held" if i < held_cells else "cached" if i < held_cells + cached_cells else "free"
        cells.append(
            element("rect", x=i * width + 1, y=1, width=width - gap, height=26, rx=1.5, class_=kind)
        )
        if kind == "cached":  # a stripe, for eyes that do not see the colour
            x = i * width + 1
            cells.append(element("path", d=f"M{x} 27L{x + width - gap} 1", class_="stripe"))
    words = (
        f"KV blocks of the device: {held:,} held, {cached:,} cached, {total - held - cached:,} free"
    )
    yield element(
        "svg",
        element("title", words) + "".join(cells),
        viewBox=f"0 0 {CELLS * width} 28",
        preserveAspectRatio="none",
        class_="strip",
        role="img",
    )


# --- the life of a request ------------------------------------------------------------------

# Where each part of a life is drawn: (top, height) of a bar of 24.  Waiting is thin, computing is
# tall, so that the parts differ without their colours.
BANDS = {
    "queued": (10, 4),
    "loading": (7, 10),
    "prompt": (2, 20),
    "decode": (5, 14),
    "preempted": (9, 6),
}
NICE = (1, 2, 5)


def life_bar(
    life: Life,
    parts: Sequence[tuple[str, int, int]],
    end_ps: int,
    *,
    scale_ps: int = 0,
    small: bool = False,
) -> str:
    """A life as one horizontal bar; `scale_ps` long ones fill the width (else its own length).

    Horizontal places are percentages, so a picture is as wide as its column and its words keep
    their size.
    """
    start_ps = life.arrival_ps
    span_ps = max(scale_ps or end_ps - start_ps, 1)

    def at(ps: int) -> float:
        return 100 * min(max(ps - start_ps, 0), span_ps) / span_ps

    drawn = [
        _bar(at(start), at(end), *BANDS[kind], kind, f"{kind} {_span(start, end)}")
        for kind, start, end in parts
    ]
    if small:
        words = ", ".join(f"{kind} {_span(start, end)}" for kind, start, end in parts)
        return _picture(drawn, 24, words or "nothing yet", "bar small")
    drawn += [
        element(
            "line",
            x1=f"{at(chunk.at_ps):.3f}%",
            x2=f"{at(chunk.at_ps):.3f}%",
            y1=2,
            y2=22,
            class_="cut",
        )
        for chunk in life.events
        if chunk.kind == "prefill"
    ]
    if life.ttft_limit_s is not None and life.ttft_limit_s * PS_PER_S < span_ps:
        x = f"{100 * life.ttft_limit_s * PS_PER_S / span_ps:.3f}%"
        drawn.append(element("line", x1=x, x2=x, y1=0, y2=30, class_="limit"))
        drawn.append(_word(x, 42, "TTFT promised", 100 * life.ttft_limit_s * PS_PER_S / span_ps))
    drawn += _ticks(span_ps, 60)
    words = ", ".join(f"{kind} {_span(start, end)}" for kind, start, end in parts)
    return _picture(drawn, 64, f"From its arrival: {words}", "bar")


def beside_columns(columns: Sequence[tuple[int, int]]) -> str:
    """Others' tokens in equal slices of a life: generated below, of prompts on top."""
    highest = max((decodes + prompt for decodes, prompt in columns), default=0) or 1
    each, drawn = 100 / len(columns), []
    for i, (decodes, prompt) in enumerate(columns):
        base = 56.0
        for tokens, kind in ((decodes, "decode"), (prompt, "prompt")):
            height = 54.0 * tokens / highest
            if tokens:
                drawn.append(
                    element(
                        "rect",
                        x=f"{i * each:.3f}%",
                        width=f"{each * 0.9:.3f}%",
                        y=base - height,
                        height=height,
                        class_=kind,
                    )
                )
            base -= height
    drawn.append(element("line", x1="0%", x2="100%", y1=56.5, y2=56.5, class_="base"))
    most = f"at most {highest:,} tokens in one of {len(columns)} slices"
    return _picture(drawn, 58, f"Tokens computed for others over its life, {most}", "bar beside")


def _bar(start: float, end: float, top: int, height: int, kind: str, words: str) -> str:
    return element(
        "rect",
        element("title", escape(words)),
        x=f"{start:.3f}%",
        width=f"{max(end - start, 0.15):.3f}%",
        y=top,
        height=height,
        class_=kind,
    )


def _span(start_ps: int, end_ps: int) -> str:
    return format_seconds((end_ps - start_ps) / PS_PER_S)


def _picture(drawn: Sequence[str], height: int, words: str, class_: str) -> str:
    title = element("title", escape(words))
    return element(
        "svg", title + "".join(drawn), width="100%", height=height, class_=class_, role="img"
    )


def _word(x: str, y: int, words: str, share: float) -> str:
    anchor = "end" if share > 50 else "start"
    return element("text", escape(words), x=x, y=y, text_anchor=anchor)


def _ticks(span_ps: int, y: int) -> list[str]:
    """At most five round instants below a bar, and the line that they stand on."""
    span_s = span_ps / PS_PER_S
    drawn = [element("line", x1="0%", x2="100%", y1=46, y2=46, class_="base")]
    for at_s in _round(span_s):
        share = 100 * at_s / span_s
        x = f"{share:.3f}%"
        anchor = "start" if not at_s else "end" if share > 92 else "middle"
        drawn.append(element("line", x1=x, x2=x, y1=46, y2=50, class_="base"))
        words = format_seconds(at_s) if at_s else "arrival"
        drawn.append(element("text", escape(words), x=x, y=y, text_anchor=anchor))
    return drawn


def _round(most: float) -> list[float]:
    """Zero and at most five round numbers up to `most`."""
    size = 10.0 ** math.floor(math.log10(most / 5))
    step = next(n * size for n in (*NICE, 10) if n * size * 5 >= most)
    return [round(i * step, 12) for i in range(int(most / step) + 1)]


# --- memory, load, shares -------------------------------------------------------------------


def memory_bar(parts: Sequence[tuple[str, float]]) -> str:
    """Bytes as one stacked bar, each part as wide as its share."""
    total = sum(count for _, count in parts) or 1.0
    drawn, start = [], 0.0
    for kind, count in parts:
        width = 100 * count / total
        words = f"{kind}: {format_bytes(count)}, {width:.1f} %"
        drawn.append(_bar(start, start + width, 2, 34, kind, words))
        if kind == "cached":
            drawn.append(
                element(
                    "rect", x=f"{start:.3f}%", width=f"{width:.3f}%", y=17, height=4, class_="band"
                )
            )
        start += width
    words = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in parts)
    return _picture(drawn, 38, f"Memory of the device: {words}", "bar memory")


class _Frame:
    """A frame with places in per cent across and pixels down; logarithmic where asked."""

    def __init__(
        self, xs: Sequence[float], ys: Sequence[float], *, log_x: bool, log_y: bool
    ) -> None:
        self.height, self.left, self.right = 210, 9.0, 98.0
        self.x = _scale(xs, log=log_x, start=self.left, end=self.right)
        self.y = _scale(ys, log=log_y, start=self.height - 26.0, end=8.0)

    def curve(self, points: Sequence[tuple[float, float]], class_: str) -> list[str]:
        """A line through points."""
        return [
            element(
                "line",
                x1=f"{self.x(a):.3f}%",
                x2=f"{self.x(c):.3f}%",
                y1=self.y(b),
                y2=self.y(d),
                class_=class_,
            )
            for (a, b), (c, d) in pairwise(points)
        ]

    def across(self, y: float, words: str, class_: str) -> list[str]:
        """A horizontal line with its words."""
        at = self.y(y)
        line = element("line", x1=f"{self.left}%", x2=f"{self.right}%", y1=at, y2=at, class_=class_)
        return [
            line,
            element("text", escape(words), x=f"{self.left - 0.8}%", y=at + 4, text_anchor="end"),
        ]

    def down(self, x: float, words: str, class_: str) -> list[str]:
        """A vertical line, and words below it."""
        at = self.x(x)
        place = f"{at:.3f}%"
        line = element("line", x1=place, x2=place, y1=8, y2=self.height - 26, class_=class_)
        anchor = "start" if at < 15 else "end" if at > 90 else "middle"
        return [
            line,
            element("text", escape(words), x=place, y=self.height - 10, text_anchor=anchor),
        ]


def _scale(
    values: Sequence[float], *, log: bool, start: float, end: float
) -> Callable[[float], float]:
    known = [math.log10(v) if log else v for v in values if v > 0 or not log]
    low, high = min(known, default=0.0), max(known, default=1.0)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        shown = math.log10(max(value, 1e-9)) if log else value
        return start + (end - start) * min(max((shown - low) / span, 0.0), 1.0)

    return place


def curve_picture(
    points: Sequence[tuple[float, float, float]],
    *,
    limit_s: float | None,
    usable_rps: float | None,
    measured: tuple[float, float] | None,
) -> str:
    """TTFT p50 and p99 against requests/s, both predicted; the promise; where we are now."""
    most = max((rps for rps, _, _ in points), default=1.0)
    times = [t for _, p50, p99 in points for t in (p50, p99)]
    times += [limit_s] if limit_s else []
    times += [measured[1]] if measured else []
    frame = _Frame(
        [0.0, max(most, measured[0] if measured else 0.0)], times, log_x=False, log_y=True
    )
    drawn: list[str] = []
    for decade in _decades(times):
        drawn += frame.across(decade, format_seconds(decade), "grid")
    for rps in _round(max(most, measured[0] if measured else 0.0)):
        drawn += frame.down(rps, f"{rps:g}" if rps else "0 requests/s", "grid")
    drawn += frame.curve([(rps, p50) for rps, p50, _ in points], "curve thin")
    drawn += frame.curve([(rps, p99) for rps, _, p99 in points], "curve")
    if limit_s:
        drawn.append(frame.across(limit_s, "", "limit")[0])
    if usable_rps:
        drawn.append(frame.down(usable_rps, "", "usable")[0])
    if measured:
        tip = element(
            "title", f"now: {measured[0]:.3g} requests/s, TTFT p99 {format_seconds(measured[1])}"
        )
        place = {"cx": f"{frame.x(measured[0]):.3f}%", "cy": frame.y(measured[1])}
        drawn.append(element("circle", tip, **place, r=6, class_="here"))
    return _picture(
        drawn, frame.height, "TTFT against load, predicted, and measured now", "bar chart"
    )


def shares_picture(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Cumulative shares over seconds (logarithmic), all in one frame."""
    known = {name: points for name, points in curves.items() if points}
    xs = [max(x, 1e-6) for points in known.values() for x, _ in points]
    if not xs:
        return ""
    frame = _Frame(xs, [0.0, 1.0], log_x=True, log_y=False)
    drawn: list[str] = []
    for share in (0.0, 0.5, 0.9, 1.0):
        drawn += frame.across(share, f"{share:.0%}", "grid")
    for decade in _decades(xs):
        drawn += frame.down(decade, format_seconds(decade), "grid")
    for i, name in enumerate(curves):
        if name in known:
            drawn += frame.curve(known[name], f"curve side-{i}")
    return _picture(drawn, frame.height, f"Shares by time: {', '.join(known)}", "bar chart")


def _decades(values: Sequence[float]) -> list[float]:
    """Powers of ten among values, or round numbers where there are too few of those."""
    known = [v for v in values if v > 0]
    if not known:
        return []
    low, high = min(known), max(known)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found = [10.0**n for n in range(first, last + 1) if low <= 10.0**n <= high]
    if len(found) > 1:
        return found
    return [m * 10.0**n for n in range(first, last + 1) for m in NICE if low <= m * 10.0**n <= high]
