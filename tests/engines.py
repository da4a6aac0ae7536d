"""Engines for tests: tiny random checkpoints, a clock that tests move, and what a run did."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tierline.engine.build import EngineOptions, open_engine
from tierline.engine.clock import VirtualClock
from tierline.engine.engine import Engine
from tierline.engine.generation import Delta
from tierline.engine.sampling import SamplingParams

torch.set_num_threads(1)  # tiny products: a second thread only waits

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def tiny_engine(path: Path, **options: Any) -> Engine:
    """An engine in fp32 on the torch path, unless `options` say otherwise."""
    chosen = {"dtype": "fp32", "kernels": "torch", "device": "cpu", "kv_bytes": 2_000_000}
    engine = open_engine(path, EngineOptions(**(chosen | options)), clock=VirtualClock())
    engine.executor.arena.data.fill_(0xFF)  # NaN: what nobody wrote must not be read
    return engine


def greedy(tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, **(GREEDY | fields))


def finish(engine: Engine, *, steps_max: int = 10_000) -> list[Delta]:
    """Step until idle; everything that was said."""
    deltas: list[Delta] = []
    for _ in range(steps_max):
        if engine.idle:
            engine.require_idle()
            return deltas
        deltas += engine.step()
    raise AssertionError(f"still busy after {steps_max} steps")


def answers(deltas: Sequence[Delta]) -> dict[tuple[int, int], list[int]]:
    """Tokens by request and answer."""
    said: dict[tuple[int, int], list[int]] = {}
    for delta in deltas:
        said.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
    return said


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], *params: SamplingParams
) -> list[Any]:
    """The first answer to every prompt, all added at once."""
    each = params if len(params) == len(prompts) else params * len(prompts)
    ids = [engine.add(prompt, own) for prompt, own in zip(prompts, each, strict=True)]
    said = answers(finish(engine))
    return [said[i, 0] for i in ids]
