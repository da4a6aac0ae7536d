"""A GGUF file opens to the weights and the config of the model it was converted from, its
blocks are the numbers their definition says, and a damaged file is refused before allocation."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from gguf import quants
from gguf.constants import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from demo_model import demo_model
from tierline.base.errors import SpecError
from tierline.engine.checkpoint import open_checkpoint
from tierline.engine.gguf_blocks import BLOCKS, dequantise
from tierline.engine.gguf_file import read_header
from tierline.engine.mapped import MappedFile
from tierline.engine.models import decoder_of
from tiny_checkpoints import tiny_checkpoint

Kind = GGMLQuantizationType

# Blocks, element by element, as ggml's C sources define them


def half(raw: bytes) -> float:
    return float(struct.unpack("<e", raw)[0])


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def scalar_q8_0(b: bytes, i: int) -> float:
    return half(b[:2]) * signed(b[2 + i])


def nibble_32(packed: bytes, i: int) -> int:
    return packed[i] & 15 if i < 16 else packed[i - 16] >> 4


def scalar_q4_0(b: bytes, i: int) -> float:
    return half(b[:2]) * (nibble_32(b[2:], i) - 8)


def scalar_q4_1(b: bytes, i: int) -> float:
    return half(b[:2]) * nibble_32(b[4:], i) + half(b[2:4])


def scalar_q4_k(b: bytes, i: int) -> float:
    run, q = i // 32, b[4:16]
    if run < 4:
        scale, minimum = q[run] & 63, q[run + 4] & 63
    else:
        scale = (q[run + 4] & 15) | (q[run - 4] >> 6) << 4
        minimum = (q[run + 4] >> 4) | (q[run] >> 6) << 4
    byte = b[16 + 32 * (run // 2) + i % 32]
    return half(b[:2]) * scale * (byte >> 4 if run % 2 else byte & 15) - half(b[2:4]) * minimum


def scalar_q6_k(b: bytes, i: int) -> float:
    part, quarter, at = i // 128, i % 128 // 32, i % 32
    low = b[64 * part + at + 32 * (quarter % 2)]
    low = low & 15 if quarter < 2 else low >> 4
    high = b[128 + 32 * part + at] >> (2 * quarter) & 3
    scale = signed(b[192 + 8 * part + at // 16 + 2 * quarter])
    return half(b[208:]) * scale * ((low | high << 4) - 32)


SCALAR: dict[str, Callable[[bytes, int], float]] = {
    "Q8_0": scalar_q8_0,
    "Q4_0": scalar_q4_0,
    "Q4_1": scalar_q4_1,
    "Q4_K": scalar_q4_k,
    "Q6_K": scalar_q6_k,
}


def random_blocks(kind: str, blocks: int) -> torch.Tensor:
    """Any bytes are a block, but for scales that are infinite or no number."""
    size_bytes = BLOCKS[kind][1]
    raw = np.random.default_rng(7).integers(0, 256, (blocks, size_bytes), dtype=np.uint8)
    for at in {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,)):
        raw[:, at + 1] &= 0b1011_1111
    return torch.from_numpy(raw.reshape(-1))


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_the_numbers_of_their_definition(kind: str) -> None:
    elements, size_bytes, _ = BLOCKS[kind]
    raw = random_blocks(kind, 40)
    blocks = [bytes(b) for b in raw.view(-1, size_bytes).numpy()]
    expected = [SCALAR[kind](block, i) for block in blocks for i in range(elements)]

    found = dequantise(kind, raw, dtype=torch.float32)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_the_numbers_of_the_reference_package(kind: str) -> None:
    """More of them than one pass takes, so that the seams are seen."""
    elements, size_bytes, _ = BLOCKS[kind]
    raw = random_blocks(kind, 20 * (1 << 14) // elements + 3)
    reference = quants.dequantize(raw.view(-1, size_bytes).numpy(), Kind[kind])

    assert np.array_equal(dequantise(kind, raw, dtype=torch.float32), reference.reshape(-1))
    assert torch.equal(
        dequantise(kind, raw, dtype=torch.bfloat16),
        torch.from_numpy(reference.reshape(-1)).bfloat16(),
    )


# Whole models, written as the converter writes them


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """What the converter does to Llama's q and k: row h, j, half becomes row h, half, j."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weight.shape)


TO_GGUF = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "rope_freqs": "rope_freqs",
}
EXPERTS = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}


