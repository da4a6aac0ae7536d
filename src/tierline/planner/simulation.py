"""`tierline sim` and `tierline explain`: replay a trace on a deployment, and tell of it.

The command line is a thin reader of arguments over this.  A run is a function of its inputs,
so what is kept of it is its inputs (`Replay`, in `run.json`) and its hash: steps, and the
moments of any request, are had by running it again, and the hash says whether it was the same.

    INV-SIM-25  a replay read back from its folder runs to the hash that is written there
"""

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tierline.base.errors import InputError, TraceError
from tierline.base.files import read_text, write_text
from tierline.base.names import lookup
from tierline.base.progress import progress_bar
from tierline.catalog.deployment import Deployment, parse_deployment
from tierline.planner.sim_page import SimPage, render_sim_page
from tierline.scheduling.profiles import POLICIES, PROFILES
from tierline.sim.api import simulate
from tierline.sim.explain import Explanation, explain
from tierline.sim.faults import parse_fault
from tierline.sim.instance import instance_of
from tierline.sim.life import beside_its_wait, slowest
from tierline.sim.measure import Summary, summary
from tierline.sim.perfetto import write_perfetto
from tierline.sim.record import Run
from tierline.sim.table import write_requests
from tierline.workload.request import Request
from tierline.workload.slo import ServiceLevel, parse_service_levels
from tierline.workload.trace import load_trace, read_trace

SCHEMA = 1
TABLES = ("csv", "csv.gz", "parquet")
SLOWEST = "slowest"  # in place of a request's number


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a simulation is a function of."""

    deployment: str  # the text of its file
    trace: str  # path, as it was given
    trace_sha256: str
    trace_format: str | None = None
    mapping: Mapping[str, str]
    policies: tuple[str, ...]  # to compare; one is enough
    seed: int = 0
    faults: tuple[str, ...] = ()

    @property
    def parsed(self) -> Deployment:
        """The deployment."""
        return parse_deployment(self.deployment, where="deployment")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The inputs, read: requests are read once and replayed under every policy."""

    replay: Replay
    deployment: Deployment
    requests: Sequence[Request]
    trace_block_tokens: int
    levels: tuple[ServiceLevel, ...]
    said: tuple[str, ...]  # what reading the trace had to say


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """Policies replayed: the one with the most good requests first, with its steps."""

    loaded: Loaded
    runs: tuple[Run, ...]
    summaries: tuple[Summary, ...]
    request: int | None  # the one that is watched in the first run


def replay_of(
    deployment: Path,
    *,
    trace: Path,
    trace_format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    policies: Sequence[str] | None = None,
    seed: int = 0,
    faults: Iterable[str] = (),
) -> Replay:
    """The inputs of a simulation; without `policies` the deployment's own scheduler.

    Raises `InputError` for files that cannot be read and names nobody knows.
    """
    text = read_text(deployment, what="deployment file")
    own = parse_deployment(text, where=str(deployment)).policies.scheduler
    chosen = tuple(dict.fromkeys(policies or [own]))
    for name in chosen:
        lookup("policy", name, POLICIES)
    faults = tuple(faults)
    for fault in faults:
        parse_fault(fault)
    return Replay(
        deployment=text,
        trace=str(trace),
        trace_sha256=_digest(trace),
        trace_format=trace_format,
        mapping=dict(mapping or {}),
        policies=chosen,
        seed=seed,
        faults=faults,
    )


def load(replay: Replay) -> Loaded:
    """Read the trace and what the deployment promises."""
    reader = read_trace(
        Path(replay.trace), format=replay.trace_format, mapping=replay.mapping or None
    )
    if not reader.has_arrivals:
        raise TraceError(
            f"trace {replay.trace!r} has no arrival times", hint="a replay needs to know when"
        )
    requests = load_trace(reader)
    deployment = replay.parsed
    levels = [f"{s.name}@{s.priority}:{','.join(s.targets)}" for s in deployment.slo]
    return Loaded(
        replay=replay,
        deployment=deployment,
        requests=requests,
        trace_block_tokens=reader.block_tokens,
        levels=parse_service_levels(levels) if levels else (),
        said=tuple(reader.report.sentences()),
    )


