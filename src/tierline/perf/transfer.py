"""Moving bytes: KV between tiers and pools, weights to a starting instance.

The planner prices cold starts and KV offload; the advisor decides whether to split prefill
from decode. Rates are bytes per second: a link that is sold in Gb/s is divided by eight
before it comes here.

    layer pipeline: total = p + x + (L - 1) max(p, x),  p = prefill / L, x = transfer / L
    P : D = (inputs / prefill rate) / (outputs / decode rate)     request rate cancels

Left out: protocol overhead and contention; pass the rate that was measured.
"""

import math
from dataclasses import dataclass

from tierline.perf.advice import Advice

COLOCATE_PROMPT_TOKENS = 500  # shorter prompts hardly disturb decodes
SMALL_CONCURRENCY = 24
LONG_OVER_SHORT = 2.0  # prompt over output, or the other way, for the rule of thumb


def transfer_s(size_bytes: float, *, bytes_per_s: float, latency_s: float = 0.0) -> float:
    """Seconds to move `size_bytes`.

    >>> transfer_s(8e9, bytes_per_s=64e9)
    0.125
    """
    return latency_s + size_bytes / bytes_per_s


def in_flight_bytes(kv_bytes: float, *, kv_bits: float, wire_bits: float) -> float:
    """KV that is packed for the way; bits include scales, see `quantization.packed_bits`.

    >>> in_flight_bytes(16e6, kv_bits=16, wire_bits=8.125)
    8125000.0
    """
    return kv_bytes * wire_bits / kv_bits


def line_rate_bytes_per_s(gigabits_per_s: float) -> float:
    """Bytes per second of a link that is sold in Gb/s."""
    return gigabits_per_s * 1e9 / 8


def pipelined_s(prefill_s: float, transfer_s_: float, *, layers: int) -> float:
    """Prefill and transfer, each layer sent as soon as it is computed.

    >>> round(pipelined_s(0.400, 0.105, layers=80), 4)
    0.4013
    """
    p, x = prefill_s / layers, transfer_s_ / layers
    return p + x + (layers - 1) * max(p, x)


def exposed_s(prefill_s: float, transfer_s_: float, *, layers: int) -> float:
    """What the transfer adds after prefill has ended."""
    return pipelined_s(prefill_s, transfer_s_, layers=layers) - prefill_s


# --- restore or recompute -------------------------------------------------------------------


def restore_s_per_token(kv_bytes_per_token: float, *, bytes_per_s: float) -> float:
    """Seconds to fetch one cached token."""
    return kv_bytes_per_token / bytes_per_s


def recompute_s_per_token(params: float, *, flops_per_s: float, mfu: float) -> float:
    """Seconds to compute one prompt token again."""
    return 2 * params / (flops_per_s * mfu)


def restore_bandwidth_min(kv_bytes_per_token: float, *, recompute_s: float) -> float:
    """The rate below which a tier is slower than computing the tokens again."""
    return kv_bytes_per_token / recompute_s


# --- prefill and decode apart ---------------------------------------------------------------


def prefill_decode_ratio(
    *,
    input_tokens: float,
    output_tokens: float,
    prefill_tokens_per_s: float,
    decode_tokens_per_s: float,
) -> float:
    """Prefill accelerators for each decode accelerator.

    >>> r = dict(prefill_tokens_per_s=6537, decode_tokens_per_s=2787)
    >>> round(prefill_decode_ratio(input_tokens=4000, output_tokens=200, **r), 1)
    8.5
    """
    return (input_tokens / prefill_tokens_per_s) / (output_tokens / decode_tokens_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """Instances of each pool, and the sequences that decode at once."""

    prefill: float
    decode: float
    decoding: float

    @property
    def prefill_instances(self) -> int:
        """Whole prefill instances."""
        return math.ceil(self.prefill)

    @property
    def decode_instances(self) -> int:
        """Whole decode instances."""
        return math.ceil(self.decode)


def pools(
    *,
    rps: float,
    input_tokens: float,
    output_tokens: float,
    prefill_tokens_per_s: float,
    decode_tokens_per_s: float,
    step_s: float,
) -> Pools:
    """What each pool needs at a rate, from the rates of one instance."""
    return Pools(
        prefill=rps * input_tokens / prefill_tokens_per_s,
        decode=rps * output_tokens / decode_tokens_per_s,
        decoding=rps * output_tokens * step_s,
    )


def disaggregation_advice(
    *,
    models: int,
    concurrency: int,
    input_tokens: float,
    output_tokens: float,
    exposed_transfer_s: float,
    ttft_slack_s: float,
    interference_share: float,
    fast_fabric: bool,
) -> Advice:
    """Whether to split prefill from decode; the ratio rule of thumb stands beside it.

    `interference_share` is how much of p99 ITL comes from other requests' prompts. The rule
    of thumb favours short prompts with long outputs, which interfere least.
    """
    rule = ""
    if output_tokens >= LONG_OVER_SHORT * input_tokens:
        rule = "split"
    elif input_tokens >= LONG_OVER_SHORT * output_tokens:
        rule = "overkill"
    if models == 1 and concurrency < SMALL_CONCURRENCY:
        reason = f"{concurrency} requests at once do not fill two pools"
        return Advice(verdict="overkill", reasons=(reason,), rule=rule)
    if input_tokens < COLOCATE_PROMPT_TOKENS:
        reason = f"prompts of {input_tokens:g} tokens hardly disturb decodes"
        return Advice(verdict="colocate", reasons=(reason,), rule=rule)
    if exposed_transfer_s > ttft_slack_s:
        reasons = (
            f"{exposed_transfer_s * 1e3:.0f} ms of transfer over {ttft_slack_s * 1e3:.0f} ms of "
            "TTFT slack",
            "compress KV or send it layer by layer",
        )
        return Advice(verdict="colocate", reasons=reasons, rule=rule)
    if not fast_fabric and interference_share < 0.1:
        reason = "prompts hardly disturb decodes, and the fabric is slow"
        return Advice(verdict="overkill", reasons=(reason,), rule=rule)
    if interference_share < 0.5:
        reason = f"prompts cause {interference_share:.0%} of p99 ITL: chunk them first"
        return Advice(verdict="colocate", reasons=(reason,), rule=rule)
    reason = f"prompts cause {interference_share:.0%} of p99 ITL"
    return Advice(verdict="split", reasons=(reason,), rule=rule)


# --- cold start -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """How long until an instance serves; moving weights and everything after are apart."""

    transfer_s: float
    init_s: float  # container, compilation, graphs, warm-up

    @property
    def total_s(self) -> float:
        """Both."""
        return self.transfer_s + self.init_s


def cold_start(weights_bytes: float, *, bytes_per_s: float, init_s: float) -> ColdStart:
    """From the tier that holds the weights; one drive is about 7 GB/s, striped ones more."""
    return ColdStart(transfer_s=weights_bytes / bytes_per_s, init_s=init_s)
