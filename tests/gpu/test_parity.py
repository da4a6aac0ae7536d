"""On a GPU the engine computes what transformers computes there, however the work is cut.

The whole suite needs a GPU.  Without one a part of it runs on the CPU, with the same kernels
under Triton's interpreter, so that what a GPU will run has run before.
"""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import answers, finish, generate, greedy, tiny_engine
from tierline.engine.engine import Engine
from tierline.engine.models import decoder_of
from tierline.engine.network import Network
from tierline.engine.sampling import SamplingParams
from tiny_checkpoints import ARCHITECTURES, VOCABULARY, tiny_checkpoint, tiny_model
from tiny_driver import Cache, file_weights
from triton_here import DEVICE, attention_cuda

HAS_GPU = DEVICE == "cuda"
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU here, and the interpreter is slow")
SEED = 1
LENGTHS, TOKENS = ((70, 33, 9, 90, 1, 50, 17), 64) if HAS_GPU else ((20, 33, 9), 4)
LISTED = [random.Random(n).choices(range(VOCABULARY), k=n) for n in LENGTHS]


def architectures(*interpreted: str) -> list[Any]:
    """All of them; without a GPU those that are named."""
    return [pytest.param(a, marks=() if a in interpreted else needs_gpu) for a in ARCHITECTURES]


class Model:
    """A tiny checkpoint, and transformers' network for it on this device."""

    def __init__(self, name: str, folder: Path) -> None:
        # Matrices are multiplied in full: TF32 keeps ten bits, and 1e-4 would mean nothing.
        assert torch.get_float32_matmul_precision() == "highest"
        self.path = tiny_checkpoint(name, folder, seed=SEED)
        self.reference = tiny_model(name, seed=SEED).to(DEVICE)
        self.reference.set_attn_implementation("eager")
        self.decoder = decoder_of(json.loads((self.path / "config.json").read_text()))

    def expected(self, tokens: list[int]) -> torch.Tensor:
        """Logits at every position."""
        with torch.inference_mode():
            logits = self.reference(torch.tensor([tokens], device=DEVICE)).logits[0]
        assert isinstance(logits, torch.Tensor)
        return logits

    def network(self) -> Network:
        return Network(
            self.decoder,
            file_weights(self.path, self.decoder),
            dtype=torch.float32,
            device=torch.device(DEVICE),
            attention=attention_cuda.attend,
        )

    def engine(self, **options: Any) -> Engine:
        engine = tiny_engine(self.path, device=DEVICE, **options)
        assert isinstance(engine.executor.network, Network)
        engine.executor.network.attention = attention_cuda.attend
        random.Random(SEED).shuffle(engine.executor.names.pool._free)
        return engine

    @cache  # noqa: B019
    def answers(self) -> list[list[int]]:
        """What the reference says to each of `LISTED`, greedily."""
        said = []
        for prompt in LISTED:
            text = list(prompt)
            for _ in range(TOKENS):
                text.append(int(self.expected(text)[-1].argmax()))
            said.append(text[len(prompt) :])
        return said


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    return cache(lambda name: Model(name, tmp_path_factory.mktemp("models")))


def logits_of(network: Network, text: list[int], *, chunk: int) -> torch.Tensor:
    """Logits at every position of a text that is fed in chunks."""
    held = Cache(network.decoder, device=DEVICE)
    found = []
    for first in range(0, len(text), chunk):
        batch = held.batch({0: text[first : first + chunk]}, every=True)
        found.append(network.logits(batch, held.arena))
        held.settle([0])
    return torch.cat(found)


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found - expected).abs().nan_to_num(torch.inf).max().item()


# Logits


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=needs_gpu), 7, 64])
@pytest.mark.parametrize("name", architectures("mistral", "deepseek_v2"))
def test_logits_equal_at_every_position(
    models: Callable[[str], Model], name: str, chunk: int
) -> None:
    model = models(name)

    assert (
        error_of(logits_of(model.network(), LISTED[0], chunk=chunk), model.expected(LISTED[0]))
        < 1e-4
    )


