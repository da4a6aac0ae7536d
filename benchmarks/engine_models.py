"""The checkpoints that engines are compared on: the same weights in every form a peer reads.

`bench_engine` and `bench_engine_load` call this.  Two models:

    random   Qwen2.5-0.5B's shape (494.0 M parameters) in bf16 with random weights, written by
             transformers; the GGUF beside it holds the same numbers for llama.cpp.
    demo     SmolLM2-135M-Instruct from the GGUF it is shipped in (Q4_1, embedding Q8_0), which
             llama.cpp and tierline read themselves; transformers and vLLM get the same weights
             dequantised, in bf16.

Each is written once into a folder that is kept, beside its place and then renamed, so that an
interrupted run leaves no half of one.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from tierline.engine.checkpoint import open_checkpoint

RANDOM: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 151_645,
}
# safetensors name within a layer -> GGUF name; what lies outside of layers.
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One set of weights in the forms that engines read."""

    name: str
    title: str
    folder: Path  # config.json and safetensors in bf16
    gguf: Path
    own: Path  # which of the two tierline opens
    vocabulary: int

    @property
    def weight_bytes(self) -> int:
        """Of the bf16 form: what one decoded token reads, as embeddings are tied."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    @property
    def gguf_bytes(self) -> int:
        """Of the GGUF form."""
        return self.gguf.stat().st_size


def random_model(folder: Path) -> Model:
    """Written at the first call, 25 s."""
    place = folder / "random"
    if not place.exists():
        with _beside(place) as scratch:
            _write_random(scratch)
    return _model("random", "Qwen2.5-0.5B shape, random, bf16", place, place / "model.gguf")


def demo_model(folder: Path, gguf_path: Path) -> Model:
    """The bf16 form of the GGUF is written at the first call."""
    place = folder / f"demo-{gguf_path.stat().st_size}"
    if not place.exists():
        with _beside(place) as scratch:
            checkpoint = open_checkpoint(gguf_path)
            config = {**checkpoint.config, "torch_dtype": "bfloat16"}
            (scratch / "config.json").write_text(json.dumps(config))
            tensors = {n: checkpoint.tensor(n, torch.bfloat16) for n in checkpoint.shapes}
            save_file(
                {name: values.clone() for name, values in tensors.items()},
                scratch / "model.safetensors",
                metadata={"format": "pt"},
            )
    return _model("demo", "SmolLM2-135M-Instruct", place, gguf_path, own=gguf_path)


def _model(name: str, title: str, folder: Path, gguf_path: Path, own: Path | None = None) -> Model:
    config = json.loads((folder / "config.json").read_text())
    return Model(
        name=name,
        title=title,
        folder=folder,
        gguf=gguf_path,
        own=own or folder,
        vocabulary=config["vocab_size"],
    )


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A scratch folder that takes its place at the end, or goes."""
    scratch = place.with_name(place.name + ".unfinished")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        scratch.rename(place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_random(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**RANDOM)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, values in model.named_parameters():
        if name.endswith("bias"):  # zeros would hide a peer that forgets them
            torch.nn.init.normal_(values, std=0.02)
    model.save_pretrained(folder)
    del model
    _write_gguf(folder, folder / "model.gguf")


def _write_gguf(folder: Path, path: Path) -> None:
    """The same numbers for llama.cpp, with a vocabulary that is a count and nothing else."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(RANDOM["max_position_embeddings"])
    writer.add_embedding_length(RANDOM["hidden_size"])
    writer.add_block_count(RANDOM["num_hidden_layers"])
    writer.add_feed_forward_length(RANDOM["intermediate_size"])
    writer.add_head_count(RANDOM["num_attention_heads"])
    writer.add_head_count_kv(RANDOM["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(RANDOM["rms_norm_eps"])
    writer.add_rope_freq_base(RANDOM["rope_theta"])
    writer.add_vocab_size(RANDOM["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, values in _gguf_tensors(folder):
        if values.dtype == torch.bfloat16:
            raw = values.view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, values.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Matrices in bf16, vectors widened to fp32 as llama.cpp wants them."""
    for name, values in load_file(folder / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        if stem in OUTSIDE_NAMES:
            theirs = f"{OUTSIDE_NAMES[stem]}.{kind}"
        else:
            number, _, part = stem.removeprefix("model.layers.").partition(".")
            theirs = f"blk.{number}.{LAYER_NAMES[part]}.{kind}"
        yield theirs, values if values.ndim == 2 else values.float()
