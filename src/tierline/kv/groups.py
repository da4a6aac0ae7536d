"""How many pages of KV memory a sequence holds, when its layers do not all cache alike.

The scheduler asks this for every admission and every growth, the executor that names pages
asks for the same numbers, and the two must agree to the page.  Layers are grouped by what
they remember: all tokens, or a window of them.  A block of `block_tokens` tokens has one
size in each group; the common divisor of those sizes is the *page*, the one unit that a
pool hands out, so a block of any group is a whole number of pages and counts stay exact.
Gemma 3 27B has 10 global and 52 local layers: a global block is 5 pages, a local one 26.

A windowed group is a rolling buffer.  W tokens in a row touch at most ceil((W-1)/b) + 1
blocks of b, so that many are kept, which is what a decode of one token needs.  A chunk of n
reads W-1 tokens before it and writes n: its blocks are taken first, save that a block which
the chunk cannot read is released for them, and the rest is released when it is done.
Hence W + n - 1 tokens at the peak, rounded to blocks.

Layers that keep a recurrent state take `state_pages` for each sequence, whatever its
length.  A state says nothing about a shorter prefix, so such sequences share none.

Invariants
    INV-KV-4  pages by count equal pages by name, between steps and at the peak (after a
              rejected draft a window may name one block less, until it moves on)
    INV-KV-5  what is held contains every token that the next one attends to
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction

from tierline.catalog.formats import Format
from tierline.catalog.model import ModelSpec
from tierline.perf.memory import STATE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """Layers that remember the same tokens; a block of all of them is `pages_per_block`."""

    pages_per_block: int
    window_tokens: int | None = None  # None: remembers everything

    def __post_init__(self) -> None:
        assert self.pages_per_block > 0
        assert self.window_tokens is None or self.window_tokens > 0

    def blocks(self, tokens: int, block_tokens: int) -> int:
        """Blocks held between steps with `tokens` cached."""
        written = -(-tokens // block_tokens)
        return written if self.window_tokens is None else min(written, self._kept(block_tokens))

    def blocks_unread(self, tokens: int, block_tokens: int) -> int:
        """Leading blocks, released ones included, that no later token reads."""
        if self.window_tokens is None:
            return 0
        return max(tokens - self.window_tokens + 1, 0) // block_tokens

    def blocks_released(self, tokens: int, block_tokens: int) -> int:
        """Leading blocks given back between steps."""
        return -(-tokens // block_tokens) - self.blocks(tokens, block_tokens)

    def blocks_peak(self, done: int, tokens: int, block_tokens: int) -> int:
        """Blocks held while `tokens` more are computed after `done`."""
        held = self.blocks(done, block_tokens)
        new = -(-(done + tokens) // block_tokens) - -(-done // block_tokens)
        unread = self.blocks_unread(done, block_tokens) - self.blocks_released(done, block_tokens)
        return held + new - min(new, unread)

    def _kept(self, block_tokens: int) -> int:
        """Blocks that the tokens of one window can touch."""
        assert self.window_tokens is not None
        return -(-(self.window_tokens - 1) // block_tokens) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """What one model's cache is made of, in pages of `page_bytes` on each accelerator."""

    groups: tuple[CacheGroup, ...]
    block_tokens: int
    page_bytes: int
    state_pages: int = 0  # of each sequence, for recurrent layers

    def __post_init__(self) -> None:
        assert self.block_tokens > 0
        assert self.page_bytes > 0
        assert self.groups or self.state_pages, "a cache of nothing"

    @property
    def pages_per_block(self) -> int:
        """Pages of one block over all groups: what a cached block of a prefix takes."""
        return sum(group.pages_per_block for group in self.groups)

    @property
    def windowed(self) -> bool:
        """Whether any group forgets."""
        return any(group.window_tokens is not None for group in self.groups)

    @property
    def shares_prefixes(self) -> bool:
        """Whether a sequence can start from another one's blocks; a state cannot be cut."""
        return not self.state_pages

    def pages(self, tokens: int) -> int:
        """Pages that a sequence holds between steps with `tokens` cached."""
        if not tokens:
            return 0
        b = self.block_tokens
        return self.state_pages + sum(g.pages_per_block * g.blocks(tokens, b) for g in self.groups)

    def pages_peak(self, done: int, tokens: int) -> int:
        """Pages that it holds while `tokens` more are computed after `done`."""
        if not done + tokens:
            return 0
        b = self.block_tokens
        blocks = (g.pages_per_block * g.blocks_peak(done, tokens, b) for g in self.groups)
        return self.state_pages + sum(blocks)


def cache_layout(model: ModelSpec, kv_format: Format, *, tp: int, block_tokens: int) -> CacheLayout:
    """The cache of `model` on each of `tp` ranks.

    Layers with one window are one group; a sparse index remembers everything, so it counts
    with the global layers.  Sizes are rounded up to whole bytes, states up to whole pages.

    >>> from tierline.catalog.formats import KV_FORMATS
    >>> from tierline.catalog.models import load_model
    >>> layout = cache_layout(load_model("gemma-3-27b"), KV_FORMATS["bf16"], tp=1, block_tokens=16)
    >>> [(group.window_tokens, group.pages_per_block) for group in layout.groups]
    [(None, 5), (1024, 26)]
    """
    element_bytes = Fraction(kv_format.bits) / 8
    token_bytes: defaultdict[int | None, Fraction] = defaultdict(Fraction)
    state = Fraction(0)
    for group in model.attention:
        held = Fraction(group.kv_elements_per_token * group.kv_replication(tp), tp)
        token_bytes[group.window_tokens] += group.layers * held * element_bytes
        token_bytes[None] += group.layers * group.index_elements_per_token * element_bytes
        state += Fraction(group.layers * group.state_elements * STATE_BYTES, tp)
    block_bytes = {
        window: math.ceil(token_bytes[window] * block_tokens)
        for window in sorted(token_bytes, key=lambda w: -1 if w is None else w)
        if token_bytes[window]
    }
    state_bytes = math.ceil(state)
    page_bytes = math.gcd(*block_bytes.values()) or state_bytes
    return CacheLayout(
        groups=tuple(
            CacheGroup(pages_per_block=size // page_bytes, window_tokens=window)
            for window, size in block_bytes.items()
        ),
        block_tokens=block_tokens,
        page_bytes=page_bytes,
        state_pages=-(-state_bytes // page_bytes),
    )
