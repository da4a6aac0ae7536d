"""A GGUF file under the names that a Hugging Face checkpoint would use.

`checkpoint` asks for three things: the metadata, a `config.json` made from it (so that one
architecture reader serves both kinds of file), and where every tensor lies. The header is
read here: `gguf.GGUFReader` takes two seconds for a vocabulary of 49,152 tokens, this takes
a tenth of one. Type numbers and block sizes are the `gguf` package's.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tierline.base.errors import SpecError
from tierline.base.names import lookup
from tierline.engine.gguf_blocks import BLOCKS
from tierline.engine.mapped import MappedFile, Stored

PLAIN = ("F32", "F16", "BF16")
VERSIONS = (2, 3)
DEPTH_MAX = 4  # of arrays in arrays
_SCALARS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a GGUF file says before its data."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]  # by GGUF name; shapes outermost dimension first
    rope_factors: tuple[float, ...] = ()  # what divides each rotary frequency; none: nothing does


class _Cursor:
    """Reads little-endian values one after the other and never past the end."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.data, self.at = file, file.map(), 0

    def damaged(self, what: str) -> SpecError:
        return SpecError(
            f"{str(self.file.path)!r} is not a whole GGUF file: {what}",
            hint="download or copy it again",
        )

    def take(self, count: int) -> int:
        """Move on by `count` bytes; returns where they start."""
        start = self.at
        if count > self.file.size_bytes - start:
            raise self.damaged(
                f"{count} bytes expected at {start}, the file has {self.file.size_bytes}"
            )
        self.at = start + count
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        size = self.number("Q")
        start = self.take(size)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError:
            raise self.damaged(f"the text at {start} is not UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        """One metadata value of type `kind`; arrays are lists."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth == DEPTH_MAX:
            raise self.damaged(f"a value of unknown type {kind} at {self.at}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            code = _SCALARS[kind]
            start = self.take(count * struct.calcsize(code))
            return list(struct.unpack_from(f"<{count}{code}", self.data, start))
        if count > self.file.size_bytes - self.at:
            raise self.damaged(f"an array of {count} values at {self.at}")
        return [self.value(kind, depth + 1) for _ in range(count)]


def read_header(file: MappedFile) -> Header:
    """The header of `file`, every tensor checked to lie inside it.

    Raises `SpecError` that says what was expected and what was found.
    """
    cursor = _Cursor(file)
    if file.map()[:4] != b"GGUF":
        raise cursor.damaged("it does not start with 'GGUF'")
    cursor.take(4)
    version = cursor.number("I")
    if version not in VERSIONS:
        raise SpecError(
            f"{str(file.path)!r} is GGUF version {version}",
            hint="versions 2 and 3 are read, little-endian; convert the model again",
        )
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.text()
        if key in metadata:
            raise cursor.damaged(f"key {key!r} comes twice")
        metadata[key] = cursor.value(cursor.number("I"))
    tensors = _tensors(cursor, tensor_count, metadata)
    factors: tuple[float, ...] = ()
    stored = tensors.get("rope_freqs.weight")
    if stored is not None:
        if stored.type != "F32" or stored.size_bytes > 1 << 16:
            raise cursor.damaged(f"rope_freqs.weight is {stored.type} {list(stored.shape)}")
        count = stored.size_bytes // 4
        factors = struct.unpack_from(f"<{count}f", file.map(), stored.offset)
    return Header(metadata=metadata, tensors=tensors, rope_factors=factors)


def _tensors(cursor: _Cursor, count: int, metadata: Mapping[str, Any]) -> dict[str, Stored]:
    """The table of tensors."""
    infos = []
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.number("I")
        if not 1 <= dimensions <= 4:
            raise cursor.damaged(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        infos.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.damaged(f"alignment {alignment!r} is not a power of two")
    start = -(-cursor.at // alignment) * alignment
    found: dict[str, Stored] = {}
    for name, shape, kind, offset in infos:
        if name in found:
            raise cursor.damaged(f"tensor {name!r} comes twice")
        found[name] = _stored(cursor, name, shape, kind, start + offset)
    return found


def _stored(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Stored:
    """One tensor of the table, checked."""
    try:
        type_ = GGMLQuantizationType(kind)
    except ValueError:
        raise cursor.damaged(f"tensor {name!r} has unknown type number {kind}") from None
    elements, block_bytes = GGML_QUANT_SIZES[type_]
    if not all(0 < n < 1 << 40 for n in shape) or shape[-1] % elements:
        raise cursor.damaged(f"tensor {name!r} has shape {list(shape)} in {type_.name} blocks")
    size_bytes = math.prod(shape) // elements * block_bytes
    if offset + size_bytes > cursor.file.size_bytes:
        raise cursor.damaged(
            f"tensor {name!r} ends at byte {offset + size_bytes}, "
            f"the file has {cursor.file.size_bytes}"
        )
    if type_.name not in (*PLAIN, *BLOCKS):
        raise SpecError(
            f"{str(cursor.file.path)!r}: tensor {name!r} is stored as {type_.name}",
            hint=f"types read: {', '.join((*PLAIN, *BLOCKS))}; quantise the model to one of them",
        )
    return Stored(file=0, offset=offset, size_bytes=size_bytes, shape=shape, type=type_.name)


# -- as a Hugging Face checkpoint -------------------------------------------------------------

_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
    "ffn_up_exps": "block_sparse_moe.experts.*.w3",
    "ffn_down_exps": "block_sparse_moe.experts.*.w2",
}
_QWEN_MOE = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IGNORED = ("rope_freqs.weight",)  # goes into the config instead


@dataclass(frozen=True, slots=True, kw_only=True)
class _Architecture:
    """How GGUF spells one architecture."""

    model_type: str
    class_name: str
    layer_names: Mapping[str, str]
    interleaved: bool = False  # whether q and k rows are in interleaved rotary order
    norm_added: float = 0.0  # what the converter added to every norm
    config: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda _: {}


def _gemma3(values: Mapping[str, Any]) -> dict[str, Any]:
    """What Gemma 3's config has beside the common keys."""
    head_dim = values.get("attention.key_length", 256)
    return {
        "sliding_window_pattern": values.get("attention.sliding_window_pattern", 6),
        "rope_local_base_freq": values.get("rope.freq_base_swa", 10_000.0),
        "query_pre_attn_scalar": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
    }


_KNOWN = {
    "llama": _Architecture(
        model_type="llama", class_name="LlamaForCausalLM", layer_names=_LLAMA, interleaved=True
    ),
    "mixtral": _Architecture(  # GGUF calls it llama, too, and gives it experts
        model_type="mixtral",
        class_name="MixtralForCausalLM",
        layer_names=_LLAMA | _MIXTRAL,
        interleaved=True,
    ),
    "qwen2": _Architecture(model_type="qwen2", class_name="Qwen2ForCausalLM", layer_names=_LLAMA),
    "qwen3": _Architecture(model_type="qwen3", class_name="Qwen3ForCausalLM", layer_names=_LLAMA),
    "qwen3moe": _Architecture(
        model_type="qwen3_moe", class_name="Qwen3MoeForCausalLM", layer_names=_LLAMA | _QWEN_MOE
    ),
    "gemma3": _Architecture(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        layer_names=_LLAMA | _GEMMA,
        norm_added=1.0,
        config=_gemma3,
    ),
}

# config.json's key: GGUF's, after the architecture's name.
_COUNTS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_OPTIONAL = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}


def config_of(header: Header, *, where: str) -> dict[str, Any]:
    """The `config.json` that this file's model would have.

    Raises `SpecError` for an architecture that is not known here, and for missing values.
    """
    kind, values = _architecture(header, where=where)
    missing = [key for key in _COUNTS.values() if type(values.get(key)) is not int]
    if missing:
        raise SpecError(f"{where}: no whole number for {', '.join(missing)}")
    for key in (*_OPTIONAL.values(), "rope.freq_base"):
        value = values.get(key, 0)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise SpecError(f"{where}: {key} is {str(value)[:40]!r}, not one number")
    config: dict[str, Any] = {
        "architectures": [kind.class_name],
        "model_type": kind.model_type,
        "vocab_size": _vocabulary(header, where=where),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_theta": values.get("rope.freq_base", 10_000.0),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
    }
    config |= {ours: values[theirs] for ours, theirs in _COUNTS.items()}
    config |= {ours: values[theirs] for ours, theirs in _OPTIONAL.items() if theirs in values}
    if "rms_norm_eps" in config:  # the file holds float32: 1e-05 comes as 9.999999747378752e-06
        config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    experts = values.get("expert_count")
    if experts:
        if type(experts) is not int or not 0 < experts < 1 << 16:
            raise SpecError(f"{where}: expert_count is {str(experts)[:40]!r}")
        name = "num_local_experts" if kind.model_type == "mixtral" else "num_experts"
        config[name] = experts
    scaling = _rope_scaling(values, where=where)
    if any(factor != 1.0 for factor in header.rope_factors):
        scaling = _llama_3_scaling(header.rope_factors, config["rope_theta"], where=where)
    if scaling is not None:
        config["rope_scaling"] = scaling
    for name in ("bos", "eos"):
        token = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            config[f"{name}_token_id"] = token
    return config | kind.config(values)


def _architecture(header: Header, *, where: str) -> tuple[_Architecture, dict[str, Any]]:
    """How this file's architecture is spelt, and its values without the prefix."""
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise SpecError(f"{where}: general.architecture is {name!r}, not a name")
    prefix = f"{name}."
    values = {
        key.removeprefix(prefix): value
        for key, value in header.metadata.items()
        if key.startswith(prefix)
    }
    if name == "llama" and values.get("expert_count"):
        name = "mixtral"
    return lookup("GGUF architecture", name, _KNOWN, error=SpecError), values


def _vocabulary(header: Header, *, where: str) -> int:
    """Rows of the embedding."""
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise SpecError(f"{where}: no embedding 'token_embd.weight' with two dimensions")
    return embedding.shape[0]


def _rope_scaling(values: Mapping[str, Any], *, where: str) -> dict[str, Any] | None:
    """`rope_scaling` from GGUF's values."""
    kind = values.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise SpecError(f"{where}: rope scaling {kind!r}", hint="known: linear, yarn, none")
    scaling = {"rope_type": kind, "factor": values.get("rope.scaling.factor", 1.0)}
    original = values.get("rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama_3_scaling(factors: tuple[float, ...], theta: float, *, where: str) -> dict[str, Any]:
    """The rule behind Llama 3's factors, which a config states and GGUF does not.

    Published models differ in `factor` alone (8 in 3.1, 32 in 3.2), the largest that is stored.
    Raises `SpecError` unless the rule gives all of the file's factors.
    """
    factor, original = max(factors), 8192
    for i, stored in enumerate(factors):
        turns = original * theta ** (-i / len(factors)) / (2 * math.pi)  # over the old context
        smooth = min(max((turns - 1) / 3, 0.0), 1.0)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if not abs(stored - expected) <= 1e-3 * expected:
            raise SpecError(
                f"{where}: rotary factor {i} is {stored:g}, Llama 3's rule gives {expected:g}",
                hint="use the safetensors checkpoint, whose config states the rule",
            )
    return {
        "rope_type": "llama3",
        "factor": round(factor, 3),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def renamed(header: Header, config: Mapping[str, Any], *, where: str) -> dict[str, Stored]:
    """The tensors by the names and in the shapes that a Hugging Face checkpoint has."""
    kind, _ = _architecture(header, where=where)
    found: dict[str, Stored] = {}
    for name, stored in header.tensors.items():
        if name not in _IGNORED:
            found |= _as_hugging_face(name, stored, kind, config, where=where)
    return found


def _as_hugging_face(
    name: str, stored: Stored, kind: _Architecture, config: Mapping[str, Any], *, where: str
) -> dict[str, Stored]:
    """One GGUF tensor under its other name; a stack of experts becomes one tensor for each."""
    stem, _, suffix = name.rpartition(".")
    layer = stem.removeprefix("blk.").partition(".") if stem.startswith("blk.") else None
    target = kind.layer_names.get(layer[2]) if layer else _OUTSIDE.get(stem)
    if target is None or suffix not in ("weight", "bias"):
        raise SpecError(f"{where}: tensor {name!r} has no place in a {kind.model_type} model")
    heads = 0
    if kind.interleaved and layer and layer[2] in ("attn_q", "attn_k"):
        key = "num_attention_heads" if layer[2] == "attn_q" else "num_key_value_heads"
        heads = config.get(key, config["num_attention_heads"])
        if type(heads) is not int or heads <= 0 or stored.shape[0] % (2 * heads):
            raise SpecError(f"{where}: tensor {name!r}, {list(stored.shape)}, has {heads} heads")
    added = kind.norm_added if stem.endswith("norm") else 0.0
    full = f"model.layers.{layer[0]}.{target}.{suffix}" if layer else f"{target}.{suffix}"
    stored = Stored(
        file=0,
        offset=stored.offset,
        size_bytes=stored.size_bytes,
        shape=stored.shape,
        type=stored.type,
        interleaved_heads=heads,
        added=added,
    )
    if "*" not in full:
        return {full: stored}
    experts = config.get("num_local_experts", config.get("num_experts"))
    if len(stored.shape) != 3 or stored.shape[0] != experts:
        raise SpecError(f"{where}: tensor {name!r}, {list(stored.shape)}, of {experts} experts")
    return _experts(full, stored)


def _experts(name: str, stack: Stored) -> dict[str, Stored]:
    """[experts, rows, columns] as one tensor for each expert."""
    count, size_bytes = stack.shape[0], stack.size_bytes // stack.shape[0]
    return {
        name.replace("*", str(number)): Stored(
            file=0,
            offset=stack.offset + number * size_bytes,
            size_bytes=size_bytes,
            shape=stack.shape[1:],
            type=stack.type,
        )
        for number in range(count)
    }
