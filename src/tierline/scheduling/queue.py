"""Who waits, and who of them goes next.

There is a lane for each band: those that can be on time, the background, and those that
stepped back.  Lanes are heaps over keys that never change.  A lane may have a floor, a share
of the tokens admitted: while it waits it earns that share in credit, when it is served it
pays, and a lane in credit is *owed*: it goes next whatever the keys say.  An empty lane
saves nothing up, and of what a lane was served beyond its floor no more than its largest
request is held against it.

Invariants
    INV-SCHED-1  who waits in a lane with a floor of f percent, with Q tokens of service before
                 it there, enters before another (Q + 2M) 100/f tokens are admitted, M being
                 the largest request
    INV-SCHED-2  as long as a lane with a floor of f <= 33 percent waits, it is served at
                 least f percent of the tokens admitted, less 2M
    INV-SCHED-3  everybody who waits is in exactly one lane
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Any

from tierline.scheduling.policy import Policy
from tierline.scheduling.sequence import (
    BACKGROUND,
    DONE,
    LATE,
    ON_TIME,
    OWED,
    WAITING,
    Sequence,
)

SAMPLE = 128  # of those that wait, when somebody asks who would be before a newcomer
Entry = tuple[int, Any, int, Sequence]


class Lane:
    """One heap of waiting sequences."""

    __slots__ = ("credit", "floor_percent", "heap", "largest_tokens", "tokens")

    def __init__(self, floor_percent: int = 0) -> None:
        self.floor_percent = floor_percent
        self.credit = 0  # percent x tokens; positive: owed
        self.largest_tokens = 0  # request that was served
        self.tokens = 0  # to be computed of all prompts that wait
        self.heap: list[Entry] = []


class WaitingLine:
    """All sequences that wait for memory, a slot, or their turn."""

    __slots__ = ("_band", "_floors", "_from", "_lanes", "waiting")

    def __init__(self, policy: Policy) -> None:
        self._lanes = [Lane(percent) for percent in policy.floors_percent]  # by band
        self._floors = [lane for lane in self._lanes if lane.floor_percent]
        self._band = policy.band
        self._from = self._lanes[ON_TIME]  # the lane that answered `head` last
        self.waiting = 0

    def push(self, sequence: Sequence) -> bool:
        """Let a sequence wait; whether it is now the first of its lane."""
        sequence.state = WAITING
        self.waiting += 1
        if sequence.band == OWED:  # it was its turn, and it lost its memory
            sequence.band = self._band(sequence)
        lane = self._lanes[sequence.band]
        entry = (sequence.band, sequence.key, sequence.id, sequence)
        heappush(lane.heap, entry)
        lane.tokens += sequence.target_tokens
        return lane.heap[0] is entry

    def head(self) -> Entry | None:
        """(band, key, id, sequence) of who goes next; the band is OWED for an owed lane."""
        if not self.waiting:
            return None
        for lane in self._floors:
            if lane.credit > 0 and (entry := self._top(lane)) is not None:
                self._from = lane
                return (OWED, *entry[1:])
        for lane in self._lanes:
            if lane.heap and (entry := self._top(lane)) is not None:
                self._from = lane
                return entry
        return None

    def take(self, head: Entry, tokens: int) -> None:
        """What `head` just answered was admitted for `tokens` tokens of service."""
        lane = self._from
        entry = heappop(lane.heap)
        assert entry[3] is head[3], "took somebody who was not first"
        self.waiting -= 1
        lane.tokens -= entry[3].target_tokens
        entry[3].band = head[0]  # who was owed stays owed until done
        if not self._floors:
            return
        for other in self._floors:
            if other.heap or other is lane:
                other.credit += other.floor_percent * tokens
            if not other.heap:
                other.credit = min(other.credit, 0)
        lane.largest_tokens = max(lane.largest_tokens, tokens)
        lane.credit = max(lane.credit - 100 * tokens, -100 * lane.largest_tokens)

    def on_time(self) -> Iterator[Sequence]:
        """Those who wait and have not stepped back."""
        for entry in self._lanes[ON_TIME].heap:
            if entry[3].state == WAITING:
                yield entry[3]

    def ripen(self, before_ps: int) -> None:
        """Who is in the background and whose deadline is near is so no longer."""
        lane = self._lanes[BACKGROUND]
        while (entry := self._top(lane)) is not None and entry[1] < before_ps:
            heappop(lane.heap)
            entry[3].band = ON_TIME
            self._move(entry[3], lane, self._lanes[ON_TIME])
            heappush(self._lanes[ON_TIME].heap, (ON_TIME, *entry[1:]))

    def step_back(self, late: list[Sequence]) -> None:
        """Move waiting sequences behind all that can still be on time."""
        for sequence in late:
            sequence.band = LATE
            self._move(sequence, self._lanes[ON_TIME], self._lanes[LATE])
            sequence.key = sequence.arrival_ps + sequence.debt_ps
            heappush(self._lanes[LATE].heap, (LATE, sequence.key, sequence.id, sequence))
        lane = self._lanes[ON_TIME]
        lane.heap = [entry for entry in lane.heap if entry[3].band != LATE]
        heapify(lane.heap)

    def reorder(self, order: dict[int, Any]) -> None:
        """Give everybody in the first lane a new key, by sequence id."""
        lane = self._lanes[ON_TIME]
        lane.heap = [(b, order[i], i, s) for b, _, i, s in lane.heap if s.state == WAITING]
        heapify(lane.heap)
        for entry in lane.heap:
            entry[3].key = entry[1]

    def cancelled(self, sequence: Sequence) -> None:
        """A waiting sequence is wanted no more; its entry is dropped when it comes up."""
        assert sequence.state == WAITING
        sequence.state = DONE
        self.waiting -= 1
        self._lanes[sequence.band].tokens -= sequence.target_tokens

    def before(self, band: int, key: Any) -> tuple[int, int]:
        """(prompt tokens, prompts) that wait and go before somebody who would come now.

        Of a long lane a sample is looked at.
        """
        tokens = sum(lane.tokens for lane in self._lanes[:band])
        prompts = sum(len(lane.heap) for lane in self._lanes[:band])
        lane = self._lanes[band]
        stride = len(lane.heap) // SAMPLE + 1
        sample = lane.heap[::stride]
        first = [e[3].target_tokens for e in sample if e[1] <= key]
        if stride == 1:
            return tokens + sum(first), prompts + len(first)
        in_all = sum(e[3].target_tokens for e in sample)
        return tokens + lane.tokens * sum(first) // in_all, prompts + stride * len(first)

    def everybody(self) -> list[Sequence]:
        """Who waits, in no particular order."""
        return [e[3] for lane in self._lanes for e in lane.heap if e[3].state == WAITING]

    def check(self) -> None:
        """Assert INV-SCHED-3."""
        waiting = self.everybody()
        assert len(waiting) == self.waiting == len({s.id for s in waiting})
        for band, lane in enumerate(self._lanes):
            assert lane.tokens == sum(s.target_tokens for s in waiting if s.band == band)

    def _move(self, sequence: Sequence, above: Lane, below: Lane) -> None:
        above.tokens -= sequence.target_tokens
        below.tokens += sequence.target_tokens

    def _top(self, lane: Lane) -> Entry | None:
        heap = lane.heap
        while heap and heap[0][3].state == DONE:
            heappop(heap)
        return heap[0] if heap else None
