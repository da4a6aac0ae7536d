"""What each tier keeps: the order in which runs are forgotten, and what is worth carrying.

`PrefixIndex` asks; a placement answers with numbers that stay true until the run is used
again, so heaps stay sorted while time passes.  A value that decays as exp(-age / tau) has
the same order at every instant as `used + tau ln(value)`: that is the key.

    value = P(used again | hits so far) x miss penalty / bytes

P is counted while serving.  The penalty of a run is what it costs to have it again once
this tier forgot it: nothing more than a reload where the tier below keeps it, else the
cheaper of reload and recompute.  LRU is the special case of a constant value.
"""

from collections.abc import Iterable
from math import log
from typing import Any, Protocol

from tierline.base.clock import FOREVER_PS, PS_PER_S

HITS_TOLD_APART = 8
COUNTED_ANEW = 64  # ARC counts its segments after forgetting this fraction of a tier


class Run(Protocol):
    """What a placement may know of cached blocks (`kv.prefix.Run`)."""

    start: int
    blocks: int
    chain: Any
    hits: int
    used_ps: int
    birth: int
    mask: int


class Index(Protocol):
    """What it may know of the index that asks (`kv.prefix.PrefixIndex`)."""

    last_tier: int
    tiers: Any

    def runs(self) -> Iterable[Run]:
        """Every run, wherever its copies are."""
        ...

    def penalty_s_per_block(self, run: Run) -> float:
        """Seconds to compute one block of the run again."""
        ...


class Placement(Protocol):
    """What an index asks of a placement."""

    def key(self, index: Index, run: Run, tier: int) -> int:
        """Its place in the order of forgetting; the smallest goes first."""
        ...

    def segment(self, run: Run) -> int:
        """Which of two orders it stands in: 0, or 1 for a placement that keeps two."""
        ...

    def shrinks(self, index: Index, tier: int) -> int:
        """The segment that a tier forgets from next; asked when both have something."""
        ...

    def used(self, run: Run) -> None:
        """A request found `run`; called before its hits are counted."""
        ...

    def missed(self, chain: Any, depth: int, limit: int, now_ps: int) -> None:
        """A prompt comes that is not cached from `depth` on; `limit` blocks of it could be."""
        ...

    def forgotten(self, index: Index, run: Run, tier: int, *, kept: int = 0) -> None:
        """`tier` gave the run up, but for its first `kept` blocks."""
        ...


class Lru:
    """The run that was not used for longest goes first."""

    def key(self, index: Index, run: Run, tier: int) -> int:  # noqa: ARG002
        """The instant of the last use."""
        return run.used_ps

    def segment(self, run: Run) -> int:  # noqa: ARG002
        """One order for all."""
        return 0

    def shrinks(self, index: Index, tier: int) -> int:  # noqa: ARG002
        """There is only one."""
        return 0

    def used(self, run: Run) -> None:
        """Nothing to learn."""

    def missed(self, chain: Any, depth: int, limit: int, now_ps: int) -> None:
        """Nothing to learn."""

    def forgotten(self, index: Index, run: Run, tier: int, *, kept: int = 0) -> None:
        """Nothing to learn."""


class Lfu(Lru):
    """The run with the fewest uses goes first where a tier forgets for good; LRU above it."""

    def key(self, index: Index, run: Run, tier: int) -> int:
        """Uses, then the instant of the last one."""
        return run.used_ps if tier != index.last_tier else run.hits * FOREVER_PS + run.used_ps


class Arc(Lru):
    """Adaptive replacement (Megiddo and Modha 2003) in the last tier; LRU above it.

    Runs that were used once and runs that were used again have an order each.  How much of
    the tier the first kind may have moves with what turns out to have been forgotten too
    early: its last tierful of names is remembered for either kind.
    """

    def __init__(self) -> None:
        self._target_blocks = 0  # what the first kind may have
        self._once_blocks = 0  # what it has, as last counted
        self._forgotten: tuple[Ghosts, Ghosts] = (Ghosts(), Ghosts())
        self._uncounted = 0  # forgotten since

    def segment(self, run: Run) -> int:
        """0 for what was used once, 1 for what was used again."""
        return 1 if run.hits else 0

    def shrinks(self, index: Index, tier: int) -> int:
        """The first kind while it has more than its target."""
        if tier != index.last_tier:
            return 0
        if self._uncounted <= 0:
            capacity = index.tiers[tier].capacity_blocks
            self._uncounted = capacity // COUNTED_ANEW + 1
            self._once_blocks = sum(
                run.blocks for run in index.runs() if run.mask >> tier & 1 and not run.hits
            )
            for ghosts in self._forgotten:
                ghosts.keep(capacity)
            self._target_blocks = min(self._target_blocks, capacity)
        return 0 if self._once_blocks > self._target_blocks else 1

    def missed(self, chain: Any, depth: int, limit: int, now_ps: int) -> None:  # noqa: ARG002
        """What would have been a hit shows which kind is given too little."""
        once, again = self._forgotten
        for ghosts, other, sign in ((once, again, 1), (again, once, -1)):
            found = ghosts.find(chain, depth, limit)
            if found:
                step = max(other.blocks // max(ghosts.blocks, 1), 1) * found
                self._target_blocks = max(self._target_blocks + sign * step, 0)

    def forgotten(self, index: Index, run: Run, tier: int, *, kept: int = 0) -> None:
        """Its name is remembered."""
        if tier == index.last_tier:
            blocks = run.blocks - kept
            self._forgotten[self.segment(run)].add(run.chain[run.start + kept], blocks)
            self._uncounted -= blocks
            if not run.hits:
                self._once_blocks -= blocks


class Ghosts:
    """Names of runs that were forgotten, the oldest first."""

    def __init__(self) -> None:
        self.blocks = 0
        self._runs: dict[int, int] = {}

    def add(self, name: int, blocks: int) -> None:
        """Remember a run by the name of its first block."""
        self.blocks += blocks - self._runs.pop(name, 0)
        self._runs[name] = blocks

    def find(self, chain: Any, depth: int, limit: int) -> int:
        """Blocks of a chain that are remembered from `depth` on; they are forgotten here, too."""
        start = depth
        while depth < limit and (blocks := self._runs.pop(chain[depth], 0)):
            self.blocks -= blocks
            depth += blocks
        return depth - start

    def keep(self, most: int) -> None:
        """Remember no more than so many blocks."""
        while self.blocks > most:
            self.blocks -= self._runs.pop(next(iter(self._runs)))


class CostAware(Lru):
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

    def forgotten(self, index: Index, run: Run, tier: int, *, kept: int = 0) -> None:
        """A run that was never used counts against new ones."""
        if tier == index.last_tier and run.hits == 0 and not kept:
            self._reached[0] += 1
