"""How much of the prompts a prefix cache of a given size would have found: the reuse curve.

The profile feeds every request to a `ReuseMeter`; the planner asks the curve what each memory
tier is worth. One pass answers for all sizes at once, because LRU has the stack property: a
block is in a cache of C blocks exactly when fewer than C other blocks were touched since it was.

Two choices make a hit mean what it means in an engine. The whole request is looked up before
any of its blocks is touched. And a request touches its blocks from the last to the first, so a
parent is never older than its child and LRU drops tails before heads: what is cached is always
a leading run, and only leading runs count.

The distances are counted for all accesses together, bit by bit of their rank, which is a few
numpy passes in place of a tree walk for each access. Above `ACCESSES_MAX` accesses, blocks are
sampled by a hash of their id (SHARDS), and distances scaled: memory stays bounded, and equal
traces give equal curves.
"""

import math
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ints = npt.NDArray[np.int64]

ACCESSES_MAX = 2_000_000
_POINTS = 40
_FLUSH = 1_000_000
_COLD = 1 << 40  # the distance of a first access: larger than any cache


@dataclass(frozen=True, slots=True, kw_only=True)
class ReusePoint:
    """What one shared LRU cache of this size would have found."""

    cached_tokens: int
    block_hit_rate: float
    token_hit_rate: float  # of all prompt tokens, those in blocks that were found


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseCurve:
    """Hit rate against cache size, in order of size; the last point holds every block."""

    block_tokens: int
    accesses: int
    distinct_blocks: int
    sample_rate: float  # 1 when every block was followed
    points: tuple[ReusePoint, ...]

    @property
    def ideal(self) -> ReusePoint:
        """The hit rates when nothing is ever dropped."""
        return self.points[-1]

    def hit_rate(self, cached_tokens: float) -> float:
        """Share of prompt tokens found, at a cache of this many tokens; linear in log size."""
        return self._between(cached_tokens, [p.token_hit_rate for p in self.points])

    def block_hit_rate(self, cached_tokens: float) -> float:
        """Share of blocks found, at a cache of this many tokens; linear in log size."""
        return self._between(cached_tokens, [p.block_hit_rate for p in self.points])

    def _between(self, cached_tokens: float, rates: Sequence[float]) -> float:
        sizes = [p.cached_tokens for p in self.points]
        above = bisect_right(sizes, cached_tokens)
        if above == len(sizes):
            return rates[-1]
        if above == 0:
            return rates[0] * max(cached_tokens, 0) / sizes[0]
        low, high = sizes[above - 1], sizes[above]
        share = math.log(cached_tokens / low) / math.log(high / low)
        return rates[above - 1] + share * (rates[above] - rates[above - 1])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return {
            "block_tokens": self.block_tokens,
            "accesses": self.accesses,
            "distinct_blocks": self.distinct_blocks,
            "sample_rate": self.sample_rate,
            "points": [[p.cached_tokens, p.block_hit_rate, p.token_hit_rate] for p in self.points],
        }


