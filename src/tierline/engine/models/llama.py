"""Llama 2 and 3, and what kept their shape: SmolLM2, the distilled DeepSeeks."""

from tierline.catalog.config import Fields
from tierline.engine.decoder import Decoder, Layer
from tierline.engine.models import parts


def decoder(fields: Fields) -> Decoder:
    """Every layer alike; biases, if any, on all four projections."""
    bias = fields.flag("attention_bias", False)
    layer = Layer(
        attention=parts.attention(fields, bias=bias, out_bias=bias), ffn=parts.dense(fields)
    )
    layers = [layer] * parts.layer_count(fields)
    return parts.decoder(fields, "llama", layers, parts.names(parts.LLAMA_LAYER))
