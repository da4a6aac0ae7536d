"""What does a step cost beside the network, with 64 answers under way?

Question   milliseconds a step for deciding, naming blocks, building tensors, sampling, text and
           accounting, and what each of them takes.
Budget     1 ms for 64 sequences, greedy, over 49,152 tokens.
Baseline   a thousand additions in pure Python in the same run, so that a slow machine shows.
Method     a real engine whose network answers at once with logits prepared before; 64 requests
           of 100 to 400 prompt tokens, decoding.  The whole step is timed in one run of steps,
           its parts by wrapping the methods in another; the median of rounds, in which every
           sequence grows into new blocks twice.  With the demo model at hand, its tokenizer
           makes the text.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tierline.engine.arena import Arena
from tierline.engine.batch import Batch
from tierline.engine.build import EngineOptions, open_engine
from tierline.engine.demo import find_demo
from tierline.engine.engine import Engine
from tierline.engine.executor import Executor
from tierline.engine.sampling import Sampler, SamplingParams
from tierline.scheduling.scheduler import Scheduler

SEQUENCES, ROUNDS, STEPS, VOCABULARY = 64, 7, 32, 49_152
ASKED_MS = 1.0
PARTS: dict[str, tuple[type, str]] = {
    "decide": (Scheduler, "next_step"),
    "name_blocks": (Executor, "_bind"),
    "build_tensors": (Executor, "_batch"),
    "sample": (Sampler, "sample"),
    "text": (Engine, "_push"),
    "account": (Engine, "_account"),
}


class Prepared:
    """A network that has computed already."""

    weight_bytes = 0

    def __init__(self) -> None:
        self.values = torch.rand(SEQUENCES, VOCABULARY, generator=torch.Generator().manual_seed(0))

    def logits(self, batch: Batch, arena: Arena) -> torch.Tensor:
        """Of as many rows as are wanted."""
        del arena
        return self.values[: len(batch.wanted)]


def small_checkpoint(folder: Path) -> Path:
    """A network of two small layers over a vocabulary of the usual size."""
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def running(path: Path) -> Engine:
    """An engine in which 64 sequences decode."""
    options = EngineOptions(
        dtype="bf16",
        device="cpu",
        kernels="torch",
        kv_bytes=2 << 30,
        positions_max=4096,
        sequences_max=SEQUENCES,
        batch_tokens=2048,
    )
    engine = open_engine(path, options)
    engine.executor.network = Prepared()
    rng = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=(2 * ROUNDS + 2) * STEPS, ignore_eos=True)
    for _ in range(SEQUENCES):
        engine.add([rng.randrange(VOCABULARY) for _ in range(rng.randint(100, 400))], params)
    for _ in range(STEPS):
        if len(engine.step()) == SEQUENCES:
            return engine
    raise AssertionError("the cache is too small for all of them at once")


def step_ms(engine: Engine) -> float:
    """Milliseconds of one step, mean of a round."""
    start_s = time.perf_counter()
    for _ in range(STEPS):
        deltas = engine.step()
    assert len(deltas) == SEQUENCES
    return (time.perf_counter() - start_s) / STEPS * 1e3


def parts_ms(engine: Engine) -> dict[str, float]:
    """Milliseconds a step in each part, mean of a round."""
    spent_s: dict[str, float] = defaultdict(float)
    originals = {part: getattr(kind, name) for part, (kind, name) in PARTS.items()}
    for part, (kind, name) in PARTS.items():
        setattr(kind, name, _timed(originals[part], part, spent_s))
    try:
        step_ms(engine)
    finally:
        for part, (kind, name) in PARTS.items():
            setattr(kind, name, originals[part])
    return {part: spent_s[part] / STEPS * 1e3 for part in PARTS}


def _timed(
    function: Callable[..., Any], part: str, spent_s: dict[str, float]
) -> Callable[..., Any]:
    def timed(*args: Any, **named: Any) -> Any:
        start_s = time.perf_counter()
        try:
            return function(*args, **named)
        finally:
            spent_s[part] += time.perf_counter() - start_s

    return timed


def additions_ms() -> float:
    """The baseline."""
    start_s = time.perf_counter()
    for _ in range(100):
        sum(range(1000))
    return (time.perf_counter() - start_s) * 10


def measure(path: Path, title: str) -> dict[str, Any]:
    """Medians over rounds."""
    engine = running(path)
    whole, parts, base = [], [], []
    for _ in range(ROUNDS):
        base.append(additions_ms())
        whole.append(step_ms(engine))
        parts.append(parts_ms(engine))
    step = statistics.median(whole)
    return {
        "benchmark": "engine_step",
        "model": title,
        "sequences": SEQUENCES,
        "step_ms_median": round(step, 3),
        "step_ms_min": round(min(whole), 3),
        "parts_ms_median": {
            part: round(statistics.median(p[part] for p in parts), 3) for part in PARTS
        },
        "step_per_1000_additions": round(step / statistics.median(base), 1),
        "within_budget": step <= ASKED_MS,
    }


def main() -> None:
    """One JSON line with token ids only, one with text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--demo", type=Path, help="SmolLM2's GGUF; found where it was fetched to")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(small_checkpoint(Path(folder)), "token ids only")), flush=True)
    if demo := asked.demo or find_demo():
        print(json.dumps(measure(demo, "SmolLM2-135M-Instruct, with text")))


if __name__ == "__main__":
    main()
