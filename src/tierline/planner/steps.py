"""The thirteen findings, one pure function each, in the order of the method.

Every function reads the same frozen `View` and returns a `Finding`: what went in, the
formula with names and with numbers, the result with its evidence, and what was turned
down. Where a rule of thumb and the computation disagree, both are told.
"""

import math
from dataclasses import dataclass

from tierline.base.units import (
    GB,
    HOURS_PER_YEAR,
    format_bytes,
    format_seconds,
    format_usd,
    significant,
)
from tierline.catalog.formats import KV_FORMATS, WEIGHT_FORMATS, weight_format
from tierline.catalog.gpu import GpuSpec
from tierline.perf.cost import ROUTING_FLEET_GPUS, instances_guide_mode, usd_per_million_tokens
from tierline.perf.evidence import EXACT, Evidence, Value
from tierline.perf.limits import (
    TTFT_RATIO_MAX,
    UTILIZATION_DROP_MAX,
    input_cap_tokens,
    shed_depth,
)
from tierline.perf.memory import (
    activation_bytes,
    kv_bytes,
    kv_bytes_per_token,
    memory_floor,
    weight_bytes,
)
from tierline.perf.parallel import step_reduce_s
from tierline.perf.speculation import batch_crossover
from tierline.perf.transfer import cold_start
from tierline.planner.candidates import Load, Search
from tierline.planner.finding import Candidate, Finding, Question, Rejected, Survival
from tierline.planner.load import saturated_rate, usable_rate
from tierline.planner.replay import OURS
from tierline.planner.survive import knows_classes
from tierline.workload.profile import Lengths, Profile, phase_balance

CONTAINER_START_S = 30.0
ENGINE_INIT_S = 60.0  # process start, graph capture, warm-up
COLD_START = Evidence(
    kind="assumed",
    source="weights over NVMe, plus 30 s container and 60 s engine start; measure per fleet",
    low=0.5,
    high=2.5,
)
TRACE = Evidence(kind="measured", source="the trace")
GIVEN = Evidence(kind="assumed", source="the rate given by the user")
PRICES = "price of the accelerator, as dated in the catalogue or given by the user"


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What every finding may look at."""

    question: Question
    profile: Profile
    load: Load
    found: Search
    best: Candidate
    survival: Survival | None = None  # None: nothing was replayed

    @property
    def tokens_per_request(self) -> float:
        """Mean prompt and output tokens."""
        return self.load.demand.input_mean + self.load.demand.output_mean


def characterize_workload(view: View) -> Finding:
    """Step 1: what comes in, sized on its busy minutes and its long requests."""
    profile, load, growth = view.profile, view.load, view.question.growth
    share = prefill_share(view)
    arrivals = profile.arrivals
    peak_to_mean = load.rate_rps / load.mean_rps
    inputs = {
        "requests": f"{profile.requests:,}",
        "mean rate": _rate(load.mean_rps / growth),
        "busy-minute rate (p95 of one-minute windows)": _rate(load.rate_rps / growth),
        "growth": f"{growth:g} x",
        "input p50 / p95 / p99": _percentiles(profile.input),
        "output p50 / p95 / p99": _percentiles(profile.output),
        "gaps between arrivals": f"CV {arrivals.iat_cv:.2f}" if arrivals else "unknown",
        "service levels": "; ".join(f"{lv.name}: {lv}" for lv in view.question.levels),
    }
    return Finding(
        step=1,
        title="Workload",
        answer=f"{_rate(load.rate_rps)} to size for; prompts of "
        f"{profile.input.percentile(95):,.0f} tokens at p95, outputs of "
        f"{profile.output.percentile(95):,.0f}; {share:.0%} of the work is prefill "
        f"({phase_balance(share)}; lengths look like {profile.archetype}).",
        inputs=inputs,
        formula="rate to size for = busy-minute rate x growth",
        substituted=f"{_rate(load.rate_rps / growth)} x {growth:g}",
        result=Value(
            amount=load.rate_rps,
            unit="requests/s",
            evidence=TRACE if view.question.peak_rps is None else GIVEN,
        ),
        rule="size on the busy rate and the long requests, never on the mean",
        computed=f"the busy minute carries {peak_to_mean:.2f} times the mean rate",
        notes=profile.notes,
    )


def prefill_share(view: View) -> float:
    """Share of accelerator time in prefill, from the winner's own prefill and decode rates."""
    cost, demand = view.best.instance.cost, view.best.demand
    chunk = view.best.instance.chunk_tokens
    prefill_s = cost.step_s(0, 0.0, chunk, chunk * demand.input_mean / 2) / chunk
    running = max(round(view.best.expected.point.running), 1)
    decode_s = cost.step_s(running, running * demand.context_mean) / running
    prefill = demand.input_mean * prefill_s
    return prefill / (prefill + demand.output_mean * decode_s)