def run_policy(
    loaded: Loaded,
    policy: str,
    *,
    keep_steps: bool = False,
    watch: Iterable[int] = (),
    progress: bool = False,
) -> Run:
    """One policy over the whole trace."""
    requests = loaded.requests
    with progress_bar(len(requests), what=f"simulating {policy}", show=progress) as bar:
        return simulate(
            instance_of(loaded.deployment),
            requests,
            levels=loaded.levels,
            replicas=loaded.deployment.replicas,
            policy=policy,
            routing=loaded.deployment.policies.routing,
            trace_block_tokens=loaded.trace_block_tokens,
            seed=loaded.replay.seed,
            keep_steps=keep_steps,
            watch=watch,
            progress=bar,
            disaggregation=loaded.deployment.policies.disaggregation,
            faults=[parse_fault(fault) for fault in loaded.replay.faults],
        )


def run_all(
    replay: Replay, *, watched: bool = False, request: str = SLOWEST, progress: bool = False
) -> Simulation:
    """Every policy of the replay, the one with the most good requests first.

    `watched` runs that one again with its steps, watching `request` (a number, or the slowest
    to its first token) and who was beside it.
    """
    loaded = load(replay)
    runs, told = [], []
    for name in replay.policies:
        run = run_policy(loaded, name, keep_steps=True, progress=progress)
        told.append(summary(run, mixes=POLICIES[name].mixes))
        run.steps = None  # they made the summary, and weigh more than all else
        runs.append(run)
    order = sorted(range(len(runs)), key=lambda i: (-told[i].all.good_share, i))
    runs, told = [runs[i] for i in order], [told[i] for i in order]
    chosen = _chosen(runs[0], request) if watched else None
    if chosen is not None:
        policy = runs[0].policy
        watch = [chosen, *beside_its_wait(runs[0], chosen)]  # drawn next to it, so as well known
        best = run_policy(loaded, policy, keep_steps=True, watch=watch, progress=progress)
        assert best.hash() == runs[0].hash(), "keeping steps changed the run"
        runs[0] = best
    return Simulation(loaded=loaded, runs=tuple(runs), summaries=tuple(told), request=chosen)


def _chosen(run: Run, request: str) -> int:
    """The number of the request that a person means."""
    if request == SLOWEST:
        return next(iter(slowest(run, 1, latency="ttft")), 0)
    last = len(run.requests) - 1
    if not request.isdigit() or int(request) > last:
        raise InputError(
            f"{request!r} is not the number of a request",
            hint=f"0 to {last}, as in the first column of requests.csv; or the word {SLOWEST}",
        )
    return int(request)


# --- the folder -----------------------------------------------------------------------------


def write_simulation(done: Simulation, folder: Path, *, table: str = "csv") -> list[Path]:
    """Write summary.json, requests.*, page.html, trace.json.gz and run.json; their paths.

    Policies that are compared have a table each, named for them. `run.json` comes last: a
    folder that has it is whole.
    """
    lookup("table format", table, dict.fromkeys(TABLES))
    paths = [folder / "summary.json"]
    write_text(paths[0], summaries_json(done))
    for i, run in enumerate(done.runs):
        name = f"requests-{run.policy}.{table}" if i else f"requests.{table}"
        paths.append(folder / name)
        write_requests(run, paths[-1])
    paths.append(folder / "page.html")
    write_text(paths[-1], render_sim_page(_page(done, folder), done.runs, done.summaries))
    paths.append(folder / "trace.json.gz")
    write_perfetto(done.runs[0], paths[-1])
    paths.append(folder / "run.json")
    write_text(paths[-1], _run_json(done))
    return paths


def summaries_json(done: Simulation) -> str:
    """The summaries, the best policy first."""
    policies = [json.loads(one.to_json()) for one in done.summaries]
    return json.dumps({"policies": policies}, indent=2) + "\n"


def _run_json(done: Simulation) -> str:
    kept = {
        "tierline_run": SCHEMA,
        "made_by": f"tierline {version('tierline')}",
        **asdict(done.loaded.replay),
        "hashes": {one.policy: one.hash for one in done.summaries},
    }
    return json.dumps(kept, indent=2) + "\n"


