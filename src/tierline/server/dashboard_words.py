"""Numbers and durations as the dashboard writes them: three digits to read, all of them on hover.

A `Shown` is what one place of a page says.  The server writes it into the page, and sends it
again when it has changed, so that a page reads the same without a script and never drifts.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tierline.base.units import format_bytes, format_seconds, significant

NOTHING = "–"


class Shown(NamedTuple):
    """What is read, and the exact value that hovering tells ("" where that adds nothing)."""

    text: str
    exact: str = ""


def seconds(value: float | None) -> Shown:
    """A duration.

    >>> seconds(0.0481234)
    Shown(text='48.1 ms', exact='0.048123400 s')
    """
    return Shown(NOTHING) if value is None else Shown(format_seconds(value), f"{value:.9f} s")


def number(value: float | None, unit: str = "") -> Shown:
    """A number with its unit; whole numbers below ten thousand in full.

    >>> number(212), number(212.345, "tokens/s").text, number(1234567).text
    (Shown(text='212', exact=''), '212 tokens/s', '1,230,000')
    """
    if value is None:
        return Shown(NOTHING)
    tail = f" {unit}" if unit else ""
    if value == int(value) and abs(value) < 10_000:
        return Shown(f"{int(value):,}{tail}")
    return Shown(significant(value) + tail, f"{value:,.10g}{tail}")


def share(part: float, whole: float) -> Shown:
    """A percentage; nothing where there is no whole.

    >>> share(1, 3)
    Shown(text='33.3 %', exact='1 of 3')
    """
    if not whole:
        return Shown(NOTHING)
    return Shown(f"{significant(100 * part / whole)} %", f"{part:,g} of {whole:,g}")


def size(count: float | None) -> Shown:
    """Bytes, decimal."""
    return Shown(NOTHING) if count is None else Shown(format_bytes(count), f"{count:,.0f} bytes")


def counted(count: int, one: str, many: str = "") -> str:
    """A number with its noun.

    >>> counted(1, "request"), counted(2, "request"), counted(0, "match", "matches")
    ('1 request', '2 requests', 'no matches')
    """
    return (
        f"{count:,} {one}"
        if count == 1
        else f"{count or 'no':{',' if count else ''}} {many or one + 's'}"
    )


def listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def ago(elapsed_s: float) -> str:
    """How long ago, coarse, since it changes by itself.

    >>> ago(0.4), ago(75), ago(7000)
    ('just now', '1 min ago', '1 h 56 min ago')
    """
    return "just now" if elapsed_s < 1 else f"{duration(elapsed_s)} ago"


def duration(elapsed_s: float) -> str:
    """A long duration in its two largest units.

    >>> duration(14), duration(75), duration(90_000)
    ('14 s', '1 min', '1 d 1 h')
    """
    minutes = int(elapsed_s // 60)
    hours, days = minutes // 60, minutes // 1440
    if minutes < 1:
        return f"{int(elapsed_s)} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if days < 1 else f"{days} d {hours % 24} h"


def quantile(values: Sequence[float], share: float) -> float | None:
    """The least of sorted `values` that `share` of them do not exceed; None of none.

    >>> quantile([1.0, 2.0, 3.0, 4.0], 0.5), quantile([], 0.5)
    (2.0, None)
    """
    if not values:
        return None
    rank = -(-len(values) * round(share * 1000) // 1000)  # the ceiling, without a float's error
    return values[max(rank, 1) - 1]


def sentence(parts: Iterable[str]) -> str:
    """Clauses that are there, joined and begun with a capital letter."""
    text = "; ".join(part for part in parts if part)
    return f"{text[:1].upper()}{text[1:]}." if text else ""
