"""Which pictures a plan has, and the numbers in them. `report` puts them on the page.

A picture whose data the plan does not have is there all the same: it says what would fill it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tierline.base.units import format_seconds, format_usd
from tierline.catalog.formats import weight_format
from tierline.catalog.gpus import math_flops_per_s
from tierline.perf.step import SEQUENCES_MAX, TOKENS_MAX
from tierline.planner import pictures
from tierline.planner.finding import Candidate, LoadPoint, Plan, Replay
from tierline.planner.pictures import Choice, LatencyPoint, Picture, Swing, WorkPoint
from tierline.planner.sim_pictures import Curve, latencies
from tierline.workload.profile import Lengths

DECODE_SIZES = (1, 4, 16, 64, 256)
PREFILL_SIZES = (128, 512, 2048, 8192)
CHOICES_MAX = 60
ALTERNATIVES = 3


def figures(plan: Plan) -> tuple[Picture, ...]:
    """Every picture of the page, in its order."""
    return (
        _lengths(plan),
        _arrivals(plan),
        _reuse(plan),
        _memory(plan),
        _roofline(plan.recommended),
        _pareto(plan),
        *_replayed(plan),
        _latency(plan, "TTFT"),
        _latency(plan, "ITL"),
        _cost(plan),
        _sensitivity(plan),
    )


def _lengths(plan: Plan) -> Picture:
    return pictures.lengths(_longer(plan.profile.input), _longer(plan.profile.output))


def _longer(lengths: Lengths) -> list[tuple[float, float]]:
    """Length and the share of requests that are longer, from the stored quantiles."""
    points = [(tokens, 1 - percent / 100) for percent, tokens in enumerate(lengths.quantiles[:100])]
    return [*points, (lengths.p99_9, 0.001)]


def _arrivals(plan: Plan) -> Picture:
    arrivals = plan.profile.arrivals
    if arrivals is None:
        return Picture(
            name="arrivals",
            title="When requests arrive is not known",
            note="The workload has no arrival times, so the rate was given. A trace with a time "
            "for every request fills this: tierline plan --trace FILE.",
            findings=(1,),
        )
    return pictures.arrivals(
        arrivals.series_rps, step_s=arrivals.series_step_s, sized_rps=plan.demand_rps
    )


def _reuse(plan: Plan) -> Picture:
    curve = plan.profile.reuse
    if curve is None:
        return Picture(
            name="reuse",
            title="How often prompts repeat a prefix is not known",
            note="The workload carries no prefix blocks, so the plan counts on no reuse. A trace "
            "with prefix_blocks for every request (the block hashes that vLLM and SGLang log, or "
            "hash_ids in Mooncake's format) fills this and shows what DRAM and NVMe are worth.",
            findings=(8,),
        )
    return pictures.reuse(
        [(p.cached_tokens, p.token_hit_rate) for p in curve.points],
        _cache_sizes(plan),
        ideal=curve.ideal.token_hit_rate,
    )


def _cache_sizes(plan: Plan) -> list[tuple[str, float]]:
    """Cached tokens that the fleet could hold in each tier, that tier and those above it."""
    best = plan.recommended
    instances = best.pessimistic.instances
    device = float(best.kv_tokens * instances)
    bytes_per_token = best.memory.kv_bytes * best.layout.gpus / best.kv_tokens
    marks = [("KV pool of the fleet", device)]
    total = device
    for name, tier in (("plus DRAM", best.gpu.host), ("plus NVMe", best.gpu.nvme)):
        held = tier.capacity_bytes / tier.shared_by_gpus * best.pessimistic.gpus / bytes_per_token
        total += held
        if held:
            marks.append((name, total))
    return marks


def _memory(plan: Plan) -> Picture:
    chosen = [plan.recommended, *_spread(plan)]
    return pictures.memory([(c.name, _parts(c), c.memory.total_bytes) for c in chosen])


def _spread(plan: Plan) -> list[Candidate]:
    """The best alternatives that differ in what one GPU holds."""
    seen = {(plan.recommended.gpu.name, plan.recommended.layout)}
    others = []
    for candidate in plan.alternatives:
        key = (candidate.gpu.name, candidate.layout)
        if key not in seen:
            seen.add(key)
            others.append(candidate)
    return others[:ALTERNATIVES]


def _parts(candidate: Candidate) -> Mapping[str, float]:
    use = candidate.memory
    return {
        "weights": use.weights_bytes,
        "KV pool": use.kv_bytes,
        "activations": use.activations_bytes,
        "overhead": use.overhead_bytes,
    }


# --- what binds -----------------------------------------------------------------------------


def _roofline(best: Candidate) -> Picture:
    running = max(round(best.pessimistic.point.running), 1)
    chunk = best.instance.chunk_tokens
    decodes = sorted({s for s in (*DECODE_SIZES, running) if s <= SEQUENCES_MAX})
    prefills = sorted({s for s in (*PREFILL_SIZES, chunk) if s <= TOKENS_MAX})
    fmt = weight_format(best.layout.weights)
    math = fmt.math if fmt.math in best.gpu.flops_per_s else "bf16"
    return pictures.roofline(
        [work_point(best, "decode", n, planned=n == running) for n in decodes]
        + [work_point(best, "prefill", n, planned=n == chunk) for n in prefills],
        peak_flops_per_s=math_flops_per_s(best.gpu, fmt),
        bytes_per_s=best.gpu.memory_bytes_per_s,
        math=math.upper(),
    )


def work_point(candidate: Candidate, kind: str, size: int, *, planned: bool) -> WorkPoint:
    """FLOP and bytes on one GPU of a step of `size` decodes, or of a prompt chunk of `size`.

    FLOP: two for every weight a token multiplies with, and two for every product of attention.
    Bytes: weights that are touched, and the cached tokens that are read.
    """
    cost = candidate.instance.cost
    model, gpus = cost.model, candidate.layout.gpus
    context = candidate.demand.context_mean
    if kind == "decode":
        step_s, pairs = cost.step_s(size, size * context), size * context
        kv_bytes = size * cost.kv_bytes_per_gpu(round(context))
    else:
        pairs = size * size / 2
        step_s = cost.step_s(0, 0.0, size, pairs)
        kv_bytes = cost.kv_bytes_per_gpu(size)
    heads = sum(
        g.layers * g.query_heads * (g.head_dim + g.v_head_dim)
        for g in model.attention
        if not g.state_elements
    )
    products = model.params_active - model.embedding_params
    flops = (2 * products * size + 2 * heads * pairs) / gpus
    moved = _touched_bytes(candidate, size) + kv_bytes
    return WorkPoint(
        kind=kind,
        size=size,
        intensity=flops / moved,
        flops_per_s=flops / step_s,
        step_s=step_s,
        planned=planned,
    )


def _touched_bytes(candidate: Candidate, tokens: int) -> float:
    """Weight bytes on one GPU that `tokens` tokens read: all, or the experts they visit."""
    cost = candidate.instance.cost
    fmt = weight_format(candidate.layout.weights)
    total = cost.weights_bytes_per_gpu
    for group in cost.model.ffn:
        if group.experts:
            untouched = (1 - group.experts_active / group.experts) ** tokens
            experts = group.layers * group.experts * group.params_per_expert
            total -= untouched * experts * fmt.bytes_per_element / candidate.layout.gpus
    return total


# --- which plan, how much load --------------------------------------------------------------


def _pareto(plan: Plan) -> Picture:
    candidates = [plan.recommended, *plan.alternatives[:CHOICES_MAX]]
    choices = [
        Choice(
            name=c.name,
            usd_per_year=c.pessimistic.usd_per_year,
            ttft_p99_s=c.pessimistic.point.ttft_s(99),
            on_front=c.name in plan.pareto,
            why_not="" if c is plan.recommended else why_not(c, plan.recommended),
        )
        for c in candidates
        if c.pessimistic.usd_per_year is not None
    ]
    if plan.recommended.pessimistic.usd_per_year is None:
        return Picture(
            name="pareto",
            title="What the plans cost is not known",
            note=f"{plan.recommended.gpu.title} has no price. tierline plan --price "
            f"{plan.recommended.gpu.name}=USD fills this.",
            findings=(12,),
        )
    return pictures.pareto(choices, limit_s=strictest(plan, "ttft"))


def why_not(candidate: Candidate, best: Candidate) -> str:
    """The number that decided against an alternative."""
    if candidate.needs_quality_test:
        return f"needs a quality test first ({candidate.needs_quality_test})"
    mine, other = best.pessimistic.usd_per_year, candidate.pessimistic.usd_per_year
    if other is None:
        return "has no price"
    late = candidate.pessimistic.point.ttft_s(99)
    soon = best.pessimistic.point.ttft_s(99)
    times = f"TTFT p99 {format_seconds(late)} instead of {format_seconds(soon)}"
    if mine is None or other < mine:
        return f"takes {candidate.pessimistic.gpus} GPUs instead of {best.pessimistic.gpus}"
    if other == mine:
        return f"costs the same, {times}"
    more = f"costs {format_usd(other - mine)} a year more (+{other / mine - 1:.0%})"
    return f"{more} for {times}" if late < soon else more


def strictest(plan: Plan, metric: str) -> float | None:
    """The strictest limit on a metric over all classes, in seconds."""
    limits = [level.limit_s(metric) for level in plan.question.levels]
    return min((limit for limit in limits if limit is not None), default=None)


def _replayed(plan: Plan) -> tuple[Picture, ...]:
    """TTFT in the replays beside what the closed form said; nothing where nothing was replayed."""
    told = plan.survival
    if told is None:
        return ()
    limit_s = strictest(plan, "ttft")
    edge, safety = plan.recommended.pessimistic, plan.question.safety
    said = [
        _replay_curve(f"replay, {safety:g} x the load, slow edge", told.deciding, limit_s),
        _replay_curve("replay, expected load and law", told.everyday, limit_s),
        *(
            [_replay_curve("replay, one instance less", told.smaller, limit_s)]
            if told.smaller and told.smaller.ttft_s
            else []
        ),
        Curve(
            policy="closed form, expected load, slow edge",
            points=[(edge.point.ttft_s(p), p / 100) for p in range(1, 100, 2)],
            percentiles={f"p{p}": edge.point.ttft_s(p) for p in (50, 95, 99)},
            within=None if limit_s is None else edge.point.within_share(limit_s),
        ),
    ]
    count = told.deciding.instances
    keeps = "instance keeps" if count == 1 else "instances keep"
    picture = latencies(
        "replay",
        "TTFT",
        said,
        limit_s=limit_s,
        promise="promised",
        title=f"{count} {keeps} every promise in the replay; "
        f"the closed form said {told.closed_form_instances}",
    )
    return (
        replace(
            picture,
            note=f"Replayed: {told.deciding.stretch}. Shares are of all requests.",
            columns=("what", *picture.columns[1:]),
            findings=(14,),
        ),
    )


def _replay_curve(words: str, replay: Replay, limit_s: float | None) -> Curve:
    points = [(seconds, percent / 100) for percent, seconds in enumerate(replay.ttft_s)]
    within = sum(seconds <= (limit_s or 0) for seconds in replay.ttft_s[1:]) / 100
    return Curve(
        policy=words,
        points=points,
        percentiles={f"p{p}": replay.ttft_percentile_s(p) for p in (50, 95, 99)},
        within=None if limit_s is None else within,
    )


def _latency(plan: Plan, metric: str) -> Picture:
    if not plan.curve:
        return Picture(
            name=metric.casefold(),
            title=f"{metric} under load is not known",
            note="The plan holds no load curve; plan again with this version.",
            findings=(10,),
        )
    best, field = plan.recommended, metric.casefold()
    points = [_latency_point(p, field) for p in plan.curve]
    marks = [
        ("at peak", best.pessimistic.point.rate_rps),
        ("usable", best.pessimistic.usable_rps),
        ("expected", best.expected.usable_rps),
    ]
    if metric == "TTFT" and (knee := knee_rps(plan.curve)) is not None:
        marks.append(("knee", knee))
    return pictures.latency(
        metric,
        points,
        limit_s=strictest(plan, field),
        usable_rps=best.expected.usable_rps,
        marks=marks,
    )


def _latency_point(point: LoadPoint, metric: str) -> LatencyPoint:
    return LatencyPoint(
        rate_rps=point.rate_rps,
        p50_s=getattr(point, f"{metric}_p50_s"),
        p99_s=getattr(point, f"{metric}_p99_s"),
        low_s=getattr(point, f"{metric}_p99_low_s"),
        high_s=getattr(point, f"{metric}_p99_high_s"),
    )


def knee_rps(curve: Iterable[LoadPoint]) -> float | None:
    """Where TTFT p99 departs from p50: the first rate at which it lies twice as far above it
    as on an idle instance, or None when it never does."""
    points = list(curve)
    idle = points[0].ttft_p99_s - points[0].ttft_p50_s
    return next((p.rate_rps for p in points if p.ttft_p99_s - p.ttft_p50_s > 2 * idle), None)


# --- money ----------------------------------------------------------------------------------


def _cost(plan: Plan) -> Picture:
    if not plan.cost_by_load:
        return Picture(
            name="cost",
            title="What a token costs is not known",
            note=f"{plan.recommended.gpu.title} has no price. tierline plan --price "
            f"{plan.recommended.gpu.name}=USD fills this.",
            findings=(12,),
        )
    points = [(p["share"], p["usd_per_million_tokens"]) for p in plan.cost_by_load]
    edge = plan.recommended.pessimistic
    assert edge.usd_per_million_tokens is not None
    return pictures.cost_by_load(
        points, used=points[-1][1] * points[-1][0] / edge.usd_per_million_tokens
    )


def _sensitivity(plan: Plan) -> Picture:
    base = plan.recommended.pessimistic.usd_per_year
    if base is None or not plan.sensitivities:
        return Picture(
            name="sensitivity",
            title="What would change the answer is not known",
            note="Sensitivities are dollars of a year, so they need a price: tierline plan "
            f"--price {plan.recommended.gpu.name}=USD.",
            findings=(12,),
        )
    return pictures.tornado(
        [
            Swing(
                name=f"{s.what} {s.change}",
                usd_per_year=s.usd_per_year,
                outcome=s.recommended,
                changes_choice=s.changes_choice,
            )
            for s in plan.sensitivities
        ],
        base_usd=base,
    )