def select_hardware(view: View) -> Finding:
    """Step 2: which accelerator, by what the whole search says and not by the archetype alone."""
    best, share = view.best, prefill_share(view)
    gpu = best.gpu
    rule = {
        "prefill-heavy": "prefill-heavy: choose FLOPs per dollar",
        "decode-heavy": "decode-heavy: choose memory bandwidth per dollar",
        "balanced": "mixed: weigh FLOPs and bandwidth by time share",
    }[phase_balance(share)]
    per_gpu = best_per_gpu(view.found)
    return Finding(
        step=2,
        title="Hardware",
        answer=f"{short_title(gpu)}: the cheapest of {len(per_gpu)} kinds that keep every promise.",
        inputs={
            "peak bf16": f"{gpu.flops_per_s['bf16'] / 1e12:,.0f} TFLOP/s",
            "memory rate": f"{gpu.memory_bytes_per_s / 1e12:.2f} TB/s",
            "memory": format_bytes(gpu.memory_bytes),
            "price": _price(best),
            "fabric": f"{gpu.scale_up.kind}, {gpu.scale_up.bytes_per_s / 1e9:,.0f} GB/s one way, "
            f"{gpu.scale_up.domain_gpus} GPUs",
        },
        formula="argmin over accelerators of annual cost at the pessimistic edge",
        substituted="; ".join(f"{c.gpu.name} {_annual(c)}" for c in list(per_gpu.values())[:8]),
        result=Value(
            amount=gpu.ridge_bf16,
            unit="FLOP/byte (ridge)",
            evidence=Evidence(kind="exact", source="datasheet rates"),
        ),
        rule=rule,
        computed=_hardware_by_rule(view, share),
        rejected=tuple(
            Rejected(what=c.gpu.title, why=f"its best fleet costs {_annual(c)}")
            for c in list(per_gpu.values())[1:]
        ),
    )


def best_per_gpu(found: Search) -> dict[str, Candidate]:
    """The cheapest candidate of every accelerator that needs no quality test, cheapest first."""
    best: dict[str, Candidate] = {}
    for candidate in found.candidates:
        if not candidate.needs_quality_test:
            best.setdefault(candidate.gpu.name, candidate)
    return best


def _hardware_by_rule(view: View, share: float) -> str:
    priced = [g for g in view.question.gpus if g.price.typical_usd]
    if not priced:
        return "no accelerator has a price"
    by_flops = max(priced, key=lambda g: g.flops_per_s["bf16"] / (g.price.typical_usd or 1))
    by_bytes = max(priced, key=lambda g: g.memory_bytes_per_s / (g.price.typical_usd or 1))
    pick = by_flops if share >= 0.5 else by_bytes
    return (
        f"most FLOPs per dollar: {by_flops.name}; most bandwidth per dollar: {by_bytes.name}; "
        f"the rule picks {pick.name}, the search {view.best.gpu.name}"
    )


def decide_routing(view: View) -> Finding:
    """Step 3: one model, or a small one in front of it."""
    gpus = view.best.expected.gpus
    large = gpus > ROUTING_FLEET_GPUS
    answer = (
        f"One tier: {gpus} GPUs would justify a router, but the trace says nothing about how "
        "hard its requests are."
        if large
        else f"One tier: {gpus} GPUs are too few for a second model to pay."
    )
    return Finding(
        step=3,
        title="Routing",
        answer=answer,
        inputs={"GPUs of the large model": str(gpus), "measured skew of difficulty": "unknown"},
        formula="several tiers if GPUs > 8 and the share of simple requests is measured",
        substituted=f"{gpus} > {ROUTING_FLEET_GPUS} is {large}; skew unknown",
        result=Value(amount=1, unit="tiers", evidence=Evidence(kind="assumed", source="no skew")),
        rule="a tier in front saves sum(share x cost): 70 % at a tenth of the cost is 0.37 of it",
        computed=f"if 70 % of requests suited a model at a tenth of the cost, the fleet would be "
        f"about {math.ceil(gpus * 0.37)} GPUs' worth; measure quality on the small model first"
        if large
        else "",
    )


