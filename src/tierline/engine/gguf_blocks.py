"""GGUF's quantised blocks as numbers.

Each function takes blocks as uint8 [blocks, bytes of a block] and answers float32
[blocks, elements of a block]; formats as `ggml-common.h` and `ggml-quants.c` define them.
`gguf.quants` computes the same in numpy, 3 to 15 times slower; tests hold the two equal.
"""

from collections.abc import Callable

import torch

CHUNK_ELEMENTS = 1 << 14  # of one pass: it stays in the cache, and below what torch would share out


def _halves(blocks: torch.Tensor, at: int, count: int) -> torch.Tensor:
    """`count` float16 numbers from byte `at` of every block, as float32 [blocks, count]."""
    return blocks[:, at : at + 2 * count].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Four-bit numbers: uint8 [..., n] to uint8 [..., 2, n], low halves first."""
    return torch.stack((packed & 15, packed >> 4), dim=-2)


def q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """32 elements: a float16 scale, then signed bytes."""
    return blocks[:, 2:].view(torch.int8).float().mul_(_halves(blocks, 0, 1))


def q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """32 elements: a float16 scale, then nibbles less 8; byte j holds elements j and j + 16."""
    values = _nibbles(blocks[:, 2:]).view(-1, 32).float()
    return values.sub_(8).mul_(_halves(blocks, 0, 1))


def q4_1(blocks: torch.Tensor) -> torch.Tensor:
    """32 elements: float16 scale and minimum, then nibbles in the order of `q4_0`."""
    both = _halves(blocks, 0, 2)
    return _nibbles(blocks[:, 4:]).view(-1, 32).float().mul_(both[:, :1]).add_(both[:, 1:])


def q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """256 elements in 8 runs of 32, each with a 6-bit scale and minimum of the block's two.

    Bytes: scale and minimum (float16), 12 with the 6-bit numbers, 128 with nibbles; 32 bytes
    hold a run in their low halves and the next in their high halves.
    """
    both = _halves(blocks, 0, 2)
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((low & 63, (high & 15) | ((low >> 6) << 4)), dim=1)
    minima = torch.cat((middle & 63, (high >> 4) | ((middle >> 6) << 4)), dim=1)
    values = _nibbles(blocks[:, 16:].view(-1, 4, 32)).view(-1, 8, 32).float()
    values.mul_((scales.float() * both[:, :1])[:, :, None])
    return values.sub_((minima.float() * both[:, 1:])[:, :, None]).view(-1, 256)


def q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """256 elements in 16 runs of 16, each with a signed byte that scales the block's scale.

    Bytes: 128 with the low four bits, 64 with the high two, 16 scales, then a float16. Of each
    half (128 elements), quarter k has its low bits in nibble k // 2 of bytes 32 x (k % 2) on,
    and its high bits in bits 2k of the 32 bytes of `qh`.
    """
    low = _nibbles(blocks[:, :128].view(-1, 2, 2, 32)).transpose(2, 3)  # [n, half, nibble, 2, 32]
    high = blocks[:, 128:192].view(-1, 2, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)
    values = low.reshape(-1, 2, 4, 32) | ((high >> shifts) & 3) << 4
    scales = blocks[:, 192:208].view(torch.int8).float() * _halves(blocks, 208, 1)
    return values.view(-1, 16, 16).float().sub_(32).mul_(scales[:, :, None]).view(-1, 256)


# Type: (elements of a block, bytes of a block, what turns one into numbers).
BLOCKS: dict[str, tuple[int, int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "Q4_0": (32, 18, q4_0),
    "Q4_1": (32, 20, q4_1),
    "Q8_0": (32, 34, q8_0),
    "Q4_K": (256, 144, q4_k),
    "Q6_K": (256, 210, q6_k),
}


def dequantise(kind: str, raw: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Bytes of `kind` blocks, uint8 [bytes], as numbers [elements] of `dtype`."""
    elements, size_bytes, convert = BLOCKS[kind]
    blocks = raw.view(-1, size_bytes)
    out = torch.empty((len(blocks), elements), dtype=dtype)
    step = max(1, CHUNK_ELEMENTS // elements)
    for first in range(0, len(blocks), step):
        chunk = slice(first, first + step)
        out[chunk] = convert(blocks[chunk])
    return out.view(-1)
