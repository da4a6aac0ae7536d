"""The load curve: what users feel as concurrency rises, measured or predicted.

The planner sizes the fleet on a curve. It may be its own prediction or a benchmark's CSV,
which `curve_from_csv` reads (the columns are in docs/reference/curve-format.md); either
way the questions are the same: where is the knee, how much concurrency keeps both
promises, and does the curve obey Little's law.

`c_max` is the last concurrency before a promise first breaks, on TTFT *and* ITL. Usable
rate is the rate there, not the peak of the curve. The knee is the first point where p99
TTFT has grown away from p50: more than `KNEE_RATIO` times the ratio at the lowest load.
"""

import csv
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tierline.base.errors import InputError
from tierline.base.files import read_text
from tierline.base.names import reject_unknown_keys
from tierline.workload.slo import ServiceLevel

KNEE_RATIO = 2.0
LITTLE_LOW, LITTLE_HIGH = 0.9, 1.1
GUIDE_GAP_MAX = 2.0

REQUIRED_COLUMNS = ("concurrency", "rps", "ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s")
OPTIONAL_COLUMNS = ("e2e_mean_s",)


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One load of a sweep."""

    concurrency: float
    rps: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    e2e_mean_s: float | None = None

    @property
    def tail_ratio(self) -> float:
        """p99 over p50 of the time to first token."""
        return self.ttft_p99_s / self.ttft_p50_s

    def meets(self, *, ttft_p99_s: float | None, itl_p99_s: float | None) -> bool:
        """Whether both promises hold here; None is no promise."""
        ttft_ok = ttft_p99_s is None or self.ttft_p99_s <= ttft_p99_s
        itl_ok = itl_p99_s is None or self.itl_p99_s <= itl_p99_s
        return ttft_ok and itl_ok


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Points by rising concurrency."""

    points: tuple[CurvePoint, ...]
    source: str

    def __post_init__(self) -> None:
        if not self.points:
            raise InputError(f"curve {self.source}: no points", hint="sweep from 1 past the knee")
        loads = [p.concurrency for p in self.points]
        if any(b <= a for a, b in itertools.pairwise(loads)):
            raise InputError(
                f"curve {self.source}: concurrency does not rise from row to row",
                hint="one row a concurrency, in rising order",
            )

    @property
    def knee(self) -> CurvePoint | None:
        """The first point whose p99 TTFT has left p50, or None when the sweep ends before."""
        calm = self.points[0].tail_ratio
        return next((p for p in self.points if p.tail_ratio > KNEE_RATIO * calm), None)

    @property
    def rps_peak(self) -> float:
        """The highest rate of the sweep, promises aside."""
        return max(p.rps for p in self.points)


def c_max(
    curve: Curve, *, ttft_p99_s: float | None = None, itl_p99_s: float | None = None
) -> CurvePoint | None:
    """The last point before a promise first breaks, or None when the first already breaks.

    Points beyond a broken one do not count, even when noise lets one of them pass.
    """
    best = None
    for point in curve.points:
        if not point.meets(ttft_p99_s=ttft_p99_s, itl_p99_s=itl_p99_s):
            break
        best = point
    return best


def usable_point(curve: Curve, level: ServiceLevel) -> CurvePoint | None:
    """`c_max` for the TTFT and ITL limits of a service level."""
    return c_max(curve, ttft_p99_s=level.limit_s("ttft"), itl_p99_s=level.limit_s("itl"))


def ended_inside(curve: Curve, point: CurvePoint | None) -> bool:
    """Whether the sweep stopped before a promise broke, so that more may be usable."""
    return point is curve.points[-1]


# --- Little's law ---------------------------------------------------------------------------


def little_ratio(*, concurrency: float, rps: float, e2e_mean_s: float) -> float:
    """C / (RPS x mean end-to-end residence): 1 in any closed loop that was measured whole.

    >>> little_ratio(concurrency=48, rps=12, e2e_mean_s=4.0)
    1.0
    """
    return concurrency / (rps * e2e_mean_s)


def little_holds(ratio: float) -> bool:
    """Whether the ratio is inside 0.9 to 1.1; outside, the inputs do not belong together."""
    return LITTLE_LOW <= ratio <= LITTLE_HIGH


def guide_gap(*, concurrency: float, slo_s: float, rps: float) -> float:
    """(C / SLO) / RPS, which some guides call Little's gap.

    A TTFT limit is not a residence time, so this exceeds 1 without anything being wrong.

    >>> guide_gap(concurrency=48, slo_s=2.0, rps=12)
    2.0
    """
    return concurrency / slo_s / rps


def guide_gap_passes(gap: float) -> bool:
    """The guide's test: fails over 2, and 2 itself passes."""
    return gap <= GUIDE_GAP_MAX


# --- reading --------------------------------------------------------------------------------


def curve_from_csv(path: Path) -> Curve:
    """The curve in a CSV file; raises `InputError` that names the row and the column."""
    where = f"curve {str(path)!r}"
    rows = csv.DictReader(io.StringIO(read_text(path, what="curve")))
    columns = [name.strip() for name in rows.fieldnames or []]
    rows.fieldnames = columns
    reject_unknown_keys(where, columns, REQUIRED_COLUMNS + OPTIONAL_COLUMNS)
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise InputError(
            f"{where}: missing column {missing[0]!r}",
            hint=f"the header is {','.join(REQUIRED_COLUMNS)}, and optionally e2e_mean_s",
        )
    points = tuple(_point(row, columns, f"{where} line {rows.line_num}") for row in rows)
    return Curve(points=points, source=str(path))


def _point(row: dict[str, str | None], columns: Sequence[str], where: str) -> CurvePoint:
    numbers: dict[str, float] = {}
    for name in columns:
        text = (row[name] or "").strip()
        if not text and name in OPTIONAL_COLUMNS:
            continue
        numbers[name] = _positive(text, f"{where}, column {name!r}")
    if None in row:  # csv keeps the fields beyond the header under None
        raise InputError(f"{where}: more fields than the header has")
    for metric in ("ttft", "itl"):
        if numbers[f"{metric}_p99_s"] < numbers[f"{metric}_p50_s"]:
            raise InputError(
                f"{where}: {metric} p99 is below p50", hint="check that no columns are swapped"
            )
    return CurvePoint(**numbers)


def _positive(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise InputError(
            f"{where}: {text!r} is not a number above zero", hint="times are in seconds"
        )
    return value
