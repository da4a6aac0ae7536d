"""What an oracle is: an id, a law applied to stated inputs, and the value it must give.

`source_said` is what a published source prints and is wrong; such an oracle also asserts that
the law does not reproduce it. A row with several values has as many figures there, None where
the source is right or silent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

PERCENT = 0.01
LAW = "law"  # a function of ours gives the value
CATALOGUE = "catalogue"  # a fact of the files that ship
ARITHMETIC = "arithmetic of the source"  # nothing of ours stands behind it


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle:
    """One row. `relative` is 0 for exact values (to float rounding)."""

    id: str
    formula: str
    law: Callable[[], Any]
    want: Any
    relative: float = 0.0
    absolute: float = 0.0
    source_said: float | tuple[float | None, ...] | None = None
    erratum: str = ""
    basis: str = LAW


def agrees(oracle: Oracle) -> bool:
    """Whether the law gives the value, within the row's tolerance."""
    got = oracle.law()
    if isinstance(oracle.want, str | bool) or oracle.want is None:
        return bool(got == oracle.want)
    tight = max(oracle.relative, 1e-9)
    return bool(got == pytest.approx(oracle.want, rel=tight, abs=oracle.absolute or None))


def contradicts_source(oracle: Oracle) -> bool:
    """Whether the law stays away from every figure that the source got wrong."""
    pairs = list(zip(_row(oracle.law()), _row(oracle.source_said), strict=True))
    wrong = [(value, said) for value, said in pairs if said is not None]
    assert wrong, oracle.id
    return all(abs(value - said) > 0.02 * abs(said) for value, said in wrong)


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
        "| Id | Formula | Value | Tolerance | Source prints | Erratum | Behind it |",
        "|---|---|---|---|---|---|---|",
    ]
    for o in table:
        said = "" if o.source_said is None else ", ".join(_said(v) for v in _row(o.source_said))
        tolerance = f"{o.relative:.2%}" if o.relative else f"{o.absolute:g}" if o.absolute else ""
        formula = o.formula.replace("|", "\\|")
        lines.append(
            f"| {o.id} | {formula} | {_text(o.want)} | {tolerance or 'exact'} | {said} "
            f"| {o.erratum} | {o.basis} |"
        )
    return "\n".join(lines) + "\n"


def _row(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(_text(v) for v in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
