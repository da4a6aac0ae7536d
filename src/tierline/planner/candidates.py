"""Every configuration worth pricing, and what each of them takes to carry the load.

The search is exhaustive over what is legal, and cheap because a bound comes first: what the
fleet would cost at full load without queueing. Configurations are tried in that order, and
one whose bound is `PRUNE_RATIO` times the best price found is not tried, unless its
accelerator has no candidate to show yet. The bound flatters, so nothing good is lost.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from tierline.base.progress import with_progress
from tierline.base.units import HOURS_PER_YEAR, format_seconds, format_usd
from tierline.catalog.tier import TierSpec
from tierline.perf.cost import instances_needed, usd_per_million_tokens, usd_per_year
from tierline.perf.evidence import Evidence
from tierline.perf.step import Layout, StepCost, load_engine
from tierline.planner.finding import Candidate, Edge, LowerTier, MemoryUse, Question, Rejected
from tierline.planner.layouts import (
    SEQUENCES_MAX,
    STEP_TOKENS_MAX,
    layouts,
    memory_use,
    quality_gate,
)
from tierline.planner.load import Demand, Instance, operating_point, usable_rate
from tierline.workload.slo import ServiceLevel

CHUNKS = (256, 512, 1024, 2048, 4096, STEP_TOKENS_MAX)
PRUNE_RATIO = 1.5
PER_GPU_MIN = 3
SHOWN = 40
IDLE_RPS = 1e-3  # slow enough that requests never meet
TIERS_TRIED = 8
TTFT_WORTH_A_TIER = 0.95  # a tier that costs nothing must cut TTFT p99 to this share
TIER_HITS_MIN = 0.01  # of prompt tokens; fewer are not worth a tier
TIER_SHARE = 0.8  # of host memory or drives that a KV tier may take; the rest is the host's


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the whole fleet must carry, and how often a prefix repeats for a cache size."""

    rate_rps: float  # sized for: peak, growth applied
    mean_rps: float  # average over the trace, growth applied
    demand: Demand  # without prefix hits
    hit_rate: Callable[[float], float] | None  # fleet-wide cached tokens -> token hit rate
    longest_tokens: int  # prompt plus output that one instance must be able to hold
    proven: "Proven | None" = None  # what a replay corrected

    @property
    def ideal_hit_rate(self) -> float:
        """Share of prompt tokens that a cache without limit would find; 0 when unknown."""
        return self.hit_rate(math.inf) if self.hit_rate is not None else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Proven:
    """What a replay found that one kind of instance carries, against the closed form."""

    gpu: str
    layout: Layout
    factor: float  # of the closed form's usable rate at the slow edge
    usable_rps: float  # at the slow edge, with the promises kept

    def corrected(self, usable_rps: float) -> float:
        """A usable rate of the same kind, at another edge or under another load.

        What was too much is scaled down. What was too little is raised, but never above what
        was seen: where the closed form stands at a cliff, its factor says nothing beyond.
        """
        scaled = usable_rps * self.factor
        return scaled if self.factor <= 1 else max(usable_rps, min(scaled, self.usable_rps))


@dataclass(frozen=True, slots=True, kw_only=True)
class Screened:
    """A layout that keeps its promises at the pessimistic edge; the other edges come later."""

    cost: StepCost
    memory: MemoryUse
    instance: Instance  # slowed down
    demand: Demand  # prefix hits applied
    pessimistic: Edge

    @property
    def name(self) -> str:
        """How a rejection calls it."""
        return f"{self.cost.gpu.name} {self.cost.layout}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What the search found: candidates by annual cost, and what was turned down."""

    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]
    shapes: tuple[StepCost, ...]  # every legal layout that fits


