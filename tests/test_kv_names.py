"""Every sequence reads its own tokens, whatever is shared, forked, slid, rolled back or loaded.

The harness is a memory that does what an executor does: it makes the copies, writes what a
step computes, and reads all that the next step attends to.
"""

from typing import Any

import pytest
from hypothesis import Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tierline.kv.groups import CacheGroup, CacheLayout
from tierline.kv.names import BlockNames
from tierline.kv.pool import BlockPool
from tierline.kv.table import BlockTable

B = 4  # tokens of a block
PAGES = 60


def layout(*groups: tuple[int, int | None], state_pages: int = 0) -> CacheLayout:
    return CacheLayout(
        groups=tuple(CacheGroup(pages_per_block=p, window_tokens=w) for p, w in groups),
        block_tokens=B,
        page_bytes=1,
        state_pages=state_pages,
    )


LAYOUTS = {
    "full": layout((1, None)),
    "wide": layout((3, None)),
    "window": layout((1, 6)),
    "alternating": layout((1, None), (2, 5)),
    "two windows": layout((1, 3), (1, 9)),
    "state": layout((1, None), state_pages=2),
}


class Memory:
    """What an executor keeps: contents by page and offset, and what each sequence wrote."""

    def __init__(self, layout: CacheLayout) -> None:
        self.names = BlockNames(BlockPool(PAGES), layout)
        self.content: dict[tuple[int, int], Any] = {}
        self.tokens: dict[int, list[int]] = {}
        self.published: dict[int, int] = {}  # sequence: blocks
        self.rolled_back: set[int] = set()  # who had drafts rejected
        self.runs: dict[str, list[int]] = {}  # the tokens of each
        self.parents: dict[str, str] = {}
        self.serial = 0

    def fresh(self, count: int) -> list[int]:
        self.serial += count
        return list(range(self.serial - count, self.serial))

    def copy(self, copies: list[tuple[int, int]]) -> None:
        for source, target in copies:
            for offset in range(B):
                self.content[target, offset] = self.content.get((source, offset))

    def advance(self, sequence: int, count: int, rejected: int, publish: str | None) -> bool:
        """One step: grow, compute `count` tokens, undo some, publish full blocks, slide."""
        names, done = self.names, len(self.tokens.get(sequence, []))
        needed = names.pages_to_grow(sequence, done + count)
        free = names.pool.blocks_free
        copies = names.grow(sequence, done + count)
        assert (copies is None) == (needed > free)
        if copies is None:
            assert names.pool.blocks_free == free
            return False
        assert free - names.pool.blocks_free == needed
        held, counted = names.pages_held(sequence), names.layout.pages_peak(done, count)
        assert held <= counted  # INV-KV-4
        assert held == counted or sequence in self.rolled_back
        self.copy(copies)
        self.read(sequence)
        written = self.tokens.setdefault(sequence, [])
        added = self.fresh(count)
        self.write(sequence, written + added)
        written += added
        if rejected:
            self.rolled_back.add(sequence)
            names.rollback(sequence, len(written) - rejected)
            del written[len(written) - rejected :]
        if publish:
            self.publish(sequence, publish)
        names.slide(sequence)
        return True

    def write(self, sequence: int, tokens: list[int]) -> None:
        done = len(self.tokens[sequence])
        for g, table in enumerate(self.names.tables(sequence)):
            for position in range(max(done, table.first_token), len(tokens)):
                block, offset = divmod(position, B)
                for part, page in enumerate(table.block(block)):
                    assert self.names.pool.references(page) == 1  # INV-KV-2
                    self.content[page, offset] = (tokens[position], g, part)
        for part, page in enumerate(self.names.state(sequence)):
            self.content[page, 0] = (tokens[-1], "state", part)

    def read(self, sequence: int) -> None:
        """All that the next token attends to is there and is this sequence's own: INV-KV-5."""
        tokens = self.tokens.get(sequence, [])
        groups = self.names.layout.groups
        for g, (table, group) in enumerate(zip(self.names.tables(sequence), groups, strict=True)):
            window = group.window_tokens or len(tokens) + 1
            for position in range(max(0, len(tokens) - window + 1), len(tokens)):
                block, offset = divmod(position, B)
                found = [self.content[page, offset] for page in table.block(block)]
                assert found == [(tokens[position], g, p) for p in range(group.pages_per_block)]
        for part, page in enumerate(self.names.state(sequence) if tokens else []):
            assert self.content[page, 0] == (tokens[-1], "state", part)

    def publish(self, sequence: int, run: str) -> None:
        first = self.published.get(sequence, 0)
        full = len(self.tokens[sequence]) // B
        if full == first:
            return
        self.names.publish(sequence, run, first_block=first, blocks=full - first)
        self.runs.setdefault(run, []).extend(self.tokens[sequence][first * B : full * B])
        self.published[sequence] = full

    def read_run(self, run: str) -> None:
        for g, pages in enumerate(self.names.run_pages(run)):
            width = self.names.layout.groups[g].pages_per_block
            found = [self.content[page, o] for page in pages for o in range(B)]
            tokens = self.runs[run]
            expected = [
                (token, g, part)
                for block in range(len(tokens) // B)
                for part in range(width)
                for token in tokens[block * B : block * B + B]
            ]
            assert found == expected


class NamesMachine(RuleBasedStateMachine):
    """Random steps of a few sequences over every layout, with the harness as the model."""

    memory: Memory

    @initialize(name=st.sampled_from(sorted(LAYOUTS)))
    def begin(self, name: str) -> None:
        self.memory = Memory(LAYOUTS[name])
        self.publishes: dict[int, str] = {}  # sequence: the run it extends
        self.births = 0

    def born(self) -> str:
        self.births += 1
        return f"run {self.births}"

    def path(self, run: str) -> list[str]:
        above = self.memory.parents.get(run)
        return [*(self.path(above) if above else []), run]

    @rule(sequence=st.integers(0, 4), count=st.integers(1, 14), publish=st.booleans(), d=st.data())
    def step(self, sequence: int, count: int, publish: bool, d: st.DataObject) -> None:
        memory, new = self.memory, sequence not in self.memory.tokens
        if new and publish and memory.names.layout.shares_prefixes:
            self.publishes[sequence] = self.born()
        state = memory.names.layout.state_pages
        rejected = 0 if state else d.draw(st.integers(0, count - 1))
        if not memory.advance(sequence, count, rejected, self.publishes.get(sequence)) and new:
            self.publishes.pop(sequence, None)

    @precondition(lambda self: self.memory.runs)
    @rule(sequence=st.integers(0, 4), d=st.data())
    def adopt(self, sequence: int, d: st.DataObject) -> None:
        memory = self.memory
        assume(sequence not in memory.tokens)
        path = self.path(d.draw(st.sampled_from(sorted(memory.runs))))
        assume(all(run in memory.runs for run in path))
        memory.names.adopt(sequence, path)
        memory.tokens[sequence] = [token for run in path for token in memory.runs[run]]
        memory.published[sequence] = len(memory.tokens[sequence]) // B
        self.publishes[sequence] = self.born()
        memory.parents[self.publishes[sequence]] = path[-1]

    @precondition(lambda self: self.memory.tokens)
    @rule(child=st.integers(0, 4), d=st.data())
    def fork(self, child: int, d: st.DataObject) -> None:
        memory = self.memory
        assume(child not in memory.tokens)
        parent = d.draw(st.sampled_from(sorted(memory.tokens)))
        free = memory.names.pool.blocks_free
        copies = memory.names.fork(parent, child)
        assert (copies is None) == (free < memory.names.layout.state_pages)
        if copies is not None:
            memory.copy(copies)
            memory.tokens[child] = memory.tokens[parent].copy()
            if parent in memory.rolled_back:
                memory.rolled_back.add(child)
            self.publishes.pop(child, None)

    @precondition(lambda self: self.memory.tokens)
    @rule(d=st.data())
    def release(self, d: st.DataObject) -> None:
        self.release_of(d.draw(st.sampled_from(sorted(self.memory.tokens))))

    def release_of(self, sequence: int) -> None:
        self.memory.names.release(sequence)
        del self.memory.tokens[sequence]
        self.memory.published.pop(sequence, None)
        self.memory.rolled_back.discard(sequence)
        self.publishes.pop(sequence, None)

    @precondition(lambda self: self.memory.tokens)
    @rule(d=st.data())
    def move_out_and_back(self, d: st.DataObject) -> None:
        """A swap: private blocks everywhere, and of a window only what is kept."""
        memory, names = self.memory, self.memory.names
        sequence = d.draw(st.sampled_from(sorted(memory.tokens)))
        tokens = memory.tokens[sequence]
        self.release_of(sequence)
        free = names.pool.blocks_free
        room = names.layout.pages(len(tokens)) <= free
        assert names.resume(sequence, len(tokens)) == room
        if not room:
            assert names.pool.blocks_free == free
            return
        memory.tokens[sequence] = []
        memory.write(sequence, tokens)
        memory.tokens[sequence] = tokens

    @precondition(lambda self: self.memory.runs)
    @rule(d=st.data())
    def split(self, d: st.DataObject) -> None:
        memory = self.memory
        tail = d.draw(st.sampled_from(sorted(memory.runs)))
        blocks = len(memory.runs[tail]) // B
        assume(blocks > 1)
        at = d.draw(st.integers(1, blocks - 1))
        head = self.born()
        memory.names.split(head, tail, blocks=at)
        memory.runs[head] = memory.runs[tail][: at * B]
        memory.runs[tail] = memory.runs[tail][at * B :]
        if tail in memory.parents:
            memory.parents[head] = memory.parents[tail]
        memory.parents[tail] = head

    @precondition(lambda self: self.memory.runs)
    @rule(d=st.data())
    def forget(self, d: st.DataObject) -> None:
        memory = self.memory
        run = d.draw(st.sampled_from(sorted(memory.runs)))
        extended = [s for s, own in self.publishes.items() if own == run]
        assume(not extended)
        memory.names.forget(run)
        del memory.runs[run]

    @rule(blocks=st.integers(1, 3))
    def load(self, blocks: int) -> None:
        memory = self.memory
        assume(memory.names.layout.shares_prefixes)
        run, free = self.born(), memory.names.pool.blocks_free
        assume(free >= blocks * memory.names.layout.pages_per_block)
        memory.names.take(run, blocks)
        memory.runs[run] = memory.fresh(blocks * B)
        for g, held in enumerate(memory.names.run_pages(run)):
            width = memory.names.layout.groups[g].pages_per_block
            for index, page in enumerate(held):
                block, part = divmod(index, width)
                for offset in range(B):
                    memory.content[page, offset] = (memory.runs[run][block * B + offset], g, part)

    @invariant()
    def everything_reads_back(self) -> None:
        memory = self.memory
        memory.names.check()  # INV-KV-1, INV-KV-3
        for sequence, tokens in memory.tokens.items():
            memory.read(sequence)
            held, counted = (
                memory.names.pages_held(sequence),
                memory.names.layout.pages(len(tokens)),
            )
            assert held <= counted  # INV-KV-4
            assert held == counted or sequence in memory.rolled_back
        for run in memory.runs:
            memory.read_run(run)

    def teardown(self) -> None:
        if not hasattr(self, "memory"):
            return
        for sequence in list(self.memory.tokens):
            self.memory.names.release(sequence)
        for run in list(self.memory.runs):
            self.memory.names.forget(run)
        assert self.memory.names.pool.blocks_free == PAGES  # nothing leaks
        self.memory.names.check()


SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)


