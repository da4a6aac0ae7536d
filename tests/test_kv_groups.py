"""Pages counted for a sequence hold the bytes of the memory law, rounded to blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierline.catalog.formats import KV_FORMATS
from tierline.catalog.models import load_model
from tierline.kv.groups import CacheGroup, CacheLayout, cache_layout
from tierline.perf import memory

MODELS = [
    "llama-3.1-70b",
    "gemma-3-27b",
    "gpt-oss-120b",
    "mistral-7b-v0.1",
    "deepseek-v3.2",
    "glm-5.2",
    "qwen3.5-397b-a17b",
]
LENGTHS = [1, 15, 16, 17, 1023, 1024, 1025, 4096, 100_000]


def layout_of(name: str, kv: str = "bf16", tp: int = 1, block_tokens: int = 16) -> CacheLayout:
    return cache_layout(load_model(name), KV_FORMATS[kv], tp=tp, block_tokens=block_tokens)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("kv", ["bf16", "nvfp4"])
@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_pages_are_the_bytes_of_the_law_rounded_to_blocks(name, tp, kv, tokens):
    layout = layout_of(name, kv, tp)
    law = memory.kv_bytes_per_gpu(load_model(name), tokens, KV_FORMATS[kv], tp=tp)
    unrounded = sum(g.pages_per_block for g in layout.groups)
    window = sum(g.pages_per_block for g in layout.groups if g.window_tokens)

    over_pages = layout.pages(tokens) - law / layout.page_bytes

    assert 0 <= over_pages < unrounded + window + 1  # a last block; a rolling one; a state's page


@pytest.mark.parametrize("name", ["llama-3.1-70b", "deepseek-v3.2", "glm-5.2"])
def test_whole_blocks_without_a_window_are_exact(name):
    model, layout = load_model(name), layout_of(name)
    law = memory.kv_bytes_per_gpu(model, 4096, KV_FORMATS["bf16"])

    assert layout.pages(4096) * layout.page_bytes == law


def test_layers_that_remember_alike_are_one_group():
    windows = {name: [g.window_tokens for g in layout_of(name).groups] for name in MODELS}
    pages = [g.pages_per_block for g in layout_of("gemma-3-27b").groups]

    assert windows["gemma-3-27b"] == [None, 1024]
    assert windows["glm-5.2"] == [None]  # with and without an index: both remember everything
    assert windows["mistral-7b-v0.1"] == [4096]
    assert pages == [5, 26]  # 10 and 52 layers over their common divisor


def test_a_latent_is_whole_on_every_rank_and_heads_are_divided():
    assert layout_of("deepseek-v3.2", tp=8).page_bytes == layout_of("deepseek-v3.2").page_bytes
    assert layout_of("llama-3.1-70b", tp=8).page_bytes == 16 * 40_960  # S1: 40,960 bytes a token
    assert layout_of("llama-3.1-70b", tp=16).page_bytes == 16 * 40_960  # and 16 ranks replicate


def test_block_sizes_of_the_reference_models():
    assert layout_of("llama-3.1-70b").page_bytes == 5 * 2**20
    assert layout_of("mistral-7b-v0.1").page_bytes == 2 * 2**20
    assert layout_of("llama-3.1-70b").pages(131_072) == 8192
    assert layout_of("llama-3.1-70b", block_tokens=4).pages(131_072) == 32_768


def test_a_state_is_held_at_any_length_and_not_shared():
    layout = layout_of("qwen3.5-397b-a17b")

    assert layout.pages(0) == 0
    assert layout.pages(1) == layout.state_pages + 1
    assert layout.pages(16_000) == layout.state_pages + 1000
    assert not layout.shares_prefixes
    assert layout_of("gemma-3-27b").shares_prefixes


@pytest.mark.parametrize(
    ("tokens", "block_tokens", "blocks"),
    [(17, 16, 2), (150, 16, 10), (4096, 16, 256), (4097, 16, 257), (10**6, 16, 257)],
)
def test_a_window_is_bounded_at_any_length(tokens, block_tokens, blocks):
    assert CacheGroup(pages_per_block=1, window_tokens=4096).blocks(tokens, block_tokens) == blocks


windows = st.integers(1, 40)
blocks = st.integers(1, 20)
counts = st.integers(0, 200)


@given(windows, blocks, counts, st.integers(1, 60))
def test_the_peak_of_a_chunk_is_the_rolling_buffer_plus_the_chunk_less_one(w, b, done, n):
    group = CacheGroup(pages_per_block=1, window_tokens=w)

    peak = group.blocks_peak(done, n, b)
    touched = -(-(w + n - 2) // b) + 1  # by W + n - 1 positions in a row

    assert peak <= max(min(-(-(done + n) // b), touched), group.blocks(done, b))
    assert peak >= group.blocks(done + n, b)


@given(windows, blocks, counts, st.integers(1, 60))
def test_what_is_held_contains_what_is_read(w, b, done, n):
    """INV-KV-5 by arithmetic: released blocks lie below the first position that is read."""
    group = CacheGroup(pages_per_block=1, window_tokens=w)
    first_read = max(0, done - w + 1)

    held_from = -(-(done + n) // b) - group.blocks_peak(done, n, b)

    assert group.blocks_released(done, b) * b <= first_read
    assert held_from * b <= first_read


@given(windows, blocks, counts)
def test_one_block_fewer_would_lose_a_token(w, b, past):
    """Control: the buffer is tight, so at some alignment of a decode a smaller one is seen."""
    group = CacheGroup(pages_per_block=1, window_tokens=w)
    long = w + b + past
    kept = group.blocks(long, b)
    smaller_from = [(-(-(t + 1) // b) - kept + 1) * b for t in range(long, long + b)]

    assert any(
        first > t - w + 1 for t, first in zip(range(long, long + b), smaller_from, strict=True)
    )


@given(blocks, counts, st.integers(0, 60))
def test_a_group_without_a_window_grows_by_what_is_new(b, done, n):
    group = CacheGroup(pages_per_block=1)

    assert group.blocks_peak(done, n, b) == group.blocks(done + n, b) == -(-(done + n) // b)
