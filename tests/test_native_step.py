"""The native step computes what transformers computes, and a row does not notice its company."""

import functools
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tierline.engine import native
from tierline.engine.arena import Arena, geometry
from tierline.engine.attention import naive
from tierline.engine.batch import Batch
from tierline.engine.checkpoint import open_checkpoint
from tierline.engine.decoder import Attention, Decoder, Dense, Experts
from tierline.engine.models import decoder_of
from tierline.engine.native_step import NativeNetwork, supports
from tierline.engine.network import Network, weight_shapes
from tiny_checkpoints import tiny_checkpoint, tiny_model

SERVED = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "qwen3_moe", "mixtral")
BLOCK = 16


Weights = Callable[[str], torch.Tensor]


@functools.cache
def tiny(architecture: str) -> tuple[torch.nn.Module, Decoder, Weights]:
    """A model of transformers, our view of its checkpoint, and the weights by our names."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(tiny_checkpoint(architecture, Path(folder)))
        decoder = decoder_of(checkpoint.config)
        state = {
            name: checkpoint.tensor(decoder.weight_names(name)).clone()
            for name in weight_shapes(decoder)
        }
    return tiny_model(architecture), decoder, state.__getitem__


def random_weights(decoder: Decoder) -> Weights:
    generator = torch.Generator().manual_seed(1)
    found = {
        name: torch.randn(shape, generator=generator) * (1.5 / shape[-1] ** 0.5)
        for name, shape in weight_shapes(decoder).items()
    }
    return lambda name: found[name]


class Texts:
    """Some sequences in an arena full of NaN, with random tables."""

    def __init__(
        self, network: NativeNetwork | Network, texts: list[list[int]], *, seed: int = 0
    ) -> None:
        decoder, dtype = network.decoder, network.dtype
        self.network, self.texts, self.done = network, texts, [0] * len(texts)
        cut = geometry(decoder, block_tokens=BLOCK, element_bytes=dtype.itemsize)
        blocks = max(-(-len(text) // BLOCK) for text in texts)
        pages = cut.layout.pages_per_block * blocks * len(texts)
        self.arena = Arena(decoder, cut, pages=pages, dtype=dtype, device=torch.device("cpu"))
        if isinstance(network, NativeNetwork):
            self.arena.data.fill_(255)
        numbers = iter(random.Random(seed).sample(range(pages), pages))
        self.tables = [
            np.array(
                [[next(numbers) for _ in range(blocks * g.pages_per_block)] for _ in texts],
                dtype=np.int32,
            )
            for g in cut.layout.groups
        ]

    def step(self, moves: list[tuple[int, int]], *, last_only: bool = False) -> list[torch.Tensor]:
        """Advance sequences by so many tokens each; the logits of their rows."""
        which, counts = [s for s, _ in moves], [n for _, n in moves]
        before = [self.done[s] for s in which]
        spans = [range(d, d + n) for d, n in zip(before, counts, strict=True)]
        for s, span in zip(which, spans, strict=True):
            self.done[s] = span.stop
        starts = np.cumsum([0, *counts], dtype=np.int32)
        batch = Batch(
            tokens=np.array(
                [self.texts[s][p] for s, span in zip(which, spans, strict=True) for p in span],
                dtype=np.int32,
            ),
            positions=np.array([p for span in spans for p in span], dtype=np.int32),
            starts=starts,
            lengths=np.array([span.stop for span in spans], dtype=np.int32),
            tables=tuple(table[which] for table in self.tables),
            wanted=starts[1:] - 1 if last_only else np.arange(starts[-1], dtype=np.int32),
        )
        logits = self.network.logits(batch, self.arena).clone()
        if last_only:
            return list(logits.split(1))
        return list(logits.split(counts))

    def whole(self) -> list[torch.Tensor]:
        """All sequences at once."""
        return self.step([(s, len(text)) for s, text in enumerate(self.texts)])

    def mixed(self, rng: random.Random) -> list[torch.Tensor]:
        """All sequences, in random chunks and mixes."""
        found: list[list[torch.Tensor]] = [[] for _ in self.texts]
        while any(d < len(t) for d, t in zip(self.done, self.texts, strict=True)):
            moves = [
                (s, min(rng.choice([1, 1, 7, 30]), len(text) - self.done[s]))
                for s, text in enumerate(self.texts)
                if self.done[s] < len(text) and rng.random() < 0.7
            ]
            if moves:
                for (s, _), logits in zip(moves, self.step(moves), strict=True):
                    found[s].append(logits)
        return [torch.cat(parts) for parts in found]


def random_texts(*lengths: int) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(256) for _ in range(n)] for n in lengths]


@functools.cache
def answer(architecture: str) -> tuple[torch.Tensor, list[int]]:
    """What transformers says: logits of a prompt, and the prompt with 64 greedy tokens."""
    model, *_ = tiny(architecture)
    prompt = torch.tensor(random_texts(60))
    with torch.no_grad():
        logits = model(prompt).logits[0]
        tokens = model.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None)
    return logits, tokens[0].tolist()


@pytest.mark.parametrize("architecture", SERVED)
def test_equals_transformers_in_logits_and_tokens(
    kernels: native.Kernels, architecture: str
) -> None:
    _, decoder, weights = tiny(architecture)
    network = NativeNetwork(decoder, weights, dtype=torch.float32, kernels=kernels)
    (text,) = random_texts(60)
    expected, tokens = answer(architecture)

    run = Texts(network, [text + [0] * 64])
    (logits,) = run.step([(0, 60)])
    found = [*text, int(logits[-1].argmax())]
    while len(found) < 124:
        run.texts[0][run.done[0]] = found[-1]
        (row,) = run.step([(0, 1)])
        found.append(int(row.argmax()))

    assert (logits - expected).abs().max() < 1e-4
    assert found == tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "qwen3_moe"])
def test_a_row_is_the_same_in_any_batch_chunk_and_number_of_threads(
    kernels: native.Kernels, architecture: str, dtype: torch.dtype
) -> None:
    _, decoder, weights = tiny(architecture)
    network = NativeNetwork(decoder, weights, dtype=dtype, kernels=kernels)
    texts = random_texts(90, 1, 33, 70)
    kernels.set_threads(1)
    alone = [Texts(network, [text], seed=n).whole()[0] for n, text in enumerate(texts)]
    kernels.set_threads(3)
    mixed = Texts(network, texts, seed=9).mixed(random.Random(3))
    one_step = Texts(network, texts, seed=10)
    one_by_one = [one_step.step([(0, 1)])[0] for _ in range(90)]

    assert all(map(torch.equal, alone, mixed))
    assert torch.equal(torch.cat(one_by_one), alone[0])


def test_another_order_of_sums_would_be_seen() -> None:
    """The control: the network in torch agrees, but not to the last bit."""
    _, decoder, weights = tiny("qwen2")
    network = Network(decoder, weights, dtype=torch.float32, device=torch.device("cpu"))
    texts = random_texts(90, 1, 33, 70)
    alone = [Texts(network, [text], seed=n).whole()[0] for n, text in enumerate(texts)]
    mixed = Texts(network, texts, seed=9).mixed(random.Random(3))
    apart = max((a - b).abs().max().item() for a, b in zip(alone, mixed, strict=True))

    assert 0 < apart < 1e-4


def test_long_steps_in_passes_and_wanted_rows_alone_change_nothing(
    kernels: native.Kernels,
) -> None:
    _, decoder, weights = tiny("mistral")
    network = NativeNetwork(decoder, weights, dtype=torch.float32, kernels=kernels)
    texts = random_texts(500, 30, 700, 40, 1)
    whole = Texts(network, texts).whole()  # 1,271 rows
    small = [Texts(network, [text]).whole()[0] for text in texts]
    last = Texts(network, texts).step([(s, len(t)) for s, t in enumerate(texts)], last_only=True)

    assert all(map(torch.equal, whole, small))
    assert all(torch.equal(a[-1:], b) for a, b in zip(whole, last, strict=True))


def test_what_no_tiny_checkpoint_has(kernels: native.Kernels) -> None:
    """Interleaved rotation of a part of each head, odd panels, biases, a soft cap."""
    _, decoder, _ = tiny("llama")
    layer = decoder.layers[0]
    assert isinstance(layer.attention, Attention)
    rope = replace(layer.attention.rope, interleaved=True, scale=1.25)
    attention = replace(layer.attention, rope=rope, bias=True, out_bias=True)
    decoder = replace(
        decoder,
        layers=(replace(layer, attention=attention, ffn=Dense(intermediate=80)),) * 2,
        logit_softcap=2.0,
        norm_offset=0.5,
        tied=False,
    )
    weights = random_weights(decoder)
    texts = random_texts(40, 3)
    device = torch.device("cpu")
    network = NativeNetwork(decoder, weights, dtype=torch.float32, kernels=kernels)
    reference = Network(decoder, weights, dtype=torch.float32, device=device, attention=naive)

    pairs = zip(Texts(network, texts).whole(), Texts(reference, texts).whole(), strict=True)

    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-4


def test_bfloat16_stays_near(kernels: native.Kernels) -> None:
    _, decoder, weights = tiny("qwen3")
    texts = random_texts(50)
    exact, rounded = (
        Texts(NativeNetwork(decoder, weights, dtype=dtype, kernels=kernels), texts).whole()[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    similarity = torch.nn.functional.cosine_similarity(exact, rounded, dim=-1)

    assert similarity.min() > 0.99
    assert not torch.equal(exact, rounded)


@pytest.mark.parametrize("kind", sorted(native.GGUF_TYPES))
def test_blocks_of_a_gguf_file_serve_as_they_are(kernels: native.Kernels, kind: str) -> None:
    """Near the same weights made numbers; all tensors compact, or only some of a stack."""
    _, decoder, weights = tiny("llama")
    type_ = gguf.GGMLQuantizationType[kind]
    names = [name for name, shape in weight_shapes(decoder).items() if len(shape) == 2]
    blocks = {name: gguf.quants.quantize(weights(name).numpy(), type_) for name in names}

    def numbers(name: str) -> torch.Tensor:
        if name not in blocks:
            return weights(name)
        return torch.from_numpy(gguf.quants.dequantize(blocks[name], type_))

    def compact(name: str) -> tuple[str, torch.Tensor] | None:
        if name == "layers.1.k" or name not in blocks:
            return None
        return kind, torch.from_numpy(blocks[name])

    def bent(name: str) -> tuple[str, torch.Tensor] | None:
        return compact(name.replace("1.gate", "1.up"))

    texts = random_texts(50, 1, 20)
    plain = NativeNetwork(decoder, numbers, dtype=torch.float32, kernels=kernels)
    small = NativeNetwork(decoder, numbers, dtype=torch.float32, kernels=kernels, compact=compact)
    wrong = NativeNetwork(decoder, numbers, dtype=torch.float32, kernels=kernels, compact=bent)
    expected, found, other = (torch.cat(Texts(n, texts).whole()) for n in (plain, small, wrong))
    mixed = torch.cat(Texts(small, texts).mixed(random.Random(5)))

    assert distance(found, expected) < 2e-3 < distance(other, expected)
    assert torch.equal(found, mixed)
    assert small.weight_bytes < 0.6 * plain.weight_bytes


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """One less the cosine of the two most different rows."""
    return 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).min().item()


def test_a_bent_network_is_noticed(kernels: native.Kernels) -> None:
    """The control: gate and up exchanged, or another page, and the logits differ."""
    _, decoder, weights = tiny("llama")
    texts = random_texts(40)

    def bent(name: str) -> torch.Tensor:
        return weights(name.replace("gate", "up") if "layers.1" in name else name)

    def run(weights: Weights, *, spoil: bool = False) -> torch.Tensor:
        network = NativeNetwork(decoder, weights, dtype=torch.float32, kernels=kernels)
        texts_run = Texts(network, texts)
        texts_run.step([(0, 20)])
        if spoil:
            texts_run.tables[0][0, 0] = texts_run.tables[0][0, 1]
        return texts_run.step([(0, 20)])[0]

    assert torch.equal(run(weights), run(weights))
    assert (run(bent) - run(weights)).abs().max() > 1e-2
    assert not (run(weights, spoil=True) - run(weights)).abs().max() < 1e-2


def test_counts_its_bytes(kernels: native.Kernels) -> None:
    _, decoder, weights = tiny("llama")
    network = NativeNetwork(decoder, weights, dtype=torch.bfloat16, kernels=kernels)
    elements = sum(np.prod(shape) for shape in weight_shapes(decoder).values())
    Texts(network, random_texts(5)).whole()
    little = network.scratch_bytes
    Texts(network, random_texts(400)).whole()

    assert 2 * elements <= network.weight_bytes < 2.4 * elements  # padded to panels
    assert 0 < little < network.scratch_bytes


def test_says_what_it_cannot_run() -> None:
    _, decoder, _ = tiny("llama")
    layer = decoder.layers[0]
    experts = Experts(
        experts=4, experts_active=2, intermediate=16, normalised=True, shared_intermediate=16
    )
    cases = {
        "no native kernel computes in float16": supports(decoder, torch.float16),
        "hidden size 40 is not a multiple of 16": supports(
            replace(decoder, hidden=40), torch.float32
        ),
        "groups of experts and shared ones have no native kernel": supports(
            replace(decoder, layers=(replace(layer, ffn=experts),)), torch.float32
        ),
        "intermediate size 100 is not a multiple of 16": supports(
            replace(decoder, layers=(replace(layer, ffn=Dense(intermediate=100)),)), torch.float32
        ),
    }

    assert supports(decoder, torch.bfloat16) is None
    assert cases == dict(zip(cases, cases, strict=True))
