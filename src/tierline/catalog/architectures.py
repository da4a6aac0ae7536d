"""One small function for each architecture: from the fields of a config to counts.

`models.model_from_config` calls the entry of `ARCHITECTURES` that the config's `model_type`
names. A function reads the fields it needs and answers `Parts`: attention groups,
feed-forward groups and norms. Embedding, head and positions are read in one place for all.

Adding an architecture is one function here, one entry in the table at the end, and one
bundled config with its published parameter count, which the tests then hold it to.

Counted are the weights that serve text: vision towers and multi-token-prediction layers
are left out, because no engine holds them when it serves tokens one at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tierline.catalog.config import LAYERS_MAX, Fields
from tierline.catalog.model import AttentionGroup, FfnGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an architecture knows of its own: everything but embedding and head."""

    attention: tuple[AttentionGroup, ...]
    ffn: tuple[FfnGroup, ...]
    norm_params: int
    head_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How to read one `model_type`: its function, and what its configs may leave out."""

    parts: Callable[[Fields], Parts]
    tied: bool = False  # tie_word_embeddings where the config does not say
    defaults: Mapping[str, Any] = field(default_factory=dict)  # where published configs rely on it
    renamed: Mapping[str, str] = field(default_factory=dict)  # their name -> the common name


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Grouped-query attention of one model."""

    hidden: int
    query: int
    kv: int
    dim: int

    @property
    def query_width(self) -> int:
        """Columns of the query projection."""
        return self.query * self.dim

    @property
    def kv_width(self) -> int:
        """Columns of the key projection, and of the value projection."""
        return self.kv * self.dim

    @property
    def qkv_bias(self) -> int:
        """Elements of the biases on queries, keys and values."""
        return self.query_width + 2 * self.kv_width

    @property
    def all_biases(self) -> int:
        """Elements of the biases on all four projections."""
        return self.qkv_bias + self.hidden


# --- what architectures share ---------------------------------------------------------------


def _layers(fields: Fields) -> int:
    return fields.count("num_hidden_layers", most=LAYERS_MAX)