class TestNames(NamesMachine.TestCase):
    settings = SETTINGS


# Controls: with a mechanism off, the model notices


def write_into_the_shared(table: BlockTable, tokens: int) -> bool:
    return False


def hold_one_block_less(group: CacheGroup, block_tokens: int) -> int:
    assert group.window_tokens is not None
    return -(-(group.window_tokens - 1) // block_tokens)


def keep_what_was_rejected(table: BlockTable, tokens: int) -> None:
    table.tokens = tokens


def share_without_saying(table: BlockTable, pages: list[int]) -> None:
    table._pages = list(pages)
    table.tokens = len(pages) // table._group.pages_per_block * B


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (BlockTable, "_must_copy", write_into_the_shared),
        (CacheGroup, "_kept", hold_one_block_less),
        (BlockTable, "rollback", keep_what_was_rejected),
        (BlockTable, "adopt", share_without_saying),
    ],
)
def test_the_model_notices_a_mechanism_that_is_off(monkeypatch, owner, name, broken):
    monkeypatch.setattr(owner, name, broken)

    with pytest.raises((AssertionError, KeyError, IndexError)):
        run_state_machine_as_test(
            NamesMachine,
            settings=settings(
                SETTINGS,
                max_examples=400,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
            ),
        )


# The cases that a reader would ask about


