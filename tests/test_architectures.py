"""For every architecture the engine computes the same logits and tokens as transformers.

Random checkpoints in float32; the arena starts as NaN and pages come in a random order.  Each
comparison is shown to notice what it is for: one detail of the decoder is bent at a time.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tierline.base.errors import SpecError
from tierline.catalog.models import known_models
from tierline.engine import native
from tierline.engine.attention import ATTENTION, Version, gathered
from tierline.engine.decoder import Decoder, Experts, Rope
from tierline.engine.models import MODEL_TYPES, decoder_of
from tierline.engine.native_attention import version, why_not
from tierline.engine.network import Network, weight_shapes
from tiny_checkpoints import ARCHITECTURES, VOCABULARY, tiny_checkpoint, tiny_config, tiny_model
from tiny_driver import Cache, file_weights

TOLERANCE = 1e-4
SEED = 1  # with it no greedy answer is a short cycle
PROMPT, ANSWER = 70, 64
TEXTS = [random.Random(n).choices(range(256), k=n) for n in (PROMPT, 33, 9, 90)]

# What a config may say beside the plain model of each architecture.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases": ("llama", {"attention_bias": True}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, one KV head": ("llama", {"num_key_value_heads": 1}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
    ),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
    "qwen3_moe, weights as they are": ("qwen3_moe", {"norm_topk_prob": False}),
    "mixtral, window": ("mixtral", {"sliding_window": 12}),
    "gemma3, scaled": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "final_logit_softcapping": 3.0,
        },
    ),
    "deepseek_v2, no query latent": ("deepseek_v2", {"q_lora_rank": None}),
    "deepseek_v2, yarn": (
        "deepseek_v2",
        {
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
            "topk_method": "greedy",
            "attention_bias": True,
        },
    ),
}
MODELS = {name: (name, {}) for name in ARCHITECTURES} | VARIANTS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Model:
    """The reference and what the engine made of its files."""

    def __init__(self, name: str, folder: Path) -> None:
        architecture, changes = MODELS[name]
        self.reference = tiny_model(architecture, seed=SEED, **changes)
        self.path = tiny_checkpoint(architecture, folder, seed=SEED, **changes)
        self.decoder = decoder_of(json.loads((self.path / "config.json").read_text()))
        self.expected = cache(self._expected)

    def _expected(self, tokens: tuple[int, ...]) -> torch.Tensor:
        with torch.inference_mode():
            logits = self.reference(torch.tensor([tokens])).logits[0]
        assert isinstance(logits, torch.Tensor)
        return logits

    def network(
        self,
        *,
        attention: Version = gathered,
        decoder: Decoder | None = None,
        dtype: torch.dtype = torch.float32,
        kernels: native.Kernels | None = None,
    ) -> Network:
        return Network(
            decoder or self.decoder,
            file_weights(self.path, decoder or self.decoder),
            dtype=dtype,
            device=torch.device("cpu"),
            attention=attention,
            kernels=kernels,
        )

    def error(self, network: Network, *, chunk: int = PROMPT) -> float:
        """The largest difference of any logit at any position of the first text."""
        found = logits_of(network, Cache(network.decoder), TEXTS[0], chunk=chunk)
        return (found - self.expected(tuple(TEXTS[0]))).abs().nan_to_num(torch.inf).max().item()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    return cache(lambda name: Model(name, tmp_path_factory.mktemp("models")))


def logits_of(network: Network, held: Cache, text: list[int], *, chunk: int) -> torch.Tensor:
    """Logits at every position of a text that is fed in chunks."""
    found = []
    for first in range(0, len(text), chunk):
        batch = held.batch({0: text[first : first + chunk]}, every=True)
        found.append(network.logits(batch, held.arena))
        held.settle([0])
    return torch.cat(found)


@pytest.mark.parametrize("how", ATTENTION)
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_at_every_position(
    models: Callable[[str], Model], name: str, how: str
) -> None:
    model = models(name)

    assert model.error(model.network(attention=ATTENTION[how])) < TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_equal_under_any_chunks(models: Callable[[str], Model], name: str) -> None:
    """If every token is the reference's best after all before it, so is the whole answer."""
    model = models(name)
    network = model.network()
    answers = []
    for chunk in (1, 7, 64, PROMPT):
        held, text = Cache(network.decoder, seed=chunk), list(TEXTS[0])
        logits = logits_of(network, held, text, chunk=chunk)
        for _ in range(ANSWER):
            text.append(int(logits[-1].argmax()))
            logits = network.logits(held.batch({0: text[-1:]}), held.arena)
            held.settle([0])
        answers.append(text[PROMPT:])
    best = model.expected((*TEXTS[0], *answers[0]))[PROMPT - 1 : -1].argmax(-1).tolist()

    assert answers == [best] * 4
    assert len(set(best)) > 10, "an answer that repeats itself shows little"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_row_never_notices_its_companions(models: Callable[[str], Model], name: str) -> None:
    model = models(name)
    network, rng, held = model.network(), random.Random(name), Cache(model.decoder, block_tokens=8)
    done = dict.fromkeys(range(len(TEXTS)), 0)
    errors = []
    while unfinished := [s for s, at in done.items() if at < len(TEXTS[s])]:
        step = {
            s: TEXTS[s][done[s] : done[s] + rng.choice((1, 1, 1, 2, 13, 40))]
            for s in rng.sample(unfinished, rng.randint(1, len(unfinished)))
        }
        logits = network.logits(held.batch(step, every=True), held.arena)
        held.settle(step)
        for s, found in zip(step, logits.split([len(t) for t in step.values()]), strict=True):
            expected = model.expected(tuple(TEXTS[s]))[done[s] : done[s] + len(found)]
            errors.append((found - expected).abs().nan_to_num(torch.inf).max().item())
            done[s] += len(found)

    assert max(errors) < TOLERANCE
    assert len(errors) > 20


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "mixtral", "deepseek_v2"])
def test_native_kernels_under_torch_change_nothing(
    models: Callable[[str], Model], name: str, kernels_folder: Path
) -> None:
    """Networks that the native step does not run use its products and its attention here."""
    kernels = native.load(kernels_folder)
    if isinstance(kernels, native.Missing):
        pytest.skip(kernels.reason)
    model = models(name)
    attention = gathered
    if why_not(model.decoder.layers[0].attention, torch.float32) is None:
        attention = version(kernels)

    assert model.error(model.network(attention=attention, kernels=kernels), chunk=9) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v2"])