def gguf_tensors(
    kind: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> dict[str, np.ndarray]:
    """The converter's names, orders and offsets."""
    names = TO_GGUF | (GEMMA if kind == "gemma3" else {})
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name in sorted(tensors, key=lambda n: [int(p) if p.isdigit() else 0 for p in n.split(".")]):
        weight, (stem, _, suffix) = tensors[name].numpy(), name.rpartition(".")
        if kind == "gemma3" and "norm" in stem:
            weight = weight + 1
        if stem in OUTSIDE:
            found[f"{OUTSIDE[stem]}.{suffix}"] = weight
            continue
        layer, _, inner = stem.removeprefix("model.layers.").partition(".")
        if ".experts." in inner:
            stacks.setdefault(f"blk.{layer}.{EXPERTS[inner[-2:]]}.weight", []).append(weight)
            continue
        if kind == "llama" and names[inner] in heads:
            weight = interleaved(weight, heads[names[inner]])
        found[f"blk.{layer}.{names[inner]}.{suffix}"] = weight
    return found | {name: np.stack(weights) for name, weights in stacks.items()}


def write_gguf(
    path: Path, kind: str, config: dict[str, Any], tensors: dict[str, torch.Tensor], store: str
) -> Path:
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if "num_local_experts" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_token_list(["a", "b"])
    for name, weight in gguf_tensors(kind, config, tensors).items():
        if store != "F32" and weight.ndim == 2 and weight.shape[1] % 32 == 0:
            blocks = quants.quantize(weight, Kind[store])
            raw_shape = None if store == "F16" else blocks.shape
            writer.add_tensor(name, blocks, raw_shape=raw_shape, raw_dtype=Kind[store])
        else:
            writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((folder / "config.json").read_text())
    return config, safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *(("llama", "llama"), ("mixtral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")),
        ("gemma3", "gemma3"),
    ],
)
def test_a_converted_model_is_the_model(tmp_path: Path, architecture: str, kind: str) -> None:
    changes = {"query_pre_attn_scalar": 32, "num_hidden_layers": 6}
    changes |= {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
    folder = tiny_checkpoint(
        architecture, tmp_path, **(changes if architecture == "gemma3" else {})
    )
    config, tensors = read_folder(folder)
    path = write_gguf(tmp_path / "model.gguf", kind, config, tensors, "F32")
    checkpoint = open_checkpoint(path)
    ours, theirs = decoder_of(checkpoint.config), decoder_of(config)

    assert checkpoint.shapes == {n: tuple(t.shape) for n, t in tensors.items()}
    for name, tensor in tensors.items():
        added = architecture == "gemma3" and "norm" in name  # + 1 - 1 rounds
        tolerance = {"rtol": 0.0, "atol": 1e-6 if added else 0.0}
        torch.testing.assert_close(checkpoint.tensor(name), tensor, **tolerance)
    for field in ("architecture", "hidden", "vocabulary", "layers", "norm_eps", "tied"):
        assert getattr(ours, field) == getattr(theirs, field), field


@pytest.mark.parametrize("store", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_rows_come_in_the_models_order(tmp_path: Path, store: str) -> None:
    config, tensors = read_folder(tiny_checkpoint("llama", tmp_path))
    checkpoint = open_checkpoint(
        write_gguf(tmp_path / "model.gguf", "llama", config, tensors, store)
    )
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            assert checkpoint.compact(name) is None
            continue
        blocks = quants.quantize(tensor.numpy(), Kind[store])  # a row's blocks know no other row
        expected = quants.dequantize(blocks, Kind[store])

        assert np.array_equal(checkpoint.tensor(name).float().numpy(), expected), name
        compact = checkpoint.compact(name)
        if store in ("F16", "BF16"):
            assert compact is None
        else:
            assert compact is not None
            assert compact[0] == store
            assert np.array_equal(compact[1].numpy(), blocks)
    names = {"F16": torch.float16, "BF16": torch.bfloat16}
    assert checkpoint.dtype == names.get(store, store)


def test_queries_in_the_files_order_would_be_seen(tmp_path: Path) -> None:
    """Negative control of the two tests above."""
    _, tensors = read_folder(tiny_checkpoint("llama", tmp_path))
    name = "model.layers.0.self_attn.q_proj.weight"

    assert not np.array_equal(interleaved(tensors[name].numpy(), 4), tensors[name].numpy())


LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def with_factors(tmp_path: Path, factors: np.ndarray) -> tuple[Path, dict[str, Any]]:
    """A tiny Llama 3 whose file holds these rotary factors."""
    config, tensors = read_folder(
        tiny_checkpoint("llama", tmp_path, rope_parameters=LLAMA_3, head_dim=64)
    )
    tensors["rope_freqs.weight"] = torch.from_numpy(factors.astype(np.float32))
    return write_gguf(tmp_path / "m.gguf", "llama", config, tensors, "F32"), config


def test_llama_3s_rotary_factors_become_their_rule(tmp_path: Path) -> None:
    """Factors as transformers derives them; a file of another rule is refused."""
    rule = transformers.LlamaConfig(rope_parameters=LLAMA_3, head_dim=64)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](rule, "cpu")
    plain = 500_000.0 ** (-np.arange(32) / 32)
    factors = plain / scaled.numpy()
    path, config = with_factors(tmp_path, factors)
    checkpoint = open_checkpoint(path)

    assert len(set(factors.round(3))) > 3  # control: the rule does something
    assert decoder_of(checkpoint.config).layers == decoder_of(config).layers
    path, _ = with_factors(tmp_path, factors * np.linspace(1, 2, 32))
    with pytest.raises(SpecError, match="Llama 3's rule gives"):
        open_checkpoint(path)


# The header, and damage


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("small")
    config, tensors = read_folder(tiny_checkpoint("llama", folder, num_hidden_layers=1))
    path = write_gguf(folder / "model.gguf", "llama", config, tensors, "Q8_0")
    return folder, path.read_bytes()


def test_the_header_is_what_the_reference_package_reads(small: tuple[Path, bytes]) -> None:
    path = small[0] / "model.gguf"
    path.write_bytes(small[1])
    header, reference = read_header(MappedFile(path)), gguf.GGUFReader(path)
    theirs = {k: f.contents() for k, f in reference.fields.items() if not k.startswith("GGUF.")}

    assert header.metadata == theirs
    assert {n: (s.offset, s.size_bytes, s.type) for n, s in header.tensors.items()} == {
        t.name: (t.data_offset, t.n_bytes, t.tensor_type.name) for t in reference.tensors
    }


@given(st.data())
def test_truncated_anywhere_it_is_refused(small: tuple[Path, bytes], data: st.DataObject) -> None:
    folder, raw = small
    path = folder / "cut.gguf"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])

    with pytest.raises(SpecError):
        open_checkpoint(path)