def find_memory_floor(view: View) -> Finding:
    """Step 4: what must fit, at native precision, before anything is optimised."""
    model, best, load = view.question.model, view.best, view.load
    native = weight_format(model.native_format)
    weights = weight_bytes(model, native)
    running = best.expected.point.running * best.expected.instances
    context = round(load.demand.context_mean)
    per_instance = best.expected.point.running
    kv = per_instance * kv_bytes(model, context, KV_FORMATS["bf16"])
    rule_activations = activation_bytes(model)
    activations = best.memory.activations_bytes * best.layout.gpus
    overhead = best.memory.overhead_bytes * best.layout.gpus
    floor = memory_floor(
        weights_bytes=weights,
        kv_bytes=kv,
        activations_bytes=activations,
        overhead_total_bytes=overhead,
        gpu_memory_bytes=best.gpu.memory_bytes,
    )
    total, gpus = floor.total_bytes, floor.gpus_min
    return Finding(
        step=4,
        title="Memory floor",
        answer=f"{format_bytes(total)} in {native.name}: at least {gpus} {best.gpu.name} "
        "for one instance before anything is optimised.",
        inputs={
            "weights": f"{model.params / 1e9:,.2f} B params x {native.bits:g} bit",
            "KV": f"{significant(per_instance)} running x {context:,} tokens x "
            f"{kv_bytes_per_token(model, KV_FORMATS['bf16']):,.0f} B",
            "activations": f"{format_bytes(activations)} computed",
            "overhead": f"{format_bytes(overhead)} ({best.layout.gpus} GPUs)",
            "running in the whole fleet": significant(running),
        },
        formula="weights + KV + activations + overhead; GPUs = ceil(total / memory of one)",
        substituted=f"{format_bytes(weights)} + {format_bytes(kv)} + {format_bytes(activations)} + "
        f"{format_bytes(overhead)}; ceil({format_bytes(total)} / "
        f"{format_bytes(best.gpu.memory_bytes)}) = {gpus}",
        result=Value(amount=total / GB, unit="GB", evidence=EXACT),
        rule=f"activations are 20 % of the native weights: {format_bytes(rule_activations)}",
        computed=f"a step of {best.instance.engine.batch_tokens:,} tokens needs "
        f"{format_bytes(activations)}; the plan uses the computed figure",
    )


def choose_precision(view: View) -> Finding:
    """Step 5: formats of weights and of KV, before parallelism."""
    model, best = view.question.model, view.best
    weights, kv = WEIGHT_FORMATS[best.layout.weights], KV_FORMATS[best.layout.kv]
    others: dict[tuple[str, str], Candidate] = {}
    for candidate in view.found.candidates:
        if candidate.gpu.name == best.gpu.name:
            others.setdefault((candidate.layout.weights, candidate.layout.kv), candidate)
    used = best.memory.weights_bytes * best.layout.gpus
    gate = (
        "test long-context tasks before production: FP8 KV loses more as context grows"
        if kv.bits < 16
        else "none beyond the usual regression set"
    )
    return Finding(
        step=5,
        title="Precision",
        answer=f"{weights.name} weights and {kv.name} KV: {format_bytes(used)} of weights, "
        f"{kv_bytes_per_token(model, kv):,.0f} B a cached token.",
        inputs={
            "native format": model.native_format,
            "quality limit": view.question.quality,
            "weight bits with scales": f"{weights.bits:g}",
            "KV bits with scales": f"{kv.bits:g}",
        },
        formula="cheapest pair of formats within the quality limit that the GPU computes natively",
        substituted="; ".join(f"{w}/{k} {_annual(c)}" for (w, k), c in others.items()),
        result=Value(amount=used / GB, unit="GB of weights per instance", evidence=EXACT),
        rule=_precision_rule(view),
        computed=f"{weights.name}/{kv.name} is cheapest of what is allowed here",
        rejected=tuple(
            Rejected(
                what=f"{w}/{k}",
                why=c.needs_quality_test or f"costs {_annual(c)}",
            )
            for (w, k), c in others.items()
            if (w, k) != (best.layout.weights, best.layout.kv)
        ),
        notes=(f"evaluation gate: {gate}",),
    )


def _precision_rule(view: View) -> str:
    flops = view.best.gpu.flops_per_s
    if "fp8" in flops:
        return "FP8 weights and KV are the default where FP8 math exists"
    return "without FP8 math use an INT8 artifact, never an FP8 one"


