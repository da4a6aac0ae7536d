"""Carries out steps with tensors: the other executor beside the simulator's.

`engine` calls `compute` once a step.  In order: blocks are named for what the step will
write, shared blocks that somebody writes into are copied, the step becomes flat arrays, the
network computes, and the logits of everybody who reached an end come back.

Whoever decodes stands before whoever computes a prompt, each in the scheduler's order, so a
batch is a function of the step alone.

Invariants
    INV-ENG-3  no memory or scheduling feature changes the tokens of a greedy request
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch

from tierline.engine.arena import Arena
from tierline.engine.batch import Batch, Tables
from tierline.kv.names import BlockNames
from tierline.kv.table import Copy
from tierline.scheduling.sequence import Sequence
from tierline.scheduling.step import Step


class Network(Protocol):
    """Weights that turn a batch into logits: `network.Network`, or `native_step.NativeNetwork`."""

    def logits(self, batch: Batch, arena: Arena) -> torch.Tensor:
        """[R, vocabulary] float32, for the wanted rows; writes the cache on the way."""
        ...


Advance = tuple[Sequence, int, int]  # a sequence, its tokens in the cache, and how many come


def advances(step: Step) -> list[Advance]:
    """Who moves in a step, in the order of the batch."""
    moves: list[Advance] = []
    if step.decodes:
        tick, count = step.tick, 1 + step.draft_tokens
        moves = [(s, s.cached_tokens + tick - s.joined_tick, count) for s in step.decoding.values()]
    moves += [(s, s.cached_tokens, count) for s, count in step.chunks]
    return moves


class Executor:
    """One network, one arena, and the tables between them."""

    __slots__ = ("_block", "arena", "names", "network", "tables")

    def __init__(self, network: Network, arena: Arena, names: BlockNames, tables: Tables) -> None:
        self.network, self.arena, self.names, self.tables = network, arena, names, tables
        self._block = arena.geometry.layout.block_tokens

    def compute(
        self, step: Step, texts: Mapping[int, list[int]]
    ) -> tuple[list[Sequence], torch.Tensor]:
        """Sequences that sample now, and their logits [R, vocabulary].

        `texts` are the tokens of every sequence, prompt and output.  On an out-of-memory
        error nothing is accounted and `undo` makes the step not have been.
        """
        moves = advances(step)
        self._bind(moves)
        batch, sampling = self._batch(moves, texts)
        with torch.inference_mode():
            return sampling, self.network.logits(batch, self.arena)

    def undo(self, step: Step) -> None:
        """The step was not computed: what was named for it is free again."""
        for s, done, count in advances(step):
            if s.id in self.names and self.names.tables(s.id)[0].tokens == done + count:
                self.names.rollback(s.id, done)
                self.tables.drop(s.id)

    def leave(self, sequence: Sequence) -> None:
        """The sequence is gone, or was preempted."""
        self.tables.drop(sequence.id)

    def _bind(self, moves: list[Advance]) -> None:
        """Name the blocks that the step writes (INV-KV-2: each has one holder)."""
        copies: list[Copy] = []
        for s, done, count in moves:
            made = self.names.grow(s.id, done + count)
            assert made is not None, "the scheduler counted more free pages than have names"
            if made:
                copies += made
                self.tables.copied(s.id)
        self.arena.copy(copies)

    def _batch(
        self, moves: list[Advance], texts: Mapping[int, list[int]]
    ) -> tuple[Batch, list[Sequence]]:
        tokens: list[int] = []
        slots: list[int] = []
        wanted: list[int] = []
        sampling: list[Sequence] = []
        for s, done, count in moves:
            text = texts[s.id]
            if count == 1:
                tokens.append(text[done])
            else:
                tokens += text[done : done + count]
            slots.append(self.tables.sync(self.names, s.id))
            if done + count == len(text):  # all that is known is cached: the next is sampled
                wanted.append(len(tokens) - 1)
                sampling.append(s)
        before = np.array([done for _, done, _ in moves], dtype=np.int32)
        counts = np.array([count for _, _, count in moves], dtype=np.int32)
        starts = np.zeros(len(moves) + 1, dtype=np.int32)
        starts[1:] = list(accumulate(counts.tolist()))
        lengths = before + counts
        positions = np.arange(len(tokens), dtype=np.int32) + np.repeat(before - starts[:-1], counts)
        batch = Batch(
            tokens=np.array(tokens, dtype=np.int32),
            positions=positions,
            starts=starts,
            lengths=lengths,
            tables=self.tables.rows(slots, -(-int(lengths.max()) // self._block)),
            wanted=np.array(wanted, dtype=np.int32),
        )
        return batch, sampling
