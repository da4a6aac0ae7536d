"""Qwen3: norms on the heads of queries and keys instead of Qwen2's biases."""

from tierline.catalog.config import Fields
from tierline.engine.decoder import Attention, Decoder, Layer
from tierline.engine.models import parts
from tierline.engine.models.qwen2 import windows


def decoder(fields: Fields) -> Decoder:
    """A dense Qwen3."""
    ffn = parts.dense(fields)
    layers = [Layer(attention=one, ffn=ffn) for one in attentions(fields)]
    return parts.decoder(fields, "qwen3", layers, parts.names(parts.LLAMA_LAYER))


def attentions(fields: Fields) -> list[Attention]:
    """The attention of each layer; heads are 128 wide where the config does not say."""
    bias = fields.flag("attention_bias", False)
    return [
        parts.attention(
            fields, head_dim=128, window_tokens=window, bias=bias, out_bias=bias, qk_norm=True
        )
        for window in windows(fields)
    ]