def search(question: Question, load: Load, *, progress: bool = False) -> Search:
    """All candidates that keep every promise at the pessimistic edge, cheapest first."""
    rejected: list[Rejected] = []
    shapes = sorted(
        (
            (price_bound(cost, load), gpu.name, str(layout), cost)
            for gpu in question.gpus
            for layout, cost in layouts(question.model, gpu, question.measured, rejected)
        ),
        key=lambda shape: shape[:3],
    )
    kept: list[Screened] = []
    cheapest = math.inf
    per_gpu: Counter[str] = Counter()
    for bound, gpu_name, name, cost in with_progress(shapes, what="configurations", show=progress):
        if per_gpu[gpu_name] >= PER_GPU_MIN:
            why = outpriced(question, cost, load, bound=bound, limit_usd=cheapest * PRUNE_RATIO)
            if why is not None:
                rejected.append(Rejected(what=f"{gpu_name} {name}", why=why))
                continue
        outcome = screen(question, cost, load)
        if isinstance(outcome, Rejected):
            rejected.append(outcome)
            continue
        kept.append(outcome)
        per_gpu[gpu_name] += 1
        if not quality_gate(question, cost.layout):
            cheapest = min(cheapest, outcome.pessimistic.usd_per_year or math.inf)
    candidates = [complete(question, s, load) for s in shortlist(question, kept, rejected)]
    candidates += with_lower_tiers(question, candidates, load)
    return Search(
        candidates=tuple(sorted(candidates, key=rank)),
        rejected=tuple(rejected),
        shapes=tuple(cost for *_, cost in shapes),
    )


def cheapest_of(question: Question, shapes: Iterable[StepCost], load: Load) -> Candidate | None:
    """The cheapest candidate for `load` among legal layouts, or None when none carries it.

    Layouts are tried in the order of their bound until the bound exceeds the best price, a
    few of every accelerator: those with the best bound need not keep the promises.
    """
    priced = [c for c in shapes if c.gpu.price.typical_usd and not quality_gate(question, c.layout)]
    ranked = sorted(((price_bound(c, load), i) for i, c in enumerate(priced)))
    best: Screened | None = None
    tried: Counter[str] = Counter()
    for bound, i in ranked:
        cost = priced[i]
        if best is not None and bound >= (best.pessimistic.usd_per_year or math.inf):
            break
        if tried[cost.gpu.name] == PER_GPU_MIN:
            continue
        tried[cost.gpu.name] += 1
        outcome = screen(question, cost, load)
        if isinstance(outcome, Screened) and (
            best is None or edge_rank(outcome.pessimistic) < edge_rank(best.pessimistic)
        ):
            best = outcome
    return complete(question, best, load) if best is not None else None


def with_lower_tiers(
    question: Question, candidates: list[Candidate], load: Load
) -> list[Candidate]:
    """The best few again with DRAM, and with DRAM and NVMe, under the device.

    A tier stays only where it makes the fleet cheaper, or its first tokens clearly faster:
    both are part of the node and cost nothing more, but somebody has to run them. What is
    found there is loaded before the prompt starts.
    """
    if load.hit_rate is None:
        return []
    better = []
    usable = [c for c in sorted(candidates, key=rank) if not c.needs_quality_test]
    for candidate in usable[:TIERS_TRIED]:
        beside = candidate
        for specs in ((candidate.gpu.host,), (candidate.gpu.host, candidate.gpu.nvme)):
            tiered = _tiered(question, candidate, load, specs)
            if tiered is not None and _clearly_better(tiered.pessimistic, beside.pessimistic):
                better.append(tiered)
                beside = tiered
    return better


def _clearly_better(tiered: Edge, beside: Edge) -> bool:
    (price, *_), (price_beside, *_) = edge_rank(tiered), edge_rank(beside)
    faster = tiered.point.ttft_s(99) < TTFT_WORTH_A_TIER * beside.point.ttft_s(99)
    return price < price_beside or (price == price_beside and faster)


def _tiered(
    question: Question, candidate: Candidate, load: Load, specs: tuple[TierSpec, ...]
) -> Candidate | None:
    """`candidate` over all that these tiers hold, or None where the last one finds too little."""
    sizes = tuple(tier_bytes(candidate.layout, spec) for spec in specs)
    return over_tiers(question, candidate, load, tuple(zip(specs, sizes, strict=True)))


def tier_bytes(layout: Layout, spec: TierSpec) -> int:
    """What a KV tier of one instance may take of host memory or drives."""
    return round(spec.capacity_bytes * layout.gpus / spec.shared_by_gpus * TIER_SHARE)


