"""The only owner of "who holds which KV block".

A block is an index.  What it points at (pages of HBM, of an arena, nothing at all) is the
executor's business, which is why the simulator can use this file.  Block tables and prefix
runs ask; neither keeps a free list of its own.

The block given back last is handed out first: it is the one most likely still in a cache,
and equal histories give equal names.

Some blocks may be withheld: they are there and nobody gets them, until they are let out.

Invariants
    INV-KV-1  every block is free, held or withheld, and never listed twice
"""


class BlockPool:
    """A fixed number of blocks with reference counts.

    `take` is all or nothing: on None nothing changed, so callers never undo.
    """

    __slots__ = ("_free", "_holders", "_withheld")

    def __init__(self, blocks_total: int) -> None:
        assert blocks_total > 0
        self._holders = [0] * blocks_total
        self._free = list(range(blocks_total - 1, -1, -1))
        self._withheld: list[int] = []

    @property
    def blocks_total(self) -> int:
        """Blocks there are, withheld ones among them."""
        return len(self._holders)

    @property
    def blocks_withheld(self) -> int:
        """Blocks that nobody gets."""
        return len(self._withheld)

    @property
    def blocks_free(self) -> int:
        """Blocks that `take` can hand out."""
        return len(self._free)

    def references(self, block: int) -> int:
        """How many hold a block; 0 when it is free."""
        return self._holders[block]

    def take(self, count: int) -> list[int] | None:
        """Hand out `count` blocks with one holder each, or None if too few are free."""
        assert count >= 0
        if count > len(self._free):
            return None
        rest = len(self._free) - count
        taken = self._free[rest:]
        taken.reverse()
        del self._free[rest:]
        for block in taken:
            self._holders[block] = 1
        return taken

    def share(self, block: int) -> None:
        """Add a holder to a block that already has one: a prefix hit, a fork."""
        assert self._holders[block] > 0, "cannot share a free block"
        self._holders[block] += 1

    def give_back(self, block: int) -> None:
        """Drop one holder; the last one frees the block."""
        holders = self._holders[block]
        assert holders > 0, "block given back twice"
        self._holders[block] = holders - 1
        if holders == 1:
            self._free.append(block)

    def withhold(self, count: int) -> None:
        """Withhold `count` blocks in all from now on; those to be added must be free.

        The free ones that were used longest ago go first, and come back as such.
        """
        more = count - len(self._withheld)
        assert 0 <= count < len(self._holders)
        assert more <= len(self._free), "only free blocks can be withheld"
        if more > 0:
            self._withheld += self._free[:more]
            del self._free[:more]
        else:
            self._free[:0] = self._withheld[count:]
            del self._withheld[count:]

    def check(self) -> None:
        """INV-KV-1: every block is free, held or withheld, and none is listed twice."""
        idle = self._free + self._withheld
        assert len(set(idle)) == len(idle)
        for block in idle:
            assert self._holders[block] == 0
        assert self._holders.count(0) == len(idle)
        assert min(self._holders) >= 0
