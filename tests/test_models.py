"""A `config.json` is read to the exact parameter and cache counts, or refused with a reason."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierline.base.errors import InputError, SpecError
from tierline.catalog import models
from tierline.catalog.architectures import ARCHITECTURES
from tierline.catalog.formats import weight_format
from tierline.catalog.models import BUNDLE, known_models, load_model, model_from_config

NAMES = sorted(known_models())

# Totals that the publishers' checkpoints have, by their safetensors index; tied heads once.
EXACT_PARAMS = {
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,  # without the multi-token-prediction layer
    "falcon-180b": 179_522_565_120,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "gpt-j-6b": 6_050_882_784,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    # What transformers 5.19 builds for the text part, and the routers' corrections, which it
    # keeps as buffers: the published figures of these are rounded or include vision and MTP.
    "deepseek-v3.2": 671_877_944_064,
    "gemma-3-4b": 3_880_263_168,
    "glm-5": 743_911_218_432,
    "glm-5.2": 743_377_019_904,
    "kimi-k2": 1_026_408_232_448,
    "llama-4-maverick": 400_711_848_960,
    "llama-4-scout": 107_769_861_120,
    "minimax-m2.5": 228_689_764_864,
    "qwen3.5-27b": 26_895_998_464,
    "qwen3.5-397b-a17b": 396_346_350_336,
}


def bundled(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((BUNDLE / f"{name}.json").read_text())
    return config


def read(config: dict[str, Any]) -> Any:
    return model_from_config(config, name="test", source="test")


# --- parameters -----------------------------------------------------------------------------


def test_the_bundle_is_large_enough_to_plan_with() -> None:
    assert len(NAMES) >= 45


@pytest.mark.parametrize("name", NAMES)
def test_parameters_equal_the_published_count_to_half_a_percent(name: str) -> None:
    published = bundled(name)["_published_params"]

    assert published["source"]
    assert load_model(name).params == pytest.approx(published["billions"] * 1e9, rel=0.005)


@pytest.mark.parametrize(("name", "params"), EXACT_PARAMS.items())
def test_parameters_equal_the_checkpoint_exactly(name: str, params: int) -> None:
    assert load_model(name).params == params


@pytest.mark.parametrize(
    ("name", "billions", "tolerance"),
    [
        ("mixtral-8x7b", 12.9, 0.005),
        ("mixtral-8x22b", 39.1, 0.005),
        ("deepseek-v3", 37.0, 0.02),  # published without the embedding table (0.93B)
        ("deepseek-v2", 21.0, 0.025),
        ("qwen3-235b-a22b", 22.0, 0.01),
        ("qwen3-30b-a3b", 3.3, 0.02),
        ("qwen3-coder-480b-a35b", 35.0, 0.015),
        ("qwen3.5-397b-a17b", 17.0, 0.025),
        ("llama-4-scout", 17.0, 0.015),
        ("llama-4-maverick", 17.0, 0.015),
        ("kimi-k2", 32.6, 0.01),
        ("glm-5", 40.0, 0.05),  # published without embedding and indexer
    ],
)
def test_active_parameters_equal_the_published_figure(
    name: str, billions: float, tolerance: float
) -> None:
    assert load_model(name).params_active == pytest.approx(billions * 1e9, rel=tolerance)


def test_gpt_oss_active_parameters_as_published_leave_out_the_embedding_table() -> None:
    model = load_model("gpt-oss-120b")

    assert model.params_active - model.embedding_params == pytest.approx(5.13e9, rel=0.005)


# An independent count: the tensors that a checkpoint's index would list, by name and shape.


def attention_tensors(c: dict[str, Any], layer: str) -> Iterator[tuple[str, int]]:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    dim = c.get("head_dim") or hidden // heads
    kv = c.get("num_key_value_heads", heads)
    for name, out in (("q", heads * dim), ("k", kv * dim), ("v", kv * dim)):
        yield f"{layer}.self_attn.{name}_proj.weight", out * hidden
        if c["model_type"] == "qwen2":
            yield f"{layer}.self_attn.{name}_proj.bias", out
    yield f"{layer}.self_attn.o_proj.weight", hidden * heads * dim


def latent_tensors(c: dict[str, Any], layer: str) -> Iterator[tuple[str, int]]:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    rank, rope, nope = c["kv_lora_rank"], c["qk_rope_head_dim"], c["qk_nope_head_dim"]
    if c["q_lora_rank"] is None:
        yield f"{layer}.self_attn.q_proj.weight", heads * (nope + rope) * hidden
    else:
        yield f"{layer}.self_attn.q_a_proj.weight", c["q_lora_rank"] * hidden
        yield f"{layer}.self_attn.q_a_layernorm.weight", c["q_lora_rank"]
        yield f"{layer}.self_attn.q_b_proj.weight", heads * (nope + rope) * c["q_lora_rank"]
    yield f"{layer}.self_attn.kv_a_proj_with_mqa.weight", (rank + rope) * hidden
    yield f"{layer}.self_attn.kv_a_layernorm.weight", rank
    yield f"{layer}.self_attn.kv_b_proj.weight", heads * (nope + c["v_head_dim"]) * rank
    yield f"{layer}.self_attn.o_proj.weight", hidden * heads * c["v_head_dim"]


def gated_tensors(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, int]]:
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield f"{prefix}.{name}.weight", hidden * width


def ffn_tensors(c: dict[str, Any], layer: str, index: int) -> Iterator[tuple[str, int]]:
    hidden = c["hidden_size"]
    if c["model_type"] == "mixtral":
        yield f"{layer}.block_sparse_moe.gate.weight", c["num_local_experts"] * hidden
        for expert in range(c["num_local_experts"]):
            for name in ("w1", "w2", "w3"):
                tensor = f"{layer}.block_sparse_moe.experts.{expert}.{name}.weight"
                yield tensor, hidden * c["intermediate_size"]
    elif "n_routed_experts" in c and index >= c["first_k_dense_replace"]:
        width = c["moe_intermediate_size"]
        yield f"{layer}.mlp.gate.weight", c["n_routed_experts"] * hidden
        if c["model_type"] == "deepseek_v3":
            yield f"{layer}.mlp.gate.e_score_correction_bias", c["n_routed_experts"]
        for expert in range(c["n_routed_experts"]):
            yield from gated_tensors(f"{layer}.mlp.experts.{expert}", hidden, width)
        shared = f"{layer}.mlp.shared_experts"
        yield from gated_tensors(shared, hidden, width * c["n_shared_experts"])
    else:
        yield from gated_tensors(f"{layer}.mlp", hidden, c["intermediate_size"])


def tensors(c: dict[str, Any]) -> Iterator[tuple[str, int]]:
    hidden = c["hidden_size"]
    yield "model.embed_tokens.weight", c["vocab_size"] * hidden
    yield "model.norm.weight", hidden
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", c["vocab_size"] * hidden
    for index in range(c["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", hidden
        yield f"{layer}.post_attention_layernorm.weight", hidden
        yield from (latent_tensors if "kv_lora_rank" in c else attention_tensors)(c, layer)
        yield from ffn_tensors(c, layer, index)


ENUMERATED = [
    name
    for name in NAMES
    if bundled(name)["model_type"] in {"llama", "qwen2", "mixtral", "deepseek_v2", "deepseek_v3"}
]


@pytest.mark.parametrize("name", ENUMERATED)
def test_parameters_equal_the_sum_over_the_tensors_of_a_checkpoint(name: str) -> None:
    index = dict(tensors(bundled(name)))

    assert load_model(name).params == sum(index.values())


def test_the_enumeration_can_fail() -> None:
    config = bundled("qwen2.5-7b")
    without_biases = {key: n for key, n in tensors(config) if not key.endswith("bias")}

    assert read(config).params != sum(without_biases.values())


# --- cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("llama-3.1-70b", 163_840),  # 327,680 bytes in bf16
        ("llama-2-7b", 262_144),  # MHA
        ("deepseek-v3", 61 * 576),  # one latent and one rotary key
        ("glm-5", 78 * 576),
        ("gemma-2-9b", 2 * 8 * 256 * 42),
        ("qwen3.5-397b-a17b", 15 * 2 * 2 * 256),  # one layer in four
    ],
)
def test_elements_that_a_token_adds_to_the_cache(name: str, elements: int) -> None:
    assert load_model(name).kv_elements_per_token == elements


@pytest.mark.parametrize(
    ("name", "window", "local_layers", "layers"),
    [
        ("mistral-7b-v0.1", 4096, 32, 32),
        ("gemma-2-9b", 4096, 21, 42),
        ("gemma-3-27b", 1024, 52, 62),
        ("gpt-oss-120b", 128, 18, 36),
        ("llama-4-scout", 8192, 36, 48),
    ],
)
def test_local_layers_stop_growing_at_their_window(
    name: str, window: int, local_layers: int, layers: int
) -> None:
    model = load_model(name)
    per_layer = model.kv_elements_per_token // layers
    grown = model.kv_elements(window + 1000) - model.kv_elements(window)

    assert model.kv_elements(window) == window * layers * per_layer
    assert grown == 1000 * (layers - local_layers) * per_layer


def test_a_model_without_windows_grows_by_the_same_amount_with_every_token() -> None:
    model = load_model("mistral-7b-v0.3")

    assert model.kv_elements(100_000) == 100_000 * model.kv_elements_per_token


def test_linear_attention_keeps_a_state_and_no_tokens() -> None:
    model = load_model("qwen3.5-397b-a17b")
    linear = [group for group in model.attention if group.state_elements]
    channels = 2 * 16 * 128 + 64 * 128

    assert [group.layers for group in linear] == [45]
    assert linear[0].state_elements == 64 * 128 * 128 + channels * 3
    assert model.kv_elements(0) == 45 * linear[0].state_elements
    assert model.kv_elements(1000) - model.kv_elements(0) == 1000 * model.kv_elements_per_token


def test_sparse_attention_caches_an_index_key_in_the_layers_that_choose() -> None:
    every_layer, one_in_four = load_model("glm-5"), load_model("glm-5.2")

    assert every_layer.kv_elements(10) == 10 * 78 * (576 + 128)
    assert [group.layers for group in one_in_four.attention] == [21, 57]
    assert one_in_four.kv_elements(10) == 10 * (78 * 576 + 21 * 128)


# --- tensor parallelism ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("llama-3.1-70b", [1, 2, 4, 8, 16, 32, 64]),
        ("qwen2.5-7b", [1, 2, 4, 28]),
        ("qwen2.5-14b", [1, 2, 4, 8, 40]),
        ("smollm2-135m", [1, 3, 9]),
        ("deepseek-v3", [1, 2, 4, 8, 16, 32, 64]),
        ("qwen3.5-397b-a17b", [1, 2, 4, 8, 16]),
    ],
)
def test_tensor_parallel_degrees_split_the_heads(name: str, degrees: list[int]) -> None:
    assert load_model(name).legal_tp(64) == degrees


def test_more_ranks_than_kv_heads_replicate_the_cache() -> None:
    group = load_model("llama-3.1-70b").attention[0]

    assert [group.kv_replication(tp) for tp in (1, 8, 16, 64)] == [1, 1, 2, 8]
    assert group.kv_heads_per_rank(8) == group.kv_heads_per_rank(16) == 1
    assert group.kv_heads_per_rank(4) == 2


def test_every_rank_holds_the_whole_latent() -> None:
    group = load_model("deepseek-v3").attention[0]

    assert group.kv_replication(8) == 8
    assert 0 < group.params_replicated_per_layer < group.params_per_layer


# --- fields ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-3.1-70b", "bf16"),
        ("deepseek-v3", "fp8-block"),
        ("minimax-m2.5", "fp8-block"),
        ("gpt-oss-120b", "mxfp4"),
        ("kimi-k2.5", "int4-g32"),
    ],
)
def test_the_published_quantization_is_the_native_format(name: str, expected: str) -> None:
    assert load_model(name).native_format == expected
    assert weight_format(expected).name == expected


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4-g128"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, "int4-g64"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
    ],
)
def test_common_quantizations_are_known(section: dict[str, Any], expected: str) -> None:
    model = read(bundled("llama-3.1-8b") | {"quantization_config": section})

    assert model.native_format == expected


def test_an_unknown_quantization_is_an_error_and_not_bf16() -> None:
    with pytest.raises(SpecError, match="'bitsandbytes'") as caught:
        read(bundled("llama-3.1-8b") | {"quantization_config": {"quant_method": "bitsandbytes"}})

    assert "remove quantization_config" in caught.value.hint


def test_absent_kv_heads_and_head_size_mean_what_transformers_means() -> None:
    config = bundled("llama-2-7b")
    without = {k: v for k, v in config.items() if k not in {"num_key_value_heads", "head_dim"}}
    null = config | {"num_key_value_heads": None, "head_dim": None}

    assert read(without).attention == read(null).attention == read(config).attention


@pytest.mark.parametrize(("name", "tied"), [("llama-2-7b", False), ("gemma-2-9b", True)])
def test_an_absent_tie_is_the_architectures_own(name: str, tied: bool) -> None:
    config = {k: v for k, v in bundled(name).items() if k != "tie_word_embeddings"}

    assert (read(config).head_params == 0) == tied
    assert read(config | {"tie_word_embeddings": not tied}).head_params == (
        read(config).embedding_params if tied else 0
    )


def test_all_missing_fields_are_named_in_one_error() -> None:
    config = bundled("deepseek-v3")
    for key in ("kv_lora_rank", "vocab_size", "n_routed_experts"):
        del config[key]

    with pytest.raises(SpecError) as caught:
        read(config)

    for key in ("kv_lora_rank", "vocab_size", "n_routed_experts"):
        assert key in str(caught.value)
    assert "hidden_size" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "4096"}, "hidden_size is '4096', not a whole number"),
        ({"hidden_size": -4096}, "hidden_size is -4096"),
        ({"vocab_size": 10**10}, "vocab_size is 10000000000, not a whole number from 1 to"),
        ({"num_hidden_layers": 32.5}, "num_hidden_layers is 32.5"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_attention_heads": 30}, "not a multiple of num_attention_heads 30"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads 5"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', not true or false"),
        ({"text_config": 3}, "text_config is not an object"),
        ({"quantization_config": "fp8"}, "quantization_config is not an object"),
        ({"model_type": None}, "lacks model_type"),
        ({"model_type": "mamba9"}, "architecture 'mamba9' is not known"),
    ],
)
def test_a_wrong_field_is_an_error_that_names_it(change: dict[str, Any], message: str) -> None:
    config = bundled("llama-3.1-8b")
    assert read(config).params == 8_030_261_248  # the control: unchanged, it is read

    with pytest.raises(SpecError, match=message):
        read(config | change)


def test_layer_types_must_cover_the_layers() -> None:
    config = bundled("gpt-oss-20b")

    with pytest.raises(SpecError, match="layer_types has 2 entries for 24 layers"):
        read(config | {"layer_types": ["full_attention"] * 2})
    with pytest.raises(SpecError, match="layer_types is not a list of"):
        read(config | {"layer_types": ["mamba"] * 24})


def test_an_unknown_architecture_says_which_are_known_and_how_to_add_one() -> None:
    with pytest.raises(SpecError) as caught:
        read({"model_type": "brand_new"})

    assert "llama, llama4" in caught.value.hint
    assert "add-a-model.md" in caught.value.hint


DAMAGE: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-3, 70) | st.text(max_size=3) | st.just([]), max_size=4),
    st.dictionaries(st.sampled_from(["quant_method", "config_groups", "bits"]), st.integers()),
)
ONE_OF_EACH = sorted({bundled(name)["model_type"]: name for name in NAMES}.values())


@given(data=st.data())
def test_a_damaged_config_is_read_or_refused_and_never_a_traceback(data: st.DataObject) -> None:
    config = bundled(data.draw(st.sampled_from(ONE_OF_EACH)))
    section = config.get("text_config", config)
    keys = [key for key in section if not key.startswith("_")]
    for key in data.draw(st.lists(st.sampled_from(keys), max_size=4)):
        section.pop(key, None)
    for key in data.draw(st.lists(st.sampled_from(keys), max_size=3)):
        section[key] = data.draw(DAMAGE)

    refusal, model = None, None
    try:
        model = read(config)
    except SpecError as error:
        refusal = str(error)

    if model is None:
        assert refusal is not None
        assert "model 'test'" in refusal
    else:
        assert model.params >= model.params_active > 0
        assert model.kv_elements(100) >= 0


# --- names and paths ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("meta-llama/Llama-3.1-70B-Instruct", "llama-3.1-70b"),
        ("META-LLAMA/llama-3.1-70b-instruct", "llama-3.1-70b"),
        ("Llama-3.1-70B", "llama-3.1-70b"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-r1"),
        ("Qwen/Qwen3-32B", "qwen3-32b"),
        ("openai/gpt-oss-120b", "gpt-oss-120b"),
        ("zhipuai/GLM-5", "glm-5"),
        ("gptj-6b", "gpt-j-6b"),
    ],
)
def test_published_ids_find_the_model_in_any_case(alias: str, name: str) -> None:
    assert load_model(alias).name == name


def test_every_alias_leads_to_a_bundled_model_and_hides_none() -> None:
    aliases = json.loads(models.ALIASES.read_text())

    assert set(aliases.values()) <= set(NAMES)
    assert not set(aliases) & set(NAMES)
    assert all(alias == alias.casefold() for alias in aliases)


def test_an_unknown_name_is_an_error_with_the_nearest_names() -> None:
    with pytest.raises(SpecError, match=r"unknown model 'llama-3\.1-71b'") as caught:
        load_model("llama-3.1-71b")

    assert "llama-3.1-70b" in caught.value.hint
    assert "or pass a path to its config.json" in caught.value.hint


@pytest.mark.parametrize("name", ["", "a" * 5000, "nul\0", "~nobody-here/x", "org/model"])
def test_what_cannot_be_a_path_is_an_unknown_name(name: str) -> None:
    with pytest.raises(SpecError, match="unknown model"):
        load_model(name)


def test_a_config_file_and_its_folder_are_the_same_model(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(bundled("qwen2.5-7b")))

    from_file, from_folder = load_model(str(folder / "config.json")), load_model(str(folder))

    assert from_file == from_folder
    assert from_file.name == "my-model"
    assert from_file.params == load_model("qwen2.5-7b").params


def test_a_bundled_name_is_not_taken_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "qwen3-8b").mkdir()
    (tmp_path / "qwen3-8b" / "config.json").write_text(json.dumps(bundled("qwen2.5-7b")))
    monkeypatch.chdir(tmp_path)

    assert load_model("qwen3-8b").architecture == "qwen3"
    assert load_model("./qwen3-8b").architecture == "qwen2"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "cannot read model config"),
        (lambda p: p.write_text("{"), "is not JSON"),
        (lambda p: p.write_text("[" * 100_000), "is not JSON"),
        (lambda p: p.write_text("[]"), "is not a JSON object"),
        (lambda p: p.write_bytes(b"\xff\xfe"), "is not UTF-8"),
        (lambda p: p.mkdir(), "holds no config.json"),
    ],
)
def test_an_unreadable_file_is_an_error_that_names_it(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "broken.json"
    make(path)

    with pytest.raises(InputError, match=message) as caught:
        load_model(str(path))

    assert "broken.json" in str(caught.value)


def test_reading_one_model_opens_one_config(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    read_config = models._read_config
    monkeypatch.setattr(
        models, "_read_config", lambda path: opened.append(path) or read_config(path)
    )
    models._read_bundled.cache_clear()

    load_model("qwen3-32b")
    assert [path.name for path in opened] == ["qwen3-32b.json"]

    list(known_models().values())  # the control: all of them are opened when all are asked for
    assert len(opened) == len(NAMES)


def test_loading_a_model_does_not_import_numpy() -> None:
    code = (
        "import sys; from tierline.catalog.models import load_model; load_model('qwen3-32b');"
        "print('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"


def test_every_architecture_has_a_bundled_model() -> None:
    used = set()
    for name in NAMES:
        config = bundled(name)
        kind = config.get("text_config", config).get("model_type", config["model_type"])
        used.add(kind.removesuffix("_text"))

    assert used == set(ARCHITECTURES)


@pytest.mark.parametrize("name", NAMES)
def test_every_bundled_model_says_where_its_shapes_come_from(name: str) -> None:
    assert bundled(name)["_hf_id"] == load_model(name).hf_id
    assert load_model(bundled(name)["_hf_id"]).name == name
    assert bundled(name)["_source"] == load_model(name).source
    assert load_model(name).source
