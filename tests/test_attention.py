"""Attention over pages equals attention over the whole text, whatever lies where (INV-ENG-6).

The oracle is written here once more, without pages: one softmax over all keys that a token
may see.  Caches start as NaN and get it back wherever a window has passed.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tierline.engine.attention import ATTENTION, Version, gathered
from tierline.engine.decoder import Attention, Decoder, Dense, LatentAttention, Layer, Rope
from tiny_driver import Cache

NO_ROPE = Rope(inverse_frequencies=())
GROUPED = Attention(heads=4, kv_heads=2, head_dim=8, rope=NO_ROPE, scale=8**-0.5)
LATENT = LatentAttention(
    heads=3,
    nope_dim=8,
    rope_dim=4,
    v_head_dim=8,
    kv_rank=12,
    q_rank=None,
    rope=NO_ROPE,
    scale=0.3,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def decoder_with(*attentions: Attention | LatentAttention) -> Decoder:
    layers = tuple(Layer(attention=one, ffn=Dense(intermediate=8)) for one in attentions)
    return Decoder(
        architecture="none",
        hidden=8,
        vocabulary=8,
        positions_max=256,
        layers=layers,
        norm_eps=1e-6,
        weight_names=str,
    )


@dataclass(slots=True)
class Text:
    """Queries, keys and values of one sequence in one layer."""

    q: torch.Tensor  # [length, heads, dim]
    k: torch.Tensor
    v: torch.Tensor | None


def text_of(attention: Attention | LatentAttention, length: int, seed: int) -> Text:
    generator = torch.Generator().manual_seed(seed)
    latent = isinstance(attention, LatentAttention)
    dim = attention.kv_elements_per_token if latent else attention.value_dim

    def some(heads: int) -> torch.Tensor:
        return torch.randn(length, heads, dim, generator=generator)

    k = some(attention.kv_heads)
    return Text(some(attention.heads), k, None if latent else some(attention.kv_heads))


def oracle(attention: Attention | LatentAttention, text: Text) -> torch.Tensor:
    """All rows at once, heads repeated, in float64."""
    values = text.k[..., : attention.value_dim] if text.v is None else text.v
    repeat = attention.heads // attention.kv_heads
    q, k, v = text.q.double(), text.k.double(), values.double()
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * attention.scale
    at = torch.arange(len(q))
    distance = at[:, None] - at
    hidden = distance < 0
    if attention.window_tokens is not None:
        hidden |= distance >= attention.window_tokens
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).float()


def play(
    version: Version,
    attentions: tuple[Attention | LatentAttention, ...],
    lengths: list[int],
    rng: random.Random,
    *,
    block_tokens: int,
    sizes: tuple[int, ...],
) -> float:
    """Random steps until all texts are done; the largest error of any layer and row."""
    held = Cache(decoder_with(*attentions), block_tokens=block_tokens, pages=1200, seed=7)
    texts = [
        [text_of(attention, length, 100 * s + n) for n, attention in enumerate(attentions)]
        for s, length in enumerate(lengths)
    ]
    done, worst = [0] * len(lengths), 0.0
    while unfinished := [s for s, length in enumerate(lengths) if done[s] < length]:
        counts = {
            s: min(rng.choice(sizes), lengths[s] - done[s])
            for s in rng.sample(unfinished, rng.randint(1, len(unfinished)))
        }
        batch = held.batch({s: [0] * count for s, count in counts.items()})
        for n, attention in enumerate(attentions):
            parts = [
                (text.q[a:b], text.k[a:b], None if text.v is None else text.v[a:b])
                for s, count in counts.items()
                for text, a, b in ((texts[s][n], done[s], done[s] + count),)
            ]
            q, k = (torch.cat([part[i] for part in parts]) for i in (0, 1))
            values = [part[2] for part in parts if part[2] is not None]
            out = version(
                q, k, torch.cat(values) if values else None, batch, held.arena, n, attention
            )
            found = out.split(list(counts.values()))
            for (s, count), rows in zip(counts.items(), found, strict=True):
                expected = oracle(attention, texts[s][n])[done[s] : done[s] + count]
                worst = max(worst, (rows - expected).abs().nan_to_num(torch.inf).max().item())
        for s, count in counts.items():
            done[s] += count
        forget(held, counts)
    return worst


def forget(held: Cache, step: Mapping[int, int]) -> None:
    """Slide the windows, and spoil what they have passed: somebody else may own it now."""
    before = {p for p in range(held.names.pool.blocks_total) if held.names.pool.references(p)}
    held.settle(step)
    for page in before:
        if not held.names.pool.references(page):
            held.arena.data[page].fill_(0xFF)


SHAPES: dict[str, tuple[Attention | LatentAttention, ...]] = {
    "grouped": (GROUPED, GROUPED),
    "one for each": (replace(GROUPED, kv_heads=4),),
    "one for all": (replace(GROUPED, kv_heads=1),),
    "window": (replace(GROUPED, window_tokens=20),),
    "window below a block": (replace(GROUPED, window_tokens=3),),
    "window of one": (replace(GROUPED, window_tokens=1),),
    "two windows and none": (
        GROUPED,
        replace(GROUPED, window_tokens=5),
        replace(GROUPED, window_tokens=17),
        replace(GROUPED, window_tokens=5),
    ),
    "latent": (LATENT, LATENT),
}


@pytest.mark.parametrize("how", ATTENTION)
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=8)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    block_tokens=st.sampled_from([1, 4, 16]),
    sizes=st.sampled_from([(1,), (1, 1, 1, 30), (2, 7, 50), (1, 90)]),
)
def test_pages_change_nothing(
    how: str,
    shape: str,
    seed: int,
    lengths: list[int],
    block_tokens: int,
    sizes: tuple[int, ...],
) -> None:
    worst = play(
        ATTENTION[how],
        SHAPES[shape],
        lengths,
        random.Random(seed),
        block_tokens=block_tokens,
        sizes=sizes,
    )

    assert worst < 1e-5


# --- the controls ---------------------------------------------------------------------------


def wider(version: Version) -> Version:
    """Sees one token more than its window."""

    def bent(q, k, v, batch, arena, layer, attention):  # type: ignore[no-untyped-def]
        more = replace(attention, window_tokens=attention.window_tokens + 1)
        return version(q, k, v, batch, arena, layer, more)

    return bent


def shifted(version: Version) -> Version:
    """Reads block tables of one sequence as those of the next."""

    def bent(q, k, v, batch, arena, layer, attention):  # type: ignore[no-untyped-def]
        tables = tuple(table[::-1].copy() for table in batch.tables)
        return version(q, k, v, replace(batch, tables=tables), arena, layer, attention)

    return bent


def unwritten(version: Version) -> Version:
    """Attends before anything is written: to NaN."""

    def bent(q, k, v, batch, arena, layer, attention):  # type: ignore[no-untyped-def]
        return version(q, k * torch.nan, v, batch, arena, layer, attention)

    return bent


def misgrouped(version: Version) -> Version:
    """Query heads look at the other KV head."""

    def bent(q, k, v, batch, arena, layer, attention):  # type: ignore[no-untyped-def]
        return version(q, k.flip(1), v.flip(1), batch, arena, layer, attention)

    return bent


BENT: dict[str, tuple[str, Callable[[Version], Version]]] = {
    "window": ("window", wider),
    "tables": ("grouped", shifted),
    "unwritten": ("grouped", unwritten),
    "groups": ("grouped", misgrouped),
}


@pytest.mark.parametrize("how", ATTENTION)
@pytest.mark.parametrize("what", BENT)
def test_a_bent_version_is_noticed(how: str, what: str) -> None:
    shape, bend = BENT[what]
    worst = play(
        bend(ATTENTION[how]),
        SHAPES[shape],
        [60, 40, 50],
        random.Random(0),
        block_tokens=4,
        sizes=(1, 7, 30),
    )

    assert worst > 1e-3


@pytest.mark.parametrize("how", ATTENTION)
def test_what_a_window_has_passed_may_be_anything(how: str) -> None:
    """The rolling buffer: a sequence far longer than the pool of pages it lives in."""
    attention = replace(GROUPED, window_tokens=10)
    text = text_of(attention, 200, seed=3)
    assert text.v is not None
    held = Cache(decoder_with(attention), block_tokens=4, pages=7)
    found = []
    for at in range(0, 200, 5):
        batch = held.batch({0: [0] * 5})
        rows = slice(at, at + 5)
        out = ATTENTION[how](
            text.q[rows], text.k[rows], text.v[rows], batch, held.arena, 0, attention
        )
        found.append(out)
        forget(held, {0: 5})

    assert torch.allclose(torch.cat(found), oracle(attention, text), atol=1e-5)


def test_a_window_that_is_read_too_far_meets_the_spoiled_pages() -> None:
    """Control of the one above: without the window, attention reads what was given back."""
    attention = replace(GROUPED, window_tokens=10)
    wrong = play(
        lambda *args: gathered(*args[:6], replace(attention, window_tokens=None)),
        (attention,),
        [80],
        random.Random(1),
        block_tokens=4,
        sizes=(5,),
    )

    assert wrong > 1e-3


def test_grouped_queries_are_repeated_heads() -> None:
    """GQA equals MHA whose KV heads are copies; one KV head is MQA."""
    for kv_heads in (1, 2):
        grouped = replace(GROUPED, kv_heads=kv_heads)
        full = replace(GROUPED, kv_heads=4)
        text = text_of(grouped, 30, seed=1)
        assert text.v is not None
        outs = []
        for attention, repeat in ((grouped, 1), (full, 4 // kv_heads)):
            held = Cache(decoder_with(attention))
            k, v = (x.repeat_interleave(repeat, 1) for x in (text.k, text.v))
            batch = held.batch({0: [0] * 30})
            outs.append(gathered(text.q, k, v, batch, held.arena, 0, attention))

        assert torch.allclose(*outs, atol=1e-6)
