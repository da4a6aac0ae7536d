"""Where the cached tokens of one sequence lie, in one group of layers.

A block table maps a sequence's blocks, counted from its first token, to pages of the pool.
`kv.names` owns one per sequence and group; an executor reads slots from it and writes what
a step computes there.  It is append-only: what was written stays where it is, so kernels in
flight never see an entry change.  Two things leave a table: a window's oldest blocks, which
become holes, and tokens of a rejected draft at its end.

Forks share everything.  Whoever is first to write into a shared last block takes a new
block and copies into it; the last holder left writes in place.  So five samples of a prompt
share its partial block until they diverge, and four copies are made, not five.

Invariants
    INV-KV-2  a block that is written has one holder
    INV-KV-5  what is held contains every token that the next one attends to
"""

from collections.abc import Sequence

from tierline.kv.groups import CacheGroup
from tierline.kv.pool import BlockPool

HOLE = -1  # an entry whose block the window has passed

Copy = tuple[int, int]  # (source page, target page): to be done before the next step writes


class BlockTable:
    """One sequence's blocks in one cache group; a block is `pages_per_block` pages."""

    __slots__ = ("_block_tokens", "_group", "_holes", "_pages", "_pool", "room_tokens", "tokens")

    def __init__(self, pool: BlockPool, group: CacheGroup, *, block_tokens: int) -> None:
        self._pool = pool
        self._group = group
        self._block_tokens = block_tokens
        self._pages: list[int] = []
        self._holes = 0  # leading blocks released
        self.tokens = 0
        self.room_tokens = 0  # up to here a write needs neither a new block nor a copy

    @property
    def blocks(self) -> int:
        """Entries, holes included."""
        return len(self._pages) // self._group.pages_per_block

    @property
    def entries(self) -> Sequence[int]:
        """The pages of all blocks, `HOLE` where the window has passed: a live view."""
        return self._pages

    @property
    def first_token(self) -> int:
        """The first position that is still held."""
        return self._holes * self._block_tokens

    @property
    def pages_held(self) -> list[int]:
        """Every page that this table holds, in order."""
        return self._pages[self._holes * self._group.pages_per_block :]

    def block(self, index: int) -> Sequence[int]:
        """The pages of one block."""
        width = self._group.pages_per_block
        pages = self._pages[index * width : (index + 1) * width]
        assert index >= self._holes, "the window has passed this block"
        assert pages, "no such block"
        return pages

    def slot(self, position: int, *, part: int = 0) -> int:
        """Where token `position` lies, in token slots of the pool; `part` is the page."""
        assert 0 <= position < self.tokens
        block, offset = divmod(position, self._block_tokens)
        return self.block(block)[part] * self._block_tokens + offset

    # What changes it

    def adopt(self, pages: Sequence[int]) -> None:
        """Start from whole blocks that somebody else holds."""
        assert not self._pages, "a table adopts before it grows"
        width = self._group.pages_per_block
        blocks = len(pages) // width
        assert blocks * width == len(pages)
        tokens = blocks * self._block_tokens
        holes = self._group.blocks_released(tokens, self._block_tokens)
        for page in pages[holes * width :]:
            self._pool.share(page)
        self._pages = [HOLE] * (holes * width) + list(pages[holes * width :])
        self._holes = holes
        self.tokens = self.room_tokens = tokens

    def resume(self, tokens: int) -> None:
        """Room for tokens that come back from elsewhere: of a window only what is kept."""
        assert not self._pages, "a table resumes before it grows"
        width = self._group.pages_per_block
        fresh = self._pool.take(self._group.blocks(tokens, self._block_tokens) * width)
        assert fresh is not None, "resume asks for more than was reserved"
        self._holes = self._group.blocks_released(tokens, self._block_tokens)
        self._pages = [HOLE] * (self._holes * width) + fresh
        self.tokens = tokens
        self.room_tokens = self.blocks * self._block_tokens

    def fork(self) -> "BlockTable":
        """A second table with the same tokens, sharing every block."""
        child = BlockTable(self._pool, self._group, block_tokens=self._block_tokens)
        child._pages = self._pages.copy()
        child._holes = self._holes
        child.tokens = child.room_tokens = self.room_tokens = self.tokens
        for page in self.pages_held:
            self._pool.share(page)
        return child

    def pages_to_grow(self, tokens: int) -> int:
        """Free pages that `grow(tokens)` needs beyond those it releases itself."""
        new = self._blocks_new(tokens)
        if not new and not self._must_copy(tokens):
            return 0
        width = self._group.pages_per_block
        first = self._holes * width
        released = self._pages[first : first + self._releasable(new) * width]
        freed = sum(self._pool.references(page) == 1 for page in released)
        return (new + self._must_copy(tokens)) * width - freed

    def grow(self, tokens: int) -> list[Copy]:
        """Cover `tokens` tokens; the pool must have `pages_to_grow` of them.

        Returns the copies to make before anything is written.
        """
        assert tokens >= self.tokens, "a table grows; rejected drafts are rolled back"
        copies: list[Copy] = []
        new = self._blocks_new(tokens)
        copy = self._must_copy(tokens)
        if new or copy:
            self._release_leading(self._releasable(new))
            width = self._group.pages_per_block
            fresh = self._pool.take((new + copy) * width)
            assert fresh is not None, "grow asks for more than was reserved"
            if copy:
                shared = self._pages[-width:]
                copies = list(zip(shared, fresh, strict=False))
                for page in shared:
                    self._pool.give_back(page)
                del self._pages[-width:]
            self._pages += fresh
        self.tokens = tokens
        self.room_tokens = self.blocks * self._block_tokens
        return copies

    def slide(self) -> None:
        """Release what the window has passed; asked for when a step is accounted."""
        released = self._group.blocks_released(self.tokens, self._block_tokens)
        if released > self._holes:
            self._release_leading(released - self._holes)

    def rollback(self, tokens: int) -> None:
        """Forget the tokens beyond `tokens`: drafts that were not accepted."""
        assert 0 <= tokens <= self.tokens
        keep = -(-tokens // self._block_tokens)
        unread = self._group.blocks_unread(tokens, self._block_tokens)
        assert self._holes <= unread, "the window has slid past what remains"
        width = self._group.pages_per_block
        for page in reversed(self._pages[keep * width :]):
            self._pool.give_back(page)
        del self._pages[keep * width :]
        self.tokens = self.room_tokens = tokens

    def release(self) -> None:
        """Give everything back; the table is as new."""
        for page in reversed(self.pages_held):
            self._pool.give_back(page)
        self._pages.clear()
        self._holes = self.tokens = self.room_tokens = 0

    def check(self) -> None:
        """INV-KV-5, and that entries, holes and tokens agree."""
        width = self._group.pages_per_block
        assert self.blocks * width == len(self._pages)
        assert self.blocks == -(-self.tokens // self._block_tokens)
        assert self.tokens <= self.room_tokens <= self.blocks * self._block_tokens
        assert self.room_tokens == self.tokens or self._pool.references(self._pages[-1]) == 1
        assert self._pages[: self._holes * width] == [HOLE] * (self._holes * width)
        assert HOLE not in self.pages_held
        assert self._holes <= self._group.blocks_unread(self.tokens, self._block_tokens)

    def _blocks_new(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens) - self.blocks

    def _must_copy(self, tokens: int) -> bool:
        """Whether the next write goes into a block that somebody else reads, too."""
        if tokens == self.tokens or not self.tokens % self._block_tokens:
            return False
        return self._pool.references(self._pages[-1]) > 1

    def _releasable(self, new: int) -> int:
        """Blocks that a step adding `new` may give back before it begins."""
        unread = self._group.blocks_unread(self.tokens, self._block_tokens)
        return min(new, unread - self._holes)

    def _release_leading(self, blocks: int) -> None:
        width = self._group.pages_per_block
        first, last = self._holes * width, (self._holes + blocks) * width
        for page in reversed(self._pages[first:last]):
            self._pool.give_back(page)
        self._pages[first:last] = [HOLE] * (last - first)
        self._holes += blocks
