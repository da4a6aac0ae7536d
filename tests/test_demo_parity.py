"""SmolLM2 says what transformers says with the same weights: real prompts, batched, every path.

Prompts are the first of IFEval's, under the model's own chat template. The engine answers all of
them at once, so they are chunked, batched and share the template's prefix. Its tokens then go
through transformers in one pass a prompt, in float32 on the dequantised weights: at every position
the token must be the likeliest one, or lack next to nothing of it.
"""

import functools
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from demo_model import demo_model
from engines import generate, greedy, tiny_engine
from tierline.engine import checkpoint, native, network
from tierline.engine.checkpoint import open_checkpoint
from tierline.engine.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """How tokens compare with the likeliest ones."""

    positions: int
    different: int
    worst_gap: float  # logits that a token lacks of the likeliest

    def __str__(self) -> str:
        return (
            f"{self.positions - self.different} of {self.positions} tokens equal; "
            f"{self.different} differ, lacking at most {self.worst_gap:.2g} logits"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to compute the model, and how far it may be from transformers."""

    options: dict[str, Any]
    gap_max: float  # logits
    different_max: float  # of all positions

    def allows(self, found: Compared) -> bool:
        return (
            found.worst_gap < self.gap_max
            and found.different <= self.different_max * found.positions
        )


# Sums in another order move a logit by 1e-4, activations rounded to bfloat16 by some hundredths.
PATHS = {
    "torch": Way(options={"kernels": "torch"}, gap_max=1e-3, different_max=1e-3),
    "native": Way(options={"kernels": "native"}, gap_max=1e-3, different_max=1e-3),
    "native, bf16": Way(
        options={"kernels": "native", "dtype": "bf16"}, gap_max=0.3, different_max=0.02
    ),
}


@pytest.fixture(scope="module")
def reference() -> Any:
    """The model as transformers builds it from the dequantised weights."""
    opened = open_checkpoint(demo_model())
    config = transformers.LlamaConfig(**opened.config)
    with torch.device("meta"):  # no random weights first
        model = transformers.LlamaForCausalLM(config)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    state = {name: opened.tensor(name, torch.float32) for name in opened.shapes}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert missing == ["lm_head.weight"]
    assert not unexpected
    model.tie_weights()
    return model.eval()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain() -> Engine:
    """On the torch path, with nothing cached from one test to the next."""
    return engine_on("torch", prefix_cache=False)


def engine_on(path: str, **options: Any) -> Engine:
    return tiny_engine(
        demo_model(), kv_bytes=600_000_000, batch_tokens=256, **PATHS[path].options, **options
    )


def prompts_of(engine: Engine, data_dir: Path, count: int) -> list[list[int]]:
    """Real prompts, as the model's template writes them."""
    assert engine.chat is not None
    with gzip.open(data_dir / "evals" / "ifeval" / "input_data.jsonl.gz", "rt") as lines:
        texts = [json.loads(line)["prompt"] for line in lines][:count]
    now = datetime(2025, 1, 1)
    return [engine.chat.encode([{"role": "user", "content": text}], now=now) for text in texts]


def compared(reference: Any, prompts: list[list[int]], said: list[list[int]]) -> Compared:
    """What transformers thinks of each token, given all before it."""
    gap = torch.cat(
        [gaps(reference, tuple(p), tuple(t)) for p, t in zip(prompts, said, strict=True)]
    )
    return Compared(positions=len(gap), different=int((gap > 0).sum()), worst_gap=float(gap.max()))


@functools.cache
def gaps(reference: Any, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> torch.Tensor:
    """Logits that every token lacks of the likeliest; most paths say the same, so it is kept."""
    with torch.inference_mode():
        found = reference(
            torch.tensor([prompt + tokens[:-1]]), logits_to_keep=len(tokens), use_cache=False
        )
    logits = found.logits[0]
    return logits.amax(-1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]


def short(prompts: list[list[int]], count: int) -> list[list[int]]:
    """A few that cost little, for the fast suite."""
    return sorted(prompts, key=len)[:count]


def test_a_few_answers_are_those_of_transformers(plain, reference, data_dir):
    prompts = short(prompts_of(plain, data_dir, 40), 6)
    found = compared(reference, prompts, generate(plain, prompts, greedy(8)))

    assert found.positions == 48
    assert PATHS["torch"].allows(found), found


def test_positions_left_out_are_noticed(plain, reference, data_dir, monkeypatch):
    """Negative control."""
    monkeypatch.setattr(network, "rotate", lambda x, *_, **__: x)
    prompts = short(prompts_of(plain, data_dir, 40), 2)
    found = compared(reference, prompts, generate(plain, prompts, greedy(8)))

    assert not PATHS["torch"].allows(found), found


@pytest.mark.slow
def test_rows_in_the_order_of_the_file_are_noticed(reference, data_dir, monkeypatch):
    """Negative control: GGUF interleaves the two halves of every query and key."""
    monkeypatch.setattr(checkpoint, "_half_split", lambda tensor, heads: tensor)
    engine = engine_on("torch")
    prompts = prompts_of(engine, data_dir, 6)
    found = compared(reference, prompts, generate(engine, prompts, greedy(8)))

    assert not PATHS["torch"].allows(found), found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("path", PATHS)
def test_two_hundred_answers_are_those_of_transformers(request, reference, data_dir, path):
    assert request.config.cache is not None
    folder = Path(request.config.cache.mkdir("kernels"))  # kept: a build is named by its sources
    if path != "torch" and isinstance(missing := native.load(folder), native.Missing):
        assert "could not" not in missing.reason, missing.reason
        pytest.skip(missing.reason)
    engine = engine_on(path, kernels_folder=folder)
    prompts = prompts_of(engine, data_dir, 200)
    found = compared(reference, prompts, generate(engine, prompts, greedy(32)))

    assert found.positions == 6400
    assert PATHS[path].allows(found), found