def test_the_first_writer_copies_and_the_last_writes_in_place():
    names = BlockNames(BlockPool(10), LAYOUTS["full"])
    names.grow(1, 6)
    names.fork(1, 2)
    parent = names.tables(1)[0].pages_held

    assert names.grow(2, 7) == [(parent[1], 2)]
    assert names.grow(1, 7) == []
    assert names.tables(1)[0].pages_held == parent
    assert names.tables(2)[0].pages_held == [parent[0], 2]


def test_a_step_that_does_not_fit_changes_nothing():
    names = BlockNames(BlockPool(3), LAYOUTS["alternating"])

    assert names.grow(1, 4) == []
    assert names.grow(1, 5) is None
    assert names.grow(2, 1) is None
    assert names.pages_held(1) == 3
    names.check()


def test_a_prefix_is_shared_and_outlives_its_writer():
    names = BlockNames(BlockPool(10), LAYOUTS["full"])
    names.grow(1, 9)
    names.publish(1, "run", first_block=0, blocks=2)
    names.release(1)
    names.adopt(2, ["run"])
    names.grow(2, 10)

    assert names.tables(2)[0].pages_held == [*names.run_pages("run")[0], 2]
    assert names.pool.blocks_free == 7
    names.forget("run")
    assert names.pool.blocks_free == 7  # still read by the second
    names.release(2)
    assert names.pool.blocks_free == 10


def test_either_half_of_a_split_may_be_the_old_run():
    for head, tail in (("old", "new"), ("new", "old")):
        names = BlockNames(BlockPool(12), LAYOUTS["alternating"])
        names.take("old", 3)
        whole = [pages.copy() for pages in names.run_pages("old")]
        names.split(head, tail, blocks=1)

        assert names.run_pages(head) == [whole[0][:1], whole[1][:2]]
        assert names.run_pages(tail) == [whole[0][1:], whole[1][2:]]
        names.check()


def test_what_is_not_full_is_not_published():
    names = BlockNames(BlockPool(10), LAYOUTS["full"])
    names.grow(1, 7)

    with pytest.raises(AssertionError, match="not full"):
        names.publish(1, "run", first_block=1, blocks=1)


def test_a_state_is_neither_adopted_nor_rolled_back():
    names = BlockNames(BlockPool(10), LAYOUTS["state"])
    names.grow(1, 3)

    assert names.fork(1, 2) == [(0, 3), (1, 4)]
    with pytest.raises(AssertionError):
        names.adopt(3, [])
    with pytest.raises(AssertionError):
        names.rollback(1, 2)
