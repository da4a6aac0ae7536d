"""Qwen3 with experts in most layers."""

from tierline.catalog.config import Fields
from tierline.engine.decoder import Decoder, Dense, Experts, Layer
from tierline.engine.models import parts
from tierline.engine.models.qwen3 import attentions

LAYER = parts.LLAMA_LAYER | parts.experts_names("mlp.experts", "gate_proj", "up_proj", "down_proj")


def decoder(fields: Fields) -> Decoder:
    """Experts in every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name."""
    step = fields.count("decoder_sparse_step", 1)
    dense_only = fields.whole_numbers("mlp_only_layers") or []
    routed = parts.experts(
        fields,
        count="num_experts" if fields.has("num_experts") else "num_local_experts",
        width="moe_intermediate_size",
        normalised=fields.flag("norm_topk_prob", False),
    )
    layers = []
    for number, attention in enumerate(attentions(fields)):
        sparse = number not in dense_only and (number + 1) % step == 0
        ffn: Dense | Experts = routed if sparse else parts.dense(fields)
        layers.append(Layer(attention=attention, ffn=ffn))
    return parts.decoder(fields, "qwen3_moe", layers, parts.names(LAYER))
