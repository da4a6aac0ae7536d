"""What a tier keeps: each placement forgets in the order that it promises, and expected reuse
saves no less prefill than LRU and ARC on real traces."""

from collections import OrderedDict
from dataclasses import replace
from itertools import count
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_driver import Cache
from tierline.base.clock import PS_PER_S
from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.kv.placement import Arc, CostAware, Ghosts, Lfu, Lru, Placement
from tierline.kv.prefix import Run
from tierline.perf.step import Layout, StepCost
from tierline.scheduling.scheduler import Limits
from tierline.sim.api import simulate
from tierline.sim.instance import build_instance
from tierline.workload.request import Request
from tierline.workload.trace import read_trace

ACCESSES = st.lists(st.integers(0, 9), min_size=1, max_size=80)


def hits(placement: Placement, accesses: list[int], *, blocks: int) -> list[bool]:
    """Which accesses to prompts of one block find it, in a device of so many blocks."""
    cache = Cache(blocks, placement=placement)
    found = [cache.serve([name]) > 0 for name in accesses]
    cache.check()
    return found


# --- each in its order ----------------------------------------------------------------------


def lru(accesses: list[int], blocks: int) -> list[bool]:
    kept: OrderedDict[int, None] = OrderedDict()
    found = []
    for name in accesses:
        found.append(name in kept)
        kept.pop(name, None)
        if len(kept) == blocks:
            kept.popitem(last=False)
        kept[name] = None
    return found


def lfu(accesses: list[int], blocks: int) -> list[bool]:
    kept: dict[int, tuple[int, int]] = {}  # uses while here, and the last of them
    found = []
    for at, name in enumerate(accesses):
        uses, _ = kept.get(name, (-1, 0))
        found.append(name in kept)
        if name not in kept and len(kept) == blocks:
            del kept[min(kept, key=lambda other: kept[other])]
        kept[name] = (uses + 1, at)
    return found


@given(ACCESSES)
def test_lru_is_the_textbook_s(accesses):
    assert hits(Lru(), accesses, blocks=4) == lru(accesses, 4)


@given(ACCESSES)
def test_lfu_is_the_textbook_s(accesses):
    assert hits(Lfu(), accesses, blocks=4) == lfu(accesses, 4)


def test_the_textbooks_differ():
    accesses = [1, 1, 2, 3, 4, 5, 1]

    assert hits(Lru(), accesses, blocks=4) != hits(Lfu(), accesses, blocks=4)


def scanned(placement: Placement) -> int:
    """Hits of a hot set that is used again and again while strangers pass through."""
    rng, strangers = Random(7), count(1000)
    accesses = []
    for _ in range(60):
        accesses += [rng.randrange(6) for _ in range(6)]
        accesses += [next(strangers) for _ in range(10)]
    return sum(hits(placement, accesses, blocks=12))


def test_arc_keeps_what_is_used_again_from_strangers():
    assert scanned(Arc()) > 1.5 * scanned(Lru())


def test_arc_gives_room_to_what_it_forgot_too_early():
    arc = Arc()
    cache = Cache(8, placement=arc)
    for name in (0, 0, 1, 1, 2, 2, 3, 3):  # all is used again: strangers get nothing at first
        cache.serve([name])
    before = arc._target_blocks
    for name in range(10, 30):
        cache.serve([name])
        cache.serve([name - 5])  # each stranger comes once more, just too late

    assert arc._target_blocks > before


def test_ghosts_are_found_in_a_row_and_no_more_than_they_may():
    ghosts = Ghosts()
    for name, blocks, kind in ((10, 2, False), (12, 3, True), (20, 4, True)):
        ghosts.add(run_of(name, blocks), 0, kind=kind, most=9)

    assert [g.blocks for g in ghosts.find(range(10, 30), 0, 20)] == [2, 3]
    assert (ghosts.blocks(kind=False), ghosts.blocks(kind=True)) == (0, 4)

    ghosts.add(run_of(30, 4), 1, kind=False, most=6)  # the oldest goes, and one block was kept

    assert ghosts.find(range(20, 30), 0, 10) == []
    assert [g.blocks for g in ghosts.find(range(31, 40), 0, 9)] == [3]


