"""How one instance behaves under load: the seam between the planner and whatever predicts.

`operating_point` answers for a rate; `usable_rate`, `at_concurrency` and `load_curve` walk
along the same states. It is a queueing model in closed form; a simulation of the same
instance has the same signature and can take its place.

The model. What an instance does is set by how many sequences decode, so states are walked
by `running`, and the rate follows: by Little's law n = rate x outputs x gap, where `gap`
is the mean time between two tokens of a stream. Prompts are computed in steps of at most
`chunk_tokens`, beside the decodes (a step of T_m seconds instead of T_d) or, for engines
that do not mix, in steps of their own while decodes wait. Prompt work is a single server:
busy a share of the time, and a new prompt waits behind it as in M/G/1 with Kingman's
correction for bursty arrivals; that wait's tail is exponential. A prompt shorter than a
chunk shares its step with the others that came during the last one. Batching is bounded
by KV blocks, by slots, and by prompt compute, and the point names the bound that is nearest.

What it leaves out, and the band must cover: shedding, preemption, priorities, and the
correlation of long prompts with each other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from tierline.perf.step import EngineProfile, StepCost
from tierline.workload.slo import ServiceLevel, Target

PRECISION = 1.005  # ratio at which a search over states stops
ROUNDS = 4  # of the inner fixed point between rate and tokens of a mixed step
RATE_MIN_RPS = 1e-4
Z99 = 2.326  # one-sided 99 % of a normal: memory must hold the busy moments, not the mean


@dataclass(frozen=True, kw_only=True)  # no slots: the means are computed once and kept
class Demand:
    """What arrives, as equally likely lengths (mid-quantiles of the profile)."""

    input_tokens: tuple[float, ...]
    output_tokens: tuple[float, ...]
    hit_rate: float = 0.0  # share of prompt tokens whose KV is already cached
    reload_s_per_token: float = 0.0  # of prompt, to load what is cached below the device
    arrival_cv2: float = 1.0  # squared coefficient of variation of the gaps; Poisson: 1

    @cached_property
    def input_mean(self) -> float:
        """Mean prompt tokens."""
        return sum(self.input_tokens) / len(self.input_tokens)

    @cached_property
    def output_mean(self) -> float:
        """Mean output tokens."""
        return sum(self.output_tokens) / len(self.output_tokens)

    @cached_property
    def fresh_mean(self) -> float:
        """Mean prompt tokens that must be computed."""
        return max(self.input_mean * (1 - self.hit_rate), 1.0)

    @cached_property
    def context_mean(self) -> float:
        """Cached tokens of a decoding sequence, over time: long outputs are seen longer."""
        squares = sum(o * o for o in self.output_tokens) / len(self.output_tokens)
        return self.input_mean + squares / (2 * self.output_mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One serving instance: its step law, its memory, and its batching limits."""

    cost: StepCost
    engine: EngineProfile
    kv_tokens: float  # cached tokens that fit beside the weights
    sequences_max: int
    chunk_tokens: int  # prompt tokens of one step


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """The steady state of one instance at one rate. Times in seconds."""

    rate_rps: float
    running: float  # decoding sequences
    step_s: float  # mean gap between two tokens of a stream
    decode_step_s: float
    mixed_step_s: float
    mixed_share: float  # of the gaps in which prompt tokens are computed
    mixed_tokens: float  # prompt tokens that such a step carries on average
    busy: float  # share of time with prompt work
    queue_s: float  # mean wait behind other prompts
    notice_s: float  # mean time until a step begins that can see the request
    prompts_s: tuple[float, ...]  # own prefill time of each equally likely prompt
    chunk_step_s: float  # a gap with the most prompt tokens that busy moments bring
    stall_s: float  # scale of the time that decodes stand still for prompts; 0 where steps mix
    kv_share: float  # of the KV pool, in a busy moment
    slot_share: float
    host_s: float
    output_tokens: tuple[float, ...]

    @property
    def saturation(self) -> float:
        """How near the closest bound is: 1 is full."""
        return max(self.busy, self.kv_share, self.slot_share)

    @property
    def bound(self) -> str:
        """The bound that is nearest."""
        shares = {
            "prompt compute": self.busy,
            "KV memory": self.kv_share,
            "sequence slots": self.slot_share,
        }
        return max(shares, key=lambda name: shares[name])

    @property
    def wait_mean_s(self) -> float:
        """Mean time from arrival to the first step with the request's own tokens."""
        return self.queue_s + self.notice_s

    def ttft_s(self, percentile: float) -> float:
        """A percentile of the time to first token.

        Queueing is exponential where it happens at all (a share `busy` of arrivals); the
        wait to be noticed is uniform and taken at the same percentile.
        """
        level = percentile / 100
        low, high = 0.0, max(self.prompts_s) + 12 * self.queue_s / self.busy + 1e-6
        for _ in range(30):
            middle = (low + high) / 2
            if self._late_share(middle) > 1 - level:
                low = middle
            else:
                high = middle
        return high + 2 * level * self.notice_s + self.host_s

    def _late_share(self, seconds: float) -> float:
        """Share of prompts whose queueing and own time exceed `seconds`."""
        decay = self.busy / self.queue_s if self.queue_s > 0 else math.inf
        late = 0.0
        for own_s in self.prompts_s:
            slack = seconds - own_s
            late += 1.0 if slack < 0 else self.busy * math.exp(-min(slack * decay, 700.0))
        return late / len(self.prompts_s)

    def keeps(self, target: Target) -> bool:
        """Whether one promise holds; for TTFT without searching for the percentile itself."""
        if target.metric != "ttft":
            return self.latency_s(target.metric, target.percentile) <= target.limit_s
        level = target.percentile / 100
        left_s = target.limit_s - 2 * level * self.notice_s - self.host_s
        return left_s > 0 and self._late_share(left_s) <= 1 - level

    def within_share(self, limit_s: float) -> float:
        """Share of requests whose first token comes within `limit_s`."""
        return max(1 - self._late_share(limit_s - self.notice_s - self.host_s), 0.0)

    def itl_s(self, percentile: float) -> float:
        """A percentile of the gap between two tokens of a stream."""
        level = percentile / 100
        if 1 - level >= self.mixed_share:
            return self.decode_step_s
        if self.stall_s:  # as long as prompts keep coming: an exponential tail
            return self.decode_step_s + self.stall_s * max(
                1.0, math.log(self.mixed_share / (1 - level))
            )
        # Among steps with prompt tokens, the larger chunks make the tail.
        among_mixed = 1 - (1 - level) / self.mixed_share
        return self.mixed_step_s + (self.chunk_step_s - self.mixed_step_s) * among_mixed

    @property
    def ttft_mean_s(self) -> float:
        """Mean time to first token."""
        return sum(self.prompts_s) / len(self.prompts_s) + self.wait_mean_s + self.host_s

    @property
    def e2e_mean_s(self) -> float:
        """Mean end-to-end residence."""
        return self.ttft_mean_s + self.step_s * _mean(self.output_tokens)

    def latency_s(self, metric: str, percentile: float) -> float:
        """A percentile of any metric of `workload.slo.METRICS`."""
        if metric == "ttft":
            return self.ttft_s(percentile)
        if metric == "itl":
            return self.itl_s(percentile)
        if metric == "tpot":
            return self.step_s
        assert metric == "e2e", metric
        ranked = sorted(self.output_tokens)
        outputs = ranked[min(int(percentile / 100 * len(ranked)), len(ranked) - 1)]
        return self.ttft_s(percentile) + outputs * self.step_s

    def meets(self, levels: tuple[ServiceLevel, ...]) -> bool:
        """Whether every promise of every class holds."""
        return all(self.keeps(target) for level in levels for target in level.targets)


