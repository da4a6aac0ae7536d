"""Many tasks, one engine thread: the same tokens, nobody waits for ever, nothing stays held."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from engines import generate, greedy, tiny_engine
from tierline.base.errors import DependencyError, RequestError
from tierline.engine.async_engine import AsyncEngine, Stream
from tierline.engine.engine import Engine
from tierline.engine.sampling import SamplingParams
from tiny_checkpoints import VOCABULARY, tiny_checkpoint

TOKENS = 16
PATIENCE_S = 30.0  # of every test: who hangs fails


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen2", tmp_path_factory.mktemp("async"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = Random(0)
    return [[rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 60))] for _ in range(12)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, prompts: list[list[int]]) -> list[list[int]]:
    return generate(tiny_engine(checkpoint), prompts, greedy(TOKENS))


def serve(
    engine: Engine, use: Callable[[AsyncEngine], Awaitable[Any]], *, stops: bool = True
) -> Any:
    """What `use` returns, with the engine served meanwhile; afterwards nothing is held."""

    async def main() -> Any:
        served = AsyncEngine(engine)
        await served.start()
        found = await use(served)
        if stops:
            await served.stop()
        return found

    found = asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    if stops:
        engine.require_idle()
        assert "engine" not in [thread.name for thread in threading.enumerate()]
    return found


async def read(stream: Stream) -> list[int]:
    return [token async for delta in stream for token in delta.token_ids]


async def idle(served: AsyncEngine) -> None:
    while not served.engine.idle:
        await asyncio.sleep(0.001)


class Held:
    """Once told to, the engine's thread waits in the midst of a step until it is let `go`."""

    def __init__(self, engine: Engine, error: Exception | None = None) -> None:
        self._network, self._error = engine.executor.network, error
        self._wanted, self._reached, self._go = (threading.Event() for _ in range(3))
        engine.executor.network = self

    def logits(self, batch: Any, arena: Any) -> torch.Tensor:
        if self._wanted.is_set() and not self._go.is_set():
            self._reached.set()
            assert self._go.wait(PATIENCE_S)
            if self._error is not None:
                raise self._error
        return self._network.logits(batch, arena)

    async def hold(self) -> None:
        self._wanted.set()
        assert await asyncio.to_thread(self._reached.wait, PATIENCE_S)

    def go(self) -> None:
        self._go.set()


async def asked(served: AsyncEngine) -> None:
    """Until something lies in the queue of an engine that is held."""
    while served._inbox.empty():
        await asyncio.sleep(0)


# The same tokens


def test_many_tasks_get_the_tokens_of_one_call(checkpoint, prompts, expected):
    async def use(served: AsyncEngine) -> list[list[int]]:
        async def ask(prompt: list[int], wait_s: float) -> list[int]:
            await asyncio.sleep(wait_s)
            return await read(await served.add(prompt, greedy(TOKENS)))

        return await asyncio.gather(*(ask(p, at * 0.003) for at, p in enumerate(prompts)))

    assert serve(tiny_engine(checkpoint), use) == expected


def test_every_answer_of_a_request_streams(checkpoint, prompts, expected):
    async def use(served: AsyncEngine) -> list[Any]:
        stream = await served.add(prompts[0], greedy(TOKENS, n=3))
        return [delta async for delta in stream]

    deltas = serve(tiny_engine(checkpoint), use)
    for index in range(3):
        own = [delta for delta in deltas if delta.index == index]
        assert [token for delta in own for token in delta.token_ids] == expected[0]
        assert own[-1].finish_reason == "length"


def test_a_reader_that_stalls_blocks_nobody(checkpoint, prompts, expected):
    async def use(served: AsyncEngine) -> tuple[list[list[int]], list[int]]:
        stalled = await served.add(prompts[0], greedy(TOKENS))
        others = [read(await served.add(prompt, greedy(TOKENS))) for prompt in prompts[1:]]
        found = await asyncio.gather(*others)
        await idle(served)  # also the one that nobody reads has been computed
        return found, await read(stalled)

    found, stalled = serve(tiny_engine(checkpoint), use)

    assert found == expected[1:]
    assert stalled == expected[0]