def run_of(name: int, blocks: int) -> Run:
    return Run(
        range(name, name + blocks), start=0, blocks=blocks, parent=None, mask=1, used_ps=0, birth=1
    )


# --- expected reuse -------------------------------------------------------------------------


def dear(cache: Cache) -> int:
    """Blocks left of a prompt whose end is dear to compute, after cheap ones have come."""
    long = list(range(100, 160))
    cache.serve(long)
    for start in range(1000, 3000, 20):
        cache.serve(list(range(start, start + 20)))
        if start < 1040:
            cache.serve(long)
    return cache.index.found(long, len(long))


def test_what_is_dear_to_compute_again_stays_longer():
    pricey = Cache(160, placement=CostAware(tau_s=100), penalties_s=(1.0, 10.0))
    plain = Cache(160, placement=CostAware(tau_s=100), penalties_s=(1.0, 0.0))

    assert dear(pricey) > dear(plain)


def test_what_is_used_again_outlives_strangers():
    """A hot name returns after more strangers than LRU keeps."""
    accesses = []
    for start in range(100, 1000, 5):
        accesses += [1, 1, *range(start, start + 5)]
    again = [at for at, name in enumerate(accesses) if name == 1 and accesses[at - 1] != 1]

    found = hits(CostAware(tau_s=30), accesses, blocks=5)
    forgetting = hits(Lru(), accesses, blocks=5)

    assert sum(found[at] for at in again) > 0.8 * len(again)
    assert not any(forgetting[at] for at in again)


def test_tau_moves_with_what_is_missed():
    index = Cache(8, penalties_s=(1.0, 1.0)).index
    for dear, sign in ((True, 1), (False, -1)):
        placement = CostAware()
        shallow, deep = run_of(10, 4), run_of(20, 4)
        deep.start = 3
        for run in (shallow, deep) * 30:
            placement.forgotten(index, run, 0)
        before = placement.tau_ps
        missed = deep if dear else shallow
        placement.missed([*range(7), *range(23, 33)], 0, 0)  # beyond the limit: nothing
        placement.missed(missed.chain, missed.start, missed.start + 1)

        assert (placement.tau_ps - before) * sign > 0


# --- worth on real traces -------------------------------------------------------------------


def saved_s(placement: str, requests: list[Request], dram_tokens: int) -> float:
    """Prefill seconds that cached prefixes stood for, over all prompts."""
    cost = StepCost(
        load_model("llama-3.1-70b"), load_gpu("h100-sxm"), Layout(weights="bf16", kv="bf16", tp=4)
    )
    built = build_instance(
        cost,
        name="tiered",
        block_tokens=512,
        limits=Limits(batch_tokens=512, sequences_max=128, chunk_tokens=512),
    )
    kind = replace(
        built,
        pages_total=462_000 // 512 * built.layout.pages_per_block,
        tier_blocks=(dram_tokens // 512, 0, 0),
        placement=placement,
    )
    run = simulate(kind, requests, levels=(), replicas=8, policy="fcfs")
    line = kind.line()
    return sum(line.prefill_ps(n, chunk=512) for n in run.requests.cached_tokens if n) / PS_PER_S


@pytest.mark.slow
@pytest.mark.parametrize("dram_tokens", [400_000, 1_600_000])
def test_expected_reuse_saves_more_than_lru_and_lfu(dram_tokens, data_dir):
    path = data_dir / "traces" / "mooncake_conversation.jsonl.gz"
    requests = list(read_trace(path))
    ours = saved_s("cost-aware", requests, dram_tokens)

    assert ours > 1.01 * saved_s("lru", requests, dram_tokens)
    assert ours >= saved_s("lfu", requests, dram_tokens)