def choose_parallelism(view: View) -> Finding:
    """Step 6: the lowest TP that fits in a node, unless latency or the price asks for more."""
    model, best = view.question.model, view.best
    layout, gpu = best.layout, best.gpu
    legal = model.legal_tp(min(gpu.gpus_per_node, 16))
    tried: dict[tuple[int, int, int], Candidate] = {}
    for candidate in view.found.candidates:
        same = (candidate.layout.weights, candidate.layout.kv) == (layout.weights, layout.kv)
        if same and candidate.gpu.name == gpu.name:
            shape = (candidate.layout.tp, candidate.layout.pp, candidate.layout.dp)
            tried.setdefault(shape, candidate)
    ranks = layout.tp * layout.dp
    running = max(round(best.expected.point.running), 1)
    step_s = best.expected.point.decode_step_s
    reduce_s = step_reduce_s(model, gpu, tokens=running, tp=ranks)
    lowest = min((c.layout.gpus for c in tried.values()), default=layout.gpus)
    return Finding(
        step=6,
        title="Parallelism",
        answer=f"{layout}: {_count(layout.gpus, 'GPU')} an instance; collectives take "
        f"{reduce_s / step_s:.0%} of a decode step.",
        inputs={
            "legal TP degrees": ", ".join(map(str, legal)),
            "query / KV heads": f"{model.attention[0].query_heads} / {model.attention[0].kv_heads}",
            "weights per GPU": format_bytes(best.memory.weights_bytes),
            "fast domain": f"{gpu.scale_up.domain_gpus} GPUs",
        },
        formula="share = 2 x layers x all-reduce(batch x hidden x 2 B) / decode step",
        substituted=f"2 x {model.layers} x all-reduce({running} x {model.hidden} x 2 B over "
        f"{ranks}) / {format_seconds(step_s)}",
        result=Value(amount=layout.gpus, unit="GPUs per instance", evidence=EXACT),
        rule=f"lowest TP that fits inside one node: {lowest} GPUs",
        computed=f"the cheapest shape at the pessimistic edge has {layout.gpus} GPUs"
        + ("" if layout.gpus == lowest else "; latency or KV room pays for the difference"),
        rejected=tuple(
            Rejected(what=str(c.layout), why=f"costs {_annual(c)}")
            for shape, c in tried.items()
            if shape != (layout.tp, layout.pp, layout.dp)
        ),
    )


def draw_baseline_curve(view: View) -> Finding:
    """Step 7: the instance as cut, before reuse: where it saturates and what it can promise."""
    best, load = view.best, view.load
    usable = usable_rate(best.instance, load.demand, view.question.levels)
    peak = saturated_rate(best.instance, load.demand)
    top = peak.rate_rps if peak else 0.0
    use = usable.rate_rps if usable else 0.0
    return Finding(
        step=7,
        title="Baseline curve",
        answer=f"Without prefix reuse one instance keeps every promise up to {_rate(use)}; "
        f"it saturates at {_rate(top)} on {peak.bound if peak else 'memory'}.",
        inputs={
            "chunk": f"{best.instance.chunk_tokens:,} tokens",
            "KV pool": f"{best.kv_tokens:,} tokens",
            "slots": f"{best.instance.sequences_max:,}",
        },
        formula="usable = highest rate with every promised percentile under its limit",
        substituted=f"{_rate(use)} of {_rate(top)}",
        result=Value(amount=use, unit="requests/s per instance", evidence=best.evidence),
        rule="Little's law: concurrency = rate x residence; a gap over 10 % means wrong inputs",
        computed=f"{significant(usable.rate_rps * usable.e2e_mean_s)} requests in flight there"
        if usable
        else "no rate keeps the promises without prefix reuse",
    )


def choose_kv_strategy(view: View) -> Finding:
    """Step 8: paging, quantised KV, prefix reuse, routing for it, and lower tiers."""
    best, load = view.best, view.load
    chosen = ["Paging in blocks of 16"]
    chosen += ["FP8 KV"] if best.layout.kv == "fp8" else []
    chosen += ["prefix cache"] if best.hit_rate > 0.01 else []
    many = best.pessimistic.instances > 1
    chosen += ["prefix-aware routing"] if best.hit_rate > 0.01 and many else []
    chosen += [f"{tier.label} tier" for tier in best.lower_tiers]
    known = load.hit_rate is not None
    ideal = load.ideal_hit_rate
    return Finding(
        step=8,
        title="KV strategy",
        answer=", ".join(chosen)
        + (f"; {best.hit_rate:.1%} of prompt tokens need no prefill" if known else "")
        + ".",
        inputs={
            "KV pool per instance": f"{best.kv_tokens:,} tokens",
            "instances": str(best.pessimistic.instances),
            "below the device": ", ".join(
                f"{tier.tokens:,} tokens of {tier.label} in the fleet" for tier in best.lower_tiers
            )
            or "nothing",
            "ideal hit rate": f"{ideal:.1%}" if known else "unknown: the trace has no prefix ids",
        },
        formula="hit rate = reuse curve(spare cached tokens of the fleet / growth)",
        substituted=f"reuse curve = {best.hit_rate:.1%} of at most {ideal:.1%}" if known else "n/a",
        result=Value(
            amount=best.hit_rate if known else math.nan,
            unit="of prompt tokens",
            evidence=TRACE
            if known
            else Evidence(kind="unknown", source="the trace carries no prefix blocks"),
        ),
        rule="reserve 20-30 % of the KV budget for prefixes",
        computed=f"a busy moment holds {best.expected.point.kv_share:.0%} of the pool; the rest "
        "serves prefixes",
        notes=()
        if known
        else ("give a trace with prefix blocks (Mooncake's format) to see what DRAM is worth",),
    )