# Leaving


def test_leaving_a_stream_early_cancels_it(checkpoint, prompts):
    engine = tiny_engine(checkpoint)
    held = Held(engine)

    async def use(served: AsyncEngine) -> int:
        stream = await served.add(prompts[0], greedy(400, n=2))
        async for _ in stream:
            await held.hold()
            break
        await asked(served)
        steps = engine.scheduler.steps
        held.go()
        await idle(served)
        return engine.scheduler.steps - steps

    assert serve(engine, use) <= 1


def test_a_cancelled_reader_cancels_its_request(checkpoint, prompts):
    engine = tiny_engine(checkpoint)
    held = Held(engine)

    async def use(served: AsyncEngine) -> int:
        task = asyncio.create_task(read(await served.add(prompts[0], greedy(400))))
        await held.hold()
        task.cancel()
        await asked(served)
        steps = engine.scheduler.steps
        held.go()
        await idle(served)
        return engine.scheduler.steps - steps

    assert serve(engine, use) <= 1


def test_whoever_reads_what_another_cancels_sees_the_end(checkpoint, prompts):
    engine = tiny_engine(checkpoint)
    held = Held(engine)

    async def use(served: AsyncEngine) -> list[str | None]:
        stream = await served.add(prompts[0], greedy(400))
        await held.hold()
        served.cancel(stream.request_id)
        held.go()
        return [delta.finish_reason async for delta in stream]

    *others, last = serve(engine, use)
    assert last == "cancelled"
    assert set(others) == {None}


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
def test_a_task_cancelled_while_it_adds_leaves_nothing(checkpoint, prompts, turns):
    """Before the engine has seen the request, while it enters it, or after."""

    async def use(served: AsyncEngine) -> None:
        for wait_s in (0.0, 0.0005, 0.002):
            task = asyncio.create_task(served.add(prompts[0], greedy(400)))
            for _ in range(turns):
                await asyncio.sleep(0)
            if turns > 1:
                time.sleep(wait_s)  # the thread answers meanwhile, the loop does not look
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result().close()
        await served.add([1], greedy(1))  # commands are obeyed in order: those before are through
        await idle(served)

    serve(tiny_engine(checkpoint), use)


def test_two_hundred_requests_with_random_cancels_leave_nothing(checkpoint):
    rng = Random(1)
    engine = tiny_engine(checkpoint, kv_bytes=120_000, batch_tokens=40, sequences_max=6)

    async def one(served: AsyncEngine, number: int) -> str:
        prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 60))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            max_tokens=rng.randrange(1, 30),
            n=rng.choice([1, 2]),
        )
        leaves_after = rng.choice([None, None, rng.randrange(8)])
        await asyncio.sleep(rng.random() * 0.2)
        stream = await served.add(prompt, params)
        reasons = []
        async for delta in stream:
            reasons.append(delta.finish_reason)
            if len(reasons) == leaves_after:
                return "left"
        assert len(reasons) - reasons.count(None) == params.n
        return "read"

    async def use(served: AsyncEngine) -> list[Any]:
        tasks = [asyncio.create_task(one(served, number)) for number in range(200)]
        for task in rng.sample(tasks, 40):
            asyncio.get_running_loop().call_later(rng.random() * 0.3, task.cancel)
        await asyncio.wait(tasks)
        await idle(served)
        return ["cancelled" if task.cancelled() else task.result() for task in tasks]

    ends = serve(engine, use)
    assert {kind: ends.count(kind) > 5 for kind in set(ends)} == {
        "read": True,
        "left": True,
        "cancelled": True,
    }


def test_a_cancellation_that_is_lost_is_noticed(checkpoint, prompts, monkeypatch):
    """Negative control: the engine goes on for a reader that has left."""
    monkeypatch.setattr(AsyncEngine, "cancel", lambda self, request_id: None)
    engine = tiny_engine(checkpoint)

    async def use(served: AsyncEngine) -> None:
        async for _ in await served.add(prompts[0], greedy(200)):
            break
        await idle(served)

    serve(engine, use)
    assert engine.scheduler.steps >= 200


# Errors


