"""The step law in whole picoseconds, for schedulers that predict and executors that add up.

A `Cost` prices a step in floating-point seconds.  Here the same law has integer
coefficients, so that a step is `alpha` and the j-th repeat of it exactly `alpha + j beta`:
k repeats cost k alpha + beta k (k - 1) / 2, to the bit what k single steps cost.

Sequences grow while they decode, and windows saturate: `linear_steps` says for how many
repeats the line holds.  A step that computes prompt tokens in front of streams is bounded
by `chunk_for`: the most prompt tokens that keep the step under an ITL target.

The few scalars of an engine on an accelerator (`Calibration`) multiply or add here, and
nowhere else.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import isqrt
from typing import Protocol

from tierline.base.clock import FOREVER_PS, PS_PER_S
from tierline.catalog.gpu import GpuSpec
from tierline.catalog.model import ModelSpec
from tierline.perf.evidence import Evidence
from tierline.perf.step import Layout, StepTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What measured points of one engine on one accelerator say about the law."""

    step_s: float = 0.0  # added to every step: the engine's own overhead
    layers: float = 1.0  # multiplies products and collectives
    cache: float = 1.0  # multiplies reading and scoring the cache: skewed lengths, kernel choice
    kernel_s: float = 0.0  # added for every kernel of a step, where kernels are counted
    prompt_layer_s: float = 0.0  # added for every layer of a step with prompt tokens, no graph
    source: str = "the law as it is"


LAW = Calibration()


class Cost(Protocol):
    """What steps are priced by: the fitted law (`perf.step`), or kernels (`perf.kernel_cost`)."""

    @property
    def model(self) -> ModelSpec:
        """The model."""
        ...

    @property
    def gpu(self) -> GpuSpec:
        """The accelerator."""
        ...

    @property
    def layout(self) -> Layout:
        """How the model is cut."""
        ...

    @property
    def weights_bytes_per_gpu(self) -> float:
        """Bytes of weights on one accelerator."""
        ...

    @property
    def evidence(self) -> Evidence:
        """How well its prices are known."""
        ...

    def terms(self, tokens_max: int) -> StepTerms:
        """The coefficients of steps of up to so many tokens."""
        ...


