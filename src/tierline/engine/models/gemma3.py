"""Gemma 3, text only: local layers with a window and one rotation, global ones with another.

Norms come before and after both halves of a layer and store w - 1; embeddings are scaled.
"""

from tierline.catalog.config import Fields
from tierline.engine.decoder import Attention, Decoder, Layer
from tierline.engine.models import parts
from tierline.engine.rope import rope_of

LAYER = parts.LLAMA_LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffn_norm": "post_feedforward_layernorm",
}


def decoder(fields: Fields) -> Decoder:
    """One global layer after five local ones, unless `layer_types` says otherwise."""
    if fields.flag("use_bidirectional_attention", False):
        raise fields.error("use_bidirectional_attention is true: that is an encoder")
    if fields.has("attn_logit_softcapping"):
        raise fields.error("attn_logit_softcapping is set, which the engine does not compute")
    count = parts.layer_count(fields)
    period = fields.count("sliding_window_pattern", fields.count("_sliding_window_pattern", 6))
    local = parts.kinds_of_layers(fields, count, lambda number: (number + 1) % period != 0)
    ffn = parts.dense(fields, activation_key="hidden_activation", activation="gelu_pytorch_tanh")
    by_kind = {is_local: attention(fields, is_local=is_local) for is_local in sorted(set(local))}
    return parts.decoder(
        fields,
        "gemma3",
        [Layer(attention=by_kind[is_local], ffn=ffn, post_norms=True) for is_local in local],
        parts.names(LAYER),
        tied=True,
        norm_offset=1.0,
        embedding_scale=fields.count("hidden_size") ** 0.5,
    )


def attention(fields: Fields, *, is_local: bool) -> Attention:
    """Of a local layer, or of a global one: `rope_scaling` is for global ones alone."""
    dim = fields.count("head_dim", 256)
    bias = fields.flag("attention_bias", False)
    rope = rope_of(
        fields,
        dim=dim,
        theta=10_000.0 if is_local else 1_000_000.0,
        theta_key="rope_local_base_freq" if is_local else "rope_theta",
        kind="sliding_attention" if is_local else "full_attention",
        scaled=not is_local,
    )
    return parts.attention(
        fields,
        head_dim=dim,
        rope=rope,
        scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        window_tokens=fields.count("sliding_window", 4096) if is_local else None,
        bias=bias,
        out_bias=bias,
        qk_norm=True,
    )