@given(st.data())
def test_with_bytes_changed_it_is_read_or_refused(
    small: tuple[Path, bytes], data: st.DataObject
) -> None:
    folder, raw = small
    changed = bytearray(raw)
    header_bytes = raw.index(b"output_norm.weight") + 200
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, header_bytes))] = data.draw(st.integers(0, 255))
    path = folder / "changed.gguf"
    path.write_bytes(bytes(changed))
    try:
        checkpoint = open_checkpoint(path)
    except SpecError:
        return

    for name, shape in checkpoint.shapes.items():
        if len(shape) <= 2:
            assert tuple(checkpoint.tensor(name).shape) == shape


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        assert old in raw
        return raw.replace(old, new, 1)

    return change


def numbered(at: int, code: str, value: int) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        packed = struct.pack(code, value)
        return raw[:at] + packed + raw[at + len(packed) :]

    return change


def of_type(number: int) -> Callable[[bytes], bytes]:
    """The embedding, as another type of block."""

    def change(raw: bytes) -> bytes:
        at = raw.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
        return numbered(at, "<I", number)(raw)

    return change


@pytest.mark.parametrize(
    ("damage", "message", "hint"),
    [
        (replaced(b"GGUF", b"GGML"), "does not start with 'GGUF'", "again"),
        (numbered(4, "<I", 1), "GGUF version 1", "2 and 3"),
        (numbered(4, ">I", 3), "GGUF version 50331648", "little-endian"),
        (numbered(8, "<Q", 2**63), "expected|not UTF-8|comes twice|dimensions", "again"),
        (numbered(16, "<Q", 2**63), "expected|not UTF-8|unknown type|comes twice", "again"),
        (replaced(b"llama", b"lemma"), "unknown GGUF architecture 'lemma'", "llama"),
        (replaced(b"block_count", b"black_count"), "no whole number for block_count", ""),
        (replaced(b"token_embd", b"taken_embd"), "no embedding", ""),
        (replaced(b"attn_norm", b"attn_form"), "has no place in a llama model", ""),
        (of_type(6), "stored as Q5_0", "Q4_1, Q8_0, Q4_K, Q6_K"),
        (of_type(99), "unknown type number 99", "again"),
        (of_type(12), r"has shape \[264, 64\] in Q4_K blocks", "again"),
        (of_type(0), "ends at byte|has", ""),
    ],
)
def test_damage_is_refused_and_said(
    small: tuple[Path, bytes], damage: Callable[[bytes], bytes], message: str, hint: str
) -> None:
    path = small[0] / "damaged.gguf"
    path.write_bytes(small[1])
    open_checkpoint(path)  # control: whole before
    changed = damage(small[1])
    if message.startswith("ends at"):
        changed = changed[: changed.index(b"token_embd") + 20_000]
    path.write_bytes(changed)

    with pytest.raises(SpecError, match=message) as caught:
        open_checkpoint(path)

    assert hint in caught.value.hint


# The real one


def test_the_demo_model_is_what_the_reference_package_reads() -> None:
    checkpoint = open_checkpoint(demo_model())
    header = read_header(MappedFile(checkpoint.path))
    name = "model.layers.7.mlp.down_proj.weight"
    stored = header.tensors["blk.7.ffn_down.weight"]
    raw = np.fromfile(checkpoint.path, np.uint8, count=stored.size_bytes, offset=stored.offset)
    expected = quants.dequantize(raw.reshape(stored.shape[0], -1), Kind.Q4_1)

    assert np.array_equal(checkpoint.tensor(name).numpy(), expected)
    assert checkpoint.dtype == "Q4_1"
    assert len(checkpoint.shapes) == 272
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.config["tie_word_embeddings"] is True
    decoder = decoder_of(checkpoint.config)
    assert (len(decoder.layers), decoder.hidden, decoder.vocabulary) == (30, 576, 49_152)
