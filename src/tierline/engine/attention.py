"""Attention over the paged cache: a ladder of versions that are called alike.

`network` calls one in every layer.  A version first writes the keys and values of the step's
tokens into their pages and then attends over all that the block tables name, so prompt
chunks, decodes and any mix of them are one case.  `naive` is the reference that can be read
against the definition; every other version is tested against it: `gathered` here,
`native_attention` and `attention_cuda` in files of their own.

Latent attention comes here, too, as one KV head whose value is the head of its key.

Invariants
    INV-ENG-6  a token sees the positions from its own back to the window's edge, and nothing
               that another slot of any page holds, NaN included
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from tierline.engine.arena import Arena
from tierline.engine.batch import Batch
from tierline.engine.decoder import Attention, LatentAttention

Int64s = NDArray[np.int64]
AnyAttention = Attention | LatentAttention
# (q [T, heads, dim]; k, v [T, KV heads, dim], rotated, v None for latents; the step; the
# arena; the layer's number and shape) -> [T, heads, value dim]
Version = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, Batch, Arena, int, AnyAttention],
    torch.Tensor,
]


def write(
    k: torch.Tensor, v: torch.Tensor | None, batch: Batch, arena: Arena, layer_number: int
) -> None:
    """Put keys and values into the slots that the block tables name."""
    place = arena.geometry.places[layer_number]
    pages, offsets = batch.derived(
        "slots", place.group, place.part, make=lambda: _slots(batch, arena, layer_number)
    )
    cache = arena.layer(layer_number)
    cache[pages, 0, offsets] = k
    if v is not None:
        cache[pages, 1, offsets] = v


def _slots(batch: Batch, arena: Arena, layer_number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token its page and the slot in it, both [T]."""
    blocks, offsets = np.divmod(batch.positions, arena.geometry.layout.block_tokens)
    sequences = np.repeat(np.arange(batch.sequences), np.diff(batch.starts))
    pages = _pages(batch, arena, layer_number)[sequences, blocks]
    device = arena.data.device
    return _tensor(pages, device), _tensor(offsets, device)


def _pages(batch: Batch, arena: Arena, layer_number: int) -> Int64s:
    """The page of this layer for each block: [S, blocks], meaningless where there is a hole."""
    place = arena.geometry.places[layer_number]
    width = arena.geometry.layout.groups[place.group].pages_per_block
    return batch.tables[place.group][:, place.part :: width].astype(np.int64)


