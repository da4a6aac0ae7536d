"""Engine and simulator take the same steps: one scheduler, under one clock, at the same prices.

The engine computes real tokens of a tiny model while a virtual clock moves by what the law says
a step costs; the simulator's replica is given the same requests.  Every decision of both is
written down: when, who decodes, whose prompt advances by how much, who gives way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from engines import greedy, tiny_engine
from tierline.base.clock import PS_PER_MS, PS_PER_S
from tierline.engine.engine import Engine
from tierline.scheduling.profiles import POLICIES
from tierline.scheduling.scheduler import Scheduler
from tierline.scheduling.sequence import Sequence
from tierline.sim.fleet import Fleet
from tierline.sim.instance import Instance
from tierline.sim.record import Requests
from tiny_checkpoints import tiny_checkpoint

Decision = tuple[int, list[int], list[tuple[int, int]], list[int]]
DECIDE = Scheduler.next_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request of the trace."""

    arrival_ps: int
    prompt: list[int]
    output_tokens: int
    ttft_s: float | None
    itl_s: float | None


def trace(seed: int, count: int) -> list[Asked]:
    """Bursts of requests that share prefixes, some in a hurry."""
    rng = Random(seed)
    documents = [[rng.randrange(256) for _ in range(120)] for _ in range(3)]
    now_ps, asked = 0, []
    for _ in range(count):
        now_ps += rng.choice([0, rng.randrange(400) * PS_PER_MS // 100])
        prompt = rng.choice(documents)[: rng.randrange(120)]
        prompt = prompt + [rng.randrange(256) for _ in range(rng.randrange(1, 40))]
        asked.append(
            Asked(
                arrival_ps=now_ps,
                prompt=prompt,
                output_tokens=rng.randrange(1, 40),
                ttft_s=rng.choice([None, 0.001, 0.02]),
                itl_s=rng.choice([None, None, 0.01]),
            )
        )
    return asked


@contextmanager
def written_down(decided: dict[int, list[Decision]]) -> Iterator[None]:
    """Every decision of every scheduler, by the scheduler's identity."""

    def deciding(self: Scheduler, now_ps: int, repeats_max: int = 1) -> Any:
        step = DECIDE(self, now_ps, repeats_max)
        if not step.empty or step.preempted:
            decodes = sorted(step.decoding) if step.decodes else []
            chunks = [(s.id, count) for s, count in step.chunks]
            found = (now_ps, decodes, chunks, [s.id for s in step.preempted])
            decided.setdefault(id(self), []).append(found)
            LAST[id(self)] = step
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "next_step", deciding)
        yield


LAST: dict[int, Any] = {}


class Priced:
    """The network, and time passing as the law says; requests arrive meanwhile."""

    def __init__(self, engine: Engine, coming: list[Asked]) -> None:
        self.engine, self.network, self.coming = engine, engine.executor.network, coming

    def logits(self, batch: Any, arena: Any) -> torch.Tensor:
        logits = self.network.logits(batch, arena)
        scheduler, clock = self.engine.scheduler, self.engine.clock
        step = LAST[id(scheduler)]
        prompts = [(s.cached_tokens, count) for s, count in step.chunks]
        alpha_ps, _ = scheduler.line.line(
            step.decodes, step.context_tokens, prompts, padding=step.padding
        )
        end_ps = clock.now_ps() + alpha_ps
        self.arrive(end_ps - 1)  # who comes at the very end is seen after the step
        clock.advance_to(end_ps)
        return logits

    def arrive(self, until_ps: int) -> None:
        while self.coming and self.coming[0].arrival_ps <= until_ps:
            asked = self.coming.pop(0)
            self.engine.clock.advance_to(asked.arrival_ps)
            self.engine.add(
                asked.prompt, greedy(asked.output_tokens), ttft_s=asked.ttft_s, itl_s=asked.itl_s
            )


def serve(engine: Engine, asked: list[Asked]) -> list[Decision]:
    """What the engine decides."""
    decided: dict[int, list[Decision]] = {}
    clock: Any = engine.clock
    priced = engine.executor.network = Priced(engine, list(asked))
    with written_down(decided):
        while priced.coming or not engine.idle:
            if engine.idle:
                clock.advance_to(priced.coming[0].arrival_ps)
            priced.arrive(clock.now_ps())
            engine.step()
    engine.require_idle()
    return decided[id(engine.scheduler)]


def simulated(engine: Engine, asked: list[Asked], policy: str) -> list[Decision]:
    """What a replica decides that has the engine's memory, limits and prices."""
    own = engine.scheduler
    instance = Instance(
        name="engine",
        cost=own.line.cost,
        layout=own.layout,
        pages_total=own.pages.total,
        limits=own.limits,
    )
    replica = instance.replica(0, POLICIES[policy])
    sequences = [
        Sequence(
            number,
            arrival_ps=a.arrival_ps,
            prompt_tokens=len(a.prompt),
            output_max_tokens=a.output_tokens,
            due_ps=1 << 62 if a.ttft_s is None else a.arrival_ps + round(a.ttft_s * PS_PER_S),
            itl_ps=1 << 62 if a.itl_s is None else round(a.itl_s * PS_PER_S),
            chain=engine._chain(a.prompt, ""),
        )
        for number, a in enumerate(asked)
    ]
    decided: dict[int, list[Decision]] = {}
    fleet = Fleet(
        [replica],
        arrivals=iter(sequences),
        outputs=[a.output_tokens for a in asked],
        requests=Requests(len(asked)),
        repeats_max=1,
    )
    with written_down(decided):
        fleet.run()
    return decided[id(replica.scheduler)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parity")
    return {name: tiny_checkpoint(name, folder) for name in ("qwen2", "gemma3")}


def engine_of(path: Path, policy: str) -> Engine:
    return tiny_engine(
        path, kv_bytes=400_000, batch_tokens=64, sequences_max=8, policy=policy, block_tokens=16
    )


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
@pytest.mark.parametrize("policy", ["tierline", "fcfs", "edf", "vllm-v1", "sglang", "static"])
def test_the_same_requests_are_the_same_steps(checkpoints, name, policy):
    asked = trace(seed=len(policy), count=30)
    served = serve(engine_of(checkpoints[name], policy), asked)

    assert served == simulated(engine_of(checkpoints[name], policy), asked, policy)
    assert len(served) > 60


def test_the_traces_are_hard(checkpoints):
    """Memory runs short and prefixes are shared, so the decisions above were not easy."""
    engine = engine_of(checkpoints["qwen2"], "edf")
    served = serve(engine, trace(seed=3, count=30))

    assert engine.scheduler.preemptions > 0
    assert any(preempted for *_, preempted in served)
    assert any(len(chunks) > 1 and decodes for _, decodes, chunks, _ in served)


def test_a_sabotaged_scheduler_is_noticed(checkpoints, monkeypatch):
    """Negative control: from some step on, prompts get seven tokens less than in the simulator."""
    asked = trace(seed=3, count=30)
    engine = engine_of(checkpoints["qwen2"], "fcfs")
    right = simulated(engine, asked, "fcfs")
    budget = Scheduler._budget
    monkeypatch.setattr(
        Scheduler, "_budget", lambda self, now_ps: budget(self, now_ps) - 7 * (self.steps > 20)
    )

    assert serve(engine, asked) != right
