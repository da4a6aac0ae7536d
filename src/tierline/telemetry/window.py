"""What happened in the last minutes: quantiles, counts and rates, for the page that shows now.

`server/recorder.py` adds samples as they come, on the event loop; the dashboard asks.  The last
`window_s` seconds are kept as slices of `slice_s`, and a whole slice falls out at a time.  A
slice keeps how many samples fell into each of a sequence of buckets whose bounds grow by a
constant factor (as in Masson, Rim & Lee, "DDSketch", VLDB 2019), so slices add up: a quantile
of the window is one of its samples, and never a mean of quantiles.

    INV-SRV-22  A quantile is within 1 % of the sample of that rank among those of the window.

A sample takes 1 us; the quantiles of a five minutes' window take 1 ms.
Time is an argument, in seconds of any clock that does not run backwards.  A sample that comes
late, for a slice that is past, counts in the newest one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil, log

RELATIVE_ERROR = 0.01
_GROWTH = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_PER_LOG = 1 / log(_GROWTH)
_MIDDLE = 2 / (1 + _GROWTH)  # of a bucket's upper bound: at most 1 % from either of its bounds
_LEAST = 1e-9  # what is not above it counts as zero
_ZERO = -(10**6)  # below every bucket


@dataclass(slots=True)
class _Slice:
    """What was added within `slice_s` seconds."""

    number: int  # counted from instant 0
    total: float = 0.0
    buckets: dict[int, int] = field(default_factory=dict)


class _Window:
    """The slices that are not older than the window, oldest first."""

    def __init__(self, *, window_s: float, slice_s: float) -> None:
        assert 0 < slice_s <= window_s
        self.slice_s = slice_s
        self._slices_max = ceil(window_s / slice_s)
        self._slices: list[_Slice] = []
        self._newest_ends_s = float("-inf")

    def _newest(self, at_s: float) -> _Slice:
        if at_s >= self._newest_ends_s or not self._slices:
            self._open(int(at_s // self.slice_s))
        return self._slices[-1]

    def _open(self, number: int) -> None:
        """Begin slice `number`, unless rounding of its bounds made it seem over."""
        self._newest_ends_s = (number + 1) * self.slice_s
        if not self._slices or number > self._slices[-1].number:
            self._slices.append(_Slice(number))
            self._forget(number)

    def _forget(self, number: int) -> None:
        """Drop what is outside of the window that ends with slice `number`."""
        oldest = number - self._slices_max + 1
        while self._slices and self._slices[0].number < oldest:
            del self._slices[0]

    def _recent(self, at_s: float) -> list[_Slice]:
        self._forget(int(at_s // self.slice_s))
        return self._slices


class Counts(_Window):
    """Sums and rates of the last `window_s` seconds, such as tokens and tokens per second."""

    def __init__(self, *, window_s: float, slice_s: float = 5.0, start_s: float) -> None:
        super().__init__(window_s=window_s, slice_s=slice_s)
        self._start_s = start_s

    def add(self, at_s: float, amount: float = 1) -> None:
        """Count `amount` at an instant."""
        self._newest(at_s).total += amount

    def total(self, at_s: float) -> float:
        """The sum over the window that ends at `at_s`."""
        return sum(s.total for s in self._recent(at_s))

    def per_s(self, at_s: float) -> float:
        """The sum by the seconds that the window covers, which are few just after the start."""
        first = (int(at_s // self.slice_s) - self._slices_max + 1) * self.slice_s
        return self.total(at_s) / max(at_s - max(first, self._start_s), self.slice_s)

    def series(self, at_s: float) -> list[tuple[float, float]]:
        """Start and rate per second of each whole slice of the window, oldest first, 0 included."""
        totals = {s.number: s.total for s in self._recent(at_s)}
        last = int(at_s // self.slice_s)
        first = max(last - self._slices_max + 1, ceil(self._start_s / self.slice_s))
        numbers = range(first, last)
        return [(n * self.slice_s, totals.get(n, 0.0) / self.slice_s) for n in numbers]


class Quantiles(_Window):
    """Quantiles of the samples of the last `window_s` seconds, such as times to first token."""

    def __init__(self, *, window_s: float, slice_s: float = 5.0) -> None:
        super().__init__(window_s=window_s, slice_s=slice_s)

    def add(self, at_s: float, values: Iterable[float]) -> None:
        """Count samples at an instant; none is negative."""
        buckets = self._newest(at_s).buckets
        for value in values:
            key = ceil(log(value) * _PER_LOG) if value > _LEAST else _ZERO
            buckets[key] = buckets.get(key, 0) + 1

    def count(self, at_s: float) -> int:
        """How many samples the window that ends at `at_s` holds."""
        return sum(sum(s.buckets.values()) for s in self._recent(at_s))

    def at(self, at_s: float, ranks: Iterable[float]) -> list[float] | None:
        """The quantiles of `ranks`, each above 0 and at most 1, or None without samples.

        Quantile q of n samples is the smallest that at least q n of them do not exceed.
        """
        merged: dict[int, int] = {}
        for part in self._recent(at_s):
            for key, count in part.buckets.items():
                merged[key] = merged.get(key, 0) + count
        return _quantiles(merged, ranks)

    def series(self, at_s: float, rank: float) -> list[tuple[float, float | None]]:
        """Start and quantile of each whole slice of the window that holds a sample."""
        last = int(at_s // self.slice_s)
        found = []
        for part in self._recent(at_s):
            if part.number < last and part.buckets:
                quantiles = _quantiles(part.buckets, (rank,))
                found.append((part.number * self.slice_s, quantiles[0] if quantiles else None))
        return found


def _quantiles(buckets: dict[int, int], ranks: Iterable[float]) -> list[float] | None:
    """The middle of the bucket in which each rank falls."""
    samples = sum(buckets.values())
    if not samples:
        return None
    ordered = sorted(buckets.items())
    found = []
    for rank in ranks:
        assert 0 < rank <= 1
        needed = ceil(rank * samples)
        for key, count in ordered:
            needed -= count
            if needed <= 0:
                found.append(0.0 if key == _ZERO else _MIDDLE * _GROWTH**key)
                break
    return found