def over_tiers(
    question: Question,
    candidate: Candidate,
    load: Load,
    sized: tuple[tuple[TierSpec, int], ...],
    *,
    hits_min: float = TIER_HITS_MIN,
) -> Candidate | None:
    """`candidate` over tiers of so many bytes, or None where the last one finds too little."""
    assert load.hit_rate is not None
    cost, instances = candidate.instance.cost, candidate.pessimistic.instances
    typical = max(round(load.demand.context_mean), 1)
    token_bytes = cost.kv_bytes_per_gpu(typical) * candidate.layout.gpus / typical
    cached = instances * candidate.kv_tokens * max(1 - candidate.pessimistic.point.kv_share, 0.0)
    found, below, reload_s = load.hit_rate(cached), 0.0, 0.0
    for spec, size in sized:
        nodes = candidate.layout.gpus / spec.shared_by_gpus
        cached += instances * size / token_bytes
        below, found = load.hit_rate(cached) - found, load.hit_rate(cached)
        reload_s += below * token_bytes / (spec.read_bytes_per_s * nodes)
    if below < hits_min:
        return None
    demand = replace(load.demand, hit_rate=found, reload_s_per_token=reload_s)
    slow = replace(candidate.instance, cost=cost.scaled(candidate.evidence.high))
    screened = at_slow_edge(question, cost, slow, demand, load)
    if screened is None:
        return None
    tiers = tuple(
        LowerTier(
            name=spec.name,
            bytes_per_instance=size,
            tokens=int(size / token_bytes) * screened.pessimistic.instances,
        )
        for spec, size in sized
    )
    return replace(complete(question, screened, load), lower_tiers=tiers)


def outpriced(
    question: Question, cost: StepCost, load: Load, *, bound: float, limit_usd: float
) -> str | None:
    """Why no fleet of this layout costs under `limit_usd` a year; None when one might.

    First without queueing; then by asking for the rate that an instance would have to carry.
    """
    price = cost.gpu.price.typical_usd
    if bound > limit_usd:
        return f"at full load without queueing it costs over {format_usd(limit_usd)} a year"
    if price is None or limit_usd == math.inf:
        return None
    per_instance = cost.layout.gpus * price * HOURS_PER_YEAR
    rate_rps = load.rate_rps * question.safety / max(math.floor(limit_usd / per_instance), 1)
    instance = slow_instance(question, cost, load)
    demand = replace(load.demand, hit_rate=load.ideal_hit_rate)
    first = _first_chunk(question, instance)
    for chunk in CHUNKS[max(first - 1, 0) : first + 2]:
        point = operating_point(replace(instance, chunk_tokens=chunk), demand, rate_rps)
        if point is not None and point.meets(promises(question)):
            return None
    return f"one instance cannot carry the {rate_rps:.3g} requests/s that the best price asks for"


def shortlist(question: Question, kept: list[Screened], rejected: list[Rejected]) -> list[Screened]:
    """The cheapest `SHOWN`, and the cheapest usable of every accelerator; the rest by price."""
    kept.sort(key=lambda s: (*edge_rank(s.pessimistic), s.name))
    shown = kept[:SHOWN]
    seen = {s.cost.gpu.name for s in shown if not quality_gate(question, s.cost.layout)}
    for screened in kept[SHOWN:]:
        usable = not quality_gate(question, screened.cost.layout)
        if usable and screened.cost.gpu.name not in seen:
            seen.add(screened.cost.gpu.name)
            shown.append(screened)
            continue
        usd = screened.pessimistic.usd_per_year
        why = f"costs {format_usd(usd)} a year" if usd is not None else "has no price"
        rejected.append(Rejected(what=screened.name, why=f"{why}; {SHOWN} others cost less"))
    return shown


def rank(candidate: Candidate) -> tuple[float, int, float, str]:
    """Cheapest first at the pessimistic edge; unpriced last; then fewest GPUs, then TTFT."""
    return (*edge_rank(candidate.pessimistic), candidate.name)


def edge_rank(edge: Edge) -> tuple[float, int, float]:
    """The order of candidates: price, GPUs, and the time to first token."""
    price = edge.usd_per_year if edge.usd_per_year is not None else math.inf
    return (price, edge.gpus, edge.point.ttft_s(99))


