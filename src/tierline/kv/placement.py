"""What each tier keeps: the order in which runs are forgotten, and what is worth carrying.

`PrefixIndex` asks; a placement answers with numbers that stay true until the run is used
again, so heaps stay sorted while time passes.  A value that decays as exp(-age / tau) has
the same order at every instant as `used + tau ln(value)`: that is the key.

    value = P(used again | hits so far) x miss penalty / bytes

P is counted while serving.  The penalty of a run is what it costs to have it again once
this tier forgot it: nothing more than a reload where the tier below keeps it, else the
cheaper of reload and recompute.  LRU is the special case of a constant value.
"""

from math import log
from typing import Protocol

from tierline.base.clock import PS_PER_S

HITS_TOLD_APART = 8


class Run(Protocol):
    """What a placement may know of cached blocks (`kv.prefix.Run`)."""

    start: int
    blocks: int
    hits: int
    used_ps: int
    birth: int
    mask: int


class Index(Protocol):
    """What it may know of the index that asks (`kv.prefix.PrefixIndex`)."""

    last_tier: int

    def penalty_s_per_block(self, run: Run) -> float:
        """Seconds to compute one block of the run again."""
        ...


class Placement(Protocol):
    """What an index asks of a placement."""

    def key(self, index: Index, run: Run, tier: int) -> int:
        """Its place in the order of forgetting; the smallest goes first."""
        ...

    def used(self, run: Run) -> None:
        """A request found `run`; called before its hits are counted."""
        ...

    def forgotten(self, index: Index, run: Run, tier: int) -> None:
        """`tier` gave the run up."""
        ...


class Lru:
    """The run that was not used for longest goes first."""

    def key(self, index: Index, run: Run, tier: int) -> int:  # noqa: ARG002
        """The instant of the last use."""
        return run.used_ps

    def used(self, run: Run) -> None:
        """Nothing to learn."""

    def forgotten(self, index: Index, run: Run, tier: int) -> None:
        """Nothing to learn."""


class CostAware:
    """Expected reuse x miss penalty / bytes, where a tier forgets for good; LRU above it."""

    def __init__(self, *, tau_s: float = 100.0) -> None:
        self.tau_ps = int(tau_s * PS_PER_S)
        self._reached = [1] * (HITS_TOLD_APART + 1)  # runs that were hit h times
        self._again = [1] * (HITS_TOLD_APART + 1)  # of those, hit once more

    def key(self, index: Index, run: Run, tier: int) -> int:
        """The last use, shifted by the logarithm of the run's value."""
        if tier != index.last_tier:
            return run.used_ps
        hits = min(run.hits, HITS_TOLD_APART - 1)
        reuse = self._again[hits] / self._reached[hits]
        penalty = index.penalty_s_per_block(run)
        return run.used_ps + int(self.tau_ps * log(reuse * penalty))

    def used(self, run: Run) -> None:
        """Count that runs with so many hits are used again."""
        hits = min(run.hits, HITS_TOLD_APART - 1)
        if run.hits == 0:
            self._reached[0] += 1
        self._again[hits] += 1
        self._reached[hits + 1] += 1

    def forgotten(self, index: Index, run: Run, tier: int) -> None:
        """A run that was never used counts against new ones."""
        if tier == index.last_tier and run.hits == 0:
            self._reached[0] += 1