def test_a_step_that_wants_no_logits_only_writes(models: Callable[[str], Model], name: str) -> None:
    model = models(name)
    network, held = model.network(), Cache(model.decoder)
    batch = held.batch({0: TEXTS[0][:-1]})
    batch.wanted = batch.wanted[:0]
    nothing = network.logits(batch, held.arena)
    last = network.logits(held.batch({0: TEXTS[0][-1:]}), held.arena)

    assert nothing.shape == (0, VOCABULARY)
    assert torch.allclose(last[0], model.expected(tuple(TEXTS[0]))[-1], atol=TOLERANCE)


def test_only_wanted_rows_get_logits(models: Callable[[str], Model]) -> None:
    model = models("qwen2")
    network, held = model.network(), Cache(model.decoder)
    found = network.logits(held.batch({0: TEXTS[0], 1: TEXTS[1][:1], 2: TEXTS[2]}), held.arena)
    expected = [model.expected(tuple(t))[-1] for t in (TEXTS[0], TEXTS[1][:1], TEXTS[2])]

    assert found.shape == (3, VOCABULARY)
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.stack(expected), atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3", "deepseek_v2"])
def test_sixteen_bits_are_near(
    models: Callable[[str], Model], name: str, dtype: torch.dtype
) -> None:
    """As near as transformers is in the same type, within a factor."""
    model = models(name)
    network = model.network(dtype=dtype)
    found = logits_of(network, Cache(model.decoder, dtype=dtype), TEXTS[2], chunk=4)
    expected = model.expected(tuple(TEXTS[2]))
    peer = tiny_model(name, seed=SEED).to(dtype)
    with torch.inference_mode():
        theirs = peer(torch.tensor([TEXTS[2]])).logits[0].float()

    assert (found - expected).square().mean() < 4 * (theirs - expected).square().mean() + 1e-6
    assert (found - expected).square().mean() < 0.1 * expected.square().mean()


