"""`tierline.plan(...)`: the planner as a function of plain arguments, and writing its output.

The command line is a thin reader of arguments over this; both raise the same errors.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tierline.base.errors import InfeasibleError, InputError
from tierline.base.files import write_text
from tierline.base.names import lookup, reject_unknown_keys
from tierline.catalog.formats import kv_format, weight_format
from tierline.catalog.gpu import GpuSpec
from tierline.catalog.gpus import load_gpu, load_gpus, with_price
from tierline.catalog.models import load_model
from tierline.perf.curve import c_max, curve_from_csv
from tierline.perf.step import Layout, engine_names
from tierline.planner.finding import MeasuredCurve, Plan, Question
from tierline.planner.layouts import QUALITIES
from tierline.planner.plan import make_plan
from tierline.planner.traffic import busy_requests
from tierline.workload.archetypes import business_rate, workload_profile
from tierline.workload.profile import Profile, profile_trace
from tierline.workload.slo import ServiceLevel, parse_service_levels
from tierline.workload.trace import TraceReader, read_trace

PREDICTABLE_CV = 1.5  # gaps about as irregular as Poisson's, and a flat day: traffic one can trust
PREDICTABLE_PEAK = 2.0
OUTPUTS = ("plan.json", "deployment.toml", "report.html")


def plan(
    model: str,
    *,
    slo: str | Iterable[str],
    trace: str | Path | None = None,
    trace_format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    workload: str | None = None,
    rps: float | None = None,
    users: int | None = None,
    sessions_per_day: float | None = None,
    gpus: Sequence[str] | None = None,
    prices: Mapping[str, float] | None = None,
    growth: float = 1.0,
    safety: float | None = None,
    budget_usd_per_year: float | None = None,
    quality: str = "negligible",
    engine: str = "vllm",
    average_load: float | None = None,
    api_usd_per_million: tuple[float, float] | None = None,
    curve: str | Path | None = None,
    instance: Mapping[str, str] | None = None,
    replay: bool = True,
    progress: bool = False,
) -> Plan:
    """Plan a fleet: which GPUs, how many, in what configuration, at what cost, and why.

    Demand comes from `trace` (a file in any format that `tierline profile` reads), or from a
    built-in `workload` (chat, rag, code, agent) at `rps` requests a second in a busy
    minute, or from `users` who open `sessions_per_day`. `slo` is text such as
    'ttft_p99=2s,itl_p99=50ms', one per class. `gpus` are names or paths of TOML files (default:
    all of the catalogue), `prices` dollars per GPU-hour by name.

    A measured load curve (`curve`, a CSV file) of one `instance` on one GPU, for example
    {'tp': '4', 'weights': 'fp8', 'kv': 'fp8'}, takes the place of the predicted one.

    The fleet that comes out is replayed, request by request, under the production scheduler;
    `replay=False` leaves that out and takes the closed form's word, in a fraction of the time.

    Raises `InputError` for what the caller can correct and `InfeasibleError`, which names the
    bound, when no configuration keeps the promises.

    >>> answer = plan("llama-3.1-8b", workload="chat", rps=20, slo="ttft_p99=2s", gpus=["l40s"])
    >>> answer.recommended.gpu.name
    'l40s'
    """
    _positive("growth", growth)
    _positive("safety", safety)
    _positive("budget", budget_usd_per_year)
    _positive("rps", rps)
    _positive("users", users)
    _positive("sessions per day", sessions_per_day)
    _positive("average load", average_load)
    lookup("quality", quality, dict.fromkeys(QUALITIES))
    lookup("engine", engine, dict.fromkeys(engine_names()))
    levels = parse_service_levels([slo] if isinstance(slo, str) else slo)
    if not levels:
        raise InputError("no service level given", hint="for example slo='ttft_p99=2s'")
    spec = load_model(model)
    chosen = _gpus(gpus, prices or {})
    peak_rps = _peak_rps(rps, users, sessions_per_day, has_trace=trace is not None)
    reader = _reader(trace, trace_format, mapping, workload)
    profile = (
        profile_trace(reader, progress=progress)
        if reader is not None
        else workload_profile(workload or "chat")
    )
    question = Question(
        model=spec,
        levels=levels,
        gpus=tuple(chosen),
        workload_name=Path(trace).name if trace is not None else f"{workload or 'chat'} workload",
        growth=growth,
        safety=safety if safety is not None else default_safety(profile),
        budget_usd_per_year=budget_usd_per_year,
        quality=quality,
        engine=engine,
        api_usd_per_million=api_usd_per_million,
        peak_rps=peak_rps,
        average_load=average_load,
        measured=_measured(curve, instance or {}, chosen, levels),
        hf_id=model if "/" in model and not Path(model).exists() else None,
        config_path=model if Path(model).exists() else None,
        gpu_files={load_gpu(n).name: n for n in gpus or () if n.endswith(".toml") or "/" in n},
        replay=replay,
    )
    if reader is None or not replay:
        return make_plan(question, profile, progress=progress)
    return make_plan(
        question,
        profile,
        requests=busy_requests(reader, profile),
        block_tokens=reader.block_tokens,
        progress=progress,
    )


def default_safety(profile: Profile) -> float:
    """1.2 for predictable traffic, 1.5 for traffic that is bursty, peaky or unknown."""
    arrivals = profile.arrivals
    if arrivals is None:
        return 1.5
    steady = arrivals.iat_cv <= PREDICTABLE_CV and arrivals.peak_to_mean <= PREDICTABLE_PEAK
    return 1.2 if steady else 1.5


def write_plan(plan: Plan, folder: Path) -> list[Path]:
    """Write `plan.json`, `deployment.toml` and `report.html` into `folder`; return their paths."""
    # These pull in the template engine, which a caller of `plan` alone does not pay for.
    from tierline.planner.plan_json import plan_to_json
    from tierline.planner.report import render_report

    texts = (plan_to_json(plan), plan.deployment.to_toml(), render_report(plan))
    paths = [folder / name for name in OUTPUTS]
    for path, text in zip(paths, texts, strict=True):
        write_text(path, text)
    return paths


def _measured(
    path: str | Path | None,
    instance: Mapping[str, str],
    gpus: list[GpuSpec],
    levels: tuple[ServiceLevel, ...],
) -> MeasuredCurve | None:
    """The benchmark that replaces the prediction: one curve of one instance on one GPU."""
    if path is None:
        if instance:
            raise InputError("an instance without a curve", hint="add --curve FILE")
        return None
    if len(gpus) != 1:
        raise InputError("a measured curve belongs to one GPU", hint="add --gpus NAME, one name")
    layout = parse_layout(instance)
    curve = curve_from_csv(Path(path))
    limits = [(lv.limit_s("ttft"), lv.limit_s("itl")) for lv in levels]
    points = [c_max(curve, ttft_p99_s=ttft, itl_p99_s=itl) for ttft, itl in limits]
    kept = [point.rps for point in points if point is not None]
    if len(kept) < len(points):
        raise InfeasibleError(
            f"curve {str(path)!r} breaks a promise at its lowest load, "
            f"{curve.points[0].concurrency:g} concurrent",
            hint="relax the service level, or measure another configuration",
        )
    return MeasuredCurve(gpu=gpus[0].name, layout=layout, curve=curve, usable_rps=min(kept))


def parse_layout(parts: Mapping[str, str]) -> Layout:
    """A layout from {'tp': '4', 'weights': 'fp8', 'kv': 'fp8'}; absent cuts are 1."""
    reject_unknown_keys("instance", parts, ("weights", "kv", "tp", "pp", "dp", "ep"))
    missing = [key for key in ("weights", "kv", "tp") if key not in parts]
    if missing:
        raise InputError(f"instance: {missing[0]!r} is missing", hint="tp=4,weights=fp8,kv=fp8")
    cuts = {key: parts[key] for key in ("tp", "pp", "dp", "ep") if key in parts}
    for key, text in cuts.items():
        if not text.isdigit() or int(text) < 1:
            raise InputError(f"instance: {key} is {text!r}", hint="a whole number from 1")
    return Layout(
        weights=weight_format(parts["weights"]).name,
        kv=kv_format(parts["kv"]).name,
        **{key: int(text) for key, text in cuts.items()},
    )


def _gpus(names: Sequence[str] | None, prices: Mapping[str, float]) -> list[GpuSpec]:
    chosen = {gpu.name: gpu for gpu in load_gpus(names)}
    for name, usd in prices.items():
        gpu = load_gpu(name)
        if gpu.name not in chosen:
            raise InputError(
                f"a price is given for {gpu.name!r}, which is not among the GPUs to plan with",
                hint=f"plan with {', '.join(chosen)}",
            )
        chosen[gpu.name] = with_price(chosen[gpu.name], usd)
    return list(chosen.values())


def _reader(
    trace: str | Path | None,
    trace_format: str | None,
    mapping: Mapping[str, str] | None,
    workload: str | None,
) -> TraceReader | None:
    """A reader of the trace; None where the demand is a built-in workload."""
    if trace is None:
        return None
    if workload is not None:
        raise InputError("a trace and a workload are given", hint="give one of them")
    return read_trace(Path(trace), format=trace_format, mapping=mapping)


def _peak_rps(
    rps: float | None, users: int | None, sessions_per_day: float | None, *, has_trace: bool
) -> float | None:
    """The rate of a busy minute that the caller states, in one way or another."""
    if users is None:
        if sessions_per_day is not None:
            raise InputError("sessions per day without users", hint="add --users 20000")
        if rps is None and not has_trace:
            raise InputError(
                "no demand given",
                hint="give --trace FILE, or --workload chat --rps 20, or --users 20000 "
                "--sessions-per-day 3",
            )
        return rps
    if rps is not None:
        raise InputError("users and rps are given", hint="give one of them")
    if sessions_per_day is None:
        raise InputError("users without sessions per day", hint="add --sessions-per-day 3")
    return business_rate(users=users, sessions_per_day=sessions_per_day)


def _positive(what: str, value: float | None) -> None:
    if value is not None and not (0 < value < float("inf")):
        raise InputError(f"{what} is {value:g}", hint="it must be above zero and finite")