def operating_point(instance: Instance, demand: Demand, rate_rps: float) -> OperatingPoint | None:
    """Where `instance` settles at `rate_rps`, or None when it cannot keep up."""

    def slow_enough(point: OperatingPoint) -> bool:
        return point.rate_rps <= rate_rps

    point = _last_state(instance, demand, slow_enough)
    return point if point is not None and point.rate_rps * PRECISION**2 >= rate_rps else None


def usable_rate(
    instance: Instance, demand: Demand, levels: tuple[ServiceLevel, ...]
) -> OperatingPoint | None:
    """The point of highest rate that keeps every promise, or None when no rate does."""

    def kept(point: OperatingPoint) -> bool:
        return point.meets(levels)

    return _last_state(instance, demand, kept)


def saturated_rate(instance: Instance, demand: Demand) -> OperatingPoint | None:
    """The point of highest rate that the instance can sustain at all, promises aside."""
    return usable_rate(instance, demand, ())


def at_concurrency(instance: Instance, demand: Demand, clients: int) -> OperatingPoint | None:
    """The point at which `clients` that send again at once keep `clients` requests in flight."""

    def few_enough(point: OperatingPoint) -> bool:
        return point.rate_rps * point.e2e_mean_s <= clients

    return _last_state(instance, demand, few_enough)


def load_curve(
    instance: Instance, demand: Demand, *, rate_max_rps: float, points: int = 24
) -> list[OperatingPoint]:
    """Operating points evenly spaced up to `rate_max_rps`; unreachable ones are left out."""
    rates = (rate_max_rps * (i + 1) / points for i in range(points))
    curve = (operating_point(instance, demand, rate) for rate in rates)
    return [point for point in curve if point is not None]


