"""Attention over the paged cache on CUDA: three Triton kernels, one more version of `attention`.

`build` gives `attend` to the networks on a CUDA device, where Triton is installed.  Triton and
not flash-attn or FlashInfer: these kernels read our pages as they lie, and run without a GPU
under Triton's interpreter, so they are tested wherever the rest is.

`write` puts the step's keys and values into their pages.  `attend` takes a tile of rows, some
tokens of one sequence times some heads that share a KV head, and walks over the keys from the
oldest that its first token sees to its last token's own, with a running softmax.  Single
tokens (decodes) and chunks are two launches, because they want tiles of different shape.
Decodes of few long sequences would leave most of the device idle, so several programs share
the keys of one tile, and `merge` puts their parts together (flash-decoding).

Nothing is padded to the longest sequence, and no page is read but those that hold a key
some row of the tile may see: holes of a table may name anything.

Invariants
    INV-ENG-6  a token sees the positions from its own back to the window's edge, and nothing
               that another slot of any page holds, NaN included
"""

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from tierline.engine import attention_triton as kernels
from tierline.engine.arena import Arena
from tierline.engine.attention import AnyAttention
from tierline.engine.batch import Batch, Int32s

ROWS_MAX = 64  # of a tile: tokens x heads
ROWS_LEAST = 16  # what a tensor core multiplies at once
KEYS_LEAST, KEYS_MAX = 16, 128
KEY_BYTES = 32 * 1024  # keys and values that one tile holds at a time
WIDE = 512  # elements of key and value above which tiles are kept small
SPLIT_TOKENS = 256  # a program that shares a sequence reads at least so many
SPLITS_MAX = 64
PROGRAMS_PER_MULTIPROCESSOR = 2


# --- shapes ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """The shape of the tiles of one launch."""

    rows: int  # at least heads x tokens, a power of two
    heads: int  # of one KV head's group
    keys: int  # a power of two
    warps: int
    stages: int  # loads of keys that are under way at once

    @property
    def tokens(self) -> int:
        """Tokens of one tile."""
        return self.rows // self.heads


def tiling(*, group: int, key_dim: int, value_dim: int, element_bytes: int, single: bool) -> Tiling:
    """Tiles for `single` tokens, or for chunks; `group` heads share a KV head."""
    width = _width(key_dim) + _width(value_dim)
    rows = ROWS_MAX
    if single:
        rows = min(max(_power_of_two(group), ROWS_LEAST), ROWS_MAX)
    if width > WIDE or element_bytes == 4:  # more would not stay in registers
        rows = ROWS_LEAST
    keys = KEYS_MAX
    while keys > KEYS_LEAST and keys * width * element_bytes > KEY_BYTES:
        keys //= 2
    return Tiling(
        rows=rows,
        heads=min(group, rows),
        keys=keys,
        warps=4 if width * element_bytes <= WIDE else 8,
        stages=2 if width <= WIDE else 1,
    )


def constants_of(attention: AnyAttention, key_dim: int, shape: Tiling) -> dict[str, int]:
    """What `kernels.attend` is compiled for, of a network."""
    return {
        "window": attention.window_tokens or 0,
        "group": attention.heads // attention.kv_heads,
        "head_dim": key_dim,
        "value_dim": attention.value_dim,
        "head_width": _width(key_dim),
        "value_width": _width(attention.value_dim),
        "rows": shape.rows,
        "heads": shape.heads,
        "keys": shape.keys,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
    }


def merge_constants_of(value_dim: int, splits: int) -> dict[str, int]:
    """What `kernels.merge` is compiled for."""
    width = _width(value_dim)
    return {
        "value_dim": value_dim,
        "value_width": width,
        "splits_width": _power_of_two(splits),
        "num_warps": 4 if width <= WIDE // 2 else 8,
    }


