"""Qwen2 and Qwen2.5: biases on queries, keys and values; a window only where asked for."""

from tierline.catalog.config import Fields
from tierline.engine.decoder import Decoder, Layer
from tierline.engine.models import parts


def decoder(fields: Fields) -> Decoder:
    """Layers from `max_window_layers` on have the window, if there is one."""
    ffn = parts.dense(fields)
    layers = [
        Layer(attention=parts.attention(fields, window_tokens=window, bias=True), ffn=ffn)
        for window in windows(fields)
    ]
    return parts.decoder(fields, "qwen2", layers, parts.names(parts.LLAMA_LAYER))


def windows(fields: Fields) -> list[int | None]:
    """The window of each layer of a Qwen: off unless `use_sliding_window`."""
    layers = parts.layer_count(fields)
    if not fields.flag("use_sliding_window", False):
        return [None] * layers
    first = fields.count("max_window_layers", 28, least=0)
    window = fields.count("sliding_window", 4096)
    local = parts.kinds_of_layers(fields, layers, lambda number: number >= first)
    return [window if is_local else None for is_local in local]
