"""Blocks are conserved after any sequence of operations, and paging wastes what it must."""

from itertools import pairwise

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tierline.kv.groups import CacheGroup
from tierline.kv.pool import BlockPool
from tierline.kv.table import BlockTable


class PoolMachine(RuleBasedStateMachine):
    """Compare the pool with the simplest thing that could be right: a list of holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8)
        self.holds: list[int] = []

    @rule(count=st.integers(0, 9))
    def take(self, count: int) -> None:
        free_before = self.pool.blocks_free
        taken = self.pool.take(count)
        assert (taken is None) == (count > free_before)
        assert len(taken or []) == (0 if taken is None else count)
        assert not set(taken or []) & set(self.holds)
        self.holds += taken or []

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.holds))
        self.pool.share(block)
        self.holds.append(block)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.holds))
        self.pool.give_back(block)
        self.holds.remove(block)

    @invariant()
    def conserved(self) -> None:
        self.pool.check()
        assert self.pool.blocks_free == 8 - len(set(self.holds))
        assert all(self.pool.references(b) == self.holds.count(b) for b in range(8))


TestPool = PoolMachine.TestCase


def leak(pool: BlockPool) -> None:
    pool._free.pop()


def list_twice(pool: BlockPool) -> None:
    pool._free.append(pool._free[0])


def free_a_held_one(pool: BlockPool) -> None:
    pool._free.append(0)


def forget_a_holder(pool: BlockPool) -> None:
    pool._holders[0] = 0


@pytest.mark.parametrize("damage", [leak, list_twice, free_a_held_one, forget_a_holder])
def test_the_checker_can_fail(damage):
    """Negative control: a checker that accepts a lost block proves nothing."""
    pool = BlockPool(3)
    pool.take(1)
    pool.check()
    damage(pool)

    with pytest.raises(AssertionError):
        pool.check()


def test_misuse_of_the_pool_is_an_assertion():
    pool = BlockPool(2)
    (block,) = pool.take(1) or []
    pool.give_back(block)

    with pytest.raises(AssertionError, match="twice"):
        pool.give_back(block)
    with pytest.raises(AssertionError, match="free block"):
        pool.share(block)


def test_equal_histories_give_equal_names():
    pool = BlockPool(6)
    first = pool.take(3)
    pool.give_back(1)

    assert first == [0, 1, 2]
    assert pool.take(2) == [1, 3]  # given back last, handed out first


# What paging saves


def table_of(pool: BlockPool, *, block_tokens: int = 16, window: int | None = None) -> BlockTable:
    group = CacheGroup(pages_per_block=1, window_tokens=window)
    return BlockTable(pool, group, block_tokens=block_tokens)


def test_positions_lie_where_the_table_says():
    pool = BlockPool(16)
    pool._free = [b for b in range(16) if b not in (8, 2, 15)] + [15, 2, 8]
    table = table_of(pool)
    table.grow(48)

    assert [list(table.block(i)) for i in range(3)] == [[8], [2], [15]]
    assert [table.slot(position) for position in (0, 19, 47)] == [128, 35, 255]


@pytest.mark.parametrize(("tokens", "waste"), [(150, 10), (17, 15), (160, 0), (1, 15)])
def test_a_sequence_wastes_less_than_a_block(tokens, waste):
    pool = BlockPool(100)
    table = table_of(pool)
    table.grow(tokens)

    assert (pool.blocks_total - pool.blocks_free) * 16 - tokens == waste


@pytest.mark.parametrize(
    ("prompt", "unshared", "at_prompt", "shared", "copies"),
    [(500, 190, 32, 66, 4), (512, 195, 32, 67, 0)],
)
def test_five_samples_share_their_prompt(prompt, unshared, at_prompt, shared, copies):
    pool = BlockPool(200)
    alone = [table_of(pool) for _ in range(5)]
    for table in alone:
        table.grow(prompt + 100)
    held_alone = pool.blocks_total - pool.blocks_free
    for table in alone:
        table.release()

    parent = table_of(pool)
    parent.grow(prompt)
    samples = [parent, *(parent.fork() for _ in range(4))]
    held_at_prompt = pool.blocks_total - pool.blocks_free
    copied = [copy for table in samples for copy in table.grow(prompt + 1)]
    for table in samples:
        table.grow(prompt + 100)

    assert held_alone == unshared
    assert held_at_prompt == at_prompt
    assert pool.blocks_total - pool.blocks_free == shared
    assert len(copied) == copies  # the last holder writes in place
    pool.check()


class ContiguousArena:
    """What paging replaced: first fit of one span per request."""

    def __init__(self, size: int) -> None:
        self._spans: dict[int, int] = {}  # start: end
        self._size = size

    def take(self, size: int) -> int | None:
        edges = sorted(self._spans.items())
        gaps = pairwise([(0, 0), *edges, (self._size, self._size)])
        for (_, end), (start, _) in gaps:
            if start - end >= size:
                self._spans[end] = end + size
                return end
        return None

    def give_back(self, start: int) -> None:
        del self._spans[start]

    @property
    def free(self) -> int:
        return self._size - sum(end - start for start, end in self._spans.items())


def test_twenty_gigabytes_in_holes_serve_pages_but_no_span():
    """Sizes in MB: 40 holes of 500 between requests of 500."""
    arena, pool = ContiguousArena(40_000), BlockPool(40_000 // 5)  # blocks of 5 MB
    spans = [arena.take(500) for _ in range(80)]
    pages = [pool.take(100) or [] for _ in range(80)]
    for start, blocks in list(zip(spans, pages, strict=True))[::2]:
        assert start is not None
        arena.give_back(start)
        for block in blocks:
            pool.give_back(block)

    assert arena.free == pool.blocks_free * 5 == 20_000
    assert arena.take(1000) is None
    assert arena.take(500) is not None
    assert len(pool.take(200) or []) == 200


# Windows and rejected drafts


def test_a_window_leaves_holes_and_reading_one_is_a_bug():
    pool = BlockPool(10)
    table = table_of(pool, block_tokens=4, window=6)
    for tokens in range(1, 30):
        table.grow(tokens)
        table.slide()
        table.check()

        assert pool.blocks_total - pool.blocks_free <= 3  # ceil(5/4) + 1, at any length
    with pytest.raises(AssertionError, match="passed"):
        table.slot(0)
    assert table.slot(28) >= 0


def test_rejected_drafts_give_back_the_blocks_wholly_beyond():
    pool = BlockPool(10)
    table = table_of(pool, block_tokens=4)
    table.grow(6)
    before = list(table.pages_held)
    table.grow(6 + 9)
    table.rollback(7)

    assert table.pages_held == before
    assert pool.blocks_free == 8
    with pytest.raises(AssertionError, match="rolled back"):
        table.grow(6)


def test_a_rollback_into_what_the_window_passed_is_a_bug():
    pool = BlockPool(10)
    table = table_of(pool, block_tokens=4, window=4)
    table.grow(20)
    table.slide()

    with pytest.raises(AssertionError, match="slid past"):
        table.rollback(9)