def test_a_request_that_cannot_be_served_is_told_to_its_caller_only(checkpoint, prompts, expected):
    async def use(served: AsyncEngine) -> list[int]:
        good = await served.add(prompts[0], greedy(TOKENS))
        for prompt, params in (([], greedy(1)), ([VOCABULARY], greedy(1)), ([1], greedy(0))):
            with pytest.raises(RequestError):
                await served.add(prompt, params)
        with pytest.raises(TypeError):
            await served.add([1], greedy(1), no_such_option=1)
        return await read(good)

    assert serve(tiny_engine(checkpoint), use) == expected[0]


def test_a_failure_of_the_engine_reaches_everybody(checkpoint, prompts):
    """Streams that are open, one that nobody reads yet, who adds meanwhile, and who comes later."""
    engine = tiny_engine(checkpoint)
    held = Held(engine, error=ZeroDivisionError("planted"))

    async def use(served: AsyncEngine) -> list[Any]:
        streams = [await served.add(prompt, greedy(400, n=2)) for prompt in prompts[:3]]
        readers = [asyncio.create_task(read(stream)) for stream in streams[:2]]
        await held.hold()
        late = asyncio.create_task(served.add(prompts[3], greedy(4)))
        await asked(served)  # and the engine will never look
        held.go()
        found = await asyncio.gather(*readers, late, return_exceptions=True)
        found += await asyncio.gather(
            read(streams[2]), served.add(prompts[4], greedy(4)), return_exceptions=True
        )
        await served.stop()
        return found

    found = serve(engine, use, stops=False)

    assert len(found) == 5
    for error in found:
        assert isinstance(error, DependencyError), error
        assert "the engine has failed: ZeroDivisionError: planted" in str(error)
        assert isinstance(error.__cause__, ZeroDivisionError)
    assert len({id(error) for error in found}) == 5


def test_stopping_ends_open_streams_and_frees_their_memory(checkpoint, prompts):
    """Also of who was let in by the last commands, and of who came behind the stop."""
    engine = tiny_engine(checkpoint)
    held = Held(engine)

    async def use(served: AsyncEngine) -> list[Any]:
        streams = [await served.add(prompt, greedy(400)) for prompt in prompts[:3]]
        readers = [asyncio.create_task(read(stream)) for stream in streams]
        await held.hold()
        let_in = asyncio.create_task(served.add(prompts[3], greedy(400)))
        await asyncio.sleep(0)
        stopped = asyncio.create_task(served.stop())
        await asyncio.sleep(0)
        behind = asyncio.create_task(served.add(prompts[3], greedy(400)))
        await asyncio.sleep(0)
        held.go()
        await stopped
        ends = [*readers, read(await let_in), behind, served.add([1], greedy(1))]
        return await asyncio.gather(*ends, return_exceptions=True)

    found = serve(engine, use)

    assert [type(error) for error in found] == [DependencyError] * 6
    assert {str(error) for error in found} == {"the engine was stopped"}


def test_a_loop_that_ends_without_a_stop_ends_the_thread(checkpoint, prompts):
    engine = tiny_engine(checkpoint)

    async def use(served: AsyncEngine) -> AsyncEngine:
        await served.add(prompts[0], greedy(400))
        return served

    served = serve(engine, use, stops=False)
    served._thread.join(PATIENCE_S)

    assert not served._thread.is_alive()


def test_stopping_what_never_started_is_nothing(checkpoint):
    async def main() -> None:
        served = AsyncEngine(tiny_engine(checkpoint))
        await served.stop()
        with pytest.raises(DependencyError, match="stopped"):
            await served.add([1], greedy(1))

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


# Rest


def test_an_idle_engine_uses_no_processor(checkpoint, prompts):
    async def use(served: AsyncEngine) -> tuple[float, float]:
        start_s = time.process_time()
        await read(await served.add(prompts[0], greedy(200)))
        busy_s = time.process_time()
        await asyncio.sleep(0.5)
        return busy_s - start_s, time.process_time() - busy_s

    busy_s, idle_s = serve(tiny_engine(checkpoint), use)

    assert idle_s < 0.1
    assert busy_s > 0.1, "the clock counts the engine's thread"