def read_replay(folder: Path) -> tuple[Replay, dict[str, str]]:
    """The inputs that a folder was made from, and the hash of each policy, the best first."""
    path = folder / "run.json"
    if not path.is_file():
        raise InputError(
            f"{str(folder)!r} holds no simulation",
            hint="give the folder that `tierline sim ... -o FOLDER` wrote",
        )
    try:
        kept = json.loads(read_text(path, what="run"))
        if kept.pop("tierline_run") != SCHEMA:
            raise ValueError
        names = [field.name for field in fields(Replay)]
        values: dict[str, Any] = {name: kept[name] for name in names}
        values |= {name: tuple(values[name]) for name in ("policies", "faults")}
        return Replay(**values), dict(kept["hashes"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{str(path)!r} is not a run that this version wrote",
            hint="run `tierline sim` again, with -o this folder",
        ) from None


# --- one request ----------------------------------------------------------------------------


def explain_request(
    folder: Path, request: str, *, policy: str | None = None, progress: bool = False
) -> Explanation:
    """Run what `folder` holds again, watching one request (its number, or 'slowest')."""
    replay, hashes = read_replay(folder)
    chosen = policy or next(iter(hashes))
    lookup("policy of this run", chosen, hashes)
    if _digest(Path(replay.trace)) != replay.trace_sha256:
        raise InputError(
            f"trace {replay.trace!r} has changed since it was simulated",
            hint="run `tierline sim` again",
        )
    loaded = load(replay)
    known = [int(request)] if request.isdigit() else []
    run = run_policy(loaded, chosen, watch=known, progress=progress)
    watched = _chosen(run, request)
    if not known:
        run = run_policy(loaded, chosen, watch=[watched], progress=progress)
    if run.hash() != hashes[chosen]:
        raise InputError(
            f"the run of {str(folder)!r} has hash {hashes[chosen]}, and now {run.hash()}",
            hint="another version wrote it: run `tierline sim` again",
        )
    return explain(run, watched)


# --- words ----------------------------------------------------------------------------------


def _page(done: Simulation, folder: Path) -> SimPage:
    replay, deployment = done.loaded.replay, done.loaded.deployment
    count, cut = len(done.loaded.requests), deployment.parallel
    each = f"{deployment.gpus_per_instance} × {deployment.gpu}, tp {cut.tp}"
    return SimPage(
        model=deployment.model.name,
        fleet=f"{deployment.replicas} × ({each})" if deployment.replicas > 1 else each,
        trace=f"{Path(replay.trace).name}, {count:,} requests",
        command=command_of(replay, folder),
        inputs=(
            ("trace", f"{replay.trace}, sha256 {replay.trace_sha256[:16]}"),
            ("seed", f"{replay.seed}"),
            ("policies", ", ".join(replay.policies)),
            *((("faults", ", ".join(replay.faults)),) if replay.faults else ()),
            ("made by", f"tierline {version('tierline')}"),
        ),
        deployment=replay.deployment,
        caveats=caveats(done),
        request=done.request,
    )


def command_of(replay: Replay, folder: Path) -> str:
    """The command that makes this simulation from a saved deployment."""
    words = ["tierline", "sim", "deployment.toml", "--trace", replay.trace]
    words += ["--seed", f"{replay.seed}", "--compare", ",".join(replay.policies)]
    words += [word for fault in replay.faults for word in ("--fault", fault)]
    words += ["--format", replay.trace_format] if replay.trace_format else []
    pairs = ",".join(f"{name}={column}" for name, column in replay.mapping.items())
    words += ["--map", pairs] if pairs else []
    return shlex.join([*words, "-o", str(folder)])


def caveats(done: Simulation) -> tuple[str, ...]:
    """What the inputs say against being believed; the page adds what the run says."""
    loaded = done.loaded
    evidence = instance_of(loaded.deployment).cost.evidence
    said = [
        f"Step times are {evidence.kind} ({evidence.source}): eight in ten true ones lie between "
        f"{evidence.low:.2f} and {evidence.high:.2f} of ours.",
        *(f"The trace: {sentence}." for sentence in loaded.said),
    ]
    if not any(request.prefix_blocks for request in loaded.requests):
        said.append("The trace does not say which prompts share a prefix, so none is found cached.")
    if loaded.replay.faults:
        said.append("Faults were put in; without them the numbers would be better.")
    imitated = [name for name in loaded.replay.policies if name in PROFILES]
    said += [f"{name} imitates {PROFILES[name].imitates}." for name in imitated]
    return tuple(said)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TraceError(
            f"cannot read trace {str(path)!r}: {error.strerror}",
            hint="a path is taken from the folder that the command runs in",
        ) from None