def choose_batching(view: View) -> Finding:
    """Step 9: continuous batching, the chunk that the ITL promise allows, and what else pays."""
    best = view.best
    point, instance = best.pessimistic.point, best.instance
    return Finding(
        step=9,
        title="Batching",
        answer=f"Continuous batching, prompts in chunks of {instance.chunk_tokens:,} tokens: a "
        f"step is {format_seconds(point.decode_step_s)} without and "
        f"{format_seconds(point.chunk_step_s)} with a full chunk.",
        inputs={
            "ITL limit": _limit(view, "itl"),
            "TTFT limit": _limit(view, "ttft"),
            "steps with prompt tokens": f"{point.mixed_share:.0%}",
        },
        formula="the chunk with the highest usable rate among 256 ... 8,192",
        substituted=f"chunk {instance.chunk_tokens:,} -> {_rate(best.pessimistic.usable_rps)}",
        result=Value(amount=instance.chunk_tokens, unit="tokens", evidence=best.evidence),
        rule="512 or 1,024 when ITL spikes; a power of two",
        computed=f"{instance.chunk_tokens:,} at the pessimistic edge",
        notes=(_speculation_note(view), _disaggregation_note(view)),
    )


def _speculation_note(view: View) -> str:
    gpu, running = view.best.gpu, view.best.expected.point.running
    crossover = batch_crossover(
        5, flops_per_s=gpu.flops_per_s["bf16"], bytes_per_s=gpu.memory_bytes_per_s
    )
    verdict = "would help" if running < crossover / 2 else "is left off"
    return (
        f"speculation {verdict}: {significant(running)} sequences decode at once and five drafts "
        f"turn compute-bound at about {crossover} on {gpu.name}; needs measured acceptance"
    )


def _disaggregation_note(view: View) -> str:
    point, demand = view.best.expected.point, view.best.demand
    if demand.input_mean < 500:
        return "prefill and decode stay together: prompts average under 500 tokens"
    if point.chunk_step_s < 3 * point.decode_step_s:
        return (
            "prefill and decode stay together: a full chunk stretches a step only "
            f"{point.chunk_step_s / point.decode_step_s:.1f} times"
        )
    return (
        f"a full chunk stretches a step {point.chunk_step_s / point.decode_step_s:.1f} times: "
        "separate prefill instances are worth a trial if ITL is the promise that binds"
    )


def draw_final_curve(view: View) -> Finding:
    """Step 10: the same curve with reuse and chunks on; this one sizes the fleet."""
    best = view.best
    low, mid, high = best.pessimistic, best.expected, best.optimistic
    return Finding(
        step=10,
        title="Final curve",
        answer=f"One instance carries {_rate(low.usable_rps)} at the pessimistic edge "
        f"({_rate(mid.usable_rps)} expected, {_rate(high.usable_rps)} optimistic).",
        inputs={
            "step-time band": f"{best.evidence.low:g} to {best.evidence.high:g} of the law",
            "prefix hit rate": f"{best.hit_rate:.1%}",
            "nearest bound": low.point.bound,
        },
        formula="usable(rate) with every step x the edge of the band",
        substituted=f"x {low.slowdown:g}: {_rate(low.usable_rps)}; x 1: {_rate(mid.usable_rps)}; "
        f"x {high.slowdown:g}: {_rate(high.usable_rps)}",
        result=Value(
            amount=mid.usable_rps,
            unit="requests/s per instance",
            evidence=Evidence(
                kind=best.evidence.kind,
                source=best.evidence.source,
                low=low.usable_rps / mid.usable_rps,
                high=max(high.usable_rps / mid.usable_rps, 1.0),
            ),
        ),
    )


