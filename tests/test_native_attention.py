"""Native attention equals the definition, on any table and any mix, and never reads garbage."""

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from tierline.engine import native
from tierline.engine.arena import Arena, geometry
from tierline.engine.attention import Version, gathered, naive
from tierline.engine.batch import Batch
from tierline.engine.decoder import Attention, Decoder, Dense, Layer, Rope
from tierline.engine.native_attention import read_layer, version, why_not, write_layer

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One cache, and the texts that go through it in steps."""

    attention: Attention
    block_tokens: int
    slots: int  # layers in a page
    parts: int  # pages of a block
    lengths: tuple[int, ...]
    dtype: torch.dtype
    seed: int

    @property
    def layers(self) -> int:
        return self.slots * self.parts


def attention_of(*, heads: int, kv_heads: int, dim: int, window: int | None = None) -> Attention:
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        rope=Rope(inverse_frequencies=()),
        scale=dim**-0.5,
        window_tokens=window,
    )


def random_case(seed: int, dtype: torch.dtype) -> Case:
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2, 3])
    return Case(
        attention=attention_of(
            heads=kv_heads * rng.choice([1, 2, 3, 5, 7, 8, 9, 16]),
            kv_heads=kv_heads,
            dim=rng.choice([16, 32, 48, 64, 80, 128, 256]),
            window=rng.choice([None, None, 1, 7, 16, 100, 200]),
        ),
        block_tokens=rng.choice([16, 32, 64]),
        slots=rng.choice([1, 3]),
        parts=rng.choice([1, 2]),
        lengths=tuple(
            rng.choice([1, 5, 16, 17, 40, 130, 300]) for _ in range(rng.choice([1, 2, 5]))
        ),
        dtype=dtype,
        seed=seed,
    )


class Run:
    """The pages of a case, full of NaN, and random tables into them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rng = random.Random(case.seed)
        block = case.block_tokens
        blocks = [-(-n // block) for n in case.lengths]
        # A group of `layers` layers whose pages hold `slots`: a second group makes them smaller.
        layer = Layer(attention=case.attention, ffn=Dense(intermediate=16))
        other = replace(case.attention, window_tokens=3)
        decoder = Decoder(
            architecture="case",
            hidden=16,
            vocabulary=16,
            positions_max=1024,
            layers=(layer,) * case.layers + (replace(layer, attention=other),) * case.slots,
            norm_eps=1e-5,
            weight_names=str,
        )
        self.geometry = geometry(decoder, block_tokens=block, element_bytes=case.dtype.itemsize)
        pages = sum(blocks) * case.layers + 3
        self.arena = Arena(
            decoder, self.geometry, pages=pages, dtype=case.dtype, device=torch.device("cpu")
        )
        self.arena.data.fill_(255)  # NaN in every type
        self.layer = self.rng.randrange(case.layers)
        self.place = self.geometry.places[self.layer]
        self.parts = self.geometry.layout.groups[self.place.group].pages_per_block
        numbers = self.rng.sample(range(pages), pages)
        self.table = np.full((len(blocks), max(blocks) * self.parts), -(1 << 20), dtype=np.int32)
        for s, count in enumerate(blocks):
            for entry in range(count * self.parts):
                self.table[s, entry] = numbers.pop()

    def batch(self, which: list[int], done: list[int], counts: list[int]) -> Batch:
        starts = np.cumsum([0, *counts], dtype=np.int32)
        table = self.table[which].copy()
        window = self.case.attention.window_tokens
        for row, before in enumerate(done):
            if window is not None:  # what the window has passed is a hole
                passed = max(before - window + 1, 0) // self.case.block_tokens
                table[row, : passed * self.parts] = -1
        return Batch(
            tokens=np.zeros(starts[-1], dtype=np.int32),
            positions=np.concatenate(
                [np.arange(d, d + n, dtype=np.int32) for d, n in zip(done, counts, strict=True)]
            ),
            starts=starts,
            lengths=np.array([d + n for d, n in zip(done, counts, strict=True)], dtype=np.int32),
            tables=(table, table),
            wanted=np.array([], dtype=np.int32),
        )


Texts = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def texts_of(case: Case) -> Texts:
    generator = torch.Generator().manual_seed(case.seed)
    a = case.attention

    def some(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, a.head_dim, generator=generator).to(case.dtype)

    return [(some(n, a.heads), some(n, a.kv_heads), some(n, a.kv_heads)) for n in case.lengths]


def attended(case: Case, how: Version, *, chunk: int | None = None) -> list[torch.Tensor]:
    """The output of every token, computed in random chunks and mixes, or in equal chunks."""
    run, texts = Run(case), texts_of(case)
    done = [0] * len(texts)
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    while any(d < n for d, n in zip(done, case.lengths, strict=True)):
        which = [
            s
            for s in range(len(texts))
            if done[s] < case.lengths[s] and (chunk is not None or run.rng.random() < 0.8)
        ]
        if not which:
            continue
        sizes = [chunk or run.rng.choice([1, 1, 3, 20, 64, 200, 700]) for _ in which]
        counts = [min(n, case.lengths[s] - done[s]) for s, n in zip(which, sizes, strict=True)]
        batch = run.batch(which, [done[s] for s in which], counts)
        q, k, v = (
            torch.cat(
                [texts[s][i][done[s] : done[s] + n] for s, n in zip(which, counts, strict=True)]
            )
            for i in range(3)
        )
        out = how(q, k, v, batch, run.arena, run.layer, case.attention)
        for row, (s, n) in enumerate(zip(which, counts, strict=True)):
            found[s].append(out[batch.starts[row] : batch.starts[row + 1]])
            done[s] += n
    return [torch.cat(parts) for parts in found]


def error_of(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference; NaN counts as infinite."""
    pairs = zip(found, expected, strict=True)
    return max((a.float() - b.float()).abs().nan_to_num(torch.inf).max().item() for a, b in pairs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_definition(kernels: native.Kernels, dtype: torch.dtype) -> None:
    cases = [random_case(seed, dtype) for seed in range(12)]

    errors = {c.seed: error_of(attended(c, version(kernels)), attended(c, naive)) for c in cases}

    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_is_the_same_in_any_chunk_batch_and_number_of_threads(
    kernels: native.Kernels, dtype: torch.dtype
) -> None:
    for seed in range(100, 103):
        case = random_case(seed, dtype)
        kernels.set_threads(1)
        alone = attended(case, version(kernels), chunk=16)
        kernels.set_threads(3)
        mixed = attended(case, version(kernels))

        assert all(map(torch.equal, alone, mixed)), case


def test_another_order_of_sums_would_be_seen() -> None:
    """The control: torch's attention agrees, but not to the last bit."""
    case = replace(random_case(100, torch.float32), lengths=(300, 40))
    alone, mixed = attended(case, gathered, chunk=16), attended(case, gathered)

    assert 0 < error_of(alone, mixed) < 1e-5


def test_one_long_sequence_is_shared_by_threads_and_comes_out_the_same(
    kernels: native.Kernels,
) -> None:
    case = Case(
        attention=attention_of(heads=8, kv_heads=1, dim=64),
        block_tokens=32,
        slots=1,
        parts=1,
        lengths=(1700,),
        dtype=torch.float32,
        seed=5,
    )
    found = []
    for threads in (1, 4):
        kernels.set_threads(threads)
        run, (text,) = Run(case), texts_of(case)
        for first, count in ((0, 1699), (1699, 1)):
            q, k, v = (x[first : first + count] for x in text)
            batch = run.batch([0], [first], [count])
            out = version(kernels)(q, k, v, batch, run.arena, run.layer, case.attention)
        found.append(out)

    assert error_of(found[:1], [attended(case, naive, chunk=1700)[0][-1:]]) < 1e-5
    assert torch.equal(*found)


def test_garbage_that_is_seen_is_noticed(kernels: native.Kernels) -> None:
    """The control: with one table entry bent, or a slot spoiled, the comparison fails."""
    case = replace(random_case(3, torch.float32), lengths=(300, 40))
    attend = version(kernels)

    def bent(q, k, v, batch, arena, layer, attention):  # type: ignore[no-untyped-def]
        batch.tables[0][0, 0] = batch.tables[0][-1, 0]
        batch.tables[1][0, 0] = batch.tables[0][-1, 0]
        return attend(q, k, v, batch, arena, layer, attention)

    def spoiled(q, k, v, batch, arena, layer, attention):  # type: ignore[no-untyped-def]
        out = attend(q, k, v, batch, arena, layer, attention)
        write_layer(arena, layer, read_layer(arena, layer).fill_(torch.nan))
        return out

    case = replace(case, attention=replace(case.attention, window_tokens=None))
    expected = attended(case, naive)

    assert error_of(attended(case, attend), expected) < 1e-5
    assert error_of(attended(case, bent), expected) > 1e-2
    assert error_of(attended(case, spoiled), expected) == torch.inf


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_pages_hold_what_was_written(kernels: native.Kernels, dtype: torch.dtype) -> None:
    case = replace(random_case(9, dtype), lengths=(50,))
    run, ((q, k, v),) = Run(case), texts_of(case)

    version(kernels)(q, k, v, run.batch([0], [0], [50]), run.arena, run.layer, case.attention)

    plain = read_layer(run.arena, run.layer)
    pages = run.table[0, run.place.part :: run.parts]
    block = case.block_tokens
    for token in range(50):
        page = plain[pages[token // block]]
        assert torch.equal(page[0, token % block], k[token])
        assert torch.equal(page[1, token % block], v[token])
    for layer, place in enumerate(run.geometry.places[: case.layers]):
        if place.slot != run.place.slot:
            assert torch.isnan(read_layer(run.arena, layer)).all()
    before = run.arena.data.clone()
    write_layer(run.arena, run.layer, torch.full_like(plain, torch.nan))
    assert torch.isnan(read_layer(run.arena, run.layer)).all()
    write_layer(run.arena, run.layer, plain)
    assert torch.equal(run.arena.data, before)


def test_says_what_it_cannot_serve() -> None:
    good = attention_of(heads=2, kv_heads=1, dim=64)

    assert why_not(good, torch.float32) is None
    assert why_not(replace(good, head_dim=40), torch.float32) == (
        "head dimension 40 is not a multiple of 16"
    )
    assert why_not(good, torch.float16) == "a cache of float16 has no native kernel"
