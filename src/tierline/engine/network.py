"""The forward pass in torch, on any device: from a `Batch` to the logits of wanted rows.

`executor` builds one `Network` from a decoder and a function that finds weights; `checkpoint`
asks `weight_shapes` what a decoder needs before anything is allocated.  A layer is a small
object for each of its parts, made once, so that a step is a plain walk over them.

Casts follow transformers, because tests compare tokens: norms in float32, then back;
softmax in float32; angles in the type of the activations.  Products that read the same input
are one matrix (q, k, v; gate, up).
"""

import functools
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.nn import functional

from tierline.engine.arena import Arena
from tierline.engine.attention import Version, gathered
from tierline.engine.batch import Batch
from tierline.engine.decoder import Attention, Decoder, Dense, Experts, LatentAttention
from tierline.engine.native import Kernels, Packed
from tierline.engine.rope import Angles, rotate, turning

Weights = Callable[[str], torch.Tensor]  # our name -> the tensor, on the CPU
Product = Callable[[torch.Tensor], torch.Tensor]
Shapes = dict[str, tuple[int, ...]]
ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
}


class Network:
    """One decoder with its weights on one device."""

    def __init__(
        self,
        decoder: Decoder,
        weights: Weights,
        *,
        dtype: torch.dtype,
        device: torch.device,
        attention: Version = gathered,
        kernels: Kernels | None = None,
    ) -> None:
        """`attention` is the version that every layer uses, `kernels` multiply where they can.

        A tensor that `weights` gives is kept as it is where type and device already agree,
        so memory-mapped files are not copied.
        """
        self.decoder, self.dtype, self.device = decoder, dtype, device
        self.attention = attention
        load = _Loader(weights, decoder, dtype, device, kernels)
        self.embed = load.tensor("embed")
        self.layers = [
            _Layer(decoder, number, load.inside(f"layers.{number}."))
            for number in range(len(decoder.layers))
        ]
        self.norm = load.norm("norm")
        self.head = load.linear("embed" if decoder.tied else "head")

    @torch.inference_mode()
    def logits(self, batch: Batch, arena: Arena) -> torch.Tensor:
        """Run the step: float32 logits [R, vocabulary]; writes the cache, adds to the sums."""
        decoder = self.decoder
        x = functional.embedding(batch.tensor("tokens", self.device), self.embed)
        if decoder.embedding_scale != 1:
            x = x * torch.tensor(decoder.embedding_scale, dtype=x.dtype, device=x.device)
        for layer in self.layers:
            x = layer(x, batch, arena, self.attention)
        x = self.norm(x)
        if batch.sums is not None:
            x = _pooled(x, batch, batch.sums)
        logits = self.head(x).float()
        if decoder.logit_softcap is not None:
            logits = decoder.logit_softcap * torch.tanh(logits / decoder.logit_softcap)
        return logits


# --- weights --------------------------------------------------------------------------------