def _last_state(
    instance: Instance,
    demand: Demand,
    keeps: Callable[[OperatingPoint], bool],
) -> OperatingPoint | None:
    """The busiest state that exists and `keeps`, which holds up to some state and not beyond."""

    def good(running: float) -> OperatingPoint | None:
        point = _state(instance, demand, running)
        return point if point is not None and keeps(point) else None

    low = high = RATE_MIN_RPS * demand.output_mean * instance.cost.step_s(1, demand.context_mean)
    best = good(low)
    if best is None:
        return None
    while (point := good(high * 8)) is not None:
        best, low, high = point, high * 8, high * 8
    high *= 8
    while high / low > PRECISION:
        middle = math.sqrt(low * high)
        if (point := good(middle)) is not None:
            best, low = point, middle
        else:
            high = middle
    return best


# --- one state --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Prompts:
    """What the demand's prompts cost while `decodes` sequences decode."""

    own_s: tuple[float, ...]  # alone, first chunk to last
    work_mean_s: float  # of the prompt server's time, sharing steps where prompts are short
    work_cv2: float
    single_chunk: tuple[bool, ...]


def _prompts(instance: Instance, demand: Demand, decodes: int) -> _Prompts:
    step_s, chunk = instance.cost.step_s, instance.chunk_tokens
    beside, cached = _beside(instance, demand, decodes)
    own_s: list[float] = []
    work_s: list[float] = []
    for tokens in demand.input_tokens:
        fresh = max(tokens * (1 - demand.hit_rate), 1.0)
        chunks = math.ceil(fresh / chunk)
        pairs = fresh * (tokens - fresh / 2)
        own = chunks * step_s(beside, cached, math.ceil(fresh / chunks), pairs / chunks)
        full = step_s(beside, cached, chunk, pairs * chunk / fresh)
        own_s.append(own)
        work_s.append(min(full * fresh / chunk, own))
    mean_s = _mean(work_s)
    squares = _mean([w * w for w in work_s])
    return _Prompts(
        own_s=tuple(own_s),
        work_mean_s=mean_s,
        work_cv2=max(squares / mean_s**2 - 1, 0.0),
        single_chunk=tuple(t * (1 - demand.hit_rate) <= chunk for t in demand.input_tokens),
    )


def _beside(instance: Instance, demand: Demand, decodes: int) -> tuple[int, float]:
    """Sequences, and their cached tokens, that decode in a step with prompt tokens."""
    return (decodes, decodes * demand.context_mean) if instance.engine.mixes_prefill else (0, 0.0)


def _state(instance: Instance, demand: Demand, running: float) -> OperatingPoint | None:
    """The state in which `running` sequences decode on average, or None where there is none."""
    if running > instance.sequences_max:
        return None
    decodes = max(math.ceil(running), 1)
    decode_s = instance.cost.step_s(decodes, decodes * demand.context_mean)
    # Between whole batch sizes the step is read off the line, so that states vary smoothly.
    if 1 < running < decodes:
        below_s = instance.cost.step_s(decodes - 1, (decodes - 1) * demand.context_mean)
        decode_s -= (decode_s - below_s) * (decodes - running)
    prompts = _prompts(instance, demand, decodes)
    mixes = instance.engine.mixes_prefill
    alone_s = _mean(prompts.own_s)
    tokens, mixed_s = _mixed_step(instance, demand, decodes, demand.fresh_mean)
    busy_s, rate_rps = prompts.work_mean_s, 0.0  # busy seconds of one prompt
    for _ in range(ROUNDS):
        progress = min(decode_s / mixed_s, 1.0) if mixes else 0.0
        rate_rps = 1 / (decode_s * demand.output_mean / running + busy_s * (1 - progress))
        busy_s = max(prompts.work_mean_s, -math.expm1(-rate_rps * alone_s) / rate_rps)
        tokens, mixed_s = _mixed_step(
            instance, demand, decodes, demand.fresh_mean * mixed_s / busy_s
        )
    if rate_rps * prompts.work_mean_s >= 1:
        return None
    busy = min(rate_rps * busy_s, 1.0)
    return _point(
        instance,
        demand,
        _Mix(running, rate_rps, decode_s, mixed_s, tokens, busy, prompts),
    )


def _mixed_step(
    instance: Instance, demand: Demand, decodes: int, tokens: float
) -> tuple[float, float]:
    """Prompt tokens of a step, bounded by the chunk, and the seconds of such a step."""
    beside, cached = _beside(instance, demand, decodes)
    tokens = min(max(tokens, 1.0), instance.chunk_tokens)
    pairs = tokens * max(demand.input_mean - demand.fresh_mean / 2, tokens / 2)
    return tokens, instance.cost.step_s(beside, cached, math.ceil(tokens), pairs)


