"""Models as their `config.json` describes them: counts, no bytes and no seconds.

A model is a few *groups* of layers that look alike. Two lists describe it: attention
groups (what a token leaves in the KV cache) and feed-forward groups (dense, or experts).
Every architecture, from MHA to MLA with shared experts to alternating windows, is a value
of these two types, so nothing above this file asks for an architecture by name.

Counts are exact integers from the shapes. Bytes come from `perf`, which knows formats.
"""

from dataclasses import dataclass

from tierline.base.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionGroup:
    """Layers whose attention has one shape.

    `kv_elements_per_token` is what one token adds to the cache *in one layer* before any
    tensor parallelism: K and V for GQA, the latent and the shared rotary key for MLA, and
    0 for linear attention, which keeps `state_elements` per sequence instead.
    """

    layers: int
    query_heads: int
    kv_heads: int  # MLA caches one latent for all heads: 1
    head_dim: int  # of a query and a key; MLA: nope + rope
    v_head_dim: int
    kv_elements_per_token: int
    params_per_layer: int  # projections, their biases, q/k norms; all of one layer
    params_replicated_per_layer: int = 0  # part of it that every TP rank holds (MLA down)
    window_tokens: int | None = None  # None: attends to everything
    latent: bool = False  # MLA: every TP rank caches the whole latent
    state_elements: int = 0  # recurrent state of one sequence in one layer
    sparse_topk_tokens: int | None = None  # attends to at most this many (DSA)
    index_elements_per_token: int = 0  # cached for choosing them

    def kv_tokens(self, sequence_tokens: int) -> int:
        """Cached tokens of a sequence: all of them, or the window's worth."""
        if self.window_tokens is None:
            return sequence_tokens
        return min(sequence_tokens, self.window_tokens)

    def kv_heads_per_rank(self, tp: int) -> int:
        """KV heads on one of `tp` ranks; at least one, so more ranks than heads replicate."""
        return 1 if self.latent else max(self.kv_heads // tp, 1)

    def kv_replication(self, tp: int) -> int:
        """How many ranks hold a copy of the same cached token: 1 when heads divide evenly."""
        if self.latent:
            return tp
        return max(tp // self.kv_heads, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnGroup:
    """Layers whose feed-forward part has one shape; `experts` is 0 where it is dense."""

    layers: int
    dense_params_per_layer: int = 0  # the whole FFN of a dense layer
    experts: int = 0
    experts_active: int = 0  # routed experts that one token visits
    params_per_expert: int = 0
    shared_params_per_layer: int = 0  # experts that every token visits
    router_params_per_layer: int = 0

    @property
    def params_per_layer(self) -> int:
        """All parameters of one layer, every expert counted."""
        return (
            self.dense_params_per_layer
            + self.experts * self.params_per_expert
            + self.shared_params_per_layer
            + self.router_params_per_layer
        )

    @property
    def active_params_per_layer(self) -> int:
        """Parameters that one token multiplies with in one layer."""
        return (
            self.dense_params_per_layer
            + self.experts_active * self.params_per_expert
            + self.shared_params_per_layer
            + self.router_params_per_layer
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model: what it weighs, what a token costs it, what a sequence leaves behind."""

    name: str
    architecture: str  # `model_type` of its config.json
    hidden: int
    vocabulary: int
    attention: tuple[AttentionGroup, ...]
    ffn: tuple[FfnGroup, ...]
    embedding_params: int
    head_params: int  # 0 when the head is tied to the embedding
    norm_params: int  # all norms outside the attention groups
    positions_max: int
    native_format: str  # the format of the published weights: bf16, fp8, mxfp4
    source: str  # where a reader can check the shapes
    hf_id: str | None = None  # the published name that an engine loads

    def __post_init__(self) -> None:
        if self.layers != sum(group.layers for group in self.ffn):
            raise SpecError(f"model {self.name!r}: attention and feed-forward layers differ")
        if min(self.hidden, self.vocabulary, self.layers, self.positions_max) <= 0:
            raise SpecError(f"model {self.name!r} has a size that is not positive")

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return sum(group.layers for group in self.attention)

    @property
    def attention_params(self) -> int:
        """Attention parameters of all layers."""
        return sum(group.layers * group.params_per_layer for group in self.attention)

    @property
    def expert_params(self) -> int:
        """Routed-expert parameters of all layers (0 for a dense model)."""
        return sum(g.layers * g.experts * g.params_per_expert for g in self.ffn)

    @property
    def _params_outside_ffn(self) -> int:
        tables = self.embedding_params + self.head_params + self.norm_params
        return self.attention_params + tables

    @property
    def params(self) -> int:
        """All parameters."""
        return self._params_outside_ffn + sum(g.layers * g.params_per_layer for g in self.ffn)

    @property
    def params_active(self) -> int:
        """Parameters that one token touches, embedding table and head included once each."""
        ffn = sum(g.layers * g.active_params_per_layer for g in self.ffn)
        return self._params_outside_ffn + ffn

    @property
    def is_moe(self) -> bool:
        """Whether any layer routes tokens to experts."""
        return any(group.experts for group in self.ffn)

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that one token adds to the cache over all layers, inside every window."""
        return sum(g.layers * g.kv_elements_per_token for g in self.attention)

    def kv_elements(self, sequence_tokens: int) -> int:
        """Cached elements of one sequence, windows and recurrent states applied."""
        return sum(
            g.layers
            * (
                g.kv_tokens(sequence_tokens) * (g.kv_elements_per_token)
                + sequence_tokens * g.index_elements_per_token
                + g.state_elements
            )
            for g in self.attention
        )

    def legal_tp(self, gpus_max: int) -> list[int]:
        """Tensor-parallel degrees up to `gpus_max` that split every layer evenly.

        A degree is clean when it divides the KV heads, replicated when the KV heads divide
        it, and illegal otherwise; it must divide the query heads either way.
        """
        return [
            tp
            for tp in range(1, gpus_max + 1)
            if all(
                g.query_heads % tp == 0
                and (g.latent or g.kv_heads % tp == 0 or tp % g.kv_heads == 0)
                for g in self.attention
            )
        ]