class Linear:
    """y = x W^T + b for one matrix, by the fastest way at hand; the only holder of W.

    On the CPU that is the native kernels, else oneDNN with weights packed once.
    """

    __slots__ = ("_bias", "_product")

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, kernels: Kernels | None = None
    ) -> None:
        self._bias = bias
        self._product: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
        on_cpu = weight.device.type == "cpu"
        if on_cpu and kernels is not None and _kernels_multiply(weight):
            native: Packed = kernels.pack([weight], bias)
            self._product = lambda x, _: native(x)
        elif on_cpu and _prepacking_works(weight.dtype):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.to_mkldnn(), 1)
            pointwise = torch.ops.mkldnn._linear_pointwise
            self._product = lambda x, bias: pointwise(x, packed, bias, "none", [], "")
        else:
            self._product = lambda x, bias: functional.linear(x, weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self._product(x, self._bias)


def _kernels_multiply(weight: torch.Tensor) -> bool:
    return weight.dtype in (torch.float32, torch.bfloat16) and weight.shape[1] % 16 == 0


@functools.cache
def _prepacking_works(dtype: torch.dtype) -> bool:
    """Whether oneDNN takes packed weights of this type here.  Private operators: tried once."""
    weight = torch.eye(16, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to_mkldnn(), 1)
        y = torch.ops.mkldnn._linear_pointwise(weight, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return bool(torch.equal(y, weight))


class Norm:
    """RMS norm over the last dimension, computed in float32."""

    __slots__ = ("_eps", "_weight")

    def __init__(self, weight: torch.Tensor, *, eps: float) -> None:
        self._weight, self._eps = weight, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """A float32 weight (one with an offset) multiplies before the cast, others after."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)
        return (self._weight * wide.to(self._weight.dtype)).to(x.dtype)


class _Loader:
    """Tensors of one part of the network, in the network's type and on its device."""

    def __init__(
        self,
        weights: Weights,
        decoder: Decoder,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels | None,
        prefix: str = "",
    ) -> None:
        self._weights, self._kernels, self._prefix = weights, kernels, prefix
        self._decoder, self._dtype, self._device = decoder, dtype, device

    def inside(self, prefix: str) -> "_Loader":
        known = (self._weights, self._decoder, self._dtype, self._device, self._kernels)
        return _Loader(*known, self._prefix + prefix)

    def tensor(self, *names: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensors of these names, one above the other."""
        parts = [self._weights(self._prefix + name) for name in names]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.to(device=self._device, dtype=dtype or self._dtype)

    def linear(self, *names: str, bias: bool = False) -> Linear:
        """One product for matrices that read the same input."""
        biases = self.tensor(*(f"{name}.bias" for name in names)) if bias else None
        return Linear(self.tensor(*names), biases, self._kernels)

    def norm(self, *names: str) -> Norm:
        """A norm; of several names, each for its own head."""
        offset = self._decoder.norm_offset
        dtype = torch.float32 if offset else self._dtype
        weights = [self.tensor(name, dtype=dtype) + offset for name in names]
        weight = weights[0] if len(weights) == 1 else torch.stack(weights)
        return Norm(weight, eps=self._decoder.norm_eps)


# --- the parts of a layer -------------------------------------------------------------------


class _Layer:
    """Attention and feed-forward with their norms and residuals."""

    def __init__(self, decoder: Decoder, number: int, load: _Loader) -> None:
        layer = decoder.layers[number]
        self._last = number == len(decoder.layers) - 1
        self._attention: _Heads | _Latent
        if isinstance(layer.attention, LatentAttention):
            self._attention = _Latent(layer.attention, number, load)
        else:
            self._attention = _Heads(layer.attention, number, load)
        if isinstance(layer.ffn, Dense):
            self._ffn: Product = _Gated(layer.ffn.activation, load)
        else:
            self._ffn = _Routed(layer.ffn, load)
        self._norm, self._ffn_norm = load.norm("norm"), load.norm("ffn_norm")
        self._post_attention: Product = _same
        self._post_ffn: Product = _same
        if layer.post_norms:
            self._post_attention = load.norm("post_attention_norm")
            self._post_ffn = load.norm("post_ffn_norm")

    def __call__(
        self, x: torch.Tensor, batch: Batch, arena: Arena, attend: Version
    ) -> torch.Tensor:
        attended = self._attention(self._norm(x), batch, arena, attend)
        x = x + self._post_attention(attended)
        if self._last:  # the cache is written: from here on only kept rows matter
            x = x[batch.tensor("kept", x.device)]
        return x + self._post_ffn(self._ffn(self._ffn_norm(x)))


def _pooled(x: torch.Tensor, batch: Batch, sums: torch.Tensor) -> torch.Tensor:
    """Add the states of pooled sequences to their sums; the wanted rows of those that were kept."""
    kept = batch.kept
    firsts = np.searchsorted(kept, batch.starts[batch.pooled])  # all rows of a sequence are kept
    counts = (batch.starts[1:] - batch.starts[:-1])[batch.pooled]
    for own, first, count in zip(sums, firsts, counts, strict=True):
        own += x[first : first + count].float().sum(0)
    return x[torch.from_numpy(np.searchsorted(kept, batch.wanted)).to(x.device)]


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


class _Heads:
    """Grouped-query attention: projections, norms and rotation around a version of `attention`."""

    def __init__(self, attention: Attention, number: int, load: _Loader) -> None:
        self._shape, self._number = attention, number
        self._qkv = load.linear("q", "k", "v", bias=attention.bias)
        self._out = load.linear("o", bias=attention.out_bias)
        self._qk_norm: Product = _same
        if attention.qk_norm:
            self._qk_norm = load.norm(
                *["q_norm"] * attention.heads, *["k_norm"] * attention.kv_heads
            )

    def __call__(
        self, x: torch.Tensor, batch: Batch, arena: Arena, attend: Version
    ) -> torch.Tensor:
        shape = self._shape
        heads = self._qkv(x).view(len(x), -1, shape.head_dim)
        turned = shape.heads + shape.kv_heads  # queries and keys are normed and rotated together
        angles = _angles(shape, batch, x)
        qk = rotate(self._qk_norm(heads[:, :turned]), angles, interleaved=shape.rope.interleaved)
        out = attend(
            qk[:, : shape.heads],
            qk[:, shape.heads :],
            heads[:, turned:],
            batch,
            arena,
            self._number,
            shape,
        )
        return self._out(out.flatten(1))


class _Latent:
    """Latent attention, absorbed: queries go into the latent space, outputs come back from it."""

    def __init__(self, attention: LatentAttention, number: int, load: _Loader) -> None:
        self._shape, self._number = attention, number
        bias = attention.down_bias
        if attention.q_rank is None:
            self._queries: Product = load.linear("q")
        else:
            down, norm = load.linear("q_down", bias=bias), load.norm("q_down_norm")
            up = load.linear("q_up")
            self._queries = lambda x: up(norm(down(x)))
        self._down, self._norm = load.linear("kv_down", bias=bias), load.norm("kv_norm")
        up_by_head = load.tensor("kv_up").view(attention.heads, -1, attention.kv_rank)
        self._to_latent = up_by_head[:, : attention.nope_dim]  # [heads, nope, rank]
        self._from_latent = up_by_head[:, attention.nope_dim :]  # [heads, v, rank]
        self._out = load.linear("o", bias=attention.out_bias)

    def __call__(
        self, x: torch.Tensor, batch: Batch, arena: Arena, attend: Version
    ) -> torch.Tensor:
        shape, angles = self._shape, _angles(self._shape, batch, x)
        turn = functools.partial(rotate, angles=angles, interleaved=shape.rope.interleaved)
        q = self._queries(x).view(len(x), shape.heads, -1)
        latent_q = torch.einsum("thn,hnr->thr", q[..., : shape.nope_dim], self._to_latent)
        q = torch.cat((latent_q, turn(q[..., shape.nope_dim :])), -1)
        kv = self._down(x)[:, None]
        latent, turned = self._norm(kv[..., : shape.kv_rank]), turn(kv[..., shape.kv_rank :])
        k = torch.cat((latent, turned), -1)
        out = attend(q, k, None, batch, arena, self._number, shape)
        return self._out(torch.einsum("thr,hvr->thv", out, self._from_latent).flatten(1))


def _angles(shape: Attention | LatentAttention, batch: Batch, x: torch.Tensor) -> Angles:
    """Layers that turn alike share their angles within a step."""
    return batch.derived(
        "angles",
        shape.rope,
        make=lambda: turning(shape.rope, batch.tensor("positions", x.device), x.dtype),
    )


class _Gated:
    """down(act(gate x) * up x)."""

    def __init__(self, activation: str, load: _Loader) -> None:
        self._gate_up, self._down = load.linear("gate", "up"), load.linear("down")
        self._act = ACTIVATIONS[activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_up(x).chunk(2, -1)
        return self._down(self._act(gate) * up)


class _Routed:
    """Experts: tokens are sorted by expert, so each expert multiplies its tokens at once."""

    def __init__(self, experts: Experts, load: _Loader) -> None:
        self._shape = experts
        self._router = load.tensor("router", dtype=torch.float32)
        self._experts = [
            _Gated("silu", load.inside(f"experts.{number}.")) for number in range(experts.experts)
        ]
        self._shared: Product | None = None
        if experts.shared_intermediate:
            self._shared = _Gated("silu", load.inside("shared."))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self._route(x)
        active = self._shape.experts_active
        order = chosen.flatten().argsort(stable=True)
        tokens, weights = order // active, weights.flatten()[order]
        out = torch.zeros_like(x)
        first = 0
        for expert, count in enumerate(
            torch.bincount(chosen.flatten(), minlength=self._shape.experts).tolist()
        ):
            if count:
                mine = slice(first, first + count)
                y = self._experts[expert](x[tokens[mine]]) * weights[mine, None]
                out.index_add_(0, tokens[mine], y.to(x.dtype))
                first += count
        return out if self._shared is None else out + self._shared(x)

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and numbers of each token's experts, both [T, active]."""
        shape = self._shape
        scores = functional.linear(x.float(), self._router).softmax(-1)
        if shape.groups > 1:  # a token looks only into the groups that hold its best experts
            grouped = scores.view(len(x), shape.groups, shape.experts // shape.groups)
            best = grouped.amax(-1).topk(shape.groups_active, -1).indices
            closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, False)
            scores = grouped.masked_fill(closed[..., None], 0).flatten(-2)
        weights, chosen = scores.topk(shape.experts_active, -1)
        if shape.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * shape.scale, chosen


# --- what a decoder needs -------------------------------------------------------------------


def weight_shapes(decoder: Decoder) -> Shapes:
    """Every tensor of a decoder, by our name, with its shape."""
    hidden = decoder.hidden
    shapes: Shapes = {"embed": (decoder.vocabulary, hidden), "norm": (hidden,)}
    if not decoder.tied:
        shapes["head"] = (decoder.vocabulary, hidden)
    for number, layer in enumerate(decoder.layers):
        inner: Shapes = {"norm": (hidden,), "ffn_norm": (hidden,)}
        if layer.post_norms:
            inner |= {"post_attention_norm": (hidden,), "post_ffn_norm": (hidden,)}
        if isinstance(layer.attention, LatentAttention):
            inner |= _latent_shapes(layer.attention, hidden)
        else:
            inner |= _head_shapes(layer.attention, hidden)
        inner |= _ffn_shapes(layer.ffn, hidden)
        shapes |= {f"layers.{number}.{name}": shape for name, shape in inner.items()}
    return shapes


def _head_shapes(attention: Attention, hidden: int) -> Shapes:
    dim = attention.head_dim
    q, kv = attention.heads * dim, attention.kv_heads * dim
    shapes: Shapes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    if attention.bias:
        shapes |= {"q.bias": (q,), "k.bias": (kv,), "v.bias": (kv,)}
    if attention.out_bias:
        shapes["o.bias"] = (hidden,)
    if attention.qk_norm:
        shapes |= {"q_norm": (dim,), "k_norm": (dim,)}
    return shapes


def _latent_shapes(attention: LatentAttention, hidden: int) -> Shapes:
    rank, kv = attention.kv_rank, attention.kv_elements_per_token
    queries = attention.heads * (attention.nope_dim + attention.rope_dim)
    up = attention.heads * (attention.nope_dim + attention.v_head_dim)
    shapes: Shapes = {"kv_down": (kv, hidden), "kv_norm": (rank,), "kv_up": (up, rank)}
    shapes["o"] = (hidden, attention.heads * attention.v_head_dim)
    if attention.q_rank is None:
        shapes["q"] = (queries, hidden)
    else:
        shapes |= {"q_down": (attention.q_rank, hidden), "q_down_norm": (attention.q_rank,)}
        shapes["q_up"] = (queries, attention.q_rank)
    if attention.down_bias:
        shapes["kv_down.bias"] = (kv,)
        if attention.q_rank is not None:
            shapes["q_down.bias"] = (attention.q_rank,)
    if attention.out_bias:
        shapes["o.bias"] = (hidden,)
    return shapes


def _ffn_shapes(ffn: Dense | Experts, hidden: int) -> Shapes:
    if isinstance(ffn, Dense):
        return _gated_shapes("", ffn.intermediate, hidden)
    shapes: Shapes = {"router": (ffn.experts, hidden)}
    for number in range(ffn.experts):
        shapes |= _gated_shapes(f"experts.{number}.", ffn.intermediate, hidden)
    if ffn.shared_intermediate:
        shapes |= _gated_shapes("shared.", ffn.shared_intermediate, hidden)
    return shapes


def _gated_shapes(prefix: str, width: int, hidden: int) -> Shapes:
    wide, narrow = (width, hidden), (hidden, width)
    return {f"{prefix}gate": wide, f"{prefix}up": wide, f"{prefix}down": narrow}
