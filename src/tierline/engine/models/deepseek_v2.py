"""DeepSeek-V2: latent attention, and experts beside shared ones after the first layers.

Rotated dimensions lie interleaved in the checkpoint and stay so.
"""

from tierline.catalog.config import Fields
from tierline.engine.decoder import Decoder, Dense, Experts, LatentAttention, Layer
from tierline.engine.models import parts
from tierline.engine.rope import rope_of, rope_parameters, yarn_scale

LAYER = (
    parts.LLAMA_LAYER
    | {
        "q_down": "self_attn.q_a_proj",
        "q_down_norm": "self_attn.q_a_layernorm",
        "q_up": "self_attn.q_b_proj",
        "kv_down": "self_attn.kv_a_proj_with_mqa",
        "kv_norm": "self_attn.kv_a_layernorm",
        "kv_up": "self_attn.kv_b_proj",
    }
    | {f"shared.{part}": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")}
    | parts.experts_names("mlp.experts", "gate_proj", "up_proj", "down_proj")
)


def decoder(fields: Fields) -> Decoder:
    """The first `first_k_dense_replace` layers are dense."""
    attention, routed = latent_attention(fields), experts(fields)
    first = fields.count("first_k_dense_replace", 0, least=0)
    layers = []
    for number in range(parts.layer_count(fields)):
        ffn: Dense | Experts = parts.dense(fields) if number < first else routed
        layers.append(Layer(attention=attention, ffn=ffn))
    return parts.decoder(fields, "deepseek_v2", layers, parts.names(LAYER))


def latent_attention(fields: Fields) -> LatentAttention:
    """YaRN sharpens the scores, too, by the square of `mscale_all_dim`'s factor."""
    nope, rope_dim = fields.count("qk_nope_head_dim"), fields.count("qk_rope_head_dim")
    bias = fields.flag("attention_bias", False)
    inner = Fields(rope_parameters(fields), where=f"{fields.where}, rope")
    scale = (nope + rope_dim) ** -0.5
    if inner.has("mscale_all_dim") and inner.has("factor"):
        scale *= yarn_scale(inner.number("factor"), inner.number("mscale_all_dim")) ** 2
    return LatentAttention(
        heads=fields.count("num_attention_heads"),
        nope_dim=nope,
        rope_dim=rope_dim,
        v_head_dim=fields.count("v_head_dim"),
        kv_rank=fields.count("kv_lora_rank"),
        q_rank=fields.count_or_none("q_lora_rank"),
        rope=rope_of(fields, dim=rope_dim, interleaved=True),
        scale=scale,
        down_bias=bias,
        out_bias=bias,
    )


def experts(fields: Fields) -> Experts:
    """Chosen among all, or among those of the best groups."""
    method = fields.word("topk_method", "greedy", known=("greedy", "group_limited_greedy"))
    width = fields.count("moe_intermediate_size")
    # Published code normalises where the config says so; transformers ignores it, and all
    # published V2 configs say no, so yes is an error rather than a choice between the two.
    if fields.flag("norm_topk_prob", False):
        raise fields.error("norm_topk_prob is true, which implementations compute differently")
    grouped = method == "group_limited_greedy"
    return parts.experts(
        fields,
        count="n_routed_experts",
        width="moe_intermediate_size",
        normalised=False,
        scale=fields.number("routed_scaling_factor", 1.0),
        shared_intermediate=width * fields.count("n_shared_experts", 0, least=0),
        groups=fields.count("n_group") if grouped else 1,
        groups_active=fields.count("topk_group") if grouped else 1,
    )