def splits_of(*, programs: int, longest_tokens: int, multiprocessors: int) -> int:
    """How many programs share one tile's keys, when `programs` would run without sharing.

    As many as the device has room for, but none for a handful of keys.
    """
    room = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // programs
    return max(min(room, longest_tokens // SPLIT_TOKENS, SPLITS_MAX), 1)


def tiles_of(starts: Int32s, which: list[int], tokens: int) -> Int32s:
    """[tiles, 2]: sequence and first row of each tile of `tokens` rows; `which` are sequences."""
    tiles = [
        (sequence, row)
        for sequence in which
        for row in range(int(starts[sequence]), int(starts[sequence + 1]), tokens)
    ]
    return np.array(tiles, dtype=np.int32).reshape(-1, 2)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _width(dim: int) -> int:
    """Elements that a tile sets aside for `dim`."""
    return max(_power_of_two(dim), 16)


# --- launches -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Paged:
    """One layer's pages, and the tables into them."""

    cache: torch.Tensor  # [pages, 2 or 1, block tokens, KV heads, key dim]
    table: torch.Tensor  # [S, entries]
    parts: int
    part: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """One launch, the same for all layers of one shape."""

    tiling: Tiling
    tiles: torch.Tensor  # [N, 2]
    sums: torch.Tensor  # [N, heads, splits, value dim] where several programs share a tile
    marks: torch.Tensor  # [N, heads, splits, 2]

    @property
    def splits(self) -> int:
        """Programs that share a tile."""
        return max(self.sums.shape[2], 1)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    batch: Batch,
    arena: Arena,
    layer_number: int,
    attention: AnyAttention,
) -> torch.Tensor:
    """A `Version` of `attention`; q, k and v have the arena's type and device."""
    assert q.dtype == k.dtype == arena.dtype
    place = arena.geometry.places[layer_number]
    paged = _Paged(
        cache=arena.layer(layer_number),
        table=batch.tensor(f"tables.{place.group}", q.device),
        parts=arena.geometry.layout.groups[place.group].pages_per_block,
        part=place.part,
    )
    works = batch.derived("triton", attention, make=lambda: _works(q, batch, attention))
    q, out = _rows(q), q.new_empty(*q.shape[:2], attention.value_dim)
    with _device_of(q):
        write(k, v, batch, paged)
        for work in works:
            _launch(work, q, out, batch, paged, attention)
    return out


def _works(q: torch.Tensor, batch: Batch, attention: AnyAttention) -> list[_Work]:
    """The launches of one step: single tokens, and chunks."""
    counts, works = np.diff(batch.starts), []
    for single in (True, False):
        which = np.flatnonzero((counts == 1) == single).tolist()
        if not which:
            continue
        shape = tiling(
            group=attention.heads // attention.kv_heads,
            key_dim=q.shape[2],
            value_dim=attention.value_dim,
            element_bytes=q.element_size(),
            single=single,
        )
        tiles = tiles_of(batch.starts, which, shape.tokens)
        longest = int(batch.lengths[which].max())
        splits = splits_of(
            programs=len(tiles) * _programs(attention, shape),
            longest_tokens=min(longest, attention.window_tokens or longest),
            multiprocessors=_multiprocessors(q.device),
        )
        # A tile of several tokens is never shared: there is work enough.
        scratch = (len(tiles), attention.heads, splits) if single and splits > 1 else (0, 0, 0)
        works.append(
            _Work(
                tiling=shape,
                tiles=_moved(tiles, q.device),
                sums=q.new_empty(*scratch, attention.value_dim, dtype=torch.float32),
                marks=q.new_empty(*scratch, 2, dtype=torch.float32),
            )
        )
    return works


def _programs(attention: AnyAttention, shape: Tiling) -> int:
    """Programs for one tile's tokens: they go over KV heads, and over parts of a large group."""
    return attention.kv_heads * -(-(attention.heads // attention.kv_heads) // shape.heads)


def write(k: torch.Tensor, v: torch.Tensor | None, batch: Batch, paged: _Paged) -> None:
    """Put keys and values into the slots that the table names."""
    k, device = _rows(k), k.device
    v = k if v is None else _rows(v)
    sequences = batch.derived("triton sequences", make=lambda: _sequences(batch, device))
    page, value, token = paged.cache.stride()[:3]
    elements = k.shape[1] * k.shape[2]
    kernels.write[len(k),](
        k,
        v,
        paged.cache,
        sequences,
        batch.tensor("positions", device),
        paged.table,
        k.stride(0),
        v.stride(0),
        page,
        value,
        token,
        paged.table.stride(0),
        paged.part,
        parts=paged.parts,
        block_tokens=paged.cache.shape[2],
        elements=elements,
        width=_power_of_two(elements),
        latent=paged.cache.shape[1] == 1,
        enable_fp_fusion=True,
    )


def _sequences(batch: Batch, device: torch.device) -> torch.Tensor:
    """For each token its sequence: [T]."""
    owners = np.arange(batch.sequences, dtype=np.int32).repeat(np.diff(batch.starts))
    return _moved(owners, device)


def _moved(array: Int32s, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[T, heads, dim] with the heads of a row side by side."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _launch(
    work: _Work,
    q: torch.Tensor,
    out: torch.Tensor,
    batch: Batch,
    paged: _Paged,
    attention: AnyAttention,
) -> None:
    """Attend for the rows of some tiles, and merge where several programs shared one."""
    page, value, token, head = paged.cache.stride()[:4]
    kernels.attend[len(work.tiles), _programs(attention, work.tiling), work.splits](
        q,
        paged.cache,
        out,
        work.sums,
        work.marks,
        work.tiles,
        batch.tensor("starts", q.device),
        batch.tensor("lengths", q.device),
        paged.table,
        attention.scale * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        page,
        0 if paged.cache.shape[1] == 1 else value,  # a latent's value is the head of its key
        token,
        head,
        paged.table.stride(0),
        paged.part,
        parts=paged.parts,
        block_tokens=paged.cache.shape[2],
        split=work.splits > 1,
        enable_fp_fusion=True,
        **constants_of(attention, q.shape[2], work.tiling),
    )
    if work.splits > 1:
        kernels.merge[len(work.tiles), attention.heads](
            work.sums,
            work.marks,
            out,
            work.tiles,
            work.splits,
            enable_fp_fusion=True,
            **merge_constants_of(attention.value_dim, work.splits),
        )


def _device_of(x: torch.Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 16
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
