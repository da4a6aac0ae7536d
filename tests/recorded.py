"""Traffic that a real engine served under a clock of its own, recorded as the server records it.

Every step lasts `pace` times what the law says of it, so that a recording is the same on every
machine, and what should be predicted of it is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engines import greedy
from tierline.base.clock import PS_PER_S
from tierline.engine.engine import Engine
from tierline.scheduling.sequence import Sequence as Scheduled
from tierline.scheduling.step import Step
from tierline.server.life import Life
from tierline.server.recorder import Recorder
from tierline.server.running import Running
from tierline.telemetry.metrics import Metrics
from tierline.telemetry.spans import request_tracer


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request of a test."""

    at_s: float
    prompt: tuple[int, ...]
    output_tokens: int
    level: str = "standard"
    cancelled_after: int | None = None  # tokens


class Paced:
    """The engine's executor, after which the clock has moved on."""

    def __init__(self, engine: Engine, pace: float) -> None:
        self._engine, self._pace, self._real = engine, pace, engine.executor

    def compute(self, step: Step, *rest: Any) -> Any:
        chunks = [(s.cached_tokens, count) for s, count in step.chunks]
        line, clock = self._engine.scheduler.line, self._engine.clock
        price_ps = line.line(step.decodes, step.context_tokens, chunks)[0]
        computed = self._real.compute(step, *rest)
        clock.advance_to(clock.now_ps() + round(price_ps * self._pace))  # type: ignore[attr-defined]
        return computed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def record(
    engine: Engine, running: Running, arrivals: Sequence[Arrival], *, pace: float = 1.0
) -> Recorder:
    """Serve all of them; what the recorder knows afterwards."""
    recorder = recorder_of(engine, running)
    engine.watch(recorder.step)
    engine.executor = Paced(engine, pace)  # type: ignore[assignment]
    clock: Any = engine.clock
    coming = sorted(arrivals, key=lambda arrival: arrival.at_s)
    lives: dict[int, tuple[Life, Arrival]] = {}
    while coming or not engine.idle:
        if engine.idle:
            clock.advance_to(max(clock.now_ps(), round(coming[0].at_s * PS_PER_S)))
        while coming and round(coming[0].at_s * PS_PER_S) <= clock.now_ps():
            arrival = coming.pop(0)
            life = life_of(arrival, running, number=len(lives))
            lives[add(engine, arrival, life)] = (life, arrival)
            recorder.begin(life)
            recorder.named(life, len(lives) - 1, life.chain)
        for delta in engine.step():
            life, arrival = lives[delta.request_id]
            if life.first_ps is None:
                recorder.cached(life, delta)
            recorder.tokens(life, delta.index, delta)
            reason = delta.finish_reason
            if life.output_tokens == arrival.cancelled_after:
                engine.cancel(delta.request_id)
                reason = "cancelled"
            if reason:
                recorder.end(life, reason, delta.at_ps)
    engine.executor = engine.executor._real  # type: ignore[attr-defined]
    engine.require_idle()
    return recorder


def recorder_of(engine: Engine, running: Running) -> Recorder:
    layout = engine.scheduler.layout
    levels = [level.name for level in running.levels]
    metrics = Metrics(
        running.model,
        levels=levels,
        positions_max=running.positions_max,
        block_tokens=layout.block_tokens,
        kv_blocks=engine.scheduler.pages.total // layout.pages_per_block,
        version="test",
    )
    tracer = request_tracer("test")
    return Recorder(metrics, tracer, levels=levels, pages_per_block=layout.pages_per_block)


def life_of(arrival: Arrival, running: Running, *, number: int) -> Life:
    level = running.level(arrival.level)
    return Life(
        id=f"test-{number}",
        endpoint="completions",
        model=running.model,
        tenant="",
        key_id="",
        level=level.name,
        priority=level.priority,
        stream=True,
        arrived_s=arrival.at_s,
        arrival_ps=round(arrival.at_s * PS_PER_S),
        prompt_tokens=len(arrival.prompt),
        output_tokens_max=arrival.output_tokens,
        ttft_limit_s=level.limit_s("ttft"),
        itl_limit_s=level.limit_s("itl"),
    )


def add(engine: Engine, arrival: Arrival, life: Life) -> int:
    """Into the engine, as `service` does; its blocks' names are noted."""
    request_id = engine.add(
        arrival.prompt,
        greedy(arrival.output_tokens),
        rank=-life.priority,
        ttft_s=life.ttft_limit_s,
        itl_s=life.itl_limit_s,
        arrival_ps=life.arrival_ps,
    )
    entered: Scheduled = engine._open[request_id][0].sequence
    life.chain = entered.chain or ()
    return request_id
