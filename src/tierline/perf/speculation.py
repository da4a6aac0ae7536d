"""What a draft model gains, and when it costs.

The planner asks for the expected tokens of a target pass and the speedup of a whole step;
the advisor sets the usual thresholds beside the computed answer. A draft proposes K tokens,
the target checks them in one pass, keeps the leading run and adds one token of its own.

    E = (1 - a^(K+1)) / (1 - a)      tokens a pass, acceptance a independent by position
    speedup = E / (1 + K c)          c: draft step over target step
    by ratio r = accepted / drafted: speedup = (1 + r K) / (1 + K c), break-even r = c

Both definitions of acceptance are in use and give different answers, so both are here.
Left out: that a verification of K + 1 tokens costs more than a decode step once the batch
is compute-bound; `batch_crossover` says where that begins.
"""

import math

from tierline.perf.advice import Advice

ACCEPTANCE_OFF, ACCEPTANCE_ON = 0.5, 0.6  # between them: keep what runs (hysteresis)
BATCH_DIMINISHING, BATCH_OFF = 32, 128
DRAFT_SPEED_GUIDE = 10.0  # a guideline and not a gate: slower drafts may still gain
DRAFT_TOKENS_MAX = 32


def tokens_per_pass(acceptance: float, draft_tokens: int) -> float:
    """Expected tokens of one target pass.

    >>> [round(tokens_per_pass(a, 5), 2) for a in (0.6, 0.7)]
    [2.38, 2.94]
    """
    if acceptance == 1:
        return draft_tokens + 1.0
    return float((1 - acceptance ** (draft_tokens + 1)) / (1 - acceptance))


def speedup(acceptance: float, draft_tokens: int, *, draft_cost: float) -> float:
    """Tokens a second over plain decode, acceptance independent by position."""
    return tokens_per_pass(acceptance, draft_tokens) / (1 + draft_tokens * draft_cost)


def speedup_by_ratio(accepted_ratio: float, draft_tokens: int, *, draft_cost: float) -> float:
    """The same when acceptance is measured as accepted over drafted tokens.

    >>> round(speedup_by_ratio(0.2, 5, draft_cost=0.05), 3)
    1.6
    """
    return (1 + accepted_ratio * draft_tokens) / (1 + draft_tokens * draft_cost)


def best_draft_tokens(acceptance: float, *, draft_cost: float) -> int:
    """The K with the highest speedup.

    >>> [best_draft_tokens(a, draft_cost=0.05) for a in (0.5, 0.6, 0.8, 0.9)]
    [3, 4, 8, 13]
    """
    return max(
        range(1, DRAFT_TOKENS_MAX + 1),
        key=lambda k: speedup(acceptance, k, draft_cost=draft_cost),
    )


def break_even_acceptance(draft_tokens: int, *, draft_cost: float) -> float:
    """The independent acceptance at which speculation neither gains nor costs.

    By ratio the break-even is `draft_cost` itself.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if speedup(middle, draft_tokens, draft_cost=draft_cost) < 1:
            low = middle
        else:
            high = middle
    return high


def batch_crossover(draft_tokens: int, *, flops_per_s: float, bytes_per_s: float) -> int:
    """The largest batch whose verification is still bound by memory.

    Weights of 2 bytes give one FLOP per byte and token, so batch x (K + 1) meets the ridge.

    >>> batch_crossover(5, flops_per_s=989e12, bytes_per_s=3.35e12)
    49
    """
    return math.floor(flops_per_s / bytes_per_s / (draft_tokens + 1))


def draft_kv_tokens(draft_bytes: float, *, kv_bytes_per_token: float) -> int:
    """Cached tokens that the draft's memory would have held.

    >>> draft_kv_tokens(35e9, kv_bytes_per_token=327_680)
    106811
    """
    return math.floor(draft_bytes / kv_bytes_per_token)


def speculation_advice(
    *,
    acceptance: float,
    draft_tokens: int,
    draft_cost: float,
    batch: int,
    crossover: int,
    running: bool = False,
) -> Advice:
    """On or off by the law, with the usual thresholds' answer beside it."""
    gain = speedup(acceptance, draft_tokens, draft_cost=draft_cost)
    if acceptance < ACCEPTANCE_OFF or batch >= BATCH_OFF:
        rule = "off"
    elif acceptance > ACCEPTANCE_ON:
        rule = "on"
    else:
        rule = "on" if running else "off"
    reasons = [f"acceptance {acceptance:.2f}: {gain:.2f} times plain decode"]
    if batch > crossover:
        reasons.insert(0, f"batch {batch} over {crossover}: verification is bound by math")
    elif batch >= BATCH_DIMINISHING:
        reasons.append(f"batch {batch}: the gain shrinks as verification nears the ridge")
    if draft_cost * DRAFT_SPEED_GUIDE > 1:
        reasons.append(f"draft only {1 / draft_cost:.1f} times faster than the target")
    verdict = "on" if gain > 1 and batch <= crossover else "off"
    return Advice(verdict=verdict, reasons=tuple(reasons), rule=rule)
