"""One step as flat arrays: what every kernel of the step reads.

`executor` builds one from a `Step`; `network` and the attention kernels read it.  Tokens of
all sequences lie in one row of numbers, without padding: sequence s has rows starts[s] to
starts[s + 1], and its last token has position lengths[s] - 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from tierline.engine.arena import Geometry
from tierline.kv.names import BlockNames
from tierline.kv.table import BlockTable

Int32s = NDArray[np.int32]
NOBODY: Int32s = np.empty(0, dtype=np.int32)
T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Batch:
    """The inputs of one forward pass. T tokens of S sequences, R of them with logits wanted."""

    tokens: Int32s  # [T]
    positions: Int32s  # [T]
    starts: Int32s  # [S + 1]
    lengths: Int32s  # [S] tokens in the cache once this step has written
    tables: tuple[
        Int32s, ...
    ]  # of each group [S, entries]: page of block b, part p at b x parts + p
    wanted: Int32s  # [R] rows
    pooled: Int32s = field(default_factory=lambda: NOBODY)  # [P] sequences, ascending
    # [P, hidden] float32: the network adds the last normed states of those sequences' rows.
    sums: torch.Tensor | None = None
    _on_device: dict[str, torch.Tensor] = field(default_factory=dict)
    _derived: dict[tuple[object, ...], object] = field(default_factory=dict)

    @property
    def sequences(self) -> int:
        """Sequences of the step."""
        return len(self.lengths)

    @property
    def kept(self) -> Int32s:
        """Rows that matter after the last attention, ascending: wanted ones and pooled ones."""
        if not len(self.pooled):
            return self.wanted
        spans = [np.arange(self.starts[s], self.starts[s + 1]) for s in self.pooled]
        return np.unique(np.concatenate([self.wanted, *spans])).astype(np.int32)

    def tensor(self, name: str, device: torch.device) -> torch.Tensor:
        """One of the arrays as a tensor on `device`, moved once; tables are `tables.0`, ...."""
        found = self._on_device.get(name)
        if found is None:
            head, _, group = name.partition(".")
            array = getattr(self, head)[int(group)] if group else getattr(self, head)
            found = torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
            self._on_device[name] = found
        return found

    def derived(self, *key: object, make: Callable[[], T]) -> T:
        """What many layers of this step compute alike, computed once: masks, slots, angles."""
        found = self._derived.get(key)
        if found is None:
            found = self._derived[key] = make()
        return cast("T", found)


class Tables:
    """Block tables of all sequences as arrays, kept up as they grow instead of built every step."""

    __slots__ = ("_arrays", "_free", "_known", "_slots", "_widths")

    def __init__(self, geometry: Geometry, *, sequences_max: int, tokens_max: int) -> None:
        layout = geometry.layout
        blocks = -(-tokens_max // layout.block_tokens) + 1
        self._widths = [group.pages_per_block for group in layout.groups]
        self._arrays = [
            np.zeros((sequences_max, blocks * width), dtype=np.int32) for width in self._widths
        ]
        self._free = list(range(sequences_max - 1, -1, -1))
        self._slots: dict[int, int] = {}
        self._known: dict[int, tuple[list[BlockTable], list[int]]] = {}

    def sync(self, names: BlockNames, sequence_id: int) -> int:
        """Take over what a table gained since it was last seen; returns the row it lies in."""
        tables = names.tables(sequence_id)
        slot = self._slots.get(sequence_id)
        if slot is None:
            slot = self._slots[sequence_id] = self._free.pop()
        seen = self._known.get(sequence_id)
        if seen is None or seen[0] is not tables:  # new here, or back after a preemption
            seen = self._known[sequence_id] = (tables, [0] * len(tables))
        for group, table in enumerate(tables):
            entries, known = table.entries, seen[1][group]
            if len(entries) != known:
                self._arrays[group][slot, known : len(entries)] = entries[known:]
                seen[1][group] = len(entries)
        return slot

    def copied(self, sequence_id: int) -> None:
        """A shared last block was replaced by a copy: its entries are read again."""
        if sequence_id in self._known:
            known = self._known[sequence_id][1]
            for group, width in enumerate(self._widths):
                known[group] = max(known[group] - width, 0)

    def drop(self, sequence_id: int) -> None:
        """The sequence has left."""
        slot = self._slots.pop(sequence_id, None)
        if slot is not None:
            self._free.append(slot)
            self._known.pop(sequence_id, None)

    def rows(self, slots: list[int], blocks: int) -> tuple[Int32s, ...]:
        """For each group the tables of these rows, `blocks` blocks wide."""
        return tuple(
            array[slots, : blocks * width]
            for array, width in zip(self._arrays, self._widths, strict=True)
        )
