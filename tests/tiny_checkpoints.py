"""Small random checkpoints, written by transformers: what the tests of the engine load.

`tiny_checkpoint("qwen3", folder)` writes `config.json`, safetensors and a byte-level
`tokenizer.json`, as a published model comes.  Weights are large enough that logits depend
on the context: with the library's usual 0.02 every position would say nearly the same.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 264  # 256 bytes, and eight special tokens
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<a>", "<b>", "<c>")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}

# Architecture -> (the class, what its config has beside the common fields).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 24, "head_dim": 32}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        _EXPERTS
        | {"head_dim": 16, "num_experts": 8, "moe_intermediate_size": 48, "mlp_only_layers": [1]}
        | {"norm_topk_prob": True},
    ),
    "mixtral": ("Mixtral", _EXPERTS | {"num_local_experts": 4, "sliding_window": None}),
    "gemma3": (
        "Gemma3",
        {"num_hidden_layers": 4, "head_dim": 32, "sliding_window": 20}
        | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
        | {"query_pre_attn_scalar": 8},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        _EXPERTS
        | {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32}
        | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24}
        | {"first_k_dense_replace": 1, "n_routed_experts": 8, "n_shared_experts": 2}
        | {"moe_intermediate_size": 32, "routed_scaling_factor": 1.5, "n_group": 2}
        | {"topk_group": 1, "topk_method": "group_limited_greedy"},
    ),
}


def tiny_config(architecture: str, **changes: Any) -> transformers.PreTrainedConfig:
    """The config of a tiny model; `changes` replace or add fields."""
    name, own = ARCHITECTURES[architecture]
    suffix = "TextConfig" if architecture == "gemma3" else "Config"
    config = getattr(transformers, name + suffix)(**(_COMMON | own | changes))
    assert isinstance(config, transformers.PreTrainedConfig)
    return config


def tiny_model(architecture: str, *, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A random tiny model in float32, ready to run; equal seeds give equal weights."""
    config = tiny_config(architecture, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, ARCHITECTURES[architecture][0] + "ForCausalLM")(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                _fill(name, weight)
    model.eval()
    assert isinstance(model, transformers.PreTrainedModel)
    return model


def _fill(name: str, weight: torch.Tensor) -> None:
    """Norms near what they start as, products that amplify a little, so that depth matters."""
    if "q_norm" in name or "k_norm" in name:
        weight.add_(1).add_(torch.randn_like(weight), alpha=0.2)  # sharp enough to choose
    elif "norm" in name:
        weight.add_(torch.randn_like(weight), alpha=0.2)
    elif name.endswith("bias"):
        weight.normal_(std=0.3)
    elif "embed" in name:
        weight.normal_(std=0.1)
    else:
        weight.normal_(std=1.5 / weight.shape[-1] ** 0.5)


def tiny_checkpoint(architecture: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a random tiny checkpoint of one of `ARCHITECTURES`; returns its folder."""
    path = folder / f"tiny-{architecture}"
    tiny_model(architecture, seed=seed, **changes).save_pretrained(path)
    write_tokenizer(path)
    return path


def tiny_chat_checkpoint(folder: Path, **changes: Any) -> Path:
    """A tiny llama that can be talked to."""
    path = tiny_checkpoint("llama", folder, **changes)
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return path


def write_tokenizer(folder: Path) -> None:
    """A `tokenizer.json` with one token for each byte, so that every text has tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
