"""The reuse curve is what an LRU cache of that size would have found, block for block."""

from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierline.workload.reuse import ReuseMeter
from tierline.workload.trace import read_trace

Chain = tuple[int, ...]


def _chains(choices: list[tuple[int, int, int]]) -> list[Chain]:
    """Requests whose ids mean a prefix: each keeps some leading blocks of an earlier one."""
    chains: list[Chain] = []
    fresh = 0
    for earlier, keep, new in choices:
        kept = chains[earlier % len(chains)][:keep] if chains else ()
        chains.append((*kept, *range(fresh, fresh + new)))
        fresh += new
    return chains


def _lru_hits(chains: list[Chain], capacity: int, *, heads_last: bool = True) -> int:
    """Blocks found by a plain LRU cache: look the whole request up, then touch its blocks."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for chain in chains:
        for block in chain:
            if block not in cache:
                break
            hits += 1
        for block in reversed(chain) if heads_last else chain:
            cache[block] = None
            cache.move_to_end(block)
            if len(cache) > capacity:
                cache.popitem(last=False)
    return hits


def _curve(chains: list[Chain], **options: int):
    meter = ReuseMeter(block_tokens=1, **options)
    for chain in chains:
        meter.add(chain, len(chain))
    return meter.curve()


CHOICES = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 8), st.integers(1, 6)), min_size=2, max_size=40
)


@given(choices=CHOICES)
def test_every_point_is_what_a_plain_lru_cache_finds(choices: list[tuple[int, int, int]]) -> None:
    chains = _chains(choices)
    curve = _curve(chains)

    for point in curve.points:
        hits = _lru_hits(chains, point.cached_tokens)
        assert point.block_hit_rate * curve.accesses == pytest.approx(hits)
        assert point.token_hit_rate == pytest.approx(point.block_hit_rate)


def test_the_check_sees_the_order_of_touching() -> None:
    """Negative control: a cache that drops heads before tails finds something else."""
    chains = _chains([(0, 0, 4), (0, 0, 3), (0, 4, 2), (1, 3, 1), (0, 4, 1)] * 4)
    curve = _curve(chains)
    wrong = [_lru_hits(chains, p.cached_tokens, heads_last=False) for p in curve.points]

    assert wrong != [round(p.block_hit_rate * curve.accesses) for p in curve.points]


@pytest.mark.parametrize(
    ("name", "rates", "ideal"),
    [
        ("conversation", (0.054, 0.211, 0.326, 0.364), (0.366, 0.374)),
        ("synthetic", (0.144, 0.424, 0.624, 0.640), (0.640, 0.651)),
    ],
)
def test_real_traces_give_the_published_curves(
    data_dir: Path, name: str, rates: tuple[float, ...], ideal: tuple[float, float]
) -> None:
    meter = ReuseMeter(block_tokens=512)
    chains = []
    for request in read_trace(data_dir / f"traces/mooncake_{name}.jsonl.gz"):
        meter.add(request.prefix_blocks, request.input_tokens)
        chains.append(request.prefix_blocks)
    curve = meter.curve()
    assert curve is not None
    found = [curve.block_hit_rate(m * 1e6) for m in (1.0, 5.1, 15.4, 51)]
    middle = next(p for p in curve.points if p.cached_tokens > 5e6)

    assert found == pytest.approx(rates, abs=0.005)
    assert (curve.ideal.block_hit_rate, curve.ideal.token_hit_rate) == pytest.approx(
        ideal, abs=0.0015
    )
    hits = _lru_hits(chains, middle.cached_tokens // 512)
    assert middle.block_hit_rate * curve.accesses == pytest.approx(hits)


def test_a_sample_of_blocks_gives_nearly_the_whole_curve(data_dir: Path) -> None:
    whole, sample = ReuseMeter(block_tokens=512), ReuseMeter(block_tokens=512, accesses_max=80_000)
    for request in read_trace(data_dir / "traces/mooncake_conversation.jsonl.gz"):
        for meter in (whole, sample):
            meter.add(request.prefix_blocks, request.input_tokens)
    exact, thin = whole.curve(), sample.curve()
    assert exact is not None
    assert thin is not None
    sizes = [10**k for k in (5, 5.5, 6, 6.5, 7, 7.5)]

    assert thin.sample_rate == 0.25
    for size in sizes:
        assert thin.block_hit_rate(size) == pytest.approx(exact.block_hit_rate(size), abs=0.02)


def test_a_trace_without_blocks_has_no_curve() -> None:
    meter = ReuseMeter(block_tokens=512)
    meter.add((), 100)

    assert meter.curve() is None


def test_tokens_outside_the_blocks_count_as_not_found() -> None:
    meter = ReuseMeter(block_tokens=10)
    for _ in range(2):
        meter.add((1, 2), 40)  # 20 of 40 tokens lie in named blocks
    curve = meter.curve()
    assert curve is not None

    assert curve.ideal.block_hit_rate == 0.5
    assert curve.ideal.token_hit_rate == 0.25
