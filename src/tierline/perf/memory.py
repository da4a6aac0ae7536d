"""How many bytes a deployment needs, and how many sequences fit in what is left.

The planner asks for the floor (weights, KV, activations, overhead, adapters) before and
after it chooses a precision, and for the KV pool of every candidate. Each component keeps
its own number, so that a report can say which of them is in the way.

    weights      every part in its own format; tables, norms and routers stay 16-bit
    kv           per token and layer, times tokens; windows, latents and states applied
    activations  20 % of the weights at 16 bit, whatever format the weights are stored in
    overhead     7.5 % of the accelerator, at least 2 GB: context, graphs, fragmentation
    adapters     rank x sum(d_in + d_out) x layers x bytes, for each resident adapter

GB is 1e9 bytes. Left out: the doubling while weights are cast or unpickled at load, and
the 3-8 % that some engines pad weights by, which `padded_weight_bytes` gives on request.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tierline.base.errors import DoesNotFitError
from tierline.catalog.formats import ATTENTION_STAYS_16_BIT_UNDER_BITS, Format
from tierline.catalog.model import AttentionGroup, ModelSpec

ACTIVATION_SHARE = 0.20  # of the 16-bit weights; FlashAttention assumed
OVERHEAD_SHARE = 0.075  # of an accelerator's memory; published figures say 5-10 %
OVERHEAD_FLOOR_BYTES = 2e9  # the context and the graphs of a small accelerator
HEADROOM_LOW, HEADROOM_HIGH = 1.3, 1.5  # deployed over minimum accelerators
STATE_BYTES = 2  # recurrent states stay 16-bit in every KV format
SIXTEEN_BIT_BYTES = 2


# --- weights --------------------------------------------------------------------------------


def nominal_weight_bytes(params: float, fmt: Format) -> float:
    """Parameters times the nominal bits, no scales and no exceptions: the quick rule.

    >>> from tierline.catalog.formats import WEIGHT_FORMATS as W
    >>> [nominal_weight_bytes(70e9, W[f]) / 1e9 for f in ("bf16", "fp8", "int4-g128")]
    [140.0, 70.0, 35.0]
    """
    return params * math.floor(fmt.bits) / 8


def weight_bytes(model: ModelSpec, fmt: Format) -> float:
    """Bytes of a checkpoint in `fmt` as they are published, scales included.

    Matrices of attention and feed-forward layers take `fmt`; embedding, head, norms and
    routers stay 16-bit, and so does the attention of an MoE model under 8 bits.
    """
    wide = max(fmt.bytes_per_element, SIXTEEN_BIT_BYTES)
    attention_stays = model.is_moe and fmt.bits < ATTENTION_STAYS_16_BIT_UNDER_BITS
    routers = sum(g.layers * g.router_params_per_layer for g in model.ffn)
    dense = model.params - model.expert_params - _table_params(model) - routers
    narrow = fmt.bytes_per_element
    return (
        model.expert_params * narrow
        + dense * (wide if attention_stays else narrow)
        + (_table_params(model) + routers) * wide
    )


def padded_weight_bytes(weights_bytes: float, *, share: float) -> float:
    """What padding adds to resident weights; engines pad by a share of 0.03 to 0.08.

    >>> round(padded_weight_bytes(140e9, share=0.03) / 1e9, 1)
    4.2
    """
    return weights_bytes * share


def lora_bytes(
    shapes: Iterable[tuple[int, int]], *, rank: int, layers: int, bytes_per_element: float = 2
) -> float:
    """One LoRA adapter over matrices of (d_in, d_out) in each of `layers` layers.

    >>> lora_bytes([(8192, 8192), (8192, 1024)], rank=16, layers=80) / 1e6  # q and v of a 70B
    65.536
    """
    return rank * sum(d_in + d_out for d_in, d_out in shapes) * layers * bytes_per_element


def _table_params(model: ModelSpec) -> int:
    return model.embedding_params + model.head_params + model.norm_params


# --- KV cache -------------------------------------------------------------------------------


def kv_bytes_per_token(model: ModelSpec, fmt: Format) -> float:
    """Bytes that one token adds over all layers, inside every window, held once."""
    index = sum(g.layers * g.index_elements_per_token for g in model.attention)
    return (model.kv_elements_per_token + index) * fmt.bytes_per_element


def kv_bytes(model: ModelSpec, sequence_tokens: int, fmt: Format, *, tp: int = 1) -> float:
    """Bytes of one cached sequence over all `tp` ranks, copies counted.

    More ranks than KV heads hold copies, and MLA's latent is whole on every rank.
    """
    return tp * kv_bytes_per_gpu(model, sequence_tokens, fmt, tp=tp)


def kv_bytes_per_gpu(model: ModelSpec, sequence_tokens: int, fmt: Format, *, tp: int = 1) -> float:
    """Bytes of one cached sequence on each of `tp` ranks."""
    return sum(_group_kv_bytes(group, sequence_tokens, fmt, tp) for group in model.attention)


def _group_kv_bytes(group: AttentionGroup, tokens: int, fmt: Format, tp: int) -> float:
    cached = group.kv_tokens(tokens) * group.kv_elements_per_token
    on_rank = cached * group.kv_replication(tp) / tp + tokens * group.index_elements_per_token
    state = group.state_elements * STATE_BYTES / tp
    return group.layers * (on_rank * fmt.bytes_per_element + state)


def kv_pool_tokens(pool_bytes: float, *, bytes_per_token: float) -> int:
    """Whole tokens that fit in a pool.

    >>> kv_pool_tokens(45e9, bytes_per_token=327_680)
    137329
    """
    return math.floor(pool_bytes / bytes_per_token)


def sequences_that_fit(
    model: ModelSpec, fmt: Format, *, pool_bytes: float, sequence_tokens: int, tp: int = 1
) -> int:
    """Sequences of one length that the pool of a whole instance holds."""
    return math.floor(pool_bytes / kv_bytes(model, sequence_tokens, fmt, tp=tp))


def sequences_to_outweigh(weights_bytes: float, *, sequence_bytes: float) -> int:
    """The smallest number of cached sequences that take more than the weights do.

    >>> sequences_to_outweigh(140e9, sequence_bytes=32_000 * 327_680)
    14
    """
    return math.floor(weights_bytes / sequence_bytes) + 1


def blocks_of(tokens: int, *, block_tokens: int) -> int:
    """Blocks that hold a sequence."""
    return -(-tokens // block_tokens)


def block_waste_tokens(tokens: int, *, block_tokens: int) -> int:
    """Slots of the last block that stay empty: less than one block for each sequence.

    >>> block_waste_tokens(17, block_tokens=16)
    15
    """
    return blocks_of(tokens, block_tokens=block_tokens) * block_tokens - tokens


# --- everything else ------------------------------------------------------------------------


def activation_bytes(model: ModelSpec, *, share: float = ACTIVATION_SHARE) -> float:
    """The rule for activations: a share of the weights at 16 bit.

    It does not shrink with the weight format, because activations stay 16-bit.
    """
    return nominal_activation_bytes(model.params, share=share)


def nominal_activation_bytes(params: float, *, share: float = ACTIVATION_SHARE) -> float:
    """The same rule from a parameter count.

    >>> nominal_activation_bytes(70e9) / 1e9
    28.0
    """
    return share * params * SIXTEEN_BIT_BYTES


def computed_activation_bytes(model: ModelSpec, *, batch_tokens: int, sequences: int) -> float:
    """What one step needs at its widest point, to set beside the rule.

    The residual stream twice, the widest layer's queries or gate and up, and FP32 logits.
    Engines keep graphs and workspaces beside it, which is why the rule is larger.
    """
    heads = max(g.query_heads * (g.head_dim + g.v_head_dim) for g in model.attention)
    inner = max(
        2 * (g.active_params_per_layer - g.router_params_per_layer) / (3 * model.hidden)
        for g in model.ffn
    )
    widest = 2 * model.hidden + max(heads, inner)
    return batch_tokens * widest * SIXTEEN_BIT_BYTES + sequences * model.vocabulary * 4


def overhead_bytes(gpu_memory_bytes: float) -> float:
    """What the runtime keeps of one accelerator."""
    return max(OVERHEAD_SHARE * gpu_memory_bytes, OVERHEAD_FLOOR_BYTES)


# --- the floor ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFloor:
    """What must be resident, by component, and the accelerators that hold it."""

    weights_bytes: float
    kv_bytes: float
    activations_bytes: float
    overhead_bytes: float
    adapters_bytes: float
    gpu_memory_bytes: float
    gpus_min: int

    @property
    def total_bytes(self) -> float:
        """The sum of the components."""
        return (
            self.weights_bytes
            + self.kv_bytes
            + self.activations_bytes
            + self.overhead_bytes
            + self.adapters_bytes
        )

    def fits(self, gpus: int, *, headroom: float = 1.0) -> bool:
        """Whether `gpus` accelerators hold the floor with that much to spare."""
        return self.total_bytes * headroom <= gpus * self.gpu_memory_bytes


def memory_floor(
    *,
    weights_bytes: float,
    kv_bytes: float,
    activations_bytes: float,
    gpu_memory_bytes: float,
    adapters_bytes: float = 0.0,
    overhead_total_bytes: float | None = None,
) -> MemoryFloor:
    """The floor and the fewest accelerators that hold it, before headroom and legal TP.

    Overhead is per accelerator unless the caller knows its total; then the count is
    ceil(total / memory). Raises `DoesNotFitError` when overhead leaves no room at all.
    """
    rest = weights_bytes + kv_bytes + activations_bytes + adapters_bytes
    each = overhead_bytes(gpu_memory_bytes)
    if overhead_total_bytes is not None:
        gpus = math.ceil((rest + overhead_total_bytes) / gpu_memory_bytes)
        overhead = overhead_total_bytes
    else:
        if each >= gpu_memory_bytes:
            raise DoesNotFitError(
                "the runtime's overhead",
                needed_bytes=each + 1,
                available_bytes=gpu_memory_bytes,
                hint="pick an accelerator with more memory",
            )
        gpus = math.ceil(rest / (gpu_memory_bytes - each))
        overhead = gpus * each
    return MemoryFloor(
        weights_bytes=weights_bytes,
        kv_bytes=kv_bytes,
        activations_bytes=activations_bytes,
        overhead_bytes=overhead,
        adapters_bytes=adapters_bytes,
        gpu_memory_bytes=gpu_memory_bytes,
        gpus_min=gpus,
    )


def gpus_with_headroom(gpus_min: int, *, headroom: float) -> int:
    """Whole accelerators after headroom.

    >>> [gpus_with_headroom(3, headroom=h) for h in (HEADROOM_LOW, HEADROOM_HIGH)]
    [4, 5]
    """
    return math.ceil(gpus_min * headroom - 1e-9)