# --- what it takes --------------------------------------------------------------------------


def evaluate(question: Question, cost: StepCost, load: Load) -> Candidate | Rejected:
    """The candidate with its three edges, or the reason why it cannot carry the load."""
    outcome = screen(question, cost, load)
    return outcome if isinstance(outcome, Rejected) else complete(question, outcome, load)


def screen(question: Question, cost: StepCost, load: Load) -> Screened | Rejected:
    """What the layout takes at the pessimistic edge, or why it cannot carry the load."""
    name = f"{cost.gpu.name} {cost.layout}"
    instance = slow_instance(question, cost, load)
    pool = round(instance.kv_tokens)
    if pool < load.longest_tokens:
        return Rejected(
            what=name,
            why=f"the KV pool of {pool:,} tokens cannot hold one request of "
            f"{load.longest_tokens:,} tokens",
        )
    tuned = best_chunk(question, instance, load)
    if tuned is None:
        return infeasible(question, instance, load, what=name)
    hit_rate = hits(question, tuned, load)
    demand = replace(load.demand, hit_rate=hit_rate)
    screened = at_slow_edge(question, cost, tuned, demand, load)
    if screened is None:
        return Rejected(what=name, why="prefix hits leave too few KV blocks for the rest")
    return screened


def at_slow_edge(
    question: Question, cost: StepCost, instance: Instance, demand: Demand, load: Load
) -> Screened | None:
    """The layout with its slowed `instance` under this demand; None when no rate will do."""
    slowdown = evidence_of(question, cost).high
    pessimistic = edge(question, instance, demand, load, name="pessimistic", slowdown=slowdown)
    if pessimistic is None:
        return None
    return Screened(
        cost=cost,
        memory=memory_use(cost),
        instance=instance,
        demand=demand,
        pessimistic=pessimistic,
    )