class StepLine:
    """Prices steps of one instance as a line over repeats."""

    __slots__ = (
        "_bounded",
        "_bounded_pairs",
        "_cache_ps",
        "_decodes_ps",
        "_mixed_cache_ps",
        "_mixed_decodes_ps",
        "_mixed_pair_ps",
        "_pair_ps",
        "_prompt_token_ps",
        "_tokens_ps",
        "bends",
        "cost",
        "tokens_max",
    )

    def __init__(
        self, cost: Cost, *, tokens_max: int, calibration: Calibration = LAW, slow: float = 1.0
    ) -> None:
        """`tokens_max` bounds the tokens of one step; `slow` stretches every step."""
        terms = cost.terms(tokens_max)
        scale = PS_PER_S * terms.slowdown * slow
        layers, cache = scale * calibration.layers, scale * calibration.cache
        fixed_s = calibration.step_s + calibration.kernel_s * terms.kernels
        self.cost = cost
        self.tokens_max = tokens_max
        self._tokens_ps = [round(layers * s) for s in terms.tokens_s]
        state_ps = round(cache * terms.state_s)
        self._decodes_ps = [
            round(scale * (s + fixed_s)) + state_ps * n for n, s in enumerate(terms.sequences_s)
        ]
        self._cache_ps = round(cache * terms.cache_s_per_token)
        self._bounded = [(limit, round(cache * s)) for limit, s in terms.bounded]
        # Twice the pairs of a chunk are a whole number, so the coefficient is per half pair.
        self._pair_ps = round(cache * terms.pair_s / 2)
        self._bounded_pairs = [
            (2 * limit, round(cache * s / 2)) for limit, s in terms.bounded_pairs
        ]
        prompt_s = terms.prefill_s + calibration.prompt_layer_s * cost.model.layers
        prefill_ps = round(scale * prompt_s)
        mixed_ps = round(cache * terms.mixed_sequence_s)
        self._mixed_decodes_ps = [
            ps + prefill_ps + mixed_ps * n for n, ps in enumerate(self._decodes_ps)
        ]
        self._prompt_token_ps = round(layers * terms.prompt_token_s)
        self._mixed_cache_ps = self._cache_ps + round(cache * terms.mixed_cache_s_per_token)
        # Whether some windows saturate, so that the line may change under way.
        self.bends = bool(self._bounded or self._bounded_pairs)
        self._mixed_pair_ps = round(cache * terms.mixed_pair_s)

    def line(
        self,
        decodes: int,
        context_tokens: int,
        chunks: Seq[tuple[int, int]] = (),
        *,
        draft_tokens: int = 0,
        padding: int = 0,
    ) -> tuple[int, int]:
        """(alpha, beta): repeat j of the step lasts alpha + j beta picoseconds.

        `chunks` are (cached tokens before, prompt tokens) of every prompt in the step.
        """
        slots = decodes + padding
        tokens = slots * (1 + draft_tokens) if draft_tokens else slots
        if chunks:
            pairs = growth = prompt = 0
            for past, count in chunks:
                prompt += count
                pairs += count * (2 * past + count)
                growth += 2 * count * count
            tokens += prompt
            cache_ps, pair_ps = self._mixed_cache_ps, self._pair_ps
            alpha = self._mixed_decodes_ps[slots] + cache_ps * context_tokens + pair_ps * pairs
            alpha += (self._prompt_token_ps + self._mixed_pair_ps * decodes) * prompt
            beta = cache_ps * decodes + pair_ps * growth
            for limit, pair_ps in self._bounded_pairs:
                most = limit * prompt
                if pairs < most:
                    alpha += pair_ps * pairs
                    beta += pair_ps * growth
                else:
                    alpha += pair_ps * most
        else:
            alpha = self._decodes_ps[slots] + self._cache_ps * context_tokens
            beta = self._cache_ps * decodes
        for limit, token_ps in self._bounded:
            most = limit * decodes
            if context_tokens < most:
                alpha += token_ps * context_tokens
                beta += token_ps * decodes
            else:
                alpha += token_ps * most
        return alpha + self._tokens_ps[tokens], beta

    def linear_steps(
        self, decodes: int, context_tokens: int, chunks: Seq[tuple[int, int]] = ()
    ) -> int:
        """Repeats, from now, for which `line` stays exact."""
        steps = FOREVER_PS
        for limit, _ in self._bounded:
            room = limit * decodes - context_tokens
            if decodes and room > 0:
                steps = min(steps, room // decodes + 1)
        if self._bounded_pairs and chunks:
            pairs = sum(count * (2 * past + count) for past, count in chunks)
            growth = sum(2 * count * count for _, count in chunks)
            prompt = sum(count for _, count in chunks)
            for limit, _ in self._bounded_pairs:
                room = limit * prompt - pairs
                if room > 0:
                    steps = min(steps, room // growth + 1)
        return steps

    def chunk_for(
        self,
        target_ps: int,
        *,
        decodes: int,
        context_tokens: int,
        past_tokens: int,
        tokens_max: int,
        grain: int,
    ) -> int:
        """The most prompt tokens, a multiple of `grain`, of a step no longer than `target_ps`."""
        base = self._mixed_decodes_ps[decodes] + self._mixed_cache_ps * context_tokens
        each = self._prompt_token_ps + self._mixed_pair_ps * decodes
        for limit, token_ps in self._bounded:
            base += token_ps * min(context_tokens, limit * decodes)
        room = target_ps - base
        tokens_ps, pair_ps, bounded = self._tokens_ps, self._pair_ps, self._bounded_pairs
        low, high = 0, tokens_max // grain
        # Mostly the whole budget fits, so that is asked first.
        pairs = tokens_max * (2 * past_tokens + tokens_max)
        whole = tokens_ps[decodes + tokens_max] + pair_ps * pairs + each * tokens_max
        if not bounded and whole <= room:
            return high * grain
        while low < high:
            middle = (low + high + 1) >> 1
            count = middle * grain
            pairs = count * (2 * past_tokens + count)
            step = tokens_ps[decodes + count] + pair_ps * pairs + each * count
            if bounded:
                step += sum(ps * min(pairs, limit * count) for limit, ps in bounded)
            if step <= room:
                low = middle
            else:
                high = middle - 1
        return low * grain

    def prefill_rate(
        self, *, chunk: int, decodes: int, context_tokens: int
    ) -> Callable[[int, int], int]:
        """(prompt tokens, cached tokens before) -> picoseconds, at one decode load and chunk."""
        fixed = self._mixed_decodes_ps[decodes] + self._mixed_cache_ps * context_tokens
        for limit, token_ps in self._bounded:
            fixed += token_ps * min(context_tokens, limit * decodes)
        tokens_ps, pair_ps, bounded = self._tokens_ps, self._pair_ps, self._bounded_pairs
        each = self._prompt_token_ps + self._mixed_pair_ps * decodes
        whole_ps = fixed + tokens_ps[decodes + chunk]

        def price(tokens: int, past: int) -> int:
            whole, rest = divmod(tokens, chunk)
            total = whole * whole_ps
            if rest:
                total += fixed + tokens_ps[decodes + rest]
            pairs = tokens * (2 * past + tokens)
            total += pair_ps * pairs + each * tokens
            for limit, bounded_ps in bounded:
                total += bounded_ps * min(pairs, limit * tokens)
            return total

        return price

    def prefill_ps(
        self, tokens: int, *, past: int = 0, chunk: int, decodes: int = 0, context_tokens: int = 0
    ) -> int:
        """Time until `tokens` prompt tokens after `past` cached ones are computed, in chunks of
        `chunk` beside `decodes` sequences."""
        if tokens <= 0:
            return 0
        rate = self.prefill_rate(chunk=chunk, decodes=decodes, context_tokens=context_tokens)
        return rate(tokens, past)


def steps_before(alpha: int, beta: int, span_ps: int, most: int) -> int:
    """How many of `most` repeats begin before `span_ps` has passed; the first begins at 0.

    Repeat j begins at j alpha + beta j (j - 1) / 2; the root of that is found in integers
    and corrected by one.

    >>> steps_before(10, 0, 25, 100), steps_before(10, 2, 23, 100)
    (3, 3)
    """
    if span_ps <= 0:
        return 1
    if beta == 0:
        return min(most, (span_ps - 1) // alpha + 1)
    half = 2 * alpha - beta
    j = (isqrt(half * half + 8 * beta * (span_ps - 1)) - half) // (2 * beta)
    while j * alpha + beta * (j * (j - 1) // 2) >= span_ps:
        j -= 1
    while (j + 1) * alpha + beta * ((j + 1) * j // 2) < span_ps:
        j += 1
    return min(most, j + 1)
