"""Which blocks are meant: the names behind the scheduler's counts.

A scheduler accounts memory by counting pages, which is all a simulation needs.  An executor
that really holds memory hands its scheduler a `BlockNames`; the scheduler and the prefix
index then say here, too, what they have decided, and the executor reads block tables from
it.  Nothing is decided in this file, so counts and names cannot disagree about anything but
a bug, and `pages_held` beside the scheduler's count shows that.

A sequence has one table for each cache group, and pages for its recurrent state.  A run of
the prefix index has the pages of its blocks, over all groups.  A run is any hashable that
stays itself: the object, or its birth number.

Within one step the order is: `grow`, compute, `rollback` of rejected drafts, `publish`,
`slide`.  A block is published before the window passes it, so a run always holds all groups
of a block.

Invariants
    INV-KV-1  every block is free xor held
    INV-KV-2  a block that is written has one holder
    INV-KV-3  holders are exactly the tables, states and runs that name a block
"""

from collections import Counter
from collections.abc import Hashable, Iterable

from tierline.kv.groups import CacheLayout
from tierline.kv.pool import BlockPool
from tierline.kv.table import BlockTable, Copy

Run = Hashable


class BlockNames:
    """Tables of sequences and pages of prefix runs, over one pool."""

    __slots__ = ("_leaving", "_runs", "_states", "_tables", "layout", "pool")

    def __init__(self, pool: BlockPool, layout: CacheLayout) -> None:
        self.pool = pool
        self.layout = layout
        self._tables: dict[int, list[BlockTable]] = {}
        self._states: dict[int, list[int]] = {}
        self._runs: dict[Run, list[list[int]]] = {}  # for each group its pages, in order
        self._leaving: dict[Run, list[list[int]]] = {}  # the same, while they are written back

    # What an executor reads

    def tables(self, sequence_id: int) -> list[BlockTable]:
        """The block table of each cache group."""
        return self._tables[sequence_id]

    def __contains__(self, sequence_id: int) -> bool:
        """Whether the sequence names any block."""
        return sequence_id in self._tables

    def state(self, sequence_id: int) -> list[int]:
        """The pages of the recurrent state."""
        return self._states[sequence_id]

    def run_pages(self, run: Run) -> list[list[int]]:
        """For each cache group the pages of a run, in order: what a mover copies."""
        return self._leaving.get(run) or self._runs[run]

    def pages_held(self, sequence_id: int) -> int:
        """Pages that a sequence names, shared ones included."""
        held = sum(len(table.pages_held) for table in self._tables[sequence_id])
        return held + len(self._states[sequence_id])

    # Sequences

    def pages_to_grow(self, sequence_id: int, tokens: int) -> int:
        """Free pages that `grow(sequence_id, tokens)` needs."""
        tables = self._tables.get(sequence_id)
        if tables is None:
            return self.layout.pages_peak(0, tokens)
        return sum(table.pages_to_grow(tokens) for table in tables)

    def grow(self, sequence_id: int, tokens: int) -> list[Copy] | None:
        """Cover `tokens` tokens of a sequence, or None, and nothing changed, if blocks lack.

        Returns the copies to make before the step writes: a fork's shared last block.
        """
        tables = self._tables.get(sequence_id)
        if tables and tables[0].tokens <= tokens <= tables[0].room_tokens:
            for table in tables:  # the common case, once per sequence and step
                table.tokens = tokens
            return []
        if self.pages_to_grow(sequence_id, tokens) > self.pool.blocks_free:
            return None
        if tables is None:
            tables = self._open(sequence_id)
        copies: list[Copy] = []
        for table in tables:
            copies += table.grow(tokens)
        return copies

    def adopt(self, sequence_id: int, runs: Iterable[Run]) -> None:
        """A new sequence starts with all blocks of these runs, first to last."""
        assert self.layout.shares_prefixes, "a recurrent state cannot be shared"
        assert sequence_id not in self._tables, "a sequence adopts before it grows"
        held = [self._runs[run] for run in runs]
        for group, table in enumerate(self._open(sequence_id)):
            table.adopt([page for pages in held for page in pages[group]])

    def resume(self, sequence_id: int, tokens: int) -> bool:
        """Room for a sequence whose `tokens` were moved elsewhere and come back, if there is."""
        assert sequence_id not in self._tables, "it is here already"
        if self.layout.pages(tokens) > self.pool.blocks_free:
            return False
        for table in self._open(sequence_id):
            table.resume(tokens)
        return True

    def slide(self, sequence_id: int) -> None:
        """A step is accounted: release what the windows have passed."""
        for table in self._tables[sequence_id]:
            table.slide()

    def rollback(self, sequence_id: int, tokens: int) -> None:
        """Drafts beyond `tokens` were not accepted."""
        assert not self.layout.state_pages, "a recurrent state cannot go back"
        for table in self._tables[sequence_id]:
            table.rollback(tokens)

    def fork(self, parent_id: int, child_id: int) -> list[Copy] | None:
        """A second sequence with the same tokens, or None if its state has no room.

        Blocks are shared until one of the two writes, and `grow` then says what to copy;
        only a recurrent state is copied at once.
        """
        assert child_id not in self._tables
        state = self.pool.take(self.layout.state_pages)
        if state is None:
            return None
        self._states[child_id] = state
        self._tables[child_id] = [table.fork() for table in self._tables[parent_id]]
        return list(zip(self._states[parent_id], state, strict=True))

    def release(self, sequence_id: int) -> None:
        """The sequence is gone: finished, preempted, or moved to a lower tier.

        One that was admitted and never computed has nothing yet.
        """
        for table in self._tables.pop(sequence_id, ()):
            table.release()
        for page in self._states.pop(sequence_id, ()):
            self.pool.give_back(page)

    # Runs of the prefix index

    def publish(self, sequence_id: int, run: Run, first_block: int, blocks: int) -> None:
        """The run now also holds these blocks of the sequence, after those it has."""
        pages_by_group = self._runs.setdefault(run, [[] for _ in self.layout.groups])
        for table, pages in zip(self._tables[sequence_id], pages_by_group, strict=True):
            for index in range(first_block, first_block + blocks):
                assert (index + 1) * self.layout.block_tokens <= table.tokens, "not full yet"
                for page in table.block(index):
                    self.pool.share(page)
                    pages.append(page)

    def take(self, run: Run, blocks: int) -> None:
        """Device blocks for a run that is being loaded; the scheduler has made room."""
        fresh = self.pool.take(blocks * self.layout.pages_per_block)
        assert fresh is not None, "a load takes more than was reserved"
        pages_by_group = self._runs.setdefault(run, [[] for _ in self.layout.groups])
        end = 0
        for group, pages in zip(self.layout.groups, pages_by_group, strict=True):
            first, end = end, end + blocks * group.pages_per_block
            pages += fresh[first:end]

    def split(self, head: Run, tail: Run, blocks: int) -> None:
        """A run becomes two: its first `blocks` are the head's, the rest the tail's.

        Either of the two may be the run that was split.  Without pages there is nothing to do.
        """
        assert head != tail
        for runs in (self._runs, self._leaving):
            self._split(runs, head, tail, blocks)

    def _split(self, runs: dict[Run, list[list[int]]], head: Run, tail: Run, blocks: int) -> None:
        assert not (head in runs and tail in runs), "which one is split?"
        whole = runs.pop(head if head in runs else tail, None)
        if whole is None:
            return
        ends = [blocks * group.pages_per_block for group in self.layout.groups]
        parts = list(zip(whole, ends, strict=True))
        runs[head] = [pages[:end] for pages, end in parts]
        if any(len(pages) > end for pages, end in parts):
            runs[tail] = [pages[end:] for pages, end in parts]

    def forget(self, run: Run) -> None:
        """The run is no longer on the device; blocks that sequences hold stay theirs."""
        self._give_back(self._runs.pop(run))

    def trim(self, run: Run, blocks: int) -> None:
        """The run's last `blocks` are no longer on the device."""
        gone = []
        for group, pages in zip(self.layout.groups, self._runs[run], strict=True):
            end = len(pages) - blocks * group.pages_per_block
            gone.append(pages[end:])
            del pages[end:]
        self._give_back(gone)

    def leave(self, run: Run) -> None:
        """Its blocks are being written back; it may get others before these have left."""
        self._leaving[run] = self._runs.pop(run)

    def stay(self, run: Run) -> None:
        """What was leaving is the run's again."""
        self._runs[run] = self._leaving.pop(run)

    def left(self, run: Run) -> None:
        """What was leaving has been written back, or is not needed."""
        self._give_back(self._leaving.pop(run))

    # The pool

    def resize(self, pages: int) -> None:
        """So many pages may be in use from now on; what is taken away must be free."""
        self.pool.withhold(self.pool.blocks_total - pages)

    def _give_back(self, pages_by_group: list[list[int]]) -> None:
        for pages in pages_by_group:
            for page in reversed(pages):
                self.pool.give_back(page)

    def check(self) -> None:
        """INV-KV-1 and INV-KV-3, and each table's own."""
        self.pool.check()
        named: Counter[int] = Counter()
        for tables in self._tables.values():
            assert len({(table.tokens, table.room_tokens) for table in tables}) <= 1
            for table in tables:
                table.check()
                named.update(table.pages_held)
        for state in self._states.values():
            named.update(state)
        for pages_by_group in (*self._runs.values(), *self._leaving.values()):
            for group, pages in zip(self.layout.groups, pages_by_group, strict=True):
                assert len(pages) * self.layout.pages_per_block == group.pages_per_block * sum(
                    map(len, pages_by_group)
                )
                named.update(pages)
        for block in range(self.pool.blocks_total):
            assert named[block] == self.pool.references(block), f"block {block}"

    def _open(self, sequence_id: int) -> list[BlockTable]:
        """Empty tables, and room for the state, of a sequence that is new here."""
        state = self.pool.take(self.layout.state_pages)
        assert state is not None, "asked for before"
        self._states[sequence_id] = state
        tables = [
            BlockTable(self.pool, group, block_tokens=self.layout.block_tokens)
            for group in self.layout.groups
        ]
        self._tables[sequence_id] = tables
        return tables
