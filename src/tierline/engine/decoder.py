"""A network as the engine runs it: the shapes of every layer, and nothing about files.

`models/<architecture>.py` reads one from a `config.json`; `network` builds tensors for it,
`arena` a cache, and the native step its tables.  Everything that tells two architectures
apart is a value here, so no other file asks for an architecture by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions: angle i of token p is p times `inverse_frequencies[i]`.

    Half-split order (NeoX): dimension i turns with dimension i + n/2; interleaved (GPT-J),
    2i with 2i + 1.  `scale` multiplies cosine and sine (YaRN's attention factor).
    """

    inverse_frequencies: tuple[float, ...]  # half as many as dimensions that turn
    scale: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query attention of one layer."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    scale: float  # multiplies the scores
    window_tokens: int | None = None  # a token attends to itself and window - 1 before it
    bias: bool = False  # of q, k and v
    out_bias: bool = False
    qk_norm: bool = False  # RMS norm of every head before the rotation

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that one token leaves in this layer's cache."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        """Elements of one head's output."""
        return self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2): one latent is cached for all heads.

    With the projections of keys and values moved over to queries and outputs, it is attention
    with one KV head whose key is latent and rotated part, and whose value is the latent.
    """

    heads: int
    nope_dim: int
    rope_dim: int
    v_head_dim: int
    kv_rank: int  # elements of the latent
    q_rank: int | None  # None: queries are not compressed
    rope: Rope
    scale: float
    window_tokens: int | None = None
    down_bias: bool = False  # of the projections to q and kv latents
    out_bias: bool = False

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that one token leaves in this layer's cache."""
        return self.kv_rank + self.rope_dim

    @property
    def kv_heads(self) -> int:
        """Heads as the cache sees them."""
        return 1

    @property
    def value_dim(self) -> int:
        """Elements of one head's output before it leaves the latent space."""
        return self.kv_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A gated feed-forward network: down(act(gate x) * up x)."""

    intermediate: int
    activation: str = "silu"  # or "gelu_tanh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Routed experts, each a gated network, beside `shared` ones that every token visits."""

    experts: int
    experts_active: int
    intermediate: int  # of one expert
    normalised: bool  # whether the weights of the chosen ones are made to sum to one
    scale: float = 1.0  # multiplies those weights
    shared_intermediate: int = 0
    groups: int = 1  # of experts; the best `groups_active` of them are looked into
    groups_active: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer."""

    attention: Attention | LatentAttention
    ffn: Dense | Experts
    post_norms: bool = False  # norms after attention and after the feed-forward, too (Gemma)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A whole network.

    `weight_names` gives the checkpoint's name of one of ours: `embed`, `norm`, `head`, and in
    layer i `layers.i.` + q, k, v, o, q.bias, ..., q_norm, k_norm, norm (before attention),
    post_attention_norm, ffn_norm (before the feed-forward), post_ffn_norm, gate, up, down,
    router, experts.j.gate, ..., shared.gate, ....  Latent attention has q or q_down,
    q_down_norm, q_up; and kv_down, kv_norm, kv_up.
    """

    architecture: str
    hidden: int
    vocabulary: int
    positions_max: int
    layers: tuple[Layer, ...]
    norm_eps: float
    weight_names: Callable[[str], str]
    norm_offset: float = 0.0  # added to every norm's weight (Gemma stores w - 1)
    embedding_scale: float = 1.0
    tied: bool = False  # the head is the embedding
    logit_softcap: float | None = None


Config = Mapping[str, Any]
