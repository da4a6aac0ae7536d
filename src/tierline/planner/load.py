"""How one instance behaves under load: the seam between the planner and whatever predicts.

`operating_point` answers for a rate; `load_curve` and `usable_rate` only call it. It is a
queueing model in closed form; a simulation of the same instance has the same signature
and can take its place.

The model. Prompts arrive at `rate` and are computed in chunks of at most `chunk_tokens`
beside the running decodes. A step with a chunk lasts T_m, one without T_d; both grow with
the n sequences that decode. Decoding sequences obey Little's law, n = rate x outputs x T,
with T the mean gap between two tokens of a stream; its smallest solution is the state the
instance settles in. Prompt work is a single server: it is busy a share `busy` of the time,
and a new prompt waits behind it as in M/G/1 with Kingman's correction for bursty arrivals;
the tail of that wait is exponential. Batching is bounded by KV blocks, by slots, and by
the stability of both queues, and the point names the bound that is nearest.

What it leaves out, and the band must cover: shedding, preemption, priorities, and the
correlation of long prompts with each other.
"""

import math
from dataclasses import dataclass

from tierline.perf.step import EngineProfile, StepCost
from tierline.workload.slo import ServiceLevel

CONVERGED = 1e-3
ROUNDS_MAX = 40
Z99 = 2.326  # one-sided 99 % of a normal: memory must hold the busy moments, not the mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What arrives, as equally likely lengths (mid-quantiles of the profile)."""

    input_tokens: tuple[float, ...]
    output_tokens: tuple[float, ...]
    hit_rate: float = 0.0  # share of prompt tokens whose KV is already cached
    reload_s_per_token: float = 0.0  # of prompt, to load what is cached below the device
    arrival_cv2: float = 1.0  # squared coefficient of variation of the gaps; Poisson: 1

    @property
    def input_mean(self) -> float:
        """Mean prompt tokens."""
        return sum(self.input_tokens) / len(self.input_tokens)

    @property
    def output_mean(self) -> float:
        """Mean output tokens."""
        return sum(self.output_tokens) / len(self.output_tokens)

    @property
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
    mixed_share: float  # of the steps that carry prompt tokens
    mixed_tokens: float  # prompt tokens that such a step carries on average
    busy: float  # share of time with prompt work
    wait_mean_s: float
    prompts_s: tuple[float, ...]  # own prefill time of each equally likely prompt
    chunk_step_s: float  # a step with a full chunk
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

    def ttft_s(self, percentile: float) -> float:
        """A percentile of the time to first token: exponential wait plus the prompt's own time."""
        level = percentile / 100
        low, high = 0.0, max(self.prompts_s) + self.wait_mean_s * 12 / max(self.busy, 1e-9) + 1e-6
        decay = self.busy / self.wait_mean_s if self.wait_mean_s > 0 else math.inf
        for _ in range(30):
            middle = (low + high) / 2
            late = 0.0
            for own_s in self.prompts_s:
                slack = middle - own_s
                late += 1.0 if slack < 0 else self.busy * math.exp(-min(slack * decay, 700.0))
            if late / len(self.prompts_s) > 1 - level:
                low = middle
            else:
                high = middle
        return high + self.host_s

    def itl_s(self, percentile: float) -> float:
        """A percentile of the gap between two tokens of a stream."""
        level = percentile / 100
        if 1 - level >= self.mixed_share:
            return self.decode_step_s
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
        return all(
            self.latency_s(target.metric, target.percentile) <= target.limit_s
            for level in levels
            for target in level.targets
        )


def operating_point(instance: Instance, demand: Demand, rate_rps: float) -> OperatingPoint | None:
    """Where `instance` settles at `rate_rps`, or None when it cannot keep up."""
    running = 0.0
    before: tuple[float, float] | None = None
    for _ in range(ROUNDS_MAX):
        mix = _mix(instance, demand, rate_rps, running)
        if mix is None:
            return None
        following = rate_rps * demand.output_mean * mix.gap_s
        if abs(following - running) <= CONVERGED * max(running, 0.1):
            return _point(instance, demand, rate_rps, following, mix)
        running, before = _secant(running, following, before), (running, following)
        if running > instance.sequences_max:
            return None
    return None


def _secant(x: float, fx: float, before: tuple[float, float] | None) -> float:
    """Next guess for the smallest fixed point of a rising map, coming from below."""
    if before is None or x == before[0]:
        return fx
    slope = (fx - before[1]) / (x - before[0])
    if slope >= 1:  # runs away: no state to settle in below here
        return fx * 2 + 1
    return max(fx, x + (fx - x) / (1 - slope)) if slope > 0 else fx


@dataclass(frozen=True, slots=True)
class _Mix:
    """Steps with and without prompt tokens while `running` sequences decode."""

    gap_s: float
    decode_s: float
    mixed_s: float
    mixed_share: float
    mixed_tokens: float
    busy: float
    work_mean_s: float
    work_cv2: float
    prompts_s: tuple[float, ...]
    chunk_s: float