@dataclass(frozen=True, slots=True)
class _Mix:
    """Steps with and without prompt tokens in one state."""

    running: float
    rate_rps: float
    decode_s: float
    mixed_s: float
    mixed_tokens: float
    busy: float
    prompts: _Prompts


def _point(instance: Instance, demand: Demand, mix: _Mix) -> OperatingPoint | None:
    prompts, rate_rps = mix.prompts, mix.rate_rps
    load = rate_rps * prompts.work_mean_s
    residual_s = (1 + prompts.work_cv2) / 2 * prompts.work_mean_s  # of work in progress
    burst = (demand.arrival_cv2 + prompts.work_cv2) / (1 + prompts.work_cv2)
    queue_s = load / (1 - load) * burst * residual_s
    gap_s = mix.running / (rate_rps * demand.output_mean)
    # Prompts come in bursts: the ones behind a prompt slow its first tokens more than the mean.
    behind_s = queue_s / (1 - load)
    behind_s *= max(1 - gap_s / mix.mixed_s, 0.0) if instance.engine.mixes_prefill else 1.0
    gap_s += behind_s / demand.output_mean
    running = mix.running + rate_rps * behind_s
    busy_moment = running + Z99 * math.sqrt(running * max(demand.arrival_cv2, 1.0))
    kv_share = (busy_moment * demand.context_mean + demand.input_mean) / instance.kv_tokens
    slot_share = busy_moment / instance.sequences_max
    if max(kv_share, slot_share) > 1:
        return None
    notice_s = mix.busy * max(mix.mixed_s / 2 - residual_s, 0.0) + (1 - mix.busy) * mix.decode_s / 2
    # The largest prompt of a step, and the others that a Poisson stream brings beside it.
    fresh = [t * (1 - demand.hit_rate) for t in demand.input_tokens]
    others = max(mix.mixed_tokens - demand.fresh_mean, 0.0)
    crowd = Z99 * math.sqrt(others * _mean([f * f for f in fresh]) / demand.fresh_mean)
    decodes = max(math.ceil(mix.running), 1)
    most = max(mix.mixed_tokens, *fresh) + crowd
    chunk_s = _mixed_step(instance, demand, decodes, most)[1]
    # Busy periods vary more than an exponential does: (1 + cv2) / 2 of M/G/1, as a spread.
    spread = math.sqrt(max((1 + (prompts.work_cv2 + load) / (1 - load)) / 2, 1.0))
    mixed_gap_s, mixed_share = _mixed_gap(instance, mix)
    return OperatingPoint(
        rate_rps=rate_rps,
        running=running,
        step_s=gap_s,
        decode_step_s=mix.decode_s,
        mixed_step_s=mixed_gap_s,
        mixed_share=mixed_share,
        mixed_tokens=mix.mixed_tokens,
        busy=mix.busy,
        queue_s=queue_s,
        notice_s=notice_s + gap_s * instance.engine.wait_steps / 2,
        # Short prompts wait for the whole step they share; loads hold up no step, only the prompt.
        prompts_s=tuple(
            (max(own_s, mix.mixed_s) if single else own_s) + tokens * demand.reload_s_per_token
            for tokens, own_s, single in zip(
                demand.input_tokens, prompts.own_s, prompts.single_chunk, strict=True
            )
        ),
        chunk_step_s=max(chunk_s, mixed_gap_s),
        stall_s=0.0 if instance.engine.mixes_prefill else spread * (mixed_gap_s - mix.decode_s),
        kv_share=kv_share,
        slot_share=slot_share,
        host_s=instance.engine.host_s,
        output_tokens=demand.output_tokens,
    )


def _mixed_gap(instance: Instance, mix: _Mix) -> tuple[float, float]:
    """Seconds of a gap with prompt work in it, and the share of such gaps."""
    if instance.engine.mixes_prefill:
        steps_per_s = mix.busy / mix.mixed_s + (1 - mix.busy) / mix.decode_s
        return mix.mixed_s, mix.busy / mix.mixed_s / steps_per_s
    # Apart: every gap is one decode step, and those with arrivals also hold all the prompt work.
    share = -math.expm1(-mix.rate_rps * mix.decode_s / max(1 - mix.busy, 1e-9))
    stall_s = mix.busy / max(1 - mix.busy, 1e-9) * mix.decode_s / share
    return mix.decode_s + stall_s, share


def _mean(values: tuple[float, ...] | list[float]) -> float:
    return sum(values) / len(values)
