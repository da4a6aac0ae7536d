"""Attention in Triton equals the definition, on any table and any mix, and never reads garbage.

Compiled and on the device where there is a GPU, else under Triton's interpreter.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tierline.engine.attention import ATTENTION, AnyAttention, Version
from tierline.engine.attention import write as plain_write
from tierline.engine.batch import Batch
from tierline.engine.decoder import Attention, Decoder, Dense, LatentAttention, Layer, Rope
from tiny_driver import Cache
from triton_here import DEVICE, attention_cuda

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
NO_ROPE = Rope(inverse_frequencies=())
LAYER = 3  # the second of the second page of a block


def grouped(heads: int, kv_heads: int, dim: int, *, window: int | None = None) -> Attention:
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        rope=NO_ROPE,
        scale=dim**-0.5,
        window_tokens=window,
    )


def latent(heads: int, *, rank: int, rope: int) -> LatentAttention:
    dims = {"nope_dim": 16, "rope_dim": rope, "v_head_dim": 16, "kv_rank": rank}
    return LatentAttention(heads=heads, q_rank=None, rope=NO_ROPE, scale=0.2, **dims)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One cache, and the texts that go through it."""

    attention: AnyAttention
    lengths: tuple[int, ...] = (40, 12, 1)
    block_tokens: int = 16
    dtype: torch.dtype = torch.float32
    seed: int = 0