def size_fleet(view: View) -> Finding:
    """Step 11: how many instances hold the busy minute, with safety."""
    best, load = view.best, view.load
    low = best.pessimistic
    safety = view.question.safety
    exact = load.rate_rps * safety / low.usable_rps
    guide = instances_guide_mode(load.rate_rps, usable_rps=low.usable_rps, safety=safety)
    return Finding(
        step=11,
        title="Fleet",
        answer=f"{_count(low.instances, 'instance')} of {best.layout.gpus} = "
        f"{_count(low.gpus, 'GPU')} "
        f"({best.optimistic.gpus} at the optimistic edge).",
        inputs={
            "rate to size for": _rate(load.rate_rps),
            "usable per instance": _rate(low.usable_rps),
            "safety": f"{safety:g}",
        },
        formula="instances = ceil(rate x safety / usable); GPUs = instances x TP x PP x DP",
        substituted=f"ceil({significant(load.rate_rps)} x {safety:g} / "
        f"{significant(low.usable_rps)}) = ceil({exact:.2f}) = {low.instances}; "
        f"x {best.layout.gpus} = {low.gpus}",
        result=Value(
            amount=low.gpus,
            unit="GPUs",
            evidence=Evidence(
                kind=best.evidence.kind,
                source=best.evidence.source,
                low=best.optimistic.gpus / low.gpus,
                high=1.0,
            ),
        ),
        rule=f"ceil(ceil(rate / usable) x safety) = {_count(guide, 'instance')}",
        computed=f"rounding once: {_count(low.instances, 'instance')}"
        + ("" if guide == low.instances else "; rounding twice buys instances nobody asked for"),
        notes=(
            *_spare_note(low.instances),
            f"a new instance serves {format_seconds(lead_time_s(best))} after it is asked for: "
            "scale on a forecast that far ahead, keep a warm spare, and never scale to zero",
        ),
    )


def _spare_note(instances: int) -> tuple[str, ...]:
    return ("one instance has no spare: a failure stops the service",) if instances == 1 else ()


def lead_time_s(candidate: Candidate) -> float:
    """From asking for an instance to its first token: weights from NVMe, container, engine.

    Instances of a node start together and share its drives.
    """
    nvme = candidate.gpu.nvme
    start = cold_start(
        candidate.memory.weights_bytes * nvme.shared_by_gpus,
        bytes_per_s=nvme.read_bytes_per_s,
        init_s=CONTAINER_START_S + ENGINE_INIT_S,
    )
    return start.total_s


def price_fleet(view: View) -> Finding:
    """Step 12: what it costs, at the load that really comes and not at the peak."""
    best, load = view.best, view.load
    edge = best.pessimistic
    per_hour = edge.usd_per_hour
    capacity = edge.instances * edge.usable_rps * view.tokens_per_request
    used = load.mean_rps / (edge.instances * edge.usable_rps)
    if per_hour is None:
        return Finding(
            step=12,
            title="Cost",
            answer=f"{best.gpu.title} has no price: give one to see the cost.",
            inputs={"price": "unknown"},
            formula="GPUs x $/GPU-hour / (capacity tokens/h x utilization)",
            substituted="unknown",
            result=Value(
                amount=math.nan,
                unit="$ per million tokens",
                evidence=Evidence(kind="unknown", source="no price"),
            ),
        )
    average, full = (
        usd_per_million_tokens(per_hour, capacity_tokens_per_s=capacity, utilization=u)
        for u in (used, 1.0)
    )
    return Finding(
        step=12,
        title="Cost",
        answer=f"{format_usd(per_hour * HOURS_PER_YEAR)} a year; {format_usd(average)} per million "
        f"tokens at the average load, {format_usd(full)} if every instance were always full.",
        inputs={
            "GPUs": str(edge.gpus),
            "price": _price(best),
            "capacity": f"{capacity:,.0f} tokens/s",
            "average utilization": f"{used:.0%} of the usable rate",
        },
        formula="$/token = GPUs x $/GPU-h / (capacity tokens/h x utilization)",
        substituted=f"{edge.gpus} x {format_usd(per_hour / edge.gpus)} / "
        f"({capacity:,.0f} tokens/s x 3600 x {used:.3f})",
        result=Value(
            amount=average,
            unit="$ per million tokens",
            evidence=Evidence(
                kind=best.evidence.kind,
                source=f"{PRICES}: {best.gpu.price.source} ({best.gpu.price.as_of})",
                low=best.optimistic.gpus / edge.gpus,
                high=1.0,
            ),
        ),
        rule="capacity tokens, so that utilization is not counted twice",
        computed=f"{significant(1 / used)} times the price of a full fleet: idle GPUs are paid for",
    )


