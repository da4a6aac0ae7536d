"""Carries out steps with tensors: the other executor beside the simulator's.

`engine` calls `compute` once a step.  In order: blocks are named for what the step will
write, shared blocks that somebody writes into are copied, the step becomes flat arrays, the
network computes, and the logits of everybody who reached an end come back.

Whoever decodes stands before whoever computes a prompt, each in the scheduler's order, so a
batch is a function of the step alone.

Invariants
    INV-ENG-3   no memory or scheduling feature changes the tokens of a greedy request
    INV-ENG-40  a pooled prompt's mean is over all its tokens, computed in this stay
"""

from collections.abc import Collection, Mapping
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch

from tierline.engine.arena import Arena
from tierline.engine.batch import NOBODY, Batch, Tables
from tierline.kv.names import BlockNames
from tierline.kv.table import Copy
from tierline.scheduling.sequence import Sequence
from tierline.scheduling.step import Step


class Network(Protocol):
    """Weights that turn a batch into logits: `network.Network`, or `native_step.NativeNetwork`."""

    def logits(self, batch: Batch, arena: Arena) -> torch.Tensor:
        """[R, vocabulary] float32, for the wanted rows; writes the cache, adds to the sums."""
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

    __slots__ = ("_block", "_sums", "arena", "hidden", "names", "network", "tables")

    def __init__(
        self, network: Network, arena: Arena, names: BlockNames, tables: Tables, *, hidden: int
    ) -> None:
        """`hidden` is the width of the network's states."""
        self.network, self.arena, self.names, self.tables = network, arena, names, tables
        self._block, self.hidden = arena.geometry.layout.block_tokens, hidden
        self._sums: dict[int, torch.Tensor] = {}  # of pooled sequences, over what is cached

    def compute(
        self, step: Step, texts: Mapping[int, list[int]], pooled: Collection[int] = ()
    ) -> tuple[list[Sequence], torch.Tensor]:
        """Sequences that sample now, and their logits [R, vocabulary].

        `texts` are the tokens of every sequence, prompt and output; those of `pooled` have
        their states summed and do not sample.  On an out-of-memory error nothing is accounted
        and `undo` makes the step not have been.
        """
        moves = advances(step)
        self._bind(moves)
        batch, sampling = self._batch(moves, texts, pooled)
        summed = [moves[at] for at in batch.pooled]
        if summed:
            batch.sums = torch.stack([self._sum(s, done) for s, done, _ in summed])
        with torch.inference_mode():
            logits = self.network.logits(batch, self.arena)
        if batch.sums is not None:
            for (s, _, _), own in zip(summed, batch.sums, strict=True):
                self._sums[s.id] = own
        return sampling, logits

    def mean(self, sequence: Sequence) -> torch.Tensor:
        """[hidden] float32: the mean state of a pooled sequence whose prompt is computed."""
        return self._sums[sequence.id] / sequence.prompt_tokens

    def _sum(self, s: Sequence, done: int) -> torch.Tensor:
        """Over the tokens before `done`: whoever comes back after a preemption starts anew."""
        if done:
            return self._sums[s.id]  # cached tokens have no states: not from another's blocks
        return torch.zeros(self.hidden, device=self.arena.data.device)

    def undo(self, step: Step) -> None:
        """The step was not computed: what was named for it is free again."""
        for s, done, count in advances(step):
            if s.id in self.names and self.names.tables(s.id)[0].tokens == done + count:
                self.names.rollback(s.id, done)
                self.tables.drop(s.id)

    def leave(self, sequence: Sequence) -> None:
        """The sequence is gone, or was preempted."""
        self.tables.drop(sequence.id)
        self._sums.pop(sequence.id, None)

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
        self, moves: list[Advance], texts: Mapping[int, list[int]], pooled: Collection[int]
    ) -> tuple[Batch, list[Sequence]]:
        tokens: list[int] = []
        slots: list[int] = []
        wanted: list[int] = []
        summed: list[int] = []
        sampling: list[Sequence] = []
        for at, (s, done, count) in enumerate(moves):
            text = texts[s.id]
            if count == 1:
                tokens.append(text[done])
            else:
                tokens += text[done : done + count]
            slots.append(self.tables.sync(self.names, s.id))
            if pooled and s.id in pooled:
                summed.append(at)
            elif done + count == len(text):  # all that is known is cached: the next is sampled
                wanted.append(len(tokens) - 1)
                sampling.append(s)
        counts = [count for _, _, count in moves]
        lengths = [done + count for _, done, count in moves]
        before = np.array([done for _, done, _ in moves], dtype=np.int32)
        positions = before
        if len(tokens) > len(moves):  # somebody advances by more than one
            spans = [np.arange(done, done + count, dtype=np.int32) for _, done, count in moves]
            positions = np.concatenate(spans)
        batch = Batch(
            tokens=np.array(tokens, dtype=np.int32),
            positions=positions,
            starts=np.array([0, *accumulate(counts)], dtype=np.int32),
            lengths=np.array(lengths, dtype=np.int32),
            tables=self.tables.rows(slots, -(-max(lengths) // self._block)),
            wanted=np.array(wanted, dtype=np.int32),
            pooled=np.array(summed, dtype=np.int32) if summed else NOBODY,
        )
        return batch, sampling
