"""From a `config.json` to a `Decoder`: one file for each architecture.

`checkpoint` calls `decoder_of`.  Adding an architecture is one file here, one line in the
table, and one entry in `tests/tiny_checkpoints.py`, which the parity tests then run against
transformers: docs/internals/add-an-architecture.md walks through it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tierline.base.errors import SpecError
from tierline.catalog.config import Fields
from tierline.engine.decoder import Decoder
from tierline.engine.models import (
    deepseek_v2,
    gemma3,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)
from tierline.engine.models.parts import fields_of

# By the class that `architectures` names, and by `model_type` for configs without.
ARCHITECTURES: Mapping[str, Callable[[Fields], Decoder]] = {
    "DeepseekV2ForCausalLM": deepseek_v2.decoder,
    "Gemma3ForCausalLM": gemma3.decoder,
    "LlamaForCausalLM": llama.decoder,
    "MistralForCausalLM": mistral.decoder,
    "MixtralForCausalLM": mixtral.decoder,
    "Qwen2ForCausalLM": qwen2.decoder,
    "Qwen3ForCausalLM": qwen3.decoder,
    "Qwen3MoeForCausalLM": qwen3_moe.decoder,
}
MODEL_TYPES: Mapping[str, str] = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def decoder_of(config: Mapping[str, Any]) -> Decoder:
    """The network that a `config.json` describes.

    Raises SpecError for an architecture that is not known, for missing fields, and for what
    a config asks for and the engine does not compute.
    """
    named = config.get("architectures")
    kind = config.get("model_type")
    name = named[0] if isinstance(named, list) and named else MODEL_TYPES.get(str(kind), kind)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise SpecError(
            f"the engine does not know the architecture {name!r}",
            hint=f"known: {known}; another one is one file and one test,"
            " see docs/internals/add-an-architecture.md",
        )
    return ARCHITECTURES[name](fields_of(config))