def set_triggers(view: View) -> Finding:
    """Step 13: what would make this plan wrong, as thresholds to watch."""
    point = view.best.expected.point
    ttft_s = point.ttft_s(99)
    cap_low, cap_high = input_cap_tokens(view.profile.input.percentile(95))
    return Finding(
        step=13,
        title="Validation",
        answer=f"Plan again when TTFT p99 exceeds {format_seconds(ttft_s * TTFT_RATIO_MAX)} at "
        f"{_rate(point.rate_rps)} an instance, or utilization falls {UTILIZATION_DROP_MAX} "
        "points below the benchmark at equal rate.",
        inputs={
            "expected TTFT p99": format_seconds(ttft_s),
            "expected ITL p99": format_seconds(point.itl_s(99)),
            "input cap for the gateway": f"{cap_low:,} to {cap_high:,} tokens",
            "queue depth to shed at": _shed_at(view),
        },
        formula="re-size if TTFT p99 > 1.30 x benchmark, or utilization drop > 20 points",
        substituted=f"{format_seconds(ttft_s)} x 1.30",
        result=Value(amount=ttft_s * TTFT_RATIO_MAX, unit="s", evidence=view.best.evidence),
        notes=(
            "any change of model, precision, GPU, TP/PP, engine version or length mix voids the "
            "curves",
            "alert on the service level as well: a benchmark that sat at the limit may drift 30 % "
            "and break it",
        ),
    )


def survive_replay(view: View) -> tuple[Finding, ...]:
    """Step 14: what the production scheduler makes of the closed form's fleet; none unreplayed."""
    told, best = view.survival, view.best
    if told is None:
        return ()
    last = told.deciding
    before, after = told.closed_form_instances, last.instances
    verdict = (
        f"The closed form's {_count(before, 'instance')} {'survives' if before == 1 else 'survive'}"
        if before == after
        else f"The closed form said {before}, the replay says {after}"
    )
    kept = "; ".join(f"{o.target} holds for {o.met_share:.2%} of {o.level}" for o in last.outcomes)
    return (
        Finding(
            step=14,
            title="What survives the replay",
            answer=f"{verdict}: {kept}{_why_not_less(told)}.",
            inputs={
                "requests": f"{last.requests:,}: {last.stretch}",
                "load": f"{_rate(view.load.rate_rps)} x {view.question.safety:g} safety",
                "policy": last.policy,
                "every step takes": f"x {last.slowdown:g} (pessimistic edge)",
                "output lengths": "as in the trace, each the token limit of its request",
                "engine": f"{best.instance.engine.name}: {best.instance.engine.host_s * 1e3:g} ms "
                f"a first token, seen after up to {best.instance.engine.wait_steps:g} steps",
                "prompt tokens found cached": f"{last.hit_share:.1%} (closed form: "
                f"{best.hit_rate:.1%}), {last.loaded_share:.1%} from below the device",
                "time in steps": f"{last.utilization:.0%}",
                "replays": str(told.replays),
            },
            formula="the fewest instances with which a replay of the trace keeps every promise "
            "to every class",
            substituted=f"{after} keep them; "
            + (
                f"{told.smaller.instances} do not: {told.smaller.broken}"
                if told.smaller and not told.smaller.kept
                else "no smaller fleet was needed"
            ),
            result=Value(
                amount=after * best.layout.gpus,
                unit="GPUs",
                evidence=Evidence(
                    kind=best.evidence.kind,
                    source=f"replay of {last.stretch} over {best.evidence.source}",
                    low=best.optimistic.gpus / best.pessimistic.gpus,
                    high=1.0,
                ),
            ),
            rule=f"the closed form: {_count(before, 'instance')}",
            computed=f"the replay: {_count(after, 'instance')}",
            rejected=tuple(
                Rejected(
                    what=c.name,
                    why=f"{c.tried_instances} instances, which would cost less "
                    f"than the best so far: {c.why}",
                )
                for c in told.checked
                if c.instances is None
            ),
            notes=told.notes,
        ),
    )


def _why_not_less(told: Survival) -> str:
    if told.smaller is None or told.smaller.kept:
        return ""
    return f"; with one instance less {told.smaller.broken}"


def _shed_at(view: View) -> str:
    """The fleet-wide queue depth at which the gateway refuses, from what the fleet drains."""
    limits = [lv.limit_s("ttft") for lv in view.question.levels]
    known = [limit for limit in limits if limit is not None]
    edge = view.best.pessimistic
    own_s = max(edge.point.prompts_s)
    if not known or min(known) <= own_s:
        return "no TTFT limit leaves room for a queue"
    depth = shed_depth(
        wait_s=min(known), drain_rps=edge.instances * edge.usable_rps, prefill_p99_s=own_s
    )
    return f"{depth.trip_low:,} to {depth.trip_high:,} requests"