def _tensor(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


# --- naive ----------------------------------------------------------------------------------


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    batch: Batch,
    arena: Arena,
    layer_number: int,
    attention: AnyAttention,
) -> torch.Tensor:
    """The definition, one sequence and one head after another, in float32."""
    write(k, v, batch, arena, layer_number)
    cache, block = arena.layer(layer_number), arena.geometry.layout.block_tokens
    pages = _pages(batch, arena, layer_number)
    out = q.new_empty(*q.shape[:2], attention.value_dim)
    for s, length in enumerate(batch.lengths.tolist()):
        first, last = batch.starts[s : s + 2].tolist()
        own = torch.arange(length - (last - first), length, device=q.device)
        oldest = oldest_seen(length - (last - first), attention.window_tokens)
        seen = np.arange(oldest, length)
        held = cache[pages[s, seen // block], :, seen % block].float()  # [N, 2, KV heads, dim]
        distance = own[:, None] - _tensor(seen, q.device)
        hidden = distance < 0
        if attention.window_tokens is not None:
            hidden |= distance >= attention.window_tokens
        for head in range(attention.heads):
            of = head * attention.kv_heads // attention.heads
            keys, values = held[:, 0, of], held[:, -1, of, : attention.value_dim]
            scores = q[first:last, head].float() @ keys.T * attention.scale
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[first:last, head] = (weights @ values).to(q.dtype)
    return out


def oldest_seen(position: int, window_tokens: int | None) -> int:
    """The first position that a token at `position` attends to."""
    return 0 if window_tokens is None else max(position - window_tokens + 1, 0)


# --- gathered -------------------------------------------------------------------------------


def gathered(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    batch: Batch,
    arena: Arena,
    layer_number: int,
    attention: AnyAttention,
) -> torch.Tensor:
    """Any device: pages are copied side by side, then torch's own attention runs over them.

    All sequences with one token go at once, padded to the longest; a prompt chunk goes alone,
    because padding to it would cost more than the loop.
    """
    write(k, v, batch, arena, layer_number)
    place = arena.geometry.places[layer_number]
    out = q.new_empty(*q.shape[:2], attention.value_dim)
    for rows, index, mask, dead in batch.derived(
        "gather",
        place.group,
        place.part,
        make=lambda: _gathers(batch, arena, layer_number, attention.window_tokens),
    ):
        held = arena.layer(layer_number)[index]  # [B, blocks, 2, block, KV heads, dim]
        held = held.transpose(1, 2).flatten(2, 3)  # [B, 2, N, KV heads, dim]
        held.masked_fill_(dead[:, None, :, None, None], 0)
        keys, values = held[:, 0], held[:, -1, ..., : attention.value_dim]
        out[rows] = _grouped(q[rows], keys, values, mask, attention)
    return out


def _grouped(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    attention: AnyAttention,
) -> torch.Tensor:
    """SDPA with each KV head's queries side by side: [rows, heads, value dim].

    q [B x n, heads, dim], n rows for each of the B sequences; keys, values
    [B, N, KV heads, dim]; mask [B, n, N].  With one row the group is what SDPA takes for its
    sequence; with more, the KV head is shared by stride, without a copy.
    """
    batch, tokens = keys.shape[:2]
    rows, group = len(q) // batch, attention.heads // attention.kv_heads
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # [B, KV heads, N, dim]
    if rows == 1:
        q = q.view(batch, attention.kv_heads, group, -1)
        heard = mask[:, None].expand(-1, -1, group, -1)
        out = functional.scaled_dot_product_attention(q, keys, values, heard, scale=attention.scale)
        return out.reshape(batch, attention.heads, -1)
    assert batch == 1
    q = q.view(rows, attention.kv_heads, group, -1).permute(1, 2, 0, 3)
    shape = (attention.kv_heads, group, tokens, -1)
    out = functional.scaled_dot_product_attention(
        q,
        keys[0, :, None].expand(shape),
        values[0, :, None].expand(shape),
        mask[:, None],
        scale=attention.scale,
    )
    return out.permute(2, 0, 1, 3).reshape(rows, attention.heads, -1)


# The rows of some sequences, [B, blocks] pages to gather, who of [B, n, N] may see whom,
# and slots [B, N] that nobody sees and that may hold anything.
Gather = tuple[torch.Tensor | slice, torch.Tensor, torch.Tensor, torch.Tensor]


def _gathers(batch: Batch, arena: Arena, layer_number: int, window: int | None) -> list[Gather]:
    """Once for the single tokens, once for each chunk."""
    counts = np.diff(batch.starts)
    device = arena.data.device
    pages = _pages(batch, arena, layer_number)
    block = arena.geometry.layout.block_tokens
    found: list[Gather] = []
    single = np.flatnonzero(counts == 1)
    if len(single):
        rows: torch.Tensor | slice = _tensor(batch.starts[single].astype(np.int64), device)
        if len(single) == len(batch.tokens):
            rows = slice(0, len(batch.tokens))
        found.append((rows, *_gather(batch, pages, single, 1, block, window, device)))
    for s in np.flatnonzero(counts > 1).tolist():
        rows = slice(int(batch.starts[s]), int(batch.starts[s + 1]))
        which = np.array([s])
        found.append((rows, *_gather(batch, pages, which, int(counts[s]), block, window, device)))
    return found


def _gather(
    batch: Batch,
    pages: Int64s,
    sequences: Int64s,
    rows: int,
    block: int,
    window: int | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index, mask and dead slots of sequences that have `rows` rows each."""
    lengths = batch.lengths[sequences].astype(np.int64)
    own = (lengths - rows)[:, None] + np.arange(rows)  # [B, n] positions
    oldest = np.zeros_like(lengths) if window is None else np.maximum(own[:, 0] - window + 1, 0)
    first = oldest // block
    blocks = first[:, None] + np.arange(int((-(-lengths // block) - first).max()))
    index = pages[sequences[:, None], np.minimum(blocks, pages.shape[1] - 1)]
    seen = (blocks[..., None] * block + np.arange(block)).reshape(len(sequences), -1)  # [B, N]
    dead = (seen < oldest[:, None]) | (seen >= lengths[:, None])
    distance = own[:, :, None] - seen[:, None]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    # Past a short sequence's end the table is padded with anything: read page 0 instead.
    index = np.where(blocks * block < lengths[:, None], index, 0)
    return _tensor(index, device), _tensor(mask, device), _tensor(dead, device)


ATTENTION: dict[str, Version] = {"naive": naive, "gathered": gathered}