class ReuseMeter:
    """Collects the block accesses of a trace, then gives its curve."""

    def __init__(self, *, block_tokens: int, accesses_max: int = ACCESSES_MAX) -> None:
        assert block_tokens > 0
        self._block_tokens = block_tokens
        self._accesses_max = accesses_max
        self._requests = 0
        self._accesses = 0
        self._input_tokens = 0
        self._halvings = 0
        self._ids = array("q")
        self._counts = array("q")
        self._inputs = array("q")
        self._kept: list[tuple[Ints, Ints, Ints]] = []  # ids, request numbers, tokens
        self._kept_accesses = 0

    def add(self, prefix_blocks: Sequence[int], input_tokens: int) -> None:
        """One request, in order of arrival."""
        self._ids.extend(prefix_blocks[::-1])
        self._counts.append(len(prefix_blocks))
        self._inputs.append(input_tokens)
        if len(self._ids) >= _FLUSH:
            self._flush()

    def curve(self) -> ReuseCurve | None:
        """The curve, or None when no request said what its blocks are: unknown, not zero."""
        import numpy as np

        self._flush()
        if self._accesses == 0:
            return None
        ids, requests, tokens = (np.concatenate(column) for column in zip(*self._kept, strict=True))
        distances = _distances(ids, requests)
        distances = np.where(distances == len(ids), _COLD, distances << self._halvings)
        order = np.argsort(distances, kind="stable")
        found_blocks = np.cumsum(np.ones(len(order)))
        found_tokens = np.cumsum(tokens[order].astype(np.float64))
        # A sample holds more or fewer accesses than its share; the difference belongs to the
        # few blocks that everyone touches, which are found at any size (SHARDS-adj).
        expected = self._accesses / (1 << self._halvings)
        extra = expected - len(ids)
        found_blocks += extra
        found_tokens += extra * self._block_tokens
        total_tokens = self._input_tokens / (1 << self._halvings)
        sorted_distances = distances[order]
        distinct = int((sorted_distances >= _COLD).sum()) << self._halvings

        def point(blocks: int) -> ReusePoint:
            hits = int(np.searchsorted(sorted_distances, blocks))
            block_rate = found_blocks[hits - 1] / expected if hits else 0.0
            token_rate = found_tokens[hits - 1] / total_tokens if hits else 0.0
            return ReusePoint(
                cached_tokens=blocks * self._block_tokens,
                block_hit_rate=min(1.0, max(0.0, float(block_rate))),
                token_hit_rate=min(1.0, max(0.0, float(token_rate))),
            )

        sizes = np.geomspace(1, max(distinct, 2), _POINTS).round().astype(int)
        return ReuseCurve(
            block_tokens=self._block_tokens,
            accesses=self._accesses,
            distinct_blocks=distinct,
            sample_rate=1 / (1 << self._halvings),
            points=tuple(point(int(size)) for size in np.unique(sizes)),
        )

    def _flush(self) -> None:
        """Move what was collected into arrays, and thin the sample when it grew too large."""
        import numpy as np

        counts = np.array(self._counts)
        inputs = np.array(self._inputs)
        ids = np.array(self._ids)
        requests = np.repeat(np.arange(len(counts)) + self._requests, counts)
        ends = np.cumsum(counts)
        depth = np.repeat(ends, counts) - 1 - np.arange(len(ids))  # 0 is the first block
        left = np.repeat(inputs, counts) - depth * self._block_tokens
        tokens = np.clip(left, 0, self._block_tokens)
        self._requests += len(counts)
        self._accesses += len(ids)
        self._input_tokens += int(inputs.sum())
        self._keep(ids, requests, tokens)
        for column in (self._ids, self._counts, self._inputs):
            del column[:]
        while self._kept_accesses > self._accesses_max:
            self._halvings += 1
            kept, self._kept, self._kept_accesses = self._kept, [], 0
            for columns in kept:
                self._keep(*columns)

    def _keep(self, ids: "Ints", requests: "Ints", tokens: "Ints") -> None:
        if self._halvings:
            chosen = _hash(ids) >> (64 - self._halvings) == 0
            ids, requests, tokens = ids[chosen], requests[chosen], tokens[chosen]
        self._kept.append((ids, requests, tokens))
        self._kept_accesses += len(ids)


def _hash(ids: "Ints") -> "npt.NDArray[np.uint64]":
    """The splitmix64 finaliser: ids are often consecutive, and a sample must not follow that."""
    import numpy as np

    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _distances(ids: "Ints", requests: "Ints") -> "Ints":
    """For each access, how many other blocks were touched between its block's last touch and
    the arrival of its request; the number of accesses, which is more than any, for a first touch.

    A block touched in that span is counted at its first touch there, which is the access j
    whose own previous touch lies before the span: previous[j] <= previous[i]. All accesses up
    to previous[i] meet that too, so the count over the whole past less previous[i] + 1 remains;
    and so do the deeper blocks of the same request, which were touched just before.
    """
    import numpy as np

    count = len(ids)
    where = np.arange(count)
    by_id = np.argsort(ids, kind="stable")
    same = ids[by_id][1:] == ids[by_id][:-1]
    previous = np.full(count, -1, dtype=np.int64)
    previous[by_id[1:][same]] = by_id[:-1][same]
    starts = np.searchsorted(requests, requests)
    inside = where - starts
    distances = _count_before(previous) - (previous + 1) - inside
    distances = np.where(previous < 0, count, np.maximum(distances, 0))
    # Leading runs only: a block is not found when one before it is not.
    offset = (requests.max(initial=0) - requests) * (count + 1)
    running = np.maximum.accumulate((distances + offset)[::-1])[::-1]
    return np.asarray(running - offset)


def _count_before(values: "Ints") -> "Ints":
    """For each i, how many j < i have values[j] <= values[i].

    Ranks are distinct and keep the order of equal values. From the top bit down, elements that
    agree in all higher bits stand together in their old order; one whose bit is 1 has all
    zeros before it in its group below it, and in no lower bit are those counted again.
    """
    import numpy as np

    count = len(values)
    rank = np.empty(count, dtype=np.int64)
    rank[np.argsort(values, kind="stable")] = np.arange(count)
    less = np.zeros(count, dtype=np.int64)
    order = np.arange(count)
    for bit in range(max(count - 1, 1).bit_length() - 1, -1, -1):
        here = rank[order]
        zero = (here >> bit & 1) == 0
        zeros_before = np.cumsum(zero) - zero
        group = here >> (bit + 1)
        group_start = np.searchsorted(group, group)
        in_group = zeros_before - zeros_before[group_start]
        less[order[~zero]] += in_group[~zero]
        order = order[np.argsort(here >> bit, kind="stable")]
    return less
