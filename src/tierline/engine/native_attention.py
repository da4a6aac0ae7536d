"""Attention by the native kernels, for networks that torch runs.

`version(kernels)` is one more version for the ladder of `attention`: it writes the step's keys
and values into the pages and attends, in one call.  The pages are in *tiled* order, which is
the kernels' own: for each KV head and each 16 tokens first K, one word of a head's dimensions
after another, each for 16 tokens; then V, one word of tokens after another, each for all
dimensions.  A word is one float32 or two bfloat16.  `read_layer` and `write_layer` translate.

Invariants
    INV-ENG-6  a token sees the positions from its own back to the window's edge, and nothing
               that another slot of any page holds, NaN included
    INV-ENG-7  a token's result is the same, bit for bit, whatever the chunk it came in, the
               batch around it and the number of threads
"""

import ctypes

import numpy as np
import torch

from tierline.engine.arena import Arena
from tierline.engine.attention import AnyAttention, Version
from tierline.engine.batch import Batch, Int32s
from tierline.engine.decoder import Attention
from tierline.engine.native import Kernels

TILE_TOKENS = 16


class Shape(ctypes.Structure):
    """`AttentionShape` of attention.h."""

    _fields_ = (
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


class Sequences(ctypes.Structure):
    """`Sequences` of attention.h."""

    _fields_ = (
        ("count", ctypes.c_int32),
        ("starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
    )


class _Cache(ctypes.Structure):
    _fields_ = (
        ("pages", ctypes.c_void_p),
        ("page_bytes", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("block_tokens", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("element_bytes", ctypes.c_int32),
    )


class _Table(ctypes.Structure):
    _fields_ = (
        ("entries", ctypes.c_void_p),
        ("stride", ctypes.c_int32),
        ("parts", ctypes.c_int32),
        ("part", ctypes.c_int32),
    )


class _AttendCall(ctypes.Structure):
    """`AttendCall` of attention.cpp."""

    _fields_ = (
        ("shape", Shape),
        ("cache", _Cache),
        ("table", _Table),
        ("sequences", Sequences),
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("k_stride", ctypes.c_int64),
        ("v_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
    )


def why_not(attention: AnyAttention, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve this attention, or None when they can."""
    if not isinstance(attention, Attention):
        return "latent attention has no native kernel"
    if attention.head_dim % 16:
        return f"head dimension {attention.head_dim} is not a multiple of 16"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"a cache of {str(dtype).removeprefix('torch.')} has no native kernel"
    return None


def version(kernels: Kernels) -> Version:
    """`attend` of the ladder in `attention`, on tiled pages; the arena must be on the CPU.

    q, k, v have the arena's type (float32 or bfloat16), and `why_not` has nothing against them.
    """
    call = kernels.library.tl_attend
    call.restype, call.argtypes = None, (ctypes.c_void_p,)

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None,
        batch: Batch,
        arena: Arena,
        layer_number: int,
        attention: AnyAttention,
    ) -> torch.Tensor:
        assert v is not None
        assert isinstance(attention, Attention)
        assert q.dtype == k.dtype == v.dtype == arena.dtype
        q, k, v = (_rows(x) for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype)
        place = arena.geometry.places[layer_number]
        table = flat(batch.tables[place.group])
        starts, lengths = flat(batch.starts), flat(batch.lengths)
        filled = _AttendCall(
            shape_of(attention),
            _cache(arena, layer_number, attention),
            _Table(
                table.ctypes.data,
                table.shape[1],
                arena.geometry.layout.groups[place.group].pages_per_block,
                place.part,
            ),
            Sequences(batch.sequences, starts.ctypes.data, lengths.ctypes.data),
            *(q.data_ptr(), k.data_ptr(), v.data_ptr()),
            *(q.stride(0), k.stride(0), v.stride(0)),
            *(out.data_ptr(), out.stride(0)),
        )
        call(ctypes.byref(filled))
        return out

    return attend


def flat(array: Int32s) -> Int32s:
    """The array as C reads it: int32, rows one after another."""
    return np.ascontiguousarray(array, dtype=np.int32)


def shape_of(attention: Attention) -> Shape:
    """The shape as the kernels take it; a window of 0 is none."""
    return Shape(
        *(attention.heads, attention.kv_heads, attention.head_dim),
        *(attention.window_tokens or 0, attention.scale),
    )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[T, heads, dim] with the heads of a row side by side."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _cache(arena: Arena, layer_number: int, attention: Attention) -> _Cache:
    block = arena.geometry.layout.block_tokens
    bytes_of_layer = attention.kv_elements_per_token * block * arena.dtype.itemsize
    return _Cache(
        arena.data.data_ptr(),
        arena.geometry.layout.page_bytes,
        arena.geometry.places[layer_number].slot * bytes_of_layer,
        *(block, attention.kv_heads, attention.head_dim, arena.dtype.itemsize),
    )


def read_layer(arena: Arena, layer_number: int) -> torch.Tensor:
    """A copy of one layer in plain order: [pages, 2, block tokens, KV heads, head dim]."""
    pages, _, block, heads, dim = arena.layer(layer_number).shape
    k, v = _tiles(arena, layer_number).unbind(3)
    word, tiles = 4 // arena.dtype.itemsize, (pages, heads, block // TILE_TOKENS)
    k = k.view(*tiles, dim // word, TILE_TOKENS, word).transpose(3, 4)
    v = v.view(*tiles, TILE_TOKENS // word, dim, word).transpose(4, 5)
    both = torch.stack([x.reshape(pages, heads, block, dim) for x in (k, v)], 1)
    return both.transpose(2, 3).contiguous()


def write_layer(arena: Arena, layer_number: int, plain: torch.Tensor) -> None:
    """Put a layer in plain order, as `read_layer` returns it, into the pages."""
    pages, _, block, heads, dim = plain.shape
    word, tiles = 4 // arena.dtype.itemsize, (pages, heads, block // TILE_TOKENS)
    k, v = plain.transpose(2, 3).unbind(1)  # [pages, heads, block, dim]
    into = _tiles(arena, layer_number)
    into[:, :, :, 0] = k.reshape(*tiles, TILE_TOKENS, dim // word, word).transpose(3, 4).flatten(3)
    into[:, :, :, 1] = v.reshape(*tiles, TILE_TOKENS // word, word, dim).transpose(4, 5).flatten(3)


def _tiles(arena: Arena, layer_number: int) -> torch.Tensor:
    """A view of the pages: [pages, KV heads, tiles, 2 (K, V), 16 x head dim]."""
    layer = arena.layer(layer_number)
    pages, _, block, heads, dim = layer.shape
    shape = (pages, heads, block // TILE_TOKENS, 2, TILE_TOKENS * dim)
    return layer.flatten(1).view(shape)
