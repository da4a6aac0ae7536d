"""What the readers of architectures share: heads, feed-forward, names, and the whole decoder.

Each `models/<architecture>.py` calls these with the fields of a `config.json`.  What a config
asks for and the engine does not compute is an error here, never a silent difference.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tierline.catalog.config import LAYERS_MAX, Fields
from tierline.engine.decoder import Attention, Decoder, Dense, Experts, Layer, Rope
from tierline.engine.rope import rope_of

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

# Our names in a layer -> the published ones of Llama, which most architectures keep.
LLAMA_LAYER: dict[str, str] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "router": "mlp.gate",
}


def fields_of(config: Mapping[str, Any]) -> Fields:
    """The fields of a `config.json`."""
    return Fields(config, where="config.json")


def names(layer: Mapping[str, str]) -> Callable[[str], str]:
    """Our name of a weight -> the checkpoint's, given the names inside a layer.

    Experts and shared experts are entries `experts.*.gate`, `shared.gate`, ....
    """
    outside = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}

    def name(ours: str) -> str:
        stem, kind = (ours[:-5], "bias") if ours.endswith(".bias") else (ours, "weight")
        if not stem.startswith("layers."):
            return f"{outside[stem]}.{kind}"
        _, number, rest = stem.split(".", 2)
        if rest.startswith("experts."):
            _, expert, part = rest.split(".")
            inner = layer[f"experts.*.{part}"].replace("*", expert)
        else:
            inner = layer[rest]
        return f"model.layers.{number}.{inner}.{kind}"

    return name


def experts_names(where: str, gate: str, up: str, down: str) -> dict[str, str]:
    """Names inside a layer of routed experts that are published one by one."""
    ours = {"gate": gate, "up": up, "down": down}
    return {f"experts.*.{part}": f"{where}.*.{theirs}" for part, theirs in ours.items()}


def layer_count(fields: Fields) -> int:
    """Decoder layers."""
    return fields.count("num_hidden_layers", most=LAYERS_MAX)


def _head_dim(fields: Fields, default: int | None) -> int:
    """The size of a head: given, or the architecture's, or what heads share of the hidden size."""
    if default is not None or fields.has("head_dim"):
        return fields.count("head_dim", default)
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    fields.insist(
        hidden % heads == 0,
        f"hidden_size {hidden} is not a multiple of num_attention_heads {heads},"
        " and there is no head_dim",
    )
    return max(hidden // heads, 1)


def attention(
    fields: Fields,
    *,
    head_dim: int | None = None,
    rope: Rope | None = None,
    scale: float | None = None,
    window_tokens: int | None = None,
    bias: bool = False,
    out_bias: bool = False,
    qk_norm: bool = False,
) -> Attention:
    """Grouped-query attention; without `rope` and `scale` the usual ones.

    `head_dim` is what holds where the config does not say.
    """
    dim = _head_dim(fields, head_dim)
    heads = fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", heads)
    fields.insist(
        heads % kv_heads == 0,
        f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
    )
    fields.insist(dim % 2 == 0, f"head_dim {dim} is odd, so it cannot be rotated")
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        rope=rope or rope_of(fields, dim=dim),
        scale=dim**-0.5 if scale is None else scale,
        window_tokens=window_tokens,
        bias=bias,
        out_bias=out_bias,
        qk_norm=qk_norm,
    )


def dense(fields: Fields, *, activation_key: str = "hidden_act", activation: str = "silu") -> Dense:
    """The gated feed-forward network; `activation` is what holds where the config is silent."""
    if fields.flag("mlp_bias", False):
        raise fields.error("mlp_bias is true, which the engine does not compute")
    word = fields.word(activation_key, activation, known=ACTIVATIONS)
    return Dense(intermediate=fields.count("intermediate_size"), activation=ACTIVATIONS[word])


def experts(
    fields: Fields,
    *,
    count: str,
    width: str,
    normalised: bool,
    scale: float = 1.0,
    shared_intermediate: int = 0,
    groups: int = 1,
    groups_active: int = 1,
) -> Experts:
    """Routed experts with SiLU; `count` and `width` are the names of the fields."""
    fields.word("hidden_act", "silu", known=("silu",))
    number, active = fields.count(count), fields.count("num_experts_per_tok")
    fields.insist(number % groups == 0, f"{count} {number} is not a multiple of n_group {groups}")
    fields.insist(groups_active <= groups, f"topk_group {groups_active} is more than {groups}")
    open_to_a_token = number // groups * groups_active
    fields.insist(
        active <= open_to_a_token,
        f"num_experts_per_tok {active} is more than the {open_to_a_token} open to a token",
    )
    return Experts(
        experts=number,
        experts_active=active,
        intermediate=fields.count(width),
        normalised=normalised,
        scale=scale,
        shared_intermediate=shared_intermediate,
        groups=groups,
        groups_active=groups_active,
    )


def kinds_of_layers(fields: Fields, layers: int, default: Callable[[int], bool]) -> list[bool]:
    """For each layer whether it attends to a window: `layer_types`, else the default pattern."""
    known = ("full_attention", "sliding_attention")
    kinds = fields.kinds("layer_types", layers=layers, known=known)
    if kinds is None:
        return [default(number) for number in range(layers)]
    return [kind == "sliding_attention" for kind in kinds]


def decoder(
    fields: Fields,
    architecture: str,
    layers: list[Layer],
    weight_names: Callable[[str], str],
    *,
    tied: bool = False,
    norm_offset: float = 0.0,
    embedding_scale: float = 1.0,
) -> Decoder:
    """The network around its layers; `tied` is what holds where the config does not say.

    Raises SpecError that names every field that was missing.
    """
    softcap = (
        fields.number("final_logit_softcapping") if fields.has("final_logit_softcapping") else None
    )
    whole = Decoder(
        architecture=architecture,
        hidden=fields.count("hidden_size"),
        vocabulary=fields.count("vocab_size"),
        positions_max=fields.count("max_position_embeddings", 2048),
        layers=tuple(layers),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        weight_names=weight_names,
        norm_offset=norm_offset,
        embedding_scale=embedding_scale,
        tied=fields.flag("tie_word_embeddings", tied),
        logit_softcap=softcap,
    )
    fields.finish()
    return whole
