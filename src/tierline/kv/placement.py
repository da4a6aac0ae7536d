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
from math import exp, log
from typing import Any, Protocol

from tierline.base.clock import FOREVER_PS, PS_PER_S

HITS_TOLD_APART = 8
TAU_MIN_PS, TAU_MAX_PS = PS_PER_S, 3600 * PS_PER_S
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

    def capacity_blocks(self, tier: int) -> int:
        """What a tier can hold."""
        ...

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

    def segment(self, index: Index, run: Run, tier: int) -> int:
        """Which of two orders it stands in: 0, or 1 for a placement that keeps two."""
        ...

    def shrinks(self, index: Index, tier: int) -> int:
        """The segment that a tier forgets from next; asked when both have something."""
        ...

    def used(self, run: Run) -> None:
        """A request found `run`; called before its hits are counted."""
        ...

    def missed(self, chain: Any, depth: int, limit: int) -> None:
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

    def segment(self, index: Index, run: Run, tier: int) -> int:  # noqa: ARG002
        """One order for all."""
        return 0

    def shrinks(self, index: Index, tier: int) -> int:  # noqa: ARG002
        """There is only one."""
        return 0

    def used(self, run: Run) -> None:
        """Nothing to learn."""

    def missed(self, chain: Any, depth: int, limit: int) -> None:
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
    early: a tierful of names is remembered.
    """

    def __init__(self) -> None:
        self._target_blocks = 0  # what the first kind may have
        self._once_blocks = 0  # what it has, as last counted
        self._ghosts = Ghosts()
        self._uncounted = 0  # to be forgotten until it is counted again

    def segment(self, index: Index, run: Run, tier: int) -> int:
        """0 for what was used once, 1 for what was used again."""
        return 1 if run.hits and tier == index.last_tier else 0

    def shrinks(self, index: Index, tier: int) -> int:
        """The first kind while it has more than its target."""
        if self._uncounted <= 0:
            capacity = index.capacity_blocks(tier)
            self._uncounted = capacity // COUNTED_ANEW + 1
            self._once_blocks = sum(
                run.blocks for run in index.runs() if run.mask >> tier & 1 and not run.hits
            )
            self._target_blocks = min(self._target_blocks, capacity)
        return 0 if self._once_blocks > self._target_blocks else 1

    def missed(self, chain: Any, depth: int, limit: int) -> None:
        """What would have been a hit shows which kind is given too little."""
        once, again = self._ghosts.blocks(kind=False), self._ghosts.blocks(kind=True)
        for ghost in self._ghosts.find(chain, depth, limit):
            if ghost.kind:
                self._target_blocks -= max(once // max(again, 1), 1) * ghost.blocks
            else:
                self._target_blocks += max(again // max(once, 1), 1) * ghost.blocks
        self._target_blocks = max(self._target_blocks, 0)

    def forgotten(self, index: Index, run: Run, tier: int, *, kept: int = 0) -> None:
        """Its name is remembered."""
        if tier == index.last_tier:
            capacity = index.capacity_blocks(tier)
            self._ghosts.add(run, kept, kind=run.hits > 0, most=capacity)
            self._uncounted -= run.blocks - kept
            if not run.hits:
                self._once_blocks -= run.blocks - kept


class CostAware(Lru):
    """Expected reuse x miss penalty / bytes, where a tier forgets for good; LRU above it.

    What is learned counts what was forgotten, too: else a kind of run that is forgotten early
    would never show that it is used again.

    `tau_ps` says how much value weighs against recency (0 is LRU).  Like ARC's target it
    moves with regret: up when a run that was worth more than most is missed after it was
    forgotten, down when it is one that was worth less.
    """

    def __init__(self, *, tau_s: float = 60.0, learning: float = 0.3) -> None:
        """`learning` is how far missing all that is remembered of a kind moves tau, as a power
        of e."""
        self.tau_ps = int(tau_s * PS_PER_S)
        self._learning = learning
        self._usual = 0.0  # value of what is forgotten: keys stay comparable while tau moves
        self._settled = False  # whether that was ever seen
        self._reached = [1] * (HITS_TOLD_APART + 1)  # runs that were hit h times
        self._again = [1] * (HITS_TOLD_APART + 1)  # of those, hit once more
        self._ghosts = Ghosts()

    def key(self, index: Index, run: Run, tier: int) -> int:
        """The last use, shifted by the logarithm of the run's value."""
        if tier != index.last_tier:
            return run.used_ps
        return run.used_ps + int(self.tau_ps * (self._value(index, run) - self._usual))

    def _value(self, index: Index, run: Run) -> float:
        """The logarithm of expected reuse x penalty, of one block."""
        hits = min(run.hits, HITS_TOLD_APART - 1)
        reuse = self._again[hits] / self._reached[hits]
        return log(reuse * index.penalty_s_per_block(run))

    def used(self, run: Run) -> None:
        """Count that runs with so many hits are used again."""
        hits = min(run.hits, HITS_TOLD_APART - 1)
        if run.hits == 0:
            self._reached[0] += 1
        self._again[hits] += 1
        self._reached[hits + 1] += 1

    def missed(self, chain: Any, depth: int, limit: int) -> None:
        """What was forgotten is used again."""
        remembered = self._ghosts.blocks(kind=False), self._ghosts.blocks(kind=True)
        for ghost in self._ghosts.find(chain, depth, limit):
            self._again[min(ghost.hits, HITS_TOLD_APART - 1)] += 1
            share = ghost.blocks / remembered[ghost.kind]
            regret = share if ghost.kind else -share
            tau_ps = int(self.tau_ps * exp(self._learning * regret))
            self.tau_ps = min(max(tau_ps, TAU_MIN_PS), TAU_MAX_PS)

    def forgotten(self, index: Index, run: Run, tier: int, *, kept: int = 0) -> None:
        """A run that was never used counts against new ones."""
        if tier != index.last_tier:
            return
        capacity, value = index.capacity_blocks(tier), self._value(index, run)
        weight = min((run.blocks - kept) / capacity, 1.0) if self._settled else 1.0
        self._usual += weight * (value - self._usual)
        self._settled = True
        self._ghosts.add(run, kept, kind=value > self._usual, most=capacity)
        if not run.hits and not kept:
            self._reached[0] += 1


