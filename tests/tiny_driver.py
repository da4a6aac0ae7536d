"""The scheduler's part, in a few lines: grows tables, builds batches, runs a network.

Tests of networks and kernels use it where a real scheduler would hide what is being tested.
Pages are handed out in a random order, and the arena starts out as NaN: whatever reads a
slot that was not written poisons its row.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from tierline.engine.arena import Arena, geometry
from tierline.engine.batch import Batch, Tables
from tierline.engine.decoder import Decoder
from tierline.kv.names import BlockNames
from tierline.kv.pool import BlockPool


def file_weights(folder: Path, decoder: Decoder) -> Callable[[str], torch.Tensor]:
    """Our name -> tensor, straight from the folder's `model.safetensors`."""
    with safe_open(folder / "model.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return lambda ours: tensors[decoder.weight_names(ours)]


def poison(arena: Arena) -> None:
    """NaN in every element: 0xFF bytes are NaN in every float type."""
    arena.data.fill_(0xFF)


class Cache:
    """An arena, its pool in a random order, and the sequences that lie in it."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        block_tokens: int = 16,
        pages: int = 512,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        shape = geometry(decoder, block_tokens=block_tokens, element_bytes=dtype.itemsize)
        self.arena = Arena(decoder, shape, pages=pages, dtype=dtype, device=torch.device(device))
        poison(self.arena)
        pool = BlockPool(pages)
        random.Random(seed).shuffle(pool._free)
        self.names = BlockNames(pool, shape.layout)
        self.tables = Tables(shape, sequences_max=64, tokens_max=decoder.positions_max)
        self.lengths: dict[int, int] = {}

    def batch(self, step: Mapping[int, Sequence[int]], *, every: bool = False) -> Batch:
        """Room for new tokens of sequences; logits of each one's last, or of `every` row."""
        positions, slots, starts = [], [], [0]
        for sequence_id, tokens in step.items():
            done = self.lengths.get(sequence_id, 0)
            copies = self.names.grow(sequence_id, done + len(tokens))
            assert copies is not None, "the test's pool is too small"
            self.arena.copy(copies)
            slots.append(self.tables.sync(self.names, sequence_id))
            positions += range(done, done + len(tokens))
            starts.append(starts[-1] + len(tokens))
            self.lengths[sequence_id] = done + len(tokens)
        lengths = [self.lengths[sequence_id] for sequence_id in step]
        blocks = -(-max(lengths) // self.arena.geometry.layout.block_tokens)
        wanted = range(starts[-1]) if every else [end - 1 for end in starts[1:]]
        return Batch(
            tokens=_int32s(token for tokens in step.values() for token in tokens),
            positions=_int32s(positions),
            starts=_int32s(starts),
            lengths=_int32s(lengths),
            tables=self.tables.rows(slots, blocks),
            wanted=_int32s(wanted),
        )

    def settle(self, step: Iterable[int]) -> None:
        """The step is done: what windows have passed is free for others."""
        for sequence_id in step:
            self.names.slide(sequence_id)


def _int32s(numbers: Iterable[int]) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    return np.fromiter(numbers, dtype=np.int32)
