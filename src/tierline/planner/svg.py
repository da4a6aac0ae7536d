"""Inline SVG by hand: an escaped element, an axis, a frame. `pictures` draws with these.

A picture is a string of SVG that scales with its column and takes its colours from CSS
classes, so that one picture serves light, dark and paper. Coordinates are written with one
decimal, which keeps equal data equal bytes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from tierline.base.markup import element

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 46  # margins around the plot, for ticks and labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A scale with its ticks; `start` and `end` are the coordinates of `low` and `high`."""

    low: float
    high: float
    log: bool
    label: str
    ticks: tuple[tuple[float, str], ...]
    start: float
    end: float

    def at(self, value: float) -> float:
        """The coordinate of `value`, held inside the plot."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def text(x: float, y: float, words: str, *, anchor: str = "start", class_: str = "") -> str:
    """A line of text with its baseline at (x, y)."""
    return element(
        "text", escape(words), x=float(x), y=float(y), text_anchor=anchor, class_=class_ or "t"
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def path(points: Iterable[tuple[float, float]], class_: str, *, closed: bool = False) -> str:
    """A polyline, or a filled shape when closed."""
    steps = [f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points)]
    return element("path", d="".join(steps) + ("Z" if closed else ""), class_=class_)


def dot(x: float, y: float, class_: str, *, tip: str = "", radius: float = 4) -> str:
    """A marker that tells its exact value on hover."""
    title = element("title", escape(tip)) if tip else ""
    return element("circle", title, cx=float(x), cy=float(y), r=float(radius), class_=class_)


def box(x: float, y: float, width: float, height: float, class_: str, *, tip: str = "") -> str:
    """A bar that tells its exact value on hover."""
    title = element("title", escape(tip)) if tip else ""
    return element(
        "rect",
        title,
        x=float(x),
        y=float(y),
        width=max(float(width), 0.0),
        height=max(float(height), 0.0),
        class_=class_,
    )


def svg(parts: Sequence[str], *, label: str, height: float = HEIGHT) -> str:
    """The whole picture; `label` is what a screen reader says."""
    return element(
        "svg",
        "\n".join(parts),
        viewBox=f"0 0 {WIDTH} {height:g}",
        role="img",
        aria_label=label,
        xmlns="http://www.w3.org/2000/svg",
    )


# --- axes -----------------------------------------------------------------------------------


def x_axis(low: float, high: float, label: str, *, log: bool = False, unit: str = "") -> Axis:
    """A horizontal axis over the plot's width."""
    low, high = _room(low, high, log=log)
    return Axis(
        low=low,
        high=high,
        log=log,
        label=label,
        ticks=_ticks(low, high, log=log, unit=unit, count=5),
        start=LEFT,
        end=WIDTH - RIGHT,
    )


def y_axis(
    low: float,
    high: float,
    label: str,
    *,
    log: bool = False,
    unit: str = "",
    height: float = HEIGHT,
) -> Axis:
    """A vertical axis over the plot's height."""
    low, high = _room(low, high, log=log)
    return Axis(
        low=low,
        high=high,
        log=log,
        label=label,
        ticks=_ticks(low, high, log=log, unit=unit, count=5),
        start=height - BOTTOM,
        end=TOP + 14,
    )


def frame(x: Axis, y: Axis) -> list[str]:
    """Grid, ticks and labels of a plot; the label of the y axis lies on top, unrotated."""
    parts = [text(4, TOP + 2, y.label, class_="axis")]
    for value, words in y.ticks:
        at = y.at(value)
        parts += [
            line(x.start, at, x.end, at, "grid"),
            text(x.start - 6, at + 4.5, words, anchor="end", class_="tick"),
        ]
    for value, words in x.ticks:
        at = x.at(value)
        parts += [
            line(at, y.start, at, y.start + 4, "base"),
            text(at, y.start + 18, words, anchor=_edge(at, x), class_="tick"),
        ]
    parts.append(line(x.start, y.start, x.end, y.start, "base"))
    middle = (x.start + x.end) / 2
    parts.append(text(middle, y.start + 37, x.label, anchor="middle", class_="axis"))
    return parts


def mark_x(x: Axis, y: Axis, marks: Sequence[tuple[str, float]]) -> tuple[list[str], list[str]]:
    """Vertical lines at values, and their names in rows from the top.

    A line begins at its own name, and rows follow the direction in which names run, so no
    name crosses the line of another. Names come apart, to be drawn after what they cover.
    """
    rightward: list[tuple[str, float]] = []
    leftward: list[tuple[str, float]] = []
    for words, value in marks:
        at = x.at(value)
        room = x.end - at
        fits = room > text_width(words) or room > at - x.start
        (rightward if fits else leftward).append((words, at))
    rightward.sort(key=lambda mark: mark[1])
    leftward.sort(key=lambda mark: -mark[1])
    lines, names = [], []
    for row, (words, at) in enumerate(rightward + leftward):
        top = y.end + 17 * row
        shift, anchor = (5, "start") if row < len(rightward) else (-5, "end")
        names.append(text(at + shift, top + 11, words, anchor=anchor, class_="halo"))
        lines.append(line(at, y.start, at, top, "mark"))
    return lines, names


def text_width(words: str) -> float:
    """About how wide a label is, with room to spare; fonts differ."""
    return 8.4 * len(words) + 8


def mark_y(x: Axis, y: Axis, value: float, words: str, *, below: bool = False) -> str:
    """A horizontal limit with its name above it at the left, or below it at the right."""
    at = y.at(value)
    label = (
        text(x.end, at + 15, words, anchor="end", class_="halo")
        if below
        else text(x.start + 5, at - 5, words, class_="halo")
    )
    return line(x.start, at, x.end, at, "limit") + label


def _edge(at: float, x: Axis) -> str:
    """Labels at the right edge end there instead of being cut off."""
    return "end" if at > x.end - 8 else "middle"


def _room(low: float, high: float, *, log: bool) -> tuple[float, float]:
    """Bounds that are never equal, and positive on a log axis."""
    if log:
        low = max(low, 1e-12)
        high = max(high, low)
        return (low, high) if high / low >= 1.5 else (low / 2, high * 2)
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))


def _ticks(
    low: float, high: float, *, log: bool, unit: str, count: int
) -> tuple[tuple[float, str], ...]:
    values = _log_ticks(low, high, count) if log else _linear_ticks(low, high, count)
    return tuple((value, short(value, unit)) for value in values)


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten; with 2 and 5, or all digits, where few of them fit."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        values = [d * 10.0**e for e in decades for d in digits]
        inside = [v for v in values if low * 0.999 <= v <= high * 1.001]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / (count + 1))]
    return inside or [low, high]


def short(value: float, unit: str = "") -> str:
    """A number for a tick: 0.1, 5, 20 k, 1.5 M; with `unit` '%', 's' or '$' in its own way.

    >>> short(1500000), short(0.05, "%"), short(0.02, "s"), short(2e6, "$")
    ('1.5 M', '5%', '20 ms', '$2 M')
    """
    if unit == "%":
        return f"{value * 100:.4g}%"
    if unit == "s":
        return f"{value * 1e3:.4g} ms" if 0 < value < 0.999 else f"{value:.4g} s"
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size * 0.9999:
            words = f"{value / (1e3 if size == 1e4 else size):.4g}{letter}"
            break
    else:
        words = f"{value:,.4g}" if abs(value) < 1e3 else f"{value:,.0f}"
    return f"${words}" if unit == "$" else words
