"""An engine says what its steps did, keeps grammars, and refuses what would come too late."""

import asyncio
from pathlib import Path

import pytest
import torch

from engines import answers, finish, greedy, tiny_engine
from tierline.base.clock import PS_PER_S
from tierline.base.errors import OverloadedError, RequestError
from tierline.engine.async_engine import AsyncEngine
from tierline.engine.clock import VirtualClock
from tierline.engine.engine import Engine
from tierline.engine.observation import StepSample
from tiny_checkpoints import VOCABULARY, tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen2", tmp_path_factory.mktemp("watched"))


class Cycle:
    """A grammar of one sentence: these tokens and nothing else."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens = tokens

    def matcher(self) -> "Place":
        return Place(self.tokens)


class Place:
    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.left = list(tokens)

    def mask(self, left_tokens: int) -> torch.Tensor:
        assert left_tokens >= 1
        if self.left[0] < 0:
            raise RequestError("a grammar that breaks")
        allowed = torch.zeros(VOCABULARY, dtype=torch.bool)
        allowed[self.left[0]] = True
        return allowed

    def accept(self, token: int) -> None:
        assert token == self.left.pop(0)

    @property
    def over(self) -> bool:
        return not self.left


def test_every_answer_keeps_to_its_grammar_and_ends_with_it(checkpoint: Path) -> None:
    engine = tiny_engine(checkpoint)
    bound = engine.add([1, 2, 3], greedy(9, n=2), grammar=Cycle((7, 8, 9)))
    free = engine.add([1, 2, 3], greedy(9))
    deltas = finish(engine)
    said = answers(deltas)
    reasons = {(d.request_id, d.index): d.finish_reason for d in deltas if d.finish_reason}

    assert said[bound, 0] == said[bound, 1] == [7, 8, 9]
    assert reasons[bound, 0] == reasons[bound, 1] == "stop"
    assert len(said[free, 0]) == 9  # the control: without a grammar it says something else
    assert said[free, 0][:3] != [7, 8, 9]


def test_a_grammar_that_breaks_ends_its_own_answer(checkpoint: Path) -> None:
    engine = tiny_engine(checkpoint)
    broken = engine.add([1, 2, 3], greedy(9), grammar=Cycle((7, -1)))
    other = engine.add([1, 2, 3], greedy(9))
    deltas = finish(engine)

    last = next(d for d in deltas if d.request_id == broken and d.finish_reason)
    assert (last.finish_reason, last.error) == ("error", "a grammar that breaks")
    assert len(answers(deltas)[other, 0]) == 9


def watched(engine: Engine) -> list[StepSample]:
    samples: list[StepSample] = []
    engine.watch(samples.append)
    return samples


def test_samples_add_up_to_what_was_computed(checkpoint: Path) -> None:
    engine = tiny_engine(checkpoint, batch_tokens=64)
    samples = watched(engine)
    ids = [engine.add(list(range(1, 101)), greedy(5)), engine.add([3] * 30, greedy(7))]
    finish(engine)

    assert sum(s.prefill_tokens for s in samples) == 130
    assert sum(n for s in samples for _, n, _ in s.chunks) == 130
    assert sum(s.decodes for s in samples) == 4 + 6  # a first token comes with the prompt
    for request in ids:
        noted = [n.what for s in samples for n in s.notes if n.request_id == request]
        assert noted[:2] == ["admitted", "first token"]
    assert [s.number for s in samples] == sorted({s.number for s in samples})
    assert all(s.kv_pages_free + s.kv_pages_cached <= s.kv_pages for s in samples)


def test_watching_changes_no_token(checkpoint: Path) -> None:
    plain, seen = tiny_engine(checkpoint), tiny_engine(checkpoint)
    watched(seen)
    for engine in (plain, seen):
        for length in (5, 70, 33):
            engine.add([length] * length, greedy(12))

    assert answers(finish(plain)) == answers(finish(seen))


def test_what_would_be_late_is_refused_with_when_to_come_again(checkpoint: Path) -> None:
    engine = tiny_engine(checkpoint)
    limit_s = 5 * engine.predicted_ttft_s(500)
    for number in range(30):
        engine.add([number + 1] * 500, greedy(2), ttft_s=limit_s)
    with pytest.raises(OverloadedError) as refused:
        engine.add([9] * 500, greedy(2), ttft_s=limit_s, refuses=True)
    asked = engine.add([9] * 500, greedy(2), ttft_s=limit_s)  # a promise, not a condition
    with pytest.raises(RequestError, match="even if nobody else were here"):
        engine.add([9] * 500, greedy(2), ttft_s=1e-12, refuses=True)
    served = answers(finish(engine))

    assert refused.value.retry_after_ns > 0.1 * limit_s * 1e9
    assert len(served[asked, 0]) == 2
    assert len(served) == 31


def test_an_arrival_of_long_ago_counts_from_then(checkpoint: Path) -> None:
    engine = tiny_engine(checkpoint)
    assert isinstance(engine.clock, VirtualClock)
    engine.clock.advance_to(5 * PS_PER_S)
    with pytest.raises((OverloadedError, RequestError)):
        engine.add([1] * 9, greedy(2), ttft_s=3.0, arrival_ps=0, refuses=True)

    engine.add([1] * 9, greedy(2), ttft_s=3.0, refuses=True)
    finish(engine)


def test_the_loop_sees_samples_before_their_deltas_and_may_call_between_steps(
    checkpoint: Path,
) -> None:
    engine = tiny_engine(checkpoint)
    order: list[str] = []

    async def main() -> tuple[int, int]:
        served = AsyncEngine(engine, watcher=lambda sample: order.append("step"))
        await served.start()
        stream = await served.add([1, 2, 3], greedy(4))
        order.extend(["delta" async for _ in stream])
        running = await served.call(lambda: engine.scheduler.running)
        with pytest.raises(ZeroDivisionError):
            await served.call(lambda: 1 // 0)
        await served.stop()
        return running, len(order)

    running, _ = asyncio.run(asyncio.wait_for(main(), 30))

    assert running == 0
    assert order[0] == "step"
    assert order.count("delta") == order.count("step") == 4
