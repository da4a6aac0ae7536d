"""What this process serves, what fits, and what is predicted of it: one value, told to everybody.

`serve` makes it once, when the engine is open (`running_of`), and prints it (`render_running`);
the dashboard's Plan page shows it; `prediction` and `whatif` start from its `instance`, which is
the engine's own scheduler, memory and step law as a simulation knows them.  So what is planned,
predicted and replayed rests on one law, and it is the one that the scheduler decides by.

Nothing heavy is imported here: a worker process that replays traffic reads this value, too.

Invariants
    INV-SRV-60  the instance that predictions use prices a step as the engine's scheduler does
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tierline.base.clock import PS_PER_S
from tierline.base.rng import stream
from tierline.base.units import format_bytes, format_seconds, significant
from tierline.catalog.gpu import GpuSpec
from tierline.perf.curve import Curve, CurvePoint, usable_point
from tierline.scheduling.profiles import POLICIES
from tierline.scheduling.scheduler import Limits
from tierline.sim.api import simulate
from tierline.sim.gaps import gaps_of
from tierline.sim.instance import Instance
from tierline.sim.measure import summary
from tierline.sim.record import Run
from tierline.workload.request import Request
from tierline.workload.slo import ServiceLevel, Target

if TYPE_CHECKING:
    from tierline.engine.engine import Engine

TYPICAL_PROMPT_TOKENS, TYPICAL_OUTPUT_TOKENS = 512, 128
CURVE_REQUESTS = 200  # of every load that is tried: a p99 is more than one request
CURVE_SHARES = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of what a full batch reaches
PATIENCE_S = 60.0  # a promise of more than this would make the class a background one
NICE = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)
# What `to_dict` takes over as it is.
_TOLD = (
    *("model", "architecture", "dtype", "device", "kernels", "policy", "weight_bytes"),
    *("block_tokens", "positions_max", "sequences_fit", "prompt_longest_tokens"),
    *("default_level", "guessed", "plan"),
)
_FORECAST_TOLD = (
    *("machine", "kind", "source", "low", "high", "prompt_tokens", "output_tokens"),
    *("ttft_s", "level", "usable_rps", "knee_rps"),
)
_POINT_TOLD = ("rps", "concurrency", "ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """One tier of memory that keeps KV."""

    tier: str
    bytes: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What one instance is predicted to do with requests of one stated length. Seconds."""

    machine: str
    kind: str  # of the evidence: measured, fitted, datasheet, assumed
    source: str
    low: float  # eight in ten true step times lie between low and high times ours
    high: float
    prompt_tokens: int
    output_tokens: int
    ttft_s: float  # of one prompt, alone
    itl_s: tuple[tuple[int, float], ...]  # by sequences that decode
    curve: tuple[CurvePoint, ...]  # simulated, by rising load
    level: str  # whose promises the usable rate keeps
    usable_rps: float | None  # None: not even the least load that was tried keeps them
    knee_rps: float | None  # from where p99 TTFT leaves p50; None: not within what was tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What is served, where, under which promises, and what may be expected."""

    model: str
    architecture: str
    dtype: str
    device: str
    kernels: str
    policy: str
    weight_bytes: int
    block_tokens: int
    positions_max: int
    limits: Limits
    rooms: tuple[Room, ...]
    sequences_fit: int  # of the forecast's length, at once
    prompt_longest_tokens: int
    levels: tuple[ServiceLevel, ...]  # the most urgent first
    default_level: str  # of a request that names none
    guessed: bool  # nobody has measured this machine
    here: Forecast
    plan: str = ""  # what was planned, in words; "" without a deployment file
    planned: Forecast | None = None  # for the machine of the plan, where that is another one
    warnings: tuple[str, ...] = ()
    instance: Instance

    def level(self, name: str) -> ServiceLevel:
        """The class of that name, or the default one."""
        named = {level.name: level for level in self.levels}
        return named.get(name) or named[self.default_level]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, for a page or a JSON answer."""
        return {name: getattr(self, name) for name in _TOLD} | {
            "limits": {
                "batch_tokens": self.limits.batch_tokens,
                "chunk_tokens": self.limits.chunk_tokens,
                "sequences_max": self.limits.sequences_max,
            },
            "rooms": [
                {"tier": room.tier, "bytes": room.bytes, "tokens": room.tokens}
                for room in self.rooms
            ],
            "levels": [level_dict(level) for level in self.levels],
            "here": forecast_dict(self.here),
            "planned": forecast_dict(self.planned) if self.planned else None,
            "warnings": list(self.warnings),
        }


def level_dict(level: ServiceLevel) -> dict[str, Any]:
    """A service class in plain numbers; no promise is None."""
    return {
        "name": level.name,
        "priority": level.priority,
        "ttft_limit_s": level.limit_s("ttft"),
        "itl_limit_s": level.limit_s("itl"),
        "targets": [target.text for target in level.targets],
    }


def forecast_dict(forecast: Forecast) -> dict[str, Any]:
    """A forecast in plain numbers."""
    return {name: getattr(forecast, name) for name in _FORECAST_TOLD} | {
        "itl_s": [{"sequences": n, "seconds": s} for n, s in forecast.itl_s],
        "curve": [{name: getattr(p, name) for name in _POINT_TOLD} for p in forecast.curve],
    }


# --- from an engine that is open ------------------------------------------------------------


def running_of(
    engine: "Engine",
    *,
    levels: Sequence[ServiceLevel] = (),
    prefix_cache: bool = True,
    plan: str = "",
    planned: Instance | None = None,
    warnings: Sequence[str] = (),
) -> Running:
    """What `engine` serves; without `levels` under promises that this machine can keep.

    `planned` is the instance of the deployment file where that is another machine's.  Takes
    some tenths of a second: every load of the forecast's curve is simulated.
    """
    facts, instance = engine.facts, instance_of_engine(engine, prefix_cache=prefix_cache)
    policy, positions = facts.policy, min(facts.positions_max, room_tokens(instance))
    prompt, output = typical(positions)
    promised = tuple(sorted(levels or default_levels(instance), key=lambda level: -level.priority))
    default = default_of(promised)
    layout = instance.layout
    each = layout.pages(prompt + output)
    said = list(warnings)
    guessed = is_guess(instance.cost.gpu)
    if guessed:
        said.append(
            "nobody has measured this machine: predictions are guesses until `tierline calibrate`"
            " (a minute and a half) was run and the server started again"
        )
    return Running(
        model=facts.model,
        architecture=facts.architecture,
        dtype=facts.dtype,
        device=facts.device,
        kernels=facts.kernels,
        policy=facts.policy,
        weight_bytes=facts.weight_bytes,
        block_tokens=layout.block_tokens,
        positions_max=facts.positions_max,
        limits=instance.limits,
        rooms=(Room(tier="device", bytes=facts.kv_bytes, tokens=facts.kv_tokens),),
        sequences_fit=min(instance.pages_total // each, instance.limits.sequences_max),
        prompt_longest_tokens=positions - 1,
        levels=promised,
        default_level=default.name,
        guessed=guessed,
        here=forecast(instance, level=default, policy=policy, positions=positions),
        plan=plan,
        planned=forecast(planned, level=default, policy=policy, positions=positions)
        if planned is not None
        else None,
        warnings=tuple(said),
        instance=instance,
    )


def resized(running: Running, engine: "Engine") -> Running:
    """`running` with another size of memory on the device; promises stay what they were."""
    now = running_of(engine, levels=running.levels, prefix_cache=running.instance.prefix_cache)
    return replace(
        running,
        rooms=now.rooms,
        sequences_fit=now.sequences_fit,
        prompt_longest_tokens=now.prompt_longest_tokens,
        here=now.here,
        instance=now.instance,
    )


def instance_of_engine(engine: "Engine", *, prefix_cache: bool = True) -> Instance:
    """The engine as a simulation knows it (INV-SRV-60): same law, layout, pages and limits."""
    scheduler = engine.scheduler
    cost = scheduler.line.cost
    return Instance(
        name=cost.gpu.name,
        cost=cost,
        layout=scheduler.layout,
        pages_total=scheduler.pages.total,
        limits=scheduler.limits,
        prefix_cache=prefix_cache and scheduler.layout.shares_prefixes,
        usd_per_hour=cost.gpu.price.typical_usd or 0.0,
    )


def room_tokens(instance: Instance) -> int:
    """Tokens of KV that fit on the device, in whole blocks."""
    layout = instance.layout
    return instance.pages_total // layout.pages_per_block * layout.block_tokens


def is_guess(gpu: GpuSpec) -> bool:
    """Whether the rates of `gpu` are those that the engine assumes where nobody measured."""
    from tierline.engine.machine import GUESS  # torch: not for the workers that read this module

    return GUESS in gpu.sources.values()


def typical(positions: int) -> tuple[int, int]:
    """(prompt, output) tokens of the length that forecasts are told for; shorter where a model
    takes less.

    >>> typical(8192), typical(512)
    ((512, 128), (256, 64))
    """
    share = min(1.0, positions / (2 * TYPICAL_PROMPT_TOKENS))
    return max(int(TYPICAL_PROMPT_TOKENS * share), 1), max(int(TYPICAL_OUTPUT_TOKENS * share), 1)


# --- promises -------------------------------------------------------------------------------


def default_levels(instance: Instance) -> tuple[ServiceLevel, ...]:
    """Three classes whose promises this machine can keep while it is not overloaded.

    `interactive` is promised its first token in four times, `standard` in ten times what a typical
    prompt takes alone; a gap as long as a step with the smallest chunk of a prompt beside 16
    streams, or with a quarter of the largest beside as many as there may be.  All of it times how
    much longer true steps may be than ours.  `batch` is promised nothing: it goes behind.
    """
    margin = instance.cost.evidence.high
    line, limits = instance.line(), instance.limits
    prompt, output = typical(1 << 30)
    alone_s = margin * line.prefill_ps(prompt, chunk=limits.chunk_tokens) / PS_PER_S

    def gap_s(decodes: int, chunk: int) -> float:
        context = decodes * (prompt + output // 2)
        return margin * line.line(decodes, context, [(0, chunk)])[0] / PS_PER_S

    some, many = min(16, limits.sequences_max), limits.sequences_max
    small = min(limits.chunk_tokens_min, limits.chunk_tokens)
    large = max(limits.chunk_tokens // 4, small)
    return (
        _level("interactive", 10, ttft_s=4 * alone_s, itl_s=gap_s(some, small)),
        _level("standard", 0, ttft_s=10 * alone_s, itl_s=gap_s(many, large)),
        ServiceLevel(name="batch", priority=-10, targets=()),
    )


def _level(name: str, priority: int, *, ttft_s: float, itl_s: float) -> ServiceLevel:
    limits = {"ttft": min(ttft_s, PATIENCE_S), "itl": itl_s}
    return ServiceLevel(
        name=name,
        priority=priority,
        targets=tuple(
            Target(metric=metric, percentile=95, limit_ns=_nice_ns(limit_s))
            for metric, limit_s in limits.items()
        ),
    )


def _nice_ns(seconds: float) -> int:
    """The least round duration that is not shorter.

    >>> _nice_ns(0.0123), _nice_ns(1.7)
    (15000000, 2000000000)
    """
    size = 1
    while size * 10 < seconds * 1e9:
        size *= 10
    return next(round(n * size) for n in NICE if n * size >= seconds * 1e9 - 1e-6)


def default_of(levels: Sequence[ServiceLevel]) -> ServiceLevel:
    """The class of a request that names none: `standard` or `default`, else the one nearest to
    priority 0, the less urgent of two."""
    for name in ("standard", "default"):
        for level in levels:
            if level.name == name:
                return level
    return nearest(levels, 0)


def nearest(levels: Sequence[ServiceLevel], priority: float) -> ServiceLevel:
    """The class of a request that names a priority and no class; the less urgent of two."""
    return min(levels, key=lambda level: (abs(level.priority - priority), level.priority))


# --- forecasts ------------------------------------------------------------------------------


def forecast(instance: Instance, *, level: ServiceLevel, policy: str, positions: int) -> Forecast:
    """What `instance` is predicted to do: prices of single steps, and a simulated load curve."""
    line, evidence = instance.line(), instance.cost.evidence
    prompt, output = typical(min(positions, room_tokens(instance)))
    context = prompt + output // 2
    counts = sorted({1, min(8, instance.limits.sequences_max), instance.limits.sequences_max})
    curve = _curve(instance, level, policy, prompt_tokens=prompt, output_tokens=output)
    usable, knee = usable_point(curve, level), curve.knee
    return Forecast(
        machine=instance.cost.gpu.title,
        kind=evidence.kind,
        source=evidence.source,
        low=evidence.low,
        high=evidence.high,
        prompt_tokens=prompt,
        output_tokens=output,
        ttft_s=line.prefill_ps(prompt, chunk=instance.limits.chunk_tokens) / PS_PER_S,
        itl_s=tuple((n, line.line(n, n * context)[0] / PS_PER_S) for n in counts),
        curve=curve.points,
        level=level.name,
        usable_rps=None if usable is None else usable.rps,
        knee_rps=None if knee is None else knee.rps,
    )


def _curve(
    instance: Instance, level: ServiceLevel, policy: str, *, prompt_tokens: int, output_tokens: int
) -> Curve:
    """Poisson arrivals of one length at rising rates, simulated; the same gaps at every rate."""
    gaps_s = stream(0, "forecast").exponential(size=CURVE_REQUESTS)

    def run_at(rps: float) -> Run:
        at_s = 0.0
        requests = []
        for gap_s in gaps_s.tolist():
            at_s += gap_s / rps if rps else 0.0
            requests.append(
                Request(
                    arrival_ns=round(at_s * 1e9),
                    input_tokens=prompt_tokens,
                    output_tokens=output_tokens,
                    priority=level.priority,
                )
            )
        return simulate(instance, requests, levels=[level], policy=policy, keep_steps=True)

    most_rps = CURVE_REQUESTS / run_at(0.0).duration_s  # all at once: as fast as it goes
    points: list[CurvePoint] = []
    for share in CURVE_SHARES:
        point = _point(run_at(share * most_rps), share * most_rps, policy)
        if not points or point.concurrency > points[-1].concurrency:
            points.append(point)
    return Curve(points=tuple(points), source=f"simulated on {instance.name}")


def _point(run: Run, rps: float, policy: str) -> CurvePoint:
    import numpy as np

    told = summary(run).all
    gaps = gaps_of(run, np.ones(len(run.requests), dtype=bool), mixes=POLICIES[policy].mixes)
    assert told.ttft.p50_s is not None
    assert told.ttft.p99_s is not None
    assert told.e2e.mean_s is not None
    itl_s = [gaps.percentile_ps(p) / PS_PER_S if gaps.total else 0.0 for p in (50, 99)]
    return CurvePoint(
        concurrency=rps * told.e2e.mean_s,
        rps=rps,
        ttft_p50_s=told.ttft.p50_s,
        ttft_p99_s=told.ttft.p99_s,
        itl_p50_s=itl_s[0],
        itl_p99_s=itl_s[1],
        e2e_mean_s=told.e2e.mean_s,
    )


# --- words ----------------------------------------------------------------------------------


def render_running(running: Running, *, measured: str = "") -> str:
    """For a terminal: the answer, then the facts it rests on, then what to know.

    `measured` is what steps took at the start.
    """
    facts = [*_facts(running), *_forecast_facts(running.here)]
    if measured:
        facts.append(("measured", measured))
    facts += _levels(running)
    if running.plan:
        facts.append(("plan", running.plan))
    if running.planned is not None:
        facts.append(("there", headline(running.planned)))
    width = max(len(name) for name, _ in facts)
    lines = [headline(running.here), ""]
    lines += [f"  {name.ljust(width)}  {words}".rstrip() for name, words in facts]
    lines += ["", *(f"note: {warning}" for warning in running.warnings)] if running.warnings else []
    return "\n".join(lines) + "\n"


def headline(told: Forecast) -> str:
    """How much can be served, as one sentence."""
    length = f"{told.prompt_tokens:,} + {told.output_tokens:,} tokens"
    if told.usable_rps is None:
        least = told.curve[0].rps
        return (
            f"The promises of class '{told.level}' are broken at {significant(least)} requests/s"
            f" of {length} already (predicted for {told.machine})."
        )
    more = "" if told.usable_rps < told.curve[-1].rps else "at least "
    return (
        f"Serves {more}{significant(told.usable_rps, 2)} requests/s of {length} within the"
        f" promises of class '{told.level}' (predicted for {told.machine})."
    )


def _facts(running: Running) -> list[tuple[str, str]]:
    rooms = ", ".join(
        f"{room.tier} {format_bytes(room.bytes)} for {room.tokens:,} tokens"
        for room in running.rooms
    )
    here = running.here
    length = here.prompt_tokens + here.output_tokens
    limits = running.limits
    return [
        ("model", f"{running.model}, {running.architecture}, {running.dtype}"),
        ("runs on", f"{running.device}, kernels: {running.kernels}"),
        ("memory", f"weights {format_bytes(running.weight_bytes)}; KV cache: {rooms}"),
        (
            "fits",
            f"{running.sequences_fit} sequences of {length:,} tokens at once; the longest prompt"
            f" has {running.prompt_longest_tokens:,} tokens",
        ),
        (
            "limits",
            f"{limits.sequences_max} sequences, {limits.batch_tokens:,} tokens a step, chunks of"
            f" {limits.chunk_tokens:,}; policy {running.policy}",
        ),
    ]


def _forecast_facts(told: Forecast) -> list[tuple[str, str]]:
    gaps = ", ".join(f"{format_seconds(s)} with {n}" for n, s in told.itl_s)
    knee = "not reached" if told.knee_rps is None else f"{significant(told.knee_rps, 2)} requests/s"
    return [
        (
            "predicted",
            f"TTFT of a {told.prompt_tokens:,}-token prompt alone {format_seconds(told.ttft_s)};"
            f" ITL {gaps} decoding; knee {knee}",
        ),
        (
            "known by",
            f"{told.source} ({told.kind}): eight in ten steps take {told.low:.2f} to"
            f" {told.high:.2f} x what is predicted",
        ),
    ]


def _levels(running: Running) -> list[tuple[str, str]]:
    told = []
    for level in running.levels:
        default = ", for requests that name none" if level.name == running.default_level else ""
        promise = str(level) or "nothing promised, goes behind the others"
        told.append(("class", f"{level.name} (priority {level.priority}): {promise}{default}"))
    return told