def with_instances(
    question: Question, candidate: Candidate, load: Load, instances: int
) -> tuple[Candidate, Load]:
    """The candidate with as many instances as a replay found, and the load corrected to say so."""
    usable_rps = load.rate_rps * question.safety / instances
    if instances == candidate.pessimistic.instances:
        return candidate, load
    proven = Proven(
        gpu=candidate.gpu.name,
        layout=candidate.layout,
        factor=usable_rps / candidate.pessimistic.usable_rps,
        usable_rps=usable_rps,
    )
    corrected = replace(load, proven=proven)
    slow = replace(candidate.instance, cost=candidate.instance.cost.scaled(candidate.evidence.high))
    screened = at_slow_edge(question, candidate.instance.cost, slow, candidate.demand, corrected)
    assert screened is not None, "it kept the promises at its own rate before"
    assert screened.pessimistic.instances == instances
    tiers = tuple(
        replace(t, tokens=t.tokens // candidate.pessimistic.instances * instances)
        for t in candidate.lower_tiers
    )
    return replace(complete(question, screened, corrected), lower_tiers=tiers), corrected


def evidence_of(question: Question, cost: StepCost) -> Evidence:
    """What the capacity of this layout rests on: the benchmark, or the step law."""
    if question.measured is None:
        return cost.rates.evidence
    return Evidence(kind="measured", source=f"load curve {question.measured.curve.source}")


def slow_instance(question: Question, cost: StepCost, load: Load) -> Instance:
    """One instance at the pessimistic edge of its evidence, with the smallest chunk."""
    return Instance(
        cost=cost.scaled(evidence_of(question, cost).high),
        engine=load_engine(question.engine),
        kv_tokens=kv_pool_tokens(cost, memory_use(cost), load),
        sequences_max=SEQUENCES_MAX,
        chunk_tokens=CHUNKS[0],
    )


def complete(question: Question, screened: Screened, load: Load) -> Candidate:
    """The candidate with the other two edges."""
    cost = screened.cost
    evidence = evidence_of(question, cost)
    edges: dict[str, Edge] = {"pessimistic": screened.pessimistic}
    for name, slowdown in (("expected", 1.0), ("optimistic", evidence.low)):
        instance = replace(screened.instance, cost=cost.scaled(slowdown))
        at_edge = edge(question, instance, screened.demand, load, name=name, slowdown=slowdown)
        assert at_edge is not None, "faster steps keep every promise that slower ones keep"
        edges[name] = at_edge
    return Candidate(
        gpu=cost.gpu,
        layout=cost.layout,
        memory=screened.memory,
        instance=replace(screened.instance, cost=cost),
        demand=screened.demand,
        kv_tokens=round(screened.instance.kv_tokens),
        lower_tiers=(),
        hit_rate=screened.demand.hit_rate,
        evidence=evidence,
        needs_quality_test=quality_gate(question, cost.layout),
        **edges,
    )


def kv_pool_tokens(cost: StepCost, memory: MemoryUse, load: Load) -> int:
    """Cached tokens that one instance holds, at the mean context of a running sequence."""
    typical = max(round(load.demand.context_mean), 1)
    return int(memory.kv_bytes / cost.kv_bytes_per_gpu(typical) * typical)


def best_chunk(question: Question, instance: Instance, load: Load) -> Instance | None:
    """The instance with the chunk size of the highest usable rate, or None if none is usable.

    A larger chunk computes prompts more cheaply and holds decodes up for longer. The climb
    starts at the largest chunk whose step fits the ITL promise, and follows the rate.
    """
    tried: dict[int, float] = {}

    def usable(index: int) -> float:
        if index not in tried:
            sized = replace(instance, chunk_tokens=CHUNKS[index])
            point = usable_rate(sized, load.demand, promises(question))
            tried[index] = point.rate_rps if point is not None else 0.0
        return tried[index]

    index = _first_chunk(question, instance)
    for direction in (-1, 1):
        while 0 <= index + direction < len(CHUNKS) and usable(index + direction) > usable(index):
            index += direction
    if usable(index) == 0.0:
        return None
    return replace(instance, chunk_tokens=CHUNKS[index])


def _first_chunk(question: Question, instance: Instance) -> int:
    limits = [lv.limit_s("itl") or math.inf for lv in question.bounds or question.levels]
    fits = [
        i
        for i, chunk in enumerate(CHUNKS)
        if chunk <= instance.engine.batch_tokens
        and instance.cost.step_s(1, 1.0, chunk, chunk * chunk / 2) < min(limits)
    ]
    return fits[-1] if fits else 0


def hits(question: Question, instance: Instance, load: Load) -> float:
    """Prompt tokens found in the spare KV blocks of the fleet that the load then needs.

    Hits need blocks that no running sequence holds, over all instances; fewer instances are
    needed with hits, and hold fewer blocks, so it is settled in two rounds.
    """
    if load.hit_rate is None:
        return 0.0
    hit_rate = 0.0
    for _ in range(2):
        point = usable_rate(instance, replace(load.demand, hit_rate=hit_rate), promises(question))
        if point is None:
            return 0.0
        instances = instances_needed(
            load.rate_rps, usable_rps=point.rate_rps, safety=question.safety
        )
        hit_rate = load.hit_rate(instances * instance.kv_tokens * max(1 - point.kv_share, 0.0))
    return hit_rate


def edge(
    question: Question,
    instance: Instance,
    demand: Demand,
    load: Load,
    *,
    name: str,
    slowdown: float,
) -> Edge | None:
    """What the fleet needs when every step takes `slowdown` times the law's time."""
    usable = usable_rate(instance, demand, promises(question))
    if usable is None:
        return None
    usable_rps = question.measured.usable_rps if question.measured else usable.rate_rps
    gpu = instance.cost.gpu
    proven = load.proven
    if proven and (proven.gpu, proven.layout) == (gpu.name, instance.cost.layout):
        usable_rps = proven.corrected(usable_rps)
    instances = instances_needed(load.rate_rps, usable_rps=usable_rps, safety=question.safety)
    gpus = instances * instance.cost.layout.gpus
    point = operating_point(instance, demand, load.rate_rps / instances)
    price = gpu.price.typical_usd
    hourly = gpus * price if price is not None else None
    tokens_per_s = load.mean_rps * (demand.input_mean + demand.output_mean)
    return Edge(
        name=name,
        slowdown=slowdown,
        usable_rps=usable_rps,
        instances=instances,
        gpus=gpus,
        usd_per_hour=hourly,
        usd_per_year=usd_per_year(gpus, usd_per_gpu_hour=price) if price is not None else None,
        usd_per_million_tokens=usd_per_million_tokens(
            hourly, capacity_tokens_per_s=tokens_per_s, utilization=1.0
        )
        if hourly is not None
        else None,
        point=point or usable,
    )


def promises(question: Question) -> tuple[ServiceLevel, ...]:
    """What the model must keep; nothing where a measured curve has kept it already.

    The closed form knows no classes: with several it is asked for what every request is owed.
    """
    return () if question.measured else question.bounds or question.levels


# --- bounds ---------------------------------------------------------------------------------


def price_bound(cost: StepCost, load: Load) -> float:
    """Dollars a year below which no fleet of this layout can carry the load.

    Prompts in the largest chunks and every decode slot taken, all hits, no queueing; 0 where
    the accelerator has no price.
    """
    price = cost.gpu.price.typical_usd
    if price is None:
        return 0.0
    demand = load.demand
    chunk = CHUNKS[-1]
    prefill_s = cost.step_s(0, 0.0, chunk, chunk * demand.input_mean / 2) / chunk
    decode_s = cost.step_s(SEQUENCES_MAX, SEQUENCES_MAX * demand.context_mean) / SEQUENCES_MAX
    busy_s = (
        demand.input_mean * (1 - load.ideal_hit_rate) * prefill_s + demand.output_mean * decode_s
    )
    gpus = max(load.rate_rps * busy_s, 1.0) * cost.layout.gpus
    return gpus * price * HOURS_PER_YEAR


def infeasible(question: Question, instance: Instance, load: Load, *, what: str) -> Rejected:
    """Which promises one lone request already breaks, at the chunk that breaks them least."""
    nearest: tuple[float, str, str] | None = None
    for chunk in CHUNKS:
        lone = operating_point(replace(instance, chunk_tokens=chunk), load.demand, IDLE_RPS)
        if lone is None:
            why = f"the KV pool of {instance.kv_tokens:,.0f} tokens holds no typical request"
            return Rejected(what=what, why=why)
        misses = [
            (lone.latency_s(t.metric, t.percentile), t)
            for lv in promises(question)
            for t in lv.targets
        ]
        misses = [(latency_s, t) for latency_s, t in misses if latency_s > t.limit_s]
        over = max((latency_s / t.limit_s for latency_s, t in misses), default=1.0)
        if nearest is None or over < nearest[0]:
            why = "; ".join(
                f"{t.metric} p{t.percentile:g} is {format_seconds(latency_s)} for a lone request, "
                f"over {format_seconds(t.limit_s)}"
                for latency_s, t in misses
            )
            within = ",".join(
                f"{t.metric}_p{t.percentile:g}={math.ceil(latency_s * 1.05e3)}ms"
                for latency_s, t in misses
            )
            nearest = (over, why or "no chunk size keeps every promise", within)
    assert nearest is not None
    if quality_gate(question, instance.cost.layout):  # never offered as the way out
        return Rejected(what=what, why=nearest[1])
    return Rejected(what=what, why=nearest[1], over=nearest[0], within=nearest[2])


def pareto(candidates: Iterable[Candidate]) -> list[str]:
    """Names of candidates that no other beats in cost, TTFT p99 and headroom at once."""
    scored = [(c, _score(c)) for c in candidates if c.pessimistic.usd_per_year is not None]
    return [
        candidate.name
        for candidate, score in scored
        if not any(
            other is not candidate
            and all(o <= s for o, s in zip(theirs, score, strict=True))
            and theirs != score
            for other, theirs in scored
        )
    ]


def _score(candidate: Candidate) -> tuple[float, float, float]:
    edge_ = candidate.pessimistic
    cost = edge_.usd_per_year if edge_.usd_per_year is not None else math.inf
    return (cost, edge_.point.ttft_s(99), edge_.point.saturation)