def test_the_comparison_can_fail(models: Callable[[str], Model]) -> None:
    """Keys in the reverse order of heads: the right numbers in the wrong places."""
    model, attend = models("mistral"), attention_cuda.attend
    network = model.network()
    network.attention = lambda q, k, *rest: attend(q, k.flip(1), *rest)

    assert error_of(logits_of(network, LISTED[0], chunk=64), model.expected(LISTED[0])) > 1e-2


# Tokens


@pytest.mark.parametrize(
    "batch_tokens", [64, *(pytest.param(n, marks=needs_gpu) for n in (1, 7, 512))]
)
@pytest.mark.parametrize("name", architectures("mistral"))
def test_greedy_tokens_equal_in_any_chunks_and_batches(
    models: Callable[[str], Model], name: str, batch_tokens: int
) -> None:
    model = models(name)
    assert generate(model.engine(batch_tokens=batch_tokens), LISTED, greedy(TOKENS)) == (
        model.answers()
    )


@pytest.mark.parametrize("name", architectures("mistral"))
def test_cached_prefixes_change_no_token(models: Callable[[str], Model], name: str) -> None:
    model = models(name)
    engine = model.engine()
    generate(engine, LISTED[:2], greedy(1))
    ids = [engine.add(prompt, greedy(TOKENS)) for prompt in LISTED]
    deltas = finish(engine)

    assert [answers(deltas)[i, 0] for i in ids] == model.answers()
    assert max(d.cached_tokens for d in deltas) > 0


@needs_gpu
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_preemption_changes_no_token(models: Callable[[str], Model], name: str) -> None:
    model = models(name)
    engine = model.engine(kv_bytes=150_000, policy="fcfs")

    assert generate(engine, LISTED, greedy(TOKENS)) == model.answers()
    assert engine.scheduler.preemptions > 0


@pytest.mark.parametrize("name", architectures("mistral"))
def test_answers_to_one_prompt_share_it(models: Callable[[str], Model], name: str) -> None:
    model = models(name)
    engine = model.engine()
    request_id = engine.add(LISTED[0], greedy(TOKENS, n=3))
    said = answers(finish(engine))

    assert [said[request_id, i] for i in range(3)] == [model.answers()[0]] * 3


@needs_gpu
def test_a_seed_gives_the_same_tokens_in_any_company(models: Callable[[str], Model]) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=3, max_tokens=TOKENS, ignore_eos=True)
    said = []
    for company in ([], LISTED[1:]):
        engine = models("llama").engine()
        mine = engine.add(LISTED[0], params)
        for prompt in company:
            engine.add(prompt, greedy(9))
        said.append(answers(finish(engine))[mine, 0])

    assert said[0] == said[1]


# Where a GPU is


@needs_gpu
def test_a_gpu_gets_these_kernels(models: Callable[[str], Model]) -> None:
    """Nobody asked for them: they are the default on CUDA."""
    engine = tiny_engine(models("llama").path, device="cuda")

    assert isinstance(engine.executor.network, Network)
    assert engine.executor.network.attention is attention_cuda.attend


@needs_gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits_are_near(models: Callable[[str], Model], dtype: str) -> None:
    """No further from float32 than transformers in the same type, within a factor."""
    model = models("llama")
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    network = Network(
        model.decoder,
        file_weights(model.path, model.decoder),
        dtype=kind,
        device=torch.device(DEVICE),
        attention=attention_cuda.attend,
    )
    held = Cache(model.decoder, dtype=kind, device=DEVICE)
    found = network.logits(held.batch({0: LISTED[0]}, every=True), held.arena)
    peer = tiny_model("llama", seed=SEED).to(DEVICE, kind)
    with torch.inference_mode():
        theirs = peer(torch.tensor([LISTED[0]], device=DEVICE)).logits[0].float()
    expected = model.expected(LISTED[0])

    assert (found - expected).square().mean() < 4 * (theirs - expected).square().mean() + 1e-6