def _mix(instance: Instance, demand: Demand, rate_rps: float, running: float) -> _Mix | None:
    decodes = min(max(math.ceil(running), 1), instance.sequences_max)
    context = decodes * demand.context_mean
    step_s, chunk = instance.cost.step_s, instance.chunk_tokens
    decode_s = step_s(decodes, context)
    beside = decodes if instance.engine.mixes_prefill else 0
    cached = context if beside else 0.0
    apart_s = 0.0 if beside else decode_s
    own_s: list[float] = []
    work_s: list[float] = []
    for tokens in demand.input_tokens:
        fresh = max(tokens * (1 - demand.hit_rate), 1.0)
        chunks = max(math.ceil(fresh / chunk), 1)
        pairs = fresh * (tokens - fresh / 2) / chunks
        one_s = step_s(beside, cached, math.ceil(fresh / chunks), pairs)
        compute_s = chunks * (one_s + apart_s) - apart_s
        own_s.append(compute_s + tokens * demand.reload_s_per_token)  # loads do not hold up steps
        # Short prompts share a step, so their work is a share of a full one.
        full_s = step_s(beside, cached, chunk, pairs) if chunks == 1 else one_s
        work_s.append(min(compute_s, full_s * fresh / chunk) if chunks == 1 else compute_s)
    work_mean_s = _mean(work_s)
    if rate_rps * work_mean_s >= 1:
        return None
    busy = max(rate_rps * work_mean_s, 1 - math.exp(-rate_rps * _mean(own_s)))
    chunk_pairs = chunk * max(demand.context_mean, chunk / 2)
    chunk_s = step_s(beside, cached, chunk, chunk_pairs) + apart_s
    fresh_rate = rate_rps * demand.input_mean * (1 - demand.hit_rate)
    mixed_s = own_s[len(own_s) // 2]
    for _ in range(3):
        tokens_in_step = min(max(fresh_rate * mixed_s / busy, 1.0), chunk)
        pairs = tokens_in_step * demand.input_mean / 2
        mixed_s = step_s(beside, cached, math.ceil(tokens_in_step), pairs) + apart_s
    steps_per_s = busy / mixed_s + (1 - busy) / decode_s
    squares = sum(w * w for w in work_s) / len(work_s)
    return _Mix(
        gap_s=1 / steps_per_s,
        decode_s=decode_s,
        mixed_s=mixed_s,
        mixed_share=busy / mixed_s / steps_per_s,
        mixed_tokens=tokens_in_step,
        busy=busy,
        work_mean_s=work_mean_s,
        work_cv2=max(squares / work_mean_s**2 - 1, 0.0),
        prompts_s=tuple(own_s),
        chunk_s=max(chunk_s, mixed_s),
    )


def _point(
    instance: Instance, demand: Demand, rate_rps: float, running: float, mix: _Mix
) -> OperatingPoint | None:
    load = rate_rps * mix.work_mean_s
    wait_s = (
        load / (1 - load) * (demand.arrival_cv2 + mix.work_cv2) / 2 * mix.work_mean_s
        + mix.gap_s * (1 + instance.engine.wait_steps) / 2
    )
    busy_moment = running + Z99 * math.sqrt(max(running, 0.0) * max(demand.arrival_cv2, 1.0))
    kv_share = (busy_moment * demand.context_mean + demand.input_mean) / instance.kv_tokens
    slot_share = busy_moment / instance.sequences_max
    if max(kv_share, slot_share) > 1:
        return None
    return OperatingPoint(
        rate_rps=rate_rps,
        running=running,
        step_s=mix.gap_s,
        decode_step_s=mix.decode_s,
        mixed_step_s=mix.mixed_s,
        mixed_share=mix.mixed_share,
        mixed_tokens=mix.mixed_tokens,
        busy=mix.busy,
        wait_mean_s=wait_s,
        prompts_s=mix.prompts_s,
        chunk_step_s=mix.chunk_s,
        kv_share=kv_share,
        slot_share=slot_share,
        host_s=instance.engine.host_s,
        output_tokens=demand.output_tokens,
    )


def usable_rate(
    instance: Instance, demand: Demand, levels: tuple[ServiceLevel, ...]
) -> OperatingPoint | None:
    """The point of highest rate that keeps every promise, or None when no rate does."""

    def good(rate_rps: float) -> OperatingPoint | None:
        point = operating_point(instance, demand, rate_rps)
        return point if point is not None and point.meets(levels) else None

    low_rps = 1e-3
    best = good(low_rps)
    if best is None:
        return None
    high_rps = low_rps
    while (point := good(high_rps * 4)) is not None:
        best, high_rps = point, high_rps * 4
    low_rps, high_rps = high_rps, high_rps * 4
    while high_rps / low_rps > 1.01:
        middle_rps = math.sqrt(low_rps * high_rps)
        if (point := good(middle_rps)) is not None:
            best, low_rps = point, middle_rps
        else:
            high_rps = middle_rps
    return best


def saturated_rate(instance: Instance, demand: Demand) -> OperatingPoint | None:
    """The point of highest rate that the instance can sustain at all, promises aside."""
    return usable_rate(instance, demand, ())


def at_concurrency(instance: Instance, demand: Demand, clients: int) -> OperatingPoint | None:
    """The point at which `clients` that send again at once keep `clients` requests in flight."""
    low_rps, high_rps = 1e-4, 1e-4
    best = operating_point(instance, demand, low_rps)

    def in_flight(point: OperatingPoint) -> float:
        return point.rate_rps * point.e2e_mean_s

    while (point := operating_point(instance, demand, high_rps)) is not None:
        if in_flight(point) >= clients:
            break
        best, low_rps, high_rps = point, high_rps, high_rps * 4
    for _ in range(24):
        middle_rps = math.sqrt(low_rps * high_rps)
        point = operating_point(instance, demand, middle_rps)
        if point is not None and in_flight(point) <= clients:
            best, low_rps = point, middle_rps
        else:
            high_rps = middle_rps
    return best


def load_curve(
    instance: Instance, demand: Demand, *, rate_max_rps: float, points: int = 24
) -> list[OperatingPoint]:
    """Operating points evenly spaced up to `rate_max_rps`; unreachable ones are left out."""
    rates = (rate_max_rps * (i + 1) / points for i in range(points))
    curve = (operating_point(instance, demand, rate) for rate in rates)
    return [point for point in curve if point is not None]


def _mean(values: tuple[float, ...] | list[float]) -> float:
    return sum(values) / len(values)