# --- the controls ---------------------------------------------------------------------------


def each_layer(decoder: Decoder, **changes: Any) -> Decoder:
    """`attention`, `ffn` and the layer's own fields, changed in every layer that has them."""

    def changed(of: Any) -> Any:
        own = {key: value for key, value in changes.items() if hasattr(of, key)}
        return replace(of, **own)

    layers = tuple(
        changed(replace(layer, attention=changed(layer.attention), ffn=changed(layer.ffn)))
        for layer in decoder.layers
    )
    return replace(decoder, layers=layers)


def unrotated(decoder: Decoder) -> Decoder:
    rope = decoder.layers[0].attention.rope
    return each_layer(
        decoder, rope=Rope(inverse_frequencies=(0.0,) * len(rope.inverse_frequencies))
    )


def renamed(ours: str, theirs: str) -> Callable[[Decoder], Decoder]:
    """A decoder that looks for one weight of each layer where another lies."""

    def bend(decoder: Decoder) -> Decoder:
        names = decoder.weight_names
        return replace(decoder, weight_names=lambda name: names(name.replace(ours, theirs)))

    return bend


BENT: dict[str, tuple[str, Callable[[Decoder], Decoder]]] = {
    "no rotation": ("llama", unrotated),
    "no rotation of latents": ("deepseek_v2", unrotated),
    "up and gate swapped": ("llama", renamed(".up", ".gate")),
    "other norm": ("llama", renamed(".ffn_norm", ".norm")),
    "other epsilon": ("llama", lambda d: replace(d, norm_eps=1e-2)),
    "no window": ("mistral", lambda d: each_layer(d, window_tokens=None)),
    "window of one more": ("mistral", lambda d: each_layer(d, window_tokens=25)),
    "no biases": ("qwen2", lambda d: each_layer(d, bias=False)),
    "no norms of heads": ("qwen3", lambda d: each_layer(d, qk_norm=False)),
    "norms of heads swapped": ("qwen3", renamed("q_norm", "k_norm")),
    "one expert less": ("mixtral", lambda d: each_layer(d, experts_active=1)),
    "weights not normalised": ("mixtral", lambda d: each_layer(d, normalised=False)),
    "weights normalised": (
        "qwen3_moe, weights as they are",
        lambda d: each_layer(d, normalised=True),
    ),
    "no shared experts": ("deepseek_v2", lambda d: each_layer(d, shared_intermediate=0)),
    "no groups": ("deepseek_v2", lambda d: each_layer(d, groups=1)),
    "experts not scaled": ("deepseek_v2", lambda d: each_layer(d, scale=1.0)),
    "no offset of norms": ("gemma3", lambda d: replace(d, norm_offset=0.0)),
    "embeddings not scaled": ("gemma3", lambda d: replace(d, embedding_scale=1.0)),
    "no norms after": ("gemma3", lambda d: each_layer(d, post_norms=False)),
    "other scale": ("gemma3", lambda d: each_layer(d, scale=32**-0.5)),
    "other activation": ("gemma3", lambda d: each_layer(d, activation="silu")),
    "one base for all": ("gemma3", lambda d: each_layer(d, rope=d.layers[0].attention.rope)),
    "every layer local": ("gemma3", lambda d: each_layer(d, window_tokens=20)),
    "no softcap": ("gemma3, scaled", lambda d: replace(d, logit_softcap=None)),
    "rope not sharpened": (
        "llama, yarn",
        lambda d: each_layer(d, rope=replace(d.layers[0].attention.rope, scale=1.0)),
    ),
    "pairs split in halves": (
        "deepseek_v2",
        lambda d: each_layer(d, rope=replace(d.layers[0].attention.rope, interleaved=False)),
    ),
}


