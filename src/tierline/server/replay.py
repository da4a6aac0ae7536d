"""Recorded traffic as requests that a simulation can serve again.

`traffic_of` turns lives into requests: the same arrivals, lengths, classes and shared prefixes.
`replay` serves them on an instance of this machine or of another one.  What really happened is put
into the same columns (`Traffic.measured`), so that measured and simulated figures are made by the
same code (`side_of`) and never disagree about what a percentile is.

A request that was cancelled is replayed for as many tokens as it got.  Who was refused, ended
before a first token, or is not finished, leaves no work that could be replayed: it is counted in
`left_out`.  Several answers to one prompt are as many requests that arrive together.  Tenants are
not told apart, as the engine does not; their caches are, by the names of their blocks.

Invariants
    INV-SRV-62  a replay without a change is the simulator's run of the same requests
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tierline.base.clock import PS_PER_NS, PS_PER_S
from tierline.base.errors import InputError
from tierline.scheduling.profiles import POLICIES
from tierline.server.life import Life
from tierline.sim.api import simulate
from tierline.sim.columns import column
from tierline.sim.gaps import gaps_of
from tierline.sim.instance import Instance
from tierline.sim.measure import Grouped, Spread, hit_share, latencies_ps, nearest_rank
from tierline.sim.record import FINISHED, ReplicaTotals, Requests, Run
from tierline.workload.request import Request
from tierline.workload.slo import ServiceLevel

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

REQUESTS_MAX = 5_000  # replayed at most, the latest ones
CURVE_POINTS = 60
Curve = tuple[tuple[float, float], ...]  # (seconds, share of requests or gaps within them)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What arrived, ready to arrive again."""

    requests: tuple[Request, ...]  # in order of arrival
    levels: tuple[ServiceLevel, ...]  # each with a priority of its own, the most urgent first
    block_tokens: int
    measured: Run  # what really happened, an entry for each life that is replayed
    left_out: tuple[str, ...]  # what was not, and why, in words

    @property
    def span_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return (self.requests[-1].arrival_ns - self.requests[0].arrival_ns) / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Fared:
    """How one class fared, or all together; a spread of nothing has no percentiles."""

    name: str
    requests: int
    finished: int
    good_share: float  # within every limit of their class, of those that arrived
    goodput_rps: float
    ttft: Spread
    itl: Spread  # of single gaps; what was recorded of a life has none
    gap_longest: Spread  # of each request
    tpot: Spread
    e2e: Spread
    queueing: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One run in numbers: everybody, and class by class."""

    all: Fared
    levels: tuple[Fared, ...]
    duration_s: float
    hit_share: float  # of prompt tokens, found cached on the device
    hit_below: float  # found cached in a tier below it
    preemptions: int
    utilization: float | None  # share of the time in steps; None: not recorded
    curves: dict[str, Curve]  # by latency: ttft, itl, e2e


# --- from lives to requests -----------------------------------------------------------------


def traffic_of(
    lives: Sequence[Life],
    levels: Sequence[ServiceLevel],
    *,
    block_tokens: int,
    requests_max: int = REQUESTS_MAX,
) -> Traffic:
    """What `lives` ask of an engine; the latest `requests_max` of them.

    Raises `InputError` when nothing can be replayed.
    """
    done = sorted((life for life in lives if _replayable(life)), key=lambda x: x.arrival_ps)
    used = done[-requests_max:]
    if not used:
        raise InputError(
            "no recorded request can be replayed",
            hint="send some requests first; one counts when it has ended and got a token",
        )
    distinct = _distinct(levels)
    priorities = {level.name: level.priority for level in distinct}
    limits = {level.name: level.limit_s("ttft") for level in distinct}
    requests = [
        request
        for life in used
        for request in _requests(life, priorities.get(life.level, 0), limits.get(life.level))
    ]
    return Traffic(
        requests=tuple(requests),
        levels=distinct,
        block_tokens=block_tokens,
        measured=_measured(used, distinct),
        left_out=_left_out(lives, skipped=len(done) - len(used)),
    )


def _replayable(life: Life) -> bool:
    return bool(life.outcome) and life.first_ps is not None and life.output_tokens > 0


def _left_out(lives: Sequence[Life], *, skipped: int) -> tuple[str, ...]:
    counts = Counter(_why_not(life) for life in lives if not _replayable(life))
    said = [f"{count:,} {outcome}" for outcome, count in sorted(counts.items())]
    return (*said, *([f"{skipped:,} older ones"] if skipped else []))


def _why_not(life: Life) -> str:
    if life.outcome in ("stop", "length", "tool_calls"):
        return "without a token"  # such as an embedding
    return life.outcome or "under way"


def _distinct(levels: Sequence[ServiceLevel]) -> tuple[ServiceLevel, ...]:
    """The classes in their order, each with its own priority: a simulation tells them by it."""
    ordered = sorted(levels, key=lambda level: -level.priority)
    return tuple(replace(level, priority=-rank) for rank, level in enumerate(ordered))


def _requests(life: Life, priority: int, limit_s: float | None) -> list[Request]:
    """One for each answer; what was promised to it alone is its deadline."""
    arrival_ns = life.arrival_ps // PS_PER_NS
    own_s = life.ttft_limit_s
    own = own_s is not None and own_s != limit_s
    each, rest = divmod(life.output_tokens, life.answers)
    return [
        Request(
            arrival_ns=arrival_ns,
            input_tokens=life.prompt_tokens,
            output_tokens=max(each + (answer < rest), 1),
            prefix_blocks=tuple(life.chain),
            priority=priority,
            deadline_ns=arrival_ns + round(own_s * 1e9) if own and own_s is not None else None,
        )
        for answer in range(life.answers)
    ]


def _measured(lives: Sequence[Life], levels: tuple[ServiceLevel, ...]) -> Run:
    """What really happened, in the columns of a run."""
    start_ps = lives[0].arrival_ps
    numbers = {level.name: number for number, level in enumerate(levels)}
    columns = Requests(len(lives))
    for i, life in enumerate(lives):
        assert life.first_ps is not None
        last_ps = life.last_ps if life.last_ps is not None else life.first_ps
        admitted_ps = life.admitted_ps if life.admitted_ps is not None else life.first_ps
        columns.arrival_ps[i] = life.arrival_ps - start_ps
        columns.admitted_ps[i] = admitted_ps - start_ps
        columns.first_ps[i] = life.first_ps - start_ps
        columns.finish_ps[i] = last_ps - start_ps
        columns.itl_max_ps[i] = life.gap_longest_ps
        columns.input_tokens[i] = life.prompt_tokens
        columns.output_tokens[i] = max(life.output_tokens // life.answers, 1)
        columns.cached_tokens[i] = life.cached_tokens
        columns.preemptions[i] = life.preemptions
        columns.level[i] = numbers.get(life.level, len(numbers) - 1)
        columns.outcome[i] = FINISHED
    return Run(
        requests=columns,
        levels=levels,
        replicas=[ReplicaTotals(number=0, preemptions=sum(x.preemptions for x in lives))],
        end_ps=max(columns.finish_ps),
    )


def at_load(requests: Sequence[Request], load: float) -> tuple[Request, ...]:
    """The same requests `load` times as densely; deadlines move with their arrivals."""
    start_ns = requests[0].arrival_ns

    def moved(request: Request) -> Request:
        arrival_ns = start_ns + round((request.arrival_ns - start_ns) / load)
        by_ns = arrival_ns - request.arrival_ns
        due_ns = request.deadline_ns
        return replace(
            request,
            arrival_ns=arrival_ns,
            deadline_ns=None if due_ns is None else due_ns + by_ns,
        )

    return tuple(requests) if load == 1 else tuple(moved(request) for request in requests)


# --- runs -----------------------------------------------------------------------------------


def replay(
    traffic: Traffic, instance: Instance, *, policy: str, load: float = 1.0, seed: int = 0
) -> Run:
    """The traffic served by a simulated instance, with its steps (INV-SRV-62)."""
    return simulate(
        instance,
        at_load(traffic.requests, load),
        levels=traffic.levels,
        policy=policy,
        trace_block_tokens=traffic.block_tokens,
        seed=seed,
        keep_steps=True,
    )


# --- figures --------------------------------------------------------------------------------


def side_of(run: Run) -> Side:
    """A run in numbers, measured or simulated."""
    import numpy as np

    levels = column(run.requests, "level")
    everyone = np.ones(len(run.requests), dtype=bool)
    totals = run.replicas[0]
    hits = hit_share(run)
    device = hits.pop("device")
    return Side(
        all=_fared(run, "all", everyone),
        levels=tuple(
            _fared(run, level.name, levels == number)
            for number, level in enumerate(run.levels)
            if (levels == number).any()
        ),
        duration_s=run.duration_s,
        hit_share=device,
        hit_below=sum(hits.values()),
        preemptions=totals.preemptions,
        utilization=totals.busy_ps / totals.up_ps if totals.up_ps else None,
        curves=_curves(run, everyone),
    )


def _fared(run: Run, name: str, members: "npt.NDArray[np.bool_]") -> Fared:
    import numpy as np

    group = Grouped(run).group(name, np.nonzero(members)[0])
    return Fared(
        name=name,
        requests=group.requests,
        finished=group.finished,
        good_share=group.good_share,
        goodput_rps=group.goodput_rps,
        ttft=group.ttft,
        itl=_gap_spread(run, members),
        gap_longest=group.itl,
        tpot=group.tpot,
        e2e=group.e2e,
        queueing=group.queueing,
    )


def _gaps(run: Run, members: "npt.NDArray[np.bool_]") -> Any:
    return gaps_of(run, members, mixes=POLICIES[run.policy].mixes)


def _gap_spread(run: Run, members: "npt.NDArray[np.bool_]") -> Spread:
    """All gaps between two tokens of some requests, where the run kept its steps."""
    if run.steps is None:
        return Spread(requests=0)
    gaps = _gaps(run, members)
    if not gaps.total:
        return Spread(requests=0)
    p50, p90, p95, p99 = (gaps.percentile_ps(p) / PS_PER_S for p in (50, 90, 95, 99))
    mean_s = float((gaps.gap_ps * gaps.counts).sum()) / gaps.total / PS_PER_S
    return Spread(requests=gaps.total, mean_s=mean_s, p50_s=p50, p90_s=p90, p95_s=p95, p99_s=p99)


def _curves(run: Run, everyone: "npt.NDArray[np.bool_]") -> dict[str, Curve]:
    """Distributions, as points for a picture."""
    import numpy as np

    shares = [i / CURVE_POINTS for i in range(1, CURVE_POINTS + 1)]
    curves: dict[str, Curve] = {}
    values = latencies_ps(run.requests)
    for name in ("ttft", "e2e"):
        ordered = np.sort(values[name][values[name] >= 0])
        if len(ordered):
            curves[name] = tuple((nearest_rank(ordered, 100 * s) / PS_PER_S, s) for s in shares)
    if run.steps is not None and (gaps := _gaps(run, everyone)).total:
        curves["itl"] = tuple((gaps.percentile_ps(100 * s) / PS_PER_S, s) for s in shares)
    return curves
