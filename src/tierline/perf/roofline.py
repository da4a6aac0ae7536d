"""Bounds from peak rates: how fast an accelerator could be, whatever the software.

The advisor and the report set these beside the step law's prediction; nothing is sized on
them. Two rates make a roofline. Prefill is bound by FLOP/s because every weight meets many
tokens; decode by bytes/s because every step reads all weights for one token a sequence.

    attainable = min(peak, intensity x bandwidth),   ridge = peak / bandwidth
    decode     = (active weights + KV of the batch) / bandwidth
    prefill    = (2 params tokens + 2 heads d tokens^2 layers) / (peak x MFU)

Left out: communication, launch gaps, and activation traffic; `perf.step` has them.
"""

from dataclasses import dataclass

from tierline.catalog.model import ModelSpec
from tierline.workload.profile import phase_balance


def ridge_flops_per_byte(flops_per_s: float, bytes_per_s: float) -> float:
    """Arithmetic intensity at which math and memory take equally long.

    >>> round(ridge_flops_per_byte(989e12, 3.35e12), 1)
    295.2
    """
    return flops_per_s / bytes_per_s


def attainable_flops_per_s(intensity: float, *, flops_per_s: float, bytes_per_s: float) -> float:
    """What the roofline allows at that many FLOP per byte."""
    return min(flops_per_s, intensity * bytes_per_s)


def idle_share(intensity: float, *, flops_per_s: float, bytes_per_s: float) -> float:
    """Share of peak math that stays idle at that intensity."""
    reached = attainable_flops_per_s(intensity, flops_per_s=flops_per_s, bytes_per_s=bytes_per_s)
    return 1 - reached / flops_per_s


# --- decode ---------------------------------------------------------------------------------


def decode_ceiling_tokens_per_s(
    active_weight_bytes: float, *, bytes_per_s: float, tp: int = 1
) -> float:
    """Tokens per second of one stream when nothing but weights is read.

    >>> round(decode_ceiling_tokens_per_s(70e9, bytes_per_s=3.35e12), 1)
    47.9
    """
    return tp * bytes_per_s / active_weight_bytes


def decode_step_s(
    *, weights_bytes: float, kv_sequence_bytes: float, batch: int, bytes_per_s: float
) -> float:
    """One decode step: the weights once, which the batch shares, and every sequence's KV."""
    return (weights_bytes + batch * kv_sequence_bytes) / bytes_per_s


def batch_where_kv_equals_weights(*, weights_bytes: float, kv_sequence_bytes: float) -> float:
    """Sequences whose KV reads cost a step as much as the weights do."""
    return weights_bytes / kv_sequence_bytes


def kv_read_s(kv_sequence_bytes: float, *, bytes_per_s: float) -> float:
    """Seconds to read one sequence's KV; over a host link in every step, no SLO survives it."""
    return kv_sequence_bytes / bytes_per_s


# --- prefill --------------------------------------------------------------------------------


def attention_flops(model: ModelSpec, tokens: int) -> float:
    """Scores and weighted sums of a causal prompt, windows applied.

    2 (d_k + d_v) heads FLOP for every query-key pair; a causal prompt has tokens^2 / 2 pairs.
    """
    total = 0.0
    for group in model.attention:
        seen = min(tokens, group.window_tokens or tokens, group.sparse_topk_tokens or tokens)
        pairs = seen * seen / 2 + (tokens - seen) * seen
        per_pair = 2 * group.query_heads * (group.head_dim + group.v_head_dim)
        total += group.layers * per_pair * pairs
    return total


def prefill_flops(model: ModelSpec, tokens: int, *, params: float | None = None) -> float:
    """FLOPs of one prompt: 2 per active parameter and token, and attention.

    `params` overrides the model's own count for the nominal sizes that people quote.
    """
    weights = model.params_active - model.embedding_params if params is None else params
    return 2 * weights * tokens + attention_flops(model, tokens)


def prefill_s(flops: float, *, flops_per_s: float, mfu: float = 1.0) -> float:
    """Seconds of a prompt at a share `mfu` of the peak rate of all accelerators together."""
    return flops / (flops_per_s * mfu)


def nominal_prefill_s(params: float, tokens: int, *, flops_per_s: float, mfu: float) -> float:
    """The same without attention.

    >>> round(nominal_prefill_s(70e9, 4000, flops_per_s=4 * 989e12, mfu=0.5), 3)
    0.283
    """
    return prefill_s(2 * params * tokens, flops_per_s=flops_per_s, mfu=mfu)


# --- mixed workloads ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Archetype:
    """Where a workload's time goes, and what hardware that asks for."""

    prefill_share: float
    name: str  # prefill-heavy, balanced, decode-heavy

    @property
    def wants(self) -> str:
        """The datasheet line to buy by."""
        return {"prefill-heavy": "FLOP/s", "decode-heavy": "memory bandwidth"}.get(
            self.name, "both, weighed by their shares of time"
        )


def archetype(
    *,
    input_tokens: float,
    output_tokens: float,
    prefill_tokens_per_s: float,
    decode_tokens_per_s: float,
) -> Archetype:
    """The workload by its share of time in prefill: from 0.8 on heavy, up to 0.2 light."""
    prefill_s_ = input_tokens / prefill_tokens_per_s
    share = prefill_s_ / (prefill_s_ + output_tokens / decode_tokens_per_s)
    return Archetype(prefill_share=share, name=phase_balance(share))


def hardware_score(prefill_share: float, *, flops_ratio: float, bandwidth_ratio: float) -> float:
    """Speed of another accelerator over this one for a mix: shares of time over the ratios."""
    return 1 / (prefill_share / flops_ratio + (1 - prefill_share) / bandwidth_ratio)
