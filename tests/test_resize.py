"""An operator empties the cache or changes its size between steps, and no answer notices."""

import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import answers, finish, generate, greedy, tiny_engine
from tierline.base.errors import DoesNotFitError
from tierline.engine.engine import Engine
from tierline.kv.names import BlockNames
from tierline.kv.pool import BlockPool
from tierline.scheduling.scheduler import Scheduler
from tierline.scheduling.sequence import Sequence as Scheduled
from tiny_checkpoints import tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("resize")
    return functools.cache(lambda architecture: tiny_checkpoint(architecture, folder))


def prompts(count: int, *, tokens: int = 100) -> list[list[int]]:
    rng = random.Random(2)
    shared = [rng.randrange(256) for _ in range(tokens // 2)]
    return [shared + [rng.randrange(256) for _ in range(tokens // 2)] for _ in range(count)]


def consistent(engine: Engine) -> None:
    """Counted pages and named blocks agree, and the facts with both."""
    scheduler, pool = engine.scheduler, engine.executor.names.pool
    scheduler.check()
    engine.executor.names.check()
    assert pool.blocks_total - pool.blocks_withheld == scheduler.pages.total
    assert pool.blocks_free >= scheduler.pages.free  # more: a fork's last block before its copy
    assert engine.facts.kv_bytes == scheduler.pages.total * scheduler.layout.page_bytes


def page_bytes(engine: Engine) -> int:
    return engine.scheduler.layout.page_bytes


# --- the pool -------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 15)), max_size=60))
def test_a_pool_withholds_what_it_is_told(moves: Sequence[tuple[int, int]]) -> None:
    pool, held = BlockPool(16), list[int]()
    for move, number in moves:
        if move == 0 and (taken := pool.take(number)):
            held += taken
        elif move == 1 and held:
            pool.give_back(held.pop(number % len(held)))
        elif move == 2 and number - pool.blocks_withheld <= pool.blocks_free:
            pool.withhold(number)
            assert pool.blocks_withheld == number
        pool.check()

        assert pool.blocks_free + pool.blocks_withheld + len(held) == 16
        assert len(set(held)) == len(held)


def test_what_is_held_cannot_be_withheld() -> None:
    pool = BlockPool(8)
    pool.take(5)
    with pytest.raises(AssertionError, match="only free"):
        pool.withhold(4)
    pool.withhold(3)

    assert pool.take(1) is None


def test_a_block_both_free_and_withheld_is_noticed() -> None:
    """Negative control."""
    pool = BlockPool(8)
    pool.withhold(2)
    pool._free.append(pool._withheld[0])

    with pytest.raises(AssertionError):
        pool.check()


# --- reset ----------------------------------------------------------------------------------------


def test_a_reset_forgets_everything_when_nobody_is_here(checkpoints):
    engine = tiny_engine(checkpoints("qwen2"))
    listed = prompts(4)
    said = generate(engine, listed, greedy(8))
    cached = engine.scheduler.index.device_blocks

    assert engine.reset_cache() == cached > 0
    assert engine.scheduler.pages.free == engine.scheduler.pages.total
    assert engine.reset_cache() == 0
    engine.add(listed[0], greedy(8))
    deltas = finish(engine)
    assert deltas[-1].cached_tokens == 0
    assert answers(deltas).popitem()[1] == said[0]


def test_a_reset_spares_what_is_in_use(checkpoints):
    path = checkpoints("qwen2")
    listed = prompts(4)
    said = generate(tiny_engine(path), listed, greedy(30))
    engine = tiny_engine(path, batch_tokens=64)
    generate(engine, listed[:2], greedy(1))
    ids = [engine.add(prompt, greedy(30)) for prompt in listed[1:]]
    deltas = []
    while not engine.idle:
        deltas += engine.step()
        index = engine.scheduler.index
        loose, held = index.evictable_blocks, index.device_blocks - index.evictable_blocks

        assert engine.reset_cache() == loose
        assert index.device_blocks == held
        consistent(engine)
    engine.require_idle()
    assert [answers(deltas)[i, 0] for i in ids] == said[1:]


def test_a_reset_of_what_is_in_use_is_noticed(checkpoints):
    """Negative control: a run that somebody holds is forgotten."""
    engine = tiny_engine(checkpoints("qwen2"))
    engine.add(prompts(1)[0], greedy(30))
    engine.step()
    index = engine.scheduler.index
    (run,) = index.runs()
    index._forget(run, 0, write_back=False)

    with pytest.raises(AssertionError):
        consistent(engine)


# --- resize ---------------------------------------------------------------------------------------


def test_a_smaller_cache_is_smaller_and_may_grow_again(checkpoints):
    engine = tiny_engine(checkpoints("qwen2"))
    listed = prompts(12)
    said = generate(engine, listed, greedy(8))
    whole = engine.facts.kv_bytes
    wanted = 20 * page_bytes(engine)

    assert engine.resize_kv(wanted + 5) == wanted  # whole pages
    consistent(engine)
    assert engine.facts.kv_tokens == 20 * 16
    assert engine.scheduler.index.device_blocks <= 20  # cached blocks went for it
    assert generate(engine, listed, greedy(8)) == said
    assert engine.resize_kv(whole) == whole
    consistent(engine)
    assert engine.executor.names.pool.blocks_free == engine.scheduler.pages.free
    assert generate(engine, listed, greedy(8)) == said


def test_what_does_not_fit_is_refused_and_changes_nothing(checkpoints):
    engine = tiny_engine(checkpoints("qwen2"), positions_max=400)
    (prompt,) = prompts(1)
    pages, size = engine.scheduler.pages.total, page_bytes(engine)
    with pytest.raises(DoesNotFitError, match="the cache needs") as refused:
        engine.resize_kv((pages + 1) * size)
    assert "restart" in refused.value.hint
    with pytest.raises(DoesNotFitError, match="a block"):
        engine.resize_kv(size - 1)
    engine.add(prompt, greedy(100))  # 13 pages at its end
    with pytest.raises(DoesNotFitError, match="promised") as refused:
        engine.resize_kv(12 * size)
    assert (refused.value.needed_bytes, refused.value.available_bytes) == (13 * size, 12 * size)
    for _ in range(20):
        engine.step()
    engine.add(prompts(2)[1], greedy(50))
    engine.step()
    with pytest.raises(DoesNotFitError, match="running"):
        engine.resize_kv(9 * size)

    assert engine.scheduler.pages.total == pages
    consistent(engine)
    assert engine.resize_kv(13 * size) == 13 * size
    finish(engine)


def test_what_fits_no_more_is_said_when_it_comes(checkpoints):
    engine = tiny_engine(checkpoints("qwen2"))
    (prompt,) = prompts(1)
    engine.resize_kv(10 * page_bytes(engine))
    with pytest.raises(DoesNotFitError) as refused:
        engine.add(prompt, greedy(100))
    assert refused.value.available_bytes == 10 * page_bytes(engine)

    generate(engine, [prompt], greedy(60))  # 160 tokens fit
    engine.resize_kv(13 * page_bytes(engine))
    generate(engine, [prompt], greedy(100))


def test_who_waits_for_memory_comes_in_when_it_grows(checkpoints):
    engine = tiny_engine(checkpoints("qwen2"), policy="fcfs", prefix_cache=False)
    whole = engine.facts.kv_bytes
    engine.resize_kv(14 * page_bytes(engine))
    for prompt in prompts(3):
        engine.add(prompt, greedy(100))
    for _ in range(5):
        engine.step()
    assert engine.scheduler.running < 3
    engine.resize_kv(whole)
    for _ in range(5):
        engine.step()

    assert engine.scheduler.running == 3
    finish(engine)


# --- everything at once ---------------------------------------------------------------------------


class Operated:
    """An engine under random traffic, whose operator cannot leave it alone."""

    def __init__(self, path: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.engine = tiny_engine(path, kv_bytes=700_000, batch_tokens=64, sequences_max=6)
        self.pages = self.engine.scheduler.pages.total
        self.listed = prompts(6, tokens=80)
        self.asked: dict[int, tuple[int, int]] = {}
        self.deltas: list[Any] = []
        self.cancelled: set[int] = set()
        self.refused = self.resized = self.reset = 0

    def come(self) -> None:
        which, tokens = self.rng.randrange(6), self.rng.randrange(1, 50)
        own = greedy(tokens, n=self.rng.choice([1, 1, 1, 2]))
        try:
            self.asked[self.engine.add(self.listed[which], own)] = (which, tokens)
        except DoesNotFitError:
            self.refused += 1

    def resize(self) -> None:
        pages = max(self.rng.randrange(self.pages + 2) for _ in range(2))
        try:
            self.engine.resize_kv(pages * page_bytes(self.engine))
            self.resized += 1
        except DoesNotFitError:
            self.refused += 1

    def empty(self) -> None:
        self.reset += self.engine.reset_cache() > 0

    def cancel(self) -> None:
        if self.asked:
            request_id = self.rng.choice(list(self.asked))
            self.cancelled.add(request_id)
            self.deltas += self.engine.cancel(request_id)

    def advance(self) -> None:
        for _ in range(self.rng.randrange(1, 5)):
            self.deltas += self.engine.step()

    def run(self, moves: int) -> None:
        what = [self.come, self.resize, self.empty, self.cancel, self.advance]
        for move in self.rng.choices(what, weights=[30, 15, 5, 3, 50], k=moves):
            move()
            consistent(self.engine)
        self.deltas += finish(self.engine)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
@pytest.mark.parametrize("seed", range(3))
def test_no_answer_notices(checkpoints, architecture, seed):
    path = checkpoints(architecture)
    alone = generate(tiny_engine(path, prefix_cache=False), prompts(6, tokens=80), greedy(50))
    run = Operated(path, seed)
    run.run(120)
    said = answers(run.deltas)

    assert run.resized > 3
    assert run.reset > 0
    assert run.refused > 0
    for (request_id, _), tokens in said.items():
        which, most = run.asked[request_id]
        assert tokens == alone[which][: len(tokens)]
        assert len(tokens) == most or request_id in run.cancelled
    assert {request_id for request_id, _ in said} == set(run.asked)


def test_names_that_were_not_told_are_noticed(checkpoints, monkeypatch):
    """Negative control: counts shrink, and the pool still hands out everything."""
    monkeypatch.setattr(BlockNames, "resize", lambda self, pages: None)
    engine = tiny_engine(checkpoints("qwen2"))
    engine.resize_kv(20 * page_bytes(engine))

    with pytest.raises(AssertionError):
        engine.require_idle()


def test_a_promise_that_is_not_kept_is_noticed(checkpoints, monkeypatch):
    """Negative control: who was accepted and does not fit any more never ends."""
    monkeypatch.setattr(Scheduler, "_promised", lambda self, s: 0)
    engine = tiny_engine(checkpoints("qwen2"))
    engine.add(prompts(1)[0], greedy(100))
    engine.step()
    engine.resize_kv(10 * page_bytes(engine))

    with pytest.raises(AssertionError, match="still busy"):
        finish(engine, steps_max=300)


def test_nobody_is_preempted_by_it(checkpoints):
    engine = tiny_engine(checkpoints("qwen2"))
    for prompt in prompts(3):
        engine.add(prompt, greedy(20))
    engine.step()
    scheduler = engine.scheduler
    held = scheduler.pages.total - scheduler._obtainable()
    engine.resize_kv(held * page_bytes(engine))
    running: list[Scheduled] = list(scheduler.decoding.values())

    assert len(running) == 3
    assert scheduler.preemptions == 0
    finish(engine)