class Ghost:
    """What is remembered of a run that was forgotten."""

    __slots__ = ("blocks", "hits", "kind")

    def __init__(self, blocks: int, hits: int, *, kind: bool) -> None:
        self.blocks, self.hits, self.kind = blocks, hits, kind


class Ghosts:
    """Runs of two kinds that were forgotten, by their first block's name, the oldest first."""

    __slots__ = ("_blocks", "_runs")

    def __init__(self) -> None:
        self._runs: dict[int, Ghost] = {}
        self._blocks = [0, 0]

    def blocks(self, *, kind: bool) -> int:
        """How many of a kind are remembered."""
        return self._blocks[kind]

    def add(self, run: Run, kept: int, *, kind: bool, most: int) -> None:
        """Remember all of a run but its first `kept` blocks, and no more than `most` in all."""
        name = run.chain[run.start + kept]
        self._drop(name)
        self._runs[name] = ghost = Ghost(run.blocks - kept, run.hits, kind=kind)
        self._blocks[kind] += ghost.blocks
        while sum(self._blocks) > most:
            self._drop(next(iter(self._runs)))

    def find(self, chain: Any, depth: int, limit: int) -> list[Ghost]:
        """What is remembered of a chain from `depth` on; it is not a ghost any more."""
        found = []
        while depth < limit and (ghost := self._drop(chain[depth])) is not None:
            found.append(ghost)
            depth += ghost.blocks
        return found

    def _drop(self, name: int) -> Ghost | None:
        ghost = self._runs.pop(name, None)
        if ghost is not None:
            self._blocks[ghost.kind] -= ghost.blocks
        return ghost


PLACEMENTS: dict[str, type[Lru]] = {
    "lru": Lru,
    "lfu": Lfu,
    "arc": Arc,
    "cost-aware": CostAware,
}