class Run:
    """Pages full of NaN, in random order; holes of a table name a page of NaN."""

    def __init__(self, case: Case) -> None:
        self.case, self.rng = case, random.Random(case.seed)
        layer = Layer(attention=case.attention, ffn=Dense(intermediate=16))
        other = replace(layer, attention=replace(case.attention, window_tokens=5))
        decoder = Decoder(
            architecture="case",
            hidden=16,
            vocabulary=16,
            positions_max=2048,
            layers=(layer,) * 4 + (other,) * 2,  # blocks of two pages, and of one
            norm_eps=1e-5,
            weight_names=str,
        )
        self.cache = Cache(
            decoder,
            block_tokens=case.block_tokens,
            pages=4 * sum(n // case.block_tokens + 2 for n in case.lengths),
            dtype=case.dtype,
            device=DEVICE,
            seed=case.seed,
        )
        taken = self.cache.names.pool.take(1)
        assert taken is not None
        self.nan_page = taken[0]
        self.done = [0] * len(case.lengths)
        generator = torch.Generator().manual_seed(case.seed)
        self.texts = [self._text(n, generator) for n in case.lengths]

    def _text(self, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """q, k and v as a network has them: slices of one product; a latent has no v."""
        a = self.case.attention
        if isinstance(a, LatentAttention):
            shape, cut = (tokens, a.heads + 1, a.kv_elements_per_token), [a.heads, 1]
        else:
            cut = [a.heads, a.kv_heads, a.kv_heads]
            shape = (tokens, sum(cut), a.head_dim)
        return torch.randn(shape, generator=generator).to(DEVICE, self.case.dtype).split(cut, 1)

    def moves(self, sizes: Sequence[int]) -> dict[int, int]:
        """Some of the sequences, and how many tokens of each."""
        moves: dict[int, int] = {}
        while not moves:
            for s, length in enumerate(self.case.lengths):
                if self.done[s] < length and self.rng.random() < 0.8:
                    moves[s] = min(self.rng.choice(sizes), length - self.done[s])
        return moves

    def step(
        self, moves: dict[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Batch]:
        """q, k and v of the tokens that come, and the batch."""
        batch = self.cache.batch({s: [0] * n for s, n in moves.items()})
        for table, group in zip(batch.tables, self.cache.arena.geometry.layout.groups, strict=True):
            window = group.window_tokens
            for row, s in enumerate(moves):
                passed = 0 if window is None else max(self.done[s] - window + 1, 0)
                holes = passed // self.case.block_tokens * group.pages_per_block
                table[row, :holes] = self.nan_page
        rows = [
            [x[self.done[s] : self.done[s] + n] for x in self.texts[s]] for s, n in moves.items()
        ]
        q, k, *v = [torch.cat(parts) for parts in zip(*rows, strict=True)]
        return q, k, v[0] if v else None, batch

    def finish(self, moves: dict[int, int]) -> None:
        for s, n in moves.items():
            self.done[s] += n
        self.cache.settle(moves)


def attended(case: Case, how: Version) -> torch.Tensor:
    """The output of every token, one sequence after another, from random chunks and mixes."""
    run = Run(case)
    found: list[list[torch.Tensor]] = [[] for _ in case.lengths]
    while tuple(run.done) != case.lengths:
        moves = run.moves((1, 5, 30))
        out = how(*run.step(moves), run.cache.arena, LAYER, case.attention)
        for s, part in zip(moves, out.split(list(moves.values())), strict=True):
            found[s].append(part)
        run.finish(moves)
    return torch.cat([part for parts in found for part in parts]).float()


def decoded(case: Case, how: Version) -> torch.Tensor:
    """The outputs of the last tokens; the keys and values before them are only written."""
    run = Run(case)
    before = {s: n - 1 for s, n in enumerate(case.lengths)}
    _, k, v, batch = run.step(before)
    plain_write(k, v, batch, run.cache.arena, LAYER)
    run.finish(before)
    last = run.step(dict.fromkeys(before, 1))
    return how(*last, run.cache.arena, LAYER, case.attention).float()


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference; NaN counts as infinite."""
    return (found - expected).abs().nan_to_num(torch.inf).max().item()


CASES = {
    "a head for each query": Case(attention=grouped(3, 3, 80)),
    "seven to a group": Case(attention=grouped(14, 2, 64)),
    "a group larger than a tile": Case(attention=grouped(20, 1, 32), lengths=(20, 2)),
    "wide heads": Case(attention=grouped(2, 1, 256), lengths=(40, 5)),
    "a window": Case(attention=grouped(4, 2, 96, window=20), lengths=(60, 30, 2)),
    "a window of one": Case(attention=grouped(4, 2, 16, window=1)),
    "large blocks": Case(attention=grouped(4, 2, 128), block_tokens=48, lengths=(60, 30, 2)),
    "latents": Case(attention=latent(5, rank=48, rope=16)),
    "latents too wide for one load": Case(attention=latent(17, rank=320, rope=32), lengths=(9, 3)),
    "bf16": Case(attention=grouped(14, 2, 64), dtype=torch.bfloat16),
    "bf16, more than a tile": Case(
        attention=grouped(9, 1, 32), dtype=torch.bfloat16, lengths=(90, 1)
    ),
    "fp16, window": Case(attention=grouped(4, 1, 48, window=7), dtype=torch.float16),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name: str) -> None:
    case = CASES[name]
    error = error_of(attended(case, attention_cuda.attend), attended(case, ATTENTION["naive"]))

    assert error < TOLERANCE[case.dtype]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_equals_the_definition_at_random(seed: int) -> None:
    rng = random.Random(seed)
    kv_heads, dim = rng.choice([1, 2, 3]), rng.choice([16, 32, 48, 64, 80, 96, 128, 256])
    heads = kv_heads * rng.choice([1, 2, 3, 5, 7, 8, 9, 16, 20])
    case = Case(
        attention=grouped(heads, kv_heads, dim, window=rng.choice([None, None, 1, 7, 16, 100])),
        lengths=tuple(rng.choice([1, 5, 16, 17, 40, 130]) for _ in range(rng.choice([1, 2, 5]))),
        block_tokens=rng.choice([16, 32, 48]),
        dtype=rng.choice(list(TOLERANCE)),
        seed=seed,
    )
    error = error_of(attended(case, attention_cuda.attend), attended(case, ATTENTION["naive"]))

    assert error < TOLERANCE[case.dtype], case


LONG = {
    "fp32": Case(attention=grouped(2, 1, 32), lengths=(1100, 30, 700)),
    "bf16": Case(attention=grouped(7, 1, 32), lengths=(800,), dtype=torch.bfloat16),
    "window": Case(attention=grouped(2, 1, 32, window=600), lengths=(1100, 30, 700)),
    "latents": Case(attention=latent(5, rank=48, rope=16), lengths=(600, 2)),
}


@pytest.mark.parametrize("name", LONG)
def test_few_long_sequences_are_shared_by_programs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, splits = LONG[name], []
    chosen = attention_cuda.splits_of
    monkeypatch.setattr(
        attention_cuda, "splits_of", lambda **of: splits.append(chosen(**of)) or splits[-1]
    )
    error = error_of(decoded(case, attention_cuda.attend), decoded(case, ATTENTION["naive"]))

    assert error < TOLERANCE[case.dtype]
    assert splits[0] > 1


# The comparison can fail


def unwindowed(*args):  # type: ignore[no-untyped-def]
    return attention_cuda.attend(*args[:-1], replace(args[-1], window_tokens=None))


def bent(q, k, v, batch, arena, layer, attention):  # type: ignore[no-untyped-def]
    """The first block of the longest sequence is read where its last one lies."""
    attention_cuda.attend(q, k, v, batch, arena, layer, attention)
    batch.tensor("tables.0", q.device)[0, :2] = batch.tensor("tables.0", q.device)[0, 2:4]
    return attention_cuda.attend(q, k, v, batch, arena, layer, attention)


def one_too_many(q, k, v, batch, arena, layer, attention):  # type: ignore[no-untyped-def]
    """Every token believes that it comes one later, and sees a slot that nobody wrote."""
    batch.lengths += 1
    return attention_cuda.attend(q, k, v, batch, arena, layer, attention)


def unwritten(q, k, v, batch, arena, layer, attention):  # type: ignore[no-untyped-def]
    """Keys and values go nowhere."""
    nowhere = replace(attention, window_tokens=None)
    return attention_cuda.attend(q, k * 0, v * 0, batch, arena, layer, nowhere)


@pytest.mark.parametrize(
    ("how", "window", "error"),
    [
        (unwindowed, 20, torch.inf),  # what the window has passed is a hole, and holes are NaN
        (bent, None, 0.1),
        (one_too_many, None, torch.inf),
        (unwritten, None, 0.1),
    ],
)
def test_what_should_not_be_seen_is_noticed(how: Version, window: int, error: float) -> None:
    case = Case(attention=grouped(4, 2, 16, window=window), lengths=(38, 33))
    expected = decoded(case, ATTENTION["naive"])

    assert error_of(decoded(case, attention_cuda.attend), expected) < 1e-5
    assert error_of(decoded(case, how), expected) >= error


def test_pages_hold_what_was_written_and_nothing_else_changed() -> None:
    case = Case(attention=grouped(3, 3, 48), lengths=(40,), dtype=torch.bfloat16)
    run, other = Run(case), Run(case)
    for one, how in ((run, attention_cuda.attend), (other, ATTENTION["naive"])):
        how(*one.step({0: 40}), one.cache.arena, LAYER, case.attention)

    assert torch.equal(run.cache.arena.data, other.cache.arena.data)


# Shapes


@given(
    group=st.integers(1, 128),
    dim=st.integers(16, 1024),
    element_bytes=st.sampled_from([2, 4]),
    single=st.booleans(),
)
def test_tiles_hold_a_token_and_all_numbers_are_powers_of_two(
    group: int, dim: int, element_bytes: int, single: bool
) -> None:
    shape = attention_cuda.tiling(
        group=group, key_dim=dim, value_dim=dim, element_bytes=element_bytes, single=single
    )

    assert shape.tokens >= 1
    assert shape.tokens * shape.heads <= shape.rows
    assert all(n & (n - 1) == 0 for n in (shape.rows, shape.keys, shape.warps))


@given(st.lists(st.integers(1, 200), min_size=1), st.integers(1, 64))
def test_every_row_lies_in_one_tile(counts: list[int], tokens: int) -> None:
    starts = np.cumsum([0, *counts], dtype=np.int32)
    tiles = attention_cuda.tiles_of(starts, list(range(len(counts))), tokens)
    covered = [
        (sequence, row)
        for sequence, first in tiles.tolist()
        for row in range(first, min(first + tokens, starts[sequence + 1]))
    ]

    assert [row for _, row in covered] == list(range(starts[-1]))
    assert [s for s, _ in covered] == np.repeat(np.arange(len(counts)), counts).tolist()


@pytest.mark.parametrize(
    ("programs", "longest_tokens", "splits"),
    [
        (8, 100_000, 33),  # one sequence: fills the device
        (8, 1024, 4),  # no program reads few keys
        (8, 100, 1),
        (512, 100_000, 1),  # full without sharing
        (1, 10_000_000, 64),
    ],
)
def test_splits_fill_the_device(programs: int, longest_tokens: int, splits: int) -> None:
    found = attention_cuda.splits_of(
        programs=programs, longest_tokens=longest_tokens, multiprocessors=132
    )

    assert found == splits


# Compiled for devices that are not here

SHARED_BYTES_MAX = 99 * 1024  # what a consumer's GPU lets one program have
SHARED_BYTES_MAX_WIDE = 163 * 1024  # what an A100 does


def require_fits(what: str, architecture: int, *, kernels: int, folder: Path) -> None:
    """Compile in another process; nothing may ask for more than there is, or spill much."""
    script = Path(__file__).with_name("compile_kernels.py")
    found = subprocess.run(
        [sys.executable, script, what, str(architecture)],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    taken = [json.loads(line) for line in found.stdout.splitlines()]

    assert found.returncode == 0, found.stderr
    assert len(taken) == kernels
    assert [k for k in taken if not fits(k)] == []


def fits(kernel: dict[str, Any]) -> bool:
    most = SHARED_BYTES_MAX_WIDE if "fp32 16x576" in kernel["kernel"] else SHARED_BYTES_MAX
    return kernel["shared_bytes"] <= most and kernel["spilled_bytes"] <= 64


def test_compiles_without_a_gpu(tmp_path: Path) -> None:
    require_fits("few", 90, kernels=5, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_shape_compiles_for_every_generation(architecture: int, tmp_path: Path) -> None:
    require_fits("all", architecture, kernels=60, folder=tmp_path)
