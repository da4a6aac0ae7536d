"""Prefill here, decode there: who receives, whether it pays, and how many of each.

The fleet asks `hand_over` before a prefill replica begins a prompt, because KV that goes
layer by layer needs its receiver from the start.  A refusal is an answer too: the replica
that computed the prompt goes on decoding it.  `pool_sizes` and `split` are asked when a fleet
is laid out or scaled.

The pipeline is the closed form of `perf.transfer` in whole picoseconds:

    total = p + x + (L - 1) max(p, x),  p = prefill / L, x = transfer / L
    L total = prefill + transfer + (L - 1) max(prefill, transfer)

Invariants
    INV-SCHED-47  who receives accepts and can hold the whole sequence, and nobody who can is
                  under less pressure afterwards
    INV-SCHED-48  what is handed over exposes no more transfer than its promise has slack
"""

from collections import abc
from dataclasses import dataclass
from math import ceil
from typing import Protocol

from tierline.base.clock import PS_PER_S
from tierline.base.units import format_seconds
from tierline.perf.transfer import COLOCATE_PROMPT_TOKENS, Pools, pools


class Receiver(Protocol):
    """What is known about a decode replica."""

    @property
    def number(self) -> int:
        """Its place in the order of births."""
        ...

    @property
    def accepting(self) -> bool:
        """Up, and not draining."""
        ...

    @property
    def kv_tokens_total(self) -> int:
        """Tokens that its KV memory holds."""
        ...

    @property
    def kv_tokens_free(self) -> int:
        """Of those, free or held by nobody who runs, less what is on its way there."""
        ...


def receiver(replicas: abc.Sequence[Receiver], *, tokens: int) -> int | None:
    """The replica that is least full with so many tokens more, or None when none can hold them.

    Shares are compared by cross products, so equal ones are equal; ties to the lowest number.
    """
    best, best_left = None, 0
    for replica in replicas:
        if not replica.accepting or replica.kv_tokens_free < tokens:
            continue
        left = replica.kv_tokens_free - tokens
        if best is None or left * best.kv_tokens_total > best_left * replica.kv_tokens_total:
            best, best_left = replica, left
    return None if best is None else best.number


def pipelined_ps(*, prefill_ps: int, transfer_ps: int, layers: int) -> int:
    """Prefill and transfer, each layer sent as soon as it is computed; a last part rounds up.

    One layer is no pipeline: everything is sent when all is computed.

    >>> pipelined_ps(prefill_ps=400 * 10**9, transfer_ps=105 * 10**9, layers=80) / 1e9
    401.3125
    """
    assert layers > 0
    longer = max(prefill_ps, transfer_ps)
    return -(-(prefill_ps + transfer_ps + (layers - 1) * longer) // layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """Where a sequence decodes, and why."""

    number: int | None  # the decode replica; None: where its prompt was computed
    exposed_ps: int  # transfer that prefill does not hide
    reason: str


def hand_over(
    replicas: abc.Sequence[Receiver],
    *,
    prompt_tokens: int,
    tokens: int,
    prefill_ps: int,
    transfer_ps: int,
    layers: int,
    slack_ps: int,
) -> Handover:
    """Hand a sequence to the decode pool, or keep it.

    `tokens` is what it will come to hold, output included; `slack_ps` what its promise leaves
    after prefill.
    """
    pipeline_ps = pipelined_ps(prefill_ps=prefill_ps, transfer_ps=transfer_ps, layers=layers)
    exposed_ps = pipeline_ps - prefill_ps

    def keep(reason: str) -> Handover:
        return Handover(number=None, exposed_ps=exposed_ps, reason=reason)

    if prompt_tokens < COLOCATE_PROMPT_TOKENS:
        return keep(f"a prompt of {prompt_tokens} tokens hardly disturbs decodes")
    if exposed_ps > slack_ps:
        exposed, left = (format_seconds(max(t, 0) / PS_PER_S) for t in (exposed_ps, slack_ps))
        return keep(f"{exposed} of transfer is exposed, the promise has {left}")
    number = receiver(replicas, tokens=tokens)
    if number is None:
        return keep(f"no decode replica can hold {tokens} tokens")
    return Handover(number=number, exposed_ps=exposed_ps, reason="least full that can hold it")


# --- how many of each -----------------------------------------------------------------------


def pool_sizes(
    *,
    rps: float,
    input_tokens: float,
    output_tokens: float,
    prefill_tokens_per_s: float,
    decode_tokens_per_s: float,
    step_s: float,
    sequences_max: int,
) -> tuple[int, int]:
    """Prefill and decode instances for a rate, from the rates of one instance.

    The decode pool must hold its sequences as well as produce its tokens.

    >>> rates = dict(prefill_tokens_per_s=14_129, decode_tokens_per_s=3796, step_s=0.01686)
    >>> pool_sizes(rps=10, input_tokens=4000, output_tokens=300, sequences_max=64, **rates)
    (3, 1)
    """
    need = pools(
        rps=rps,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        prefill_tokens_per_s=prefill_tokens_per_s,
        decode_tokens_per_s=decode_tokens_per_s,
        step_s=step_s,
    )
    decode = max(need.decode, need.decoding / sequences_max)
    return max(need.prefill_instances, 1), max(ceil(decode), 1)


def split(replicas: int, need: Pools) -> tuple[int, int]:
    """So many replicas cut into two pools, so that the busier one is as little busy as can be."""
    assert replicas > 1, "two pools need two replicas"

    def busiest(prefill: int) -> float:
        return max(need.prefill / prefill, need.decode / (replicas - prefill))

    prefill = min(range(1, replicas), key=busiest)
    return prefill, replicas - prefill
