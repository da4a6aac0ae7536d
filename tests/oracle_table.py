"""What an oracle is: an id, a law applied to stated inputs, and the value it must give.

`source_said` is a figure that a published source prints and that is wrong; such an oracle
also asserts that the law does not reproduce it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

PERCENT = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle:
    """One row. `relative` is 0 for exact values (to float rounding)."""

    id: str
    formula: str
    law: Callable[[], Any]
    want: Any
    relative: float = 0.0
    absolute: float = 0.0
    source_said: float | None = None
    erratum: str = ""


def agrees(oracle: Oracle) -> bool:
    """Whether the law gives the value, within the row's tolerance."""
    got = oracle.law()
    if isinstance(oracle.want, str | bool) or oracle.want is None:
        return bool(got == oracle.want)
    tight = max(oracle.relative, 1e-9)
    return bool(got == pytest.approx(oracle.want, rel=tight, abs=oracle.absolute or None))


def contradicts_source(oracle: Oracle) -> bool:
    """Whether the law stays away from the figure that the source got wrong."""
    assert oracle.source_said is not None
    got = oracle.law()
    value = got[0] if isinstance(got, tuple) else got
    return bool(abs(value - oracle.source_said) > 0.02 * abs(oracle.source_said))


def ids(table: Sequence[Oracle]) -> list[str]:
    """Names for `parametrize`; they must differ."""
    names = [o.id for o in table]
    assert len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)
    return names


def markdown(title: str, table: Sequence[Oracle]) -> str:
    """The table as documentation."""
    lines = [
        f"## {title}",
        "",
        "| Id | Formula | Value | Tolerance | Source prints | Erratum |",
        "|---|---|---|---|---|---|",
    ]
    for o in table:
        said = "" if o.source_said is None else f"{o.source_said:g}"
        tolerance = f"{o.relative:.2%}" if o.relative else f"{o.absolute:g}" if o.absolute else ""
        formula = o.formula.replace("|", "\\|")
        lines.append(
            f"| {o.id} | {formula} | {_text(o.want)} | {tolerance or 'exact'} | {said} "
            f"| {o.erratum} |"
        )
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(_text(v) for v in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