@pytest.mark.parametrize("what", BENT)
def test_a_bent_detail_is_noticed(models: Callable[[str], Model], what: str) -> None:
    name, bend = BENT[what]
    model = models(name)

    assert model.error(model.network(decoder=bend(model.decoder))) > 10 * TOLERANCE


# --- configs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_file(models: Callable[[str], Model], name: str) -> None:
    model = models(name)
    names = model.decoder.weight_names
    with safe_open(model.path / "model.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118

    assert {names(ours): shape for ours, shape in weight_shapes(model.decoder).items()} == stored


def bundled() -> list[str]:
    return [name for name, model in known_models().items() if model.architecture in MODEL_TYPES]


@pytest.mark.parametrize("name", bundled())
def test_published_configs_have_their_published_size(name: str) -> None:
    folder = Path(__file__).resolve().parents[1] / "src/tierline/catalog/data/models"
    shapes = weight_shapes(decoder_of(json.loads((folder / f"{name}.json").read_text())))

    assert sum(map(prod, shapes.values())) == known_models()[name].params


def test_older_configs_say_the_same() -> None:
    """Before transformers 5 the base stood alone and the scaling had a section of its own."""
    new = tiny_config("llama", rope_parameters=LLAMA3 | {"rope_theta": 5e5}).to_dict()
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    gemma = tiny_config("gemma3", **MODELS["gemma3, scaled"][1]).to_dict()
    older = {k: v for k, v in gemma.items() if k not in ("rope_parameters", "layer_types")}
    older |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 4}
    older["rope_scaling"] = {"type": "linear", "factor": 8.0}

    for one, other in ((new, old), (gemma, older)):
        pair = [decoder_of(config | {"architectures": None}) for config in (one, other)]

        assert replace(pair[0], weight_names=str) == replace(pair[1], weight_names=str)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"architectures": ["MambaForCausalLM"]}, "does not know .*'MambaForCausalLM'"),
    "nothing": ({"architectures": None, "model_type": None}, "does not know"),
    "missing": ({"hidden_size": None, "vocab_size": None}, "lacks hidden_size, vocab_size"),
    "not a number": ({"num_attention_heads": "four"}, "num_attention_heads is 'four'"),
    "too many": ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000"),
    "uneven heads": ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
    "odd head": ({"head_dim": 15}, "head_dim 15 is odd"),
    "rope": ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'"),
    "factor": ({"rope_parameters": {"rope_type": "linear"}}, "rope lacks factor"),
    "biases": ({"mlp_bias": True}, "mlp_bias"),
    "activation": ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    "epsilon": ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_config_says_what_is_wrong(what: str) -> None:
    changes, message = WRONG[what]
    config = tiny_config("llama").to_dict() | {"architectures": ["LlamaForCausalLM"]}

    assert decoder_of(config).hidden == 64
    with pytest.raises(SpecError, match=message) as caught:
        decoder_of(config | changes)
    assert caught.value.hint


def test_the_hint_for_an_unknown_architecture_names_all_and_the_way() -> None:
    with pytest.raises(SpecError) as caught:
        decoder_of({"architectures": ["X"]})

    assert "LlamaForCausalLM" in caught.value.hint
    assert "add-an-architecture" in caught.value.hint


def test_groups_of_experts_must_be_even() -> None:
    config = tiny_config("deepseek_v2", n_group=3).to_dict()

    with pytest.raises(SpecError, match="n_routed_experts 8 is not a multiple of n_group 3"):
        decoder_of(config | {"architectures": ["DeepseekV2ForCausalLM"]})


def test_experts_take_equal_tokens_alike(models: Callable[[str], Model]) -> None:
    """A prompt of one repeated token sends whole batches to few experts, and others none."""
    model = models("qwen3_moe")
    ffn = model.decoder.layers[0].ffn
    found = logits_of(model.network(), Cache(model.decoder), [7] * 40, chunk=40)

    assert isinstance(ffn, Experts)
    assert ffn.experts_active < ffn.experts
    assert torch.allclose(found, model.expected((7,) * 40), atol=TOLERANCE)
