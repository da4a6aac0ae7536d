"""Mistral: Llama with a sliding window on every layer, or on none."""

from tierline.catalog.config import Fields
from tierline.engine.decoder import Decoder, Layer
from tierline.engine.models import parts


def decoder(fields: Fields) -> Decoder:
    """The window is `sliding_window`; later versions leave it out."""
    layer = Layer(
        attention=parts.attention(fields, window_tokens=fields.count_or_none("sliding_window")),
        ffn=parts.dense(fields),
    )
    layers = [layer] * parts.layer_count(fields)
    return parts.decoder(fields, "mistral", layers, parts.names(parts.LLAMA_LAYER))