def _heads(fields: Fields) -> Heads:
    """Heads as transformers reads them: KV heads default to MHA, head size to hidden / heads."""
    hidden = fields.count("hidden_size")
    query = fields.count("num_attention_heads")
    kv = fields.count("num_key_value_heads", query)
    if not fields.has("head_dim"):
        fields.insist(
            hidden % query == 0,
            f"hidden_size {hidden} is not a multiple of num_attention_heads {query},"
            " and there is no head_dim",
        )
    fields.insist(
        query % kv == 0,
        f"num_attention_heads {query} is not a multiple of num_key_value_heads {kv}",
    )
    return Heads(hidden=hidden, query=query, kv=kv, dim=fields.count("head_dim", hidden // query))


def _attention(
    heads: Heads, *, layers: int, extra: int = 0, local: int = 0, window: int | None = None
) -> tuple[AttentionGroup, ...]:
    """Groups of grouped-query layers: those that see everything, and `local` with a window.

    `extra` is what one layer has beside its four projections: biases, norms, gates, sinks.
    """
    local = 0 if window is None else local
    params = 2 * heads.hidden * (heads.query_width + heads.kv_width) + extra
    return tuple(
        AttentionGroup(
            layers=count,
            query_heads=heads.query,
            kv_heads=heads.kv,
            head_dim=heads.dim,
            v_head_dim=heads.dim,
            kv_elements_per_token=2 * heads.kv_width,
            params_per_layer=params,
            window_tokens=limit,
        )
        for count, limit in ((layers - local, None), (local, window))
        if count
    )


def _local_layers(fields: Fields, layers: int, default: Callable[[int], bool]) -> int:
    """How many layers attend to a window: what `layer_types` says, else the default pattern."""
    known = {"full_attention", "sliding_attention", "chunked_attention"}
    kinds = fields.kinds("layer_types", layers=layers, known=known)
    if kinds is None:
        return sum(default(index) for index in range(layers))
    return min(sum(kind != "full_attention" for kind in kinds), layers)


def _dense(fields: Fields, *, layers: int, hidden: int, extra: int = 0) -> tuple[FfnGroup, ...]:
    """Layers with a gated FFN (gate, up, down), or no group where there are no such layers."""
    if layers == 0:
        return ()
    params = 3 * hidden * fields.count("intermediate_size") + extra
    return (FfnGroup(layers=layers, dense_params_per_layer=params),)


def _experts(
    fields: Fields,
    *,
    layers: int,
    hidden: int,
    experts: str,
    size: str,
    shared_params: int = 0,
    bias: bool = False,  # on the three products of an expert
    router_bias: bool = False,
) -> tuple[FfnGroup, ...]:
    """Layers with routed gated experts; `experts` and `size` are the names of the fields."""
    count, width = fields.count(experts), fields.count(size)
    active = fields.count("num_experts_per_tok")
    fields.insist(active <= count, f"num_experts_per_tok {active} is more than {experts} {count}")
    if layers == 0:
        return ()
    group = FfnGroup(
        layers=layers,
        experts=count,
        experts_active=active,
        params_per_expert=3 * hidden * width + (2 * width + hidden if bias else 0),
        shared_params_per_layer=shared_params,
        router_params_per_layer=hidden * count + (count if router_bias else 0),
    )
    return (group,)


def _norms(layers: int, hidden: int, *, per_layer: int = 2) -> int:
    """RMS norms of all layers and the final one."""
    return (layers * per_layer + 1) * hidden


# --- dense ----------------------------------------------------------------------------------


def _llama(fields: Fields) -> Parts:
    """Llama 2 and 3, SmolLM2, DeepSeek's distilled Llamas."""
    layers, heads = _layers(fields), _heads(fields)
    bias = heads.all_biases if fields.flag("attention_bias", False) else 0
    ffn_bias = 2 * fields.count("intermediate_size") + heads.hidden
    return Parts(
        attention=_attention(heads, layers=layers, extra=bias),
        ffn=_dense(
            fields,
            layers=layers,
            hidden=heads.hidden,
            extra=ffn_bias if fields.flag("mlp_bias", False) else 0,
        ),
        norm_params=_norms(layers, heads.hidden),
    )


def _mistral(fields: Fields) -> Parts:
    """Mistral and Phi-3: a window on every layer, or on none; fused products count the same."""
    layers, heads = _layers(fields), _heads(fields)
    window = fields.count_or_none("sliding_window")
    return Parts(
        attention=_attention(heads, layers=layers, local=layers, window=window),
        ffn=_dense(fields, layers=layers, hidden=heads.hidden),
        norm_params=_norms(layers, heads.hidden),
    )


def _qwen_window(fields: Fields, layers: int) -> tuple[int, int | None]:
    """(Layers with a window, the window): off unless `use_sliding_window`."""
    if not fields.flag("use_sliding_window", False):
        return 0, None
    first = fields.count("max_window_layers", 28, least=0)
    local = _local_layers(fields, layers, lambda index: index >= first)
    return local, fields.count("sliding_window", 4096)


def _qwen2(fields: Fields) -> Parts:
    """Qwen2 and Qwen2.5: biases on queries, keys and values."""
    layers, heads = _layers(fields), _heads(fields)
    local, window = _qwen_window(fields, layers)
    return Parts(
        attention=_attention(
            heads, layers=layers, extra=heads.qkv_bias, local=local, window=window
        ),
        ffn=_dense(fields, layers=layers, hidden=heads.hidden),
        norm_params=_norms(layers, heads.hidden),
    )


def _qwen3_extra(fields: Fields, heads: Heads) -> int:
    """Norms on queries and keys, of one head's size; biases where the config asks."""
    return 2 * heads.dim + (heads.all_biases if fields.flag("attention_bias", False) else 0)


def _qwen3(fields: Fields) -> Parts:
    layers, heads = _layers(fields), _heads(fields)
    local, window = _qwen_window(fields, layers)
    extra = _qwen3_extra(fields, heads)
    return Parts(
        attention=_attention(heads, layers=layers, extra=extra, local=local, window=window),
        ffn=_dense(fields, layers=layers, hidden=heads.hidden),
        norm_params=_norms(layers, heads.hidden),
    )


def _gemma2(fields: Fields) -> Parts:
    """Every other layer is local; norms before and after both halves of a layer."""
    return _gemma(fields, period=2, qk_norm=False)


def _gemma3(fields: Fields) -> Parts:
    """One global layer after five local ones; norms on queries and keys."""
    period = fields.count("sliding_window_pattern", 6)
    return _gemma(fields, period=period, qk_norm=True)


def _gemma(fields: Fields, *, period: int, qk_norm: bool) -> Parts:
    layers, heads = _layers(fields), _heads(fields)
    bias = heads.all_biases if fields.flag("attention_bias", False) else 0
    return Parts(
        attention=_attention(
            heads,
            layers=layers,
            extra=bias + (2 * heads.dim if qk_norm else 0),
            local=_local_layers(fields, layers, lambda index: (index + 1) % period != 0),
            window=fields.count_or_none("sliding_window"),
        ),
        ffn=_dense(fields, layers=layers, hidden=heads.hidden),
        norm_params=_norms(layers, heads.hidden, per_layer=4),
    )


def _gptj(fields: Fields) -> Parts:
    """GPT-J: one layer norm (weight and bias) before both halves, an FFN without a gate."""
    layers, heads = _layers(fields), _heads(fields)
    width = fields.count("intermediate_size", 4 * heads.hidden)
    ffn = 2 * heads.hidden * width + width + heads.hidden
    return Parts(
        attention=_attention(heads, layers=layers),
        ffn=(FfnGroup(layers=layers, dense_params_per_layer=ffn),),
        norm_params=2 * _norms(layers, heads.hidden, per_layer=1),
        head_bias=True,
    )


def _falcon(fields: Fields) -> Parts:
    """Falcon: KV heads count only in the new decoder; before it one, or one for each query."""
    layers, heads = _layers(fields), _heads(fields)
    new_decoder = fields.flag("new_decoder_architecture", False)
    if not new_decoder:
        kv = 1 if fields.flag("multi_query", True) else heads.query
        heads = Heads(hidden=heads.hidden, query=heads.query, kv=kv, dim=heads.dim)
    bias = fields.flag("bias", False)
    width = fields.count("ffn_hidden_size", 4 * heads.hidden)
    ffn = 2 * heads.hidden * width + (width + heads.hidden if bias else 0)
    parallel = fields.flag("parallel_attn", True)
    norms = fields.count("num_ln_in_parallel_attn", 2) if new_decoder else (1 if parallel else 2)
    return Parts(
        attention=_attention(heads, layers=layers, extra=heads.all_biases if bias else 0),
        ffn=(FfnGroup(layers=layers, dense_params_per_layer=ffn),),
        norm_params=2 * _norms(layers, heads.hidden, per_layer=norms),
    )


# --- experts --------------------------------------------------------------------------------


def _mixtral(fields: Fields) -> Parts:
    layers, heads = _layers(fields), _heads(fields)
    window = fields.count_or_none("sliding_window")
    return Parts(
        attention=_attention(heads, layers=layers, local=layers, window=window),
        ffn=_experts(
            fields,
            layers=layers,
            hidden=heads.hidden,
            experts="num_local_experts",
            size="intermediate_size",
        ),
        norm_params=_norms(layers, heads.hidden),
    )


def _qwen3_moe(fields: Fields) -> Parts:
    """Experts in every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name."""
    layers, heads = _layers(fields), _heads(fields)
    step = fields.count("decoder_sparse_step", 1)
    dense_only = set(fields.whole_numbers("mlp_only_layers") or [])
    sparse = sum(i not in dense_only and (i + 1) % step == 0 for i in range(layers))
    local, window = _qwen_window(fields, layers)
    extra = _qwen3_extra(fields, heads)
    experts = _experts(
        fields,
        layers=sparse,
        hidden=heads.hidden,
        experts="num_experts" if fields.has("num_experts") else "num_local_experts",
        size="moe_intermediate_size",
    )
    return Parts(
        attention=_attention(heads, layers=layers, extra=extra, local=local, window=window),
        ffn=_dense(fields, layers=layers - sparse, hidden=heads.hidden) + experts,
        norm_params=_norms(layers, heads.hidden),
    )


def _gpt_oss(fields: Fields) -> Parts:
    """Alternating windows, biases everywhere, and one learned sink for each query head."""
    layers, heads = _layers(fields), _heads(fields)
    bias = heads.all_biases if fields.flag("attention_bias", True) else 0
    return Parts(
        attention=_attention(
            heads,
            layers=layers,
            extra=bias + heads.query,
            local=_local_layers(fields, layers, lambda index: index % 2 == 0),
            window=fields.count_or_none("sliding_window"),
        ),
        ffn=_experts(
            fields,
            layers=layers,
            hidden=heads.hidden,
            experts="num_local_experts",
            size="intermediate_size",
            bias=True,
            router_bias=True,
        ),
        norm_params=_norms(layers, heads.hidden),
    )


def _minimax_m2(fields: Fields) -> Parts:
    """Norms over all query heads together and all key heads together; a router correction."""
    layers, heads = _layers(fields), _heads(fields)
    normed = fields.flag("use_qk_norm", True)
    return Parts(
        attention=_attention(
            heads, layers=layers, extra=heads.query_width + heads.kv_width if normed else 0
        ),
        ffn=_experts(
            fields,
            layers=layers,
            hidden=heads.hidden,
            experts="num_local_experts",
            size="intermediate_size",
            router_bias=True,
        ),
        norm_params=_norms(layers, heads.hidden),
    )


def _llama4(fields: Fields) -> Parts:
    """Three of four layers attend in chunks; experts in every `interleave_moe_layer_step`-th.

    A chunk is kept like a window of its size, which is its most. Norms on queries and keys
    have no weights.
    """
    layers, heads = _layers(fields), _heads(fields)
    period = fields.count("no_rope_layer_interval", 4)
    ropes = fields.whole_numbers("no_rope_layers") or []
    local = sum(1 for rope in ropes[:layers] if rope) if ropes else layers - layers // period
    step = fields.count("interleave_moe_layer_step", 1)
    listed = fields.whole_numbers("moe_layers")
    sparse = layers // step if listed is None else sum(i in listed for i in range(layers))
    expert = 3 * heads.hidden * fields.count("intermediate_size")
    experts = _experts(
        fields,
        layers=sparse,
        hidden=heads.hidden,
        experts="num_local_experts",
        size="intermediate_size",
        shared_params=expert,
    )
    dense: tuple[FfnGroup, ...] = ()
    if sparse < layers:
        params = 3 * heads.hidden * fields.count("intermediate_size_mlp")
        dense = (FfnGroup(layers=layers - sparse, dense_params_per_layer=params),)
    window = fields.count_or_none("attention_chunk_size")
    return Parts(
        attention=_attention(heads, layers=layers, local=local, window=window),
        ffn=dense + experts,
        norm_params=_norms(layers, heads.hidden),
    )


# --- latent attention -----------------------------------------------------------------------


def _mla(
    fields: Fields, *, layers: int, index_params: int = 0, topk: int | None = None, indexed: int = 0
) -> AttentionGroup:
    """Multi-head latent attention: one latent and one rotary key for all heads.

    What goes down to the latents is on every rank; what comes up from them is split by head.
    """
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    nope, rope = fields.count("qk_nope_head_dim"), fields.count("qk_rope_head_dim")
    value, latent = fields.count("v_head_dim"), fields.count("kv_lora_rank")
    query_latent = fields.count_or_none("q_lora_rank")
    down = hidden * (latent + rope) + latent  # with the norm of the latent
    query_up = hidden * heads * (nope + rope)
    if query_latent is not None:
        down += hidden * query_latent + query_latent
        query_up = query_latent * heads * (nope + rope)
    if fields.flag("attention_bias", False):
        down += latent + rope + (query_latent or 0) + hidden
    up = query_up + latent * heads * (nope + value) + heads * value * hidden
    return AttentionGroup(
        layers=layers,
        query_heads=heads,
        kv_heads=1,
        head_dim=nope + rope,
        v_head_dim=value,
        kv_elements_per_token=latent + rope,
        params_per_layer=up + down + index_params,
        params_replicated_per_layer=down + index_params,
        latent=True,
        sparse_topk_tokens=topk,
        index_elements_per_token=indexed,
    )


def _indexed_mla(fields: Fields, *, layers: int) -> tuple[AttentionGroup, ...]:
    """MLA whose layers choose the tokens they attend to; some reuse the choice of another layer."""
    hidden, heads = fields.count("hidden_size"), fields.count("index_n_heads")
    dim, topk = fields.count("index_head_dim"), fields.count("index_topk")
    query_latent = fields.count("q_lora_rank")
    params = query_latent * heads * dim + hidden * dim + 2 * dim + hidden * heads
    kinds = fields.kinds("indexer_types", layers=layers, known={"full", "shared"})
    sharing = 0 if kinds is None else min(kinds.count("shared"), layers)
    groups = []
    if layers > sharing:
        groups.append(
            _mla(fields, layers=layers - sharing, index_params=params, topk=topk, indexed=dim)
        )
    if sharing:
        groups.append(_mla(fields, layers=sharing, topk=topk))
    return tuple(groups)


def _deepseek_ffn(fields: Fields, *, layers: int, router_bias: bool) -> tuple[FfnGroup, ...]:
    """Dense first layers, then routed and shared experts."""
    hidden = fields.count("hidden_size")
    first = fields.count("first_k_dense_replace", 0, least=0)
    every = fields.count("moe_layer_freq", 1)
    kinds = fields.kinds("mlp_layer_types", layers=layers, known={"dense", "sparse"})
    if kinds is None:
        sparse = sum(i >= first and i % every == 0 for i in range(layers))
    else:
        sparse = min(kinds.count("sparse"), layers)
    expert = 3 * hidden * fields.count("moe_intermediate_size")
    experts = _experts(
        fields,
        layers=sparse,
        hidden=hidden,
        experts="n_routed_experts",
        size="moe_intermediate_size",
        shared_params=expert * fields.count("n_shared_experts", 0, least=0),
        router_bias=router_bias,
    )
    return _dense(fields, layers=layers - sparse, hidden=hidden) + experts


def _deepseek_v2(fields: Fields) -> Parts:
    layers = _layers(fields)
    return Parts(
        attention=(_mla(fields, layers=layers),),
        ffn=_deepseek_ffn(fields, layers=layers, router_bias=False),
        norm_params=_norms(layers, fields.count("hidden_size")),
    )


def _deepseek_v3(fields: Fields) -> Parts:
    """DeepSeek-V3, R1 and Kimi-K2: as V2, and the router has a correction for each expert."""
    layers = _layers(fields)
    return Parts(
        attention=(_mla(fields, layers=layers),),
        ffn=_deepseek_ffn(fields, layers=layers, router_bias=True),
        norm_params=_norms(layers, fields.count("hidden_size")),
    )


def _deepseek_v32(fields: Fields) -> Parts:
    """DeepSeek-V3.2 and GLM-5: as V3, with an indexer that picks the tokens to attend to."""
    layers = _layers(fields)
    return Parts(
        attention=_indexed_mla(fields, layers=layers),
        ffn=_deepseek_ffn(fields, layers=layers, router_bias=True),
        norm_params=_norms(layers, fields.count("hidden_size")),
    )


# --- linear attention -----------------------------------------------------------------------


def _gated_delta(fields: Fields, *, layers: int, hidden: int) -> AttentionGroup:
    """Gated delta net: a matrix for each value head and a short convolution, nothing per token.

    Ranks split by key heads, so those stand for both kinds of heads here.
    """
    keys, values = fields.count("linear_num_key_heads"), fields.count("linear_num_value_heads")
    key_dim, value_dim = fields.count("linear_key_head_dim"), fields.count("linear_value_head_dim")
    kernel = fields.count("linear_conv_kernel_dim")
    fields.insist(
        values % keys == 0,
        f"linear_num_value_heads {values} is not a multiple of linear_num_key_heads {keys}",
    )
    mixed = 2 * keys * key_dim + values * value_dim  # channels of the convolution
    projections = hidden * (mixed + values * value_dim + 2 * values)  # in: qkv, z, b, a
    return AttentionGroup(
        layers=layers,
        query_heads=keys,
        kv_heads=keys,
        head_dim=key_dim,
        v_head_dim=value_dim,
        kv_elements_per_token=0,
        params_per_layer=projections
        + mixed * kernel
        + 2 * values  # decay and time step
        + value_dim  # norm of a head
        + values * value_dim * hidden,
        state_elements=values * key_dim * value_dim + mixed * (kernel - 1),
    )


def _qwen35_attention(fields: Fields, *, layers: int, heads: Heads) -> tuple[AttentionGroup, ...]:
    """Mostly linear layers; one in four attends to everything, with an output gate."""
    known = {"full_attention", "linear_attention"}
    kinds = fields.kinds("layer_types", layers=layers, known=known)
    period = fields.count("full_attention_interval", 4)
    full = layers // period if kinds is None else min(kinds.count("full_attention"), layers)
    gate = heads.hidden * heads.query_width if fields.flag("attn_output_gate", True) else 0
    extra = gate + _qwen3_extra(fields, heads)
    groups = _attention(heads, layers=full, extra=extra)
    if full < layers:
        groups += (_gated_delta(fields, layers=layers - full, hidden=heads.hidden),)
    return groups


def _qwen35(fields: Fields) -> Parts:
    layers, heads = _layers(fields), _heads(fields)
    return Parts(
        attention=_qwen35_attention(fields, layers=layers, heads=heads),
        ffn=_dense(fields, layers=layers, hidden=heads.hidden),
        norm_params=_norms(layers, heads.hidden),
    )


def _qwen35_moe(fields: Fields) -> Parts:
    """A shared expert with a gate of its own beside the routed ones."""
    layers, heads = _layers(fields), _heads(fields)
    shared = 3 * heads.hidden * fields.count("shared_expert_intermediate_size")
    return Parts(
        attention=_qwen35_attention(fields, layers=layers, heads=heads),
        ffn=_experts(
            fields,
            layers=layers,
            hidden=heads.hidden,
            experts="num_experts",
            size="moe_intermediate_size",
            shared_params=shared + heads.hidden,
        ),
        norm_params=_norms(layers, heads.hidden),
    )


GEMMA3_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
GPTJ_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "deepseek_v2": Architecture(parts=_deepseek_v2),
    "deepseek_v3": Architecture(parts=_deepseek_v3),
    "deepseek_v32": Architecture(parts=_deepseek_v32),
    "falcon": Architecture(
        parts=_falcon,
        tied=True,
        defaults={"max_position_embeddings": 2048},
        renamed={"num_kv_heads": "num_key_value_heads"},
    ),
    "gemma2": Architecture(parts=_gemma2, tied=True, defaults={"sliding_window": 4096}),
    "gemma3": Architecture(parts=_gemma3, tied=True, defaults=GEMMA3_DEFAULTS),
    "glm_moe_dsa": Architecture(parts=_deepseek_v32),
    "gpt_oss": Architecture(parts=_gpt_oss, defaults={"sliding_window": 128}),
    "gptj": Architecture(parts=_gptj, renamed=GPTJ_NAMES),
    "kimi_k2": Architecture(parts=_deepseek_v3),
    "llama": Architecture(parts=_llama),
    "llama4": Architecture(parts=_llama4, defaults={"attention_chunk_size": 8192}),
    "minimax_m2": Architecture(parts=_minimax_m2),
    "mistral": Architecture(parts=_mistral, defaults={"sliding_window": 4096}),
    "mixtral": Architecture(parts=_mixtral),
    "phi3": Architecture(parts=_mistral),
    "qwen2": Architecture(parts=_qwen2),
    "qwen3": Architecture(parts=_qwen3),
    "qwen3_5": Architecture(parts=_qwen35),
    "qwen3_5_moe": Architecture(parts=_qwen35_moe),
    "qwen3_moe": Architecture(parts=_qwen3_moe),
}
