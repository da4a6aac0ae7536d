"""Mixtral: Mistral with experts instead of the feed-forward network of every layer."""

from tierline.catalog.config import Fields
from tierline.engine.decoder import Decoder, Layer
from tierline.engine.models import parts

LAYER = (
    parts.LLAMA_LAYER
    | {"router": "block_sparse_moe.gate"}
    | parts.experts_names("block_sparse_moe.experts", "w1", "w3", "w2")
)


def decoder(fields: Fields) -> Decoder:
    """The weights of the chosen experts always sum to one."""
    layer = Layer(
        attention=parts.attention(fields, window_tokens=fields.count_or_none("sliding_window")),
        ffn=parts.experts(
            fields, count="num_local_experts", width="intermediate_size", normalised=True
        ),
    )
    layers = [layer] * parts.layer_count(fields)
    return parts.decoder(fields, "mixtral", layers, parts.names(LAYER))