# --- the top of the page --------------------------------------------------------------------


def headline(view: View) -> str:
    """The answer in one sentence."""
    best, edge = view.best, view.best.pessimistic
    breaks = edge.instances * edge.usable_rps
    cost = f"; {format_usd(edge.usd_per_year)} a year" if edge.usd_per_year is not None else ""
    promises = "; ".join(str(level) for level in view.question.levels)
    told = view.survival
    if told is not None and told.closed_form_instances != told.deciding.instances:
        return (
            f"{edge.instances} x {best.layout.gpus} {short_title(best.gpu)} "
            f"({_count(edge.gpus, 'GPU')}) hold {promises} at {_rate(view.load.rate_rps)}{cost}; "
            f"up to {_rate(breaks)} in a replay, where the closed form asks for "
            f"{_count(told.closed_form_instances, 'instance')}."
        )
    return (
        f"{edge.instances} x {best.layout.gpus} {short_title(best.gpu)} "
        f"({_count(edge.gpus, 'GPU')}) hold {promises} "
        f"at {_rate(view.load.rate_rps)}{cost}; breaks first at {_rate(breaks)}, on "
        f"{edge.point.bound}."
    )


def short_title(gpu: GpuSpec) -> str:
    """The accelerator's name without what the catalogue adds in brackets."""
    return gpu.title.partition(" (")[0]


def caveats(view: View) -> tuple[str, ...]:
    """What could be wrong, the weightiest first."""
    best = view.best
    lines = [
        f"Step times are {best.evidence.kind} ({best.evidence.source}): the truth lies between "
        f"{best.evidence.low:g} and {best.evidence.high:g} of ours in 8 of 10 cases; the plan uses "
        f"the slow edge.",
        *_basis(view),
    ]
    if view.load.hit_rate is None:
        lines.append(
            "Prefix reuse is unknown: the trace carries no prefix blocks, so none is used."
        )
    if len(view.question.levels) > 1 and not knows_classes(view.question, view.profile):
        lines.append(
            "Every request is planned to the strictest promise of any class: the plan does not "
            "know which request belongs to which."
        )
    price = best.gpu.price
    if price.typical_usd is not None and price.source != "user":
        lines.append(
            f"Price {format_usd(price.typical_usd)}/GPU-h is a default ({price.as_of}): "
            f"{price.source}."
        )
    budget = view.question.budget_usd_per_year
    cost = best.pessimistic.usd_per_year
    if budget is not None and cost is not None and cost > budget:
        lines.insert(
            0,
            f"Over budget: {format_usd(cost)} a year against {format_usd(budget)}; the optimistic "
            f"edge costs {format_usd(best.optimistic.usd_per_year or 0)}.",
        )
    return (*lines, *view.profile.notes)


def _basis(view: View) -> list[str]:
    """What the number of instances rests on, and what else would be needed without it."""
    told = view.survival
    if told is None:
        return ["Latency under load comes from a queueing model, not from a replay of the trace."]
    last = told.deciding
    lines = [
        f"The number of instances comes from a replay of {last.stretch}, at "
        f"{view.question.safety:g} times the load to size for; load curves and what-ifs come from "
        "a queueing model, scaled to agree with it.",
    ]
    others = [w for w in told.policies if not w.chosen]
    if last.policy == OURS and others and others[0].instances != last.instances:
        needed = others[0].instances
        takes = f"takes {_count(needed, 'instance')}" if needed else "kept them in no fleet tried"
        lines.append(
            f"The fleet is sized for the {last.policy} policy; first come first served, as engines "
            f"do by default, {takes}."
        )
    return lines


def _price(candidate: Candidate) -> str:
    price = candidate.gpu.price
    if price.typical_usd is None:
        return "unknown"
    return f"{format_usd(price.typical_usd)}/GPU-h ({price.as_of}, {price.source})"


def _annual(candidate: Candidate) -> str:
    cost = candidate.pessimistic.usd_per_year
    return (
        f"{format_usd(cost)} a year" if cost is not None else f"{candidate.pessimistic.gpus} GPUs"
    )


def _limit(view: View, metric: str) -> str:
    limits = [lv.limit_s(metric) for lv in view.question.levels]
    known = [limit for limit in limits if limit is not None]
    return format_seconds(min(known)) if known else "none"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _rate(rate_rps: float) -> str:
    return f"{significant(rate_rps)} requests/s"


def _percentiles(lengths: Lengths) -> str:
    return " / ".join(f"{lengths.percentile(p):,.0f}" for p in (50, 95, 99))
