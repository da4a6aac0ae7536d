"""Replaying a candidate: its fleet in the simulator, at the slow edge, judged by every class.

The instance is the one that `tierline sim` builds from the plan's deployment file, so that the
two never disagree; the planner adds what the engine spends outside steps, and slows the steps
down to the pessimistic edge.

    INV-PLAN-4  a replay is given up only when a promise is broken whatever comes
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tierline.base.clock import PS_PER_NS, PS_PER_S
from tierline.kv.transfer import DRAM, NVME
from tierline.perf.step import TOKENS_MAX
from tierline.planner.finding import Candidate, LowerTier, Outcome, Replay
from tierline.planner.traffic import BLOCK_TOKENS_KV, SEED, Stretch
from tierline.scheduling.scheduler import Limits
from tierline.scheduling.sequence import Sequence as Served
from tierline.sim.api import simulate
from tierline.sim.columns import column
from tierline.sim.fleet import Fleet
from tierline.sim.instance import Instance, build_instance, imitating
from tierline.sim.measure import latencies_ps, nearest_rank, promises
from tierline.sim.record import Run
from tierline.sim.replica import Replica
from tierline.workload.slo import ServiceLevel

HITS_MIN = 0.01  # of prompt tokens; fewer are not worth routing for
OURS, PLAIN = "tierline", "fcfs"  # the policies that are compared
CHECKS = 100  # how often a replay is asked whether it is hopeless
DRAIN_FACTOR = 3  # a fleet that keeps its promises never serves this many times the mean rate


class _HopelessError(Exception):
    """A promise is broken, whatever comes; says which."""


def sim_instance(
    candidate: Candidate, lower_tiers: Sequence[LowerTier], *, slowdown: float
) -> Instance:
    """The candidate as the simulator knows it, over these tiers, every step slowed down."""
    planned = candidate.instance
    batch = max(planned.chunk_tokens, planned.sequences_max)
    built = build_instance(
        planned.cost.scaled(slowdown),
        name=f"{candidate.gpu.name} x{candidate.layout.gpus}",
        block_tokens=BLOCK_TOKENS_KV,
        device_bytes=round(candidate.memory.kv_bytes * candidate.layout.gpus),
        tier_bytes={
            {"dram": DRAM, "nvme": NVME}[tier.name]: tier.bytes_per_instance for tier in lower_tiers
        },
        limits=Limits(
            batch_tokens=min(batch, TOKENS_MAX // 2),
            sequences_max=planned.sequences_max,
            chunk_tokens=planned.chunk_tokens,
        ),
    )
    built = replace(built, prefix_cache=built.layout.shares_prefixes)
    return imitating(built, planned.engine.name)


def replay(
    candidate: Candidate,
    stretch: Stretch,
    *,
    instances: int,
    replicas: int,
    levels: tuple[ServiceLevel, ...],
    policy: str,
    lower_tiers: tuple[LowerTier, ...],
    slowdown: float,
    block_tokens: int,
) -> Replay:
    """What becomes of the promises when `replicas`, a slice of `instances`, get the stretch."""
    instance = sim_instance(candidate, lower_tiers, slowdown=slowdown)
    whole: dict[str, Any] = {
        "instances": instances,
        "policy": policy,
        "lower_tiers": lower_tiers,
        "stretch": stretch.what,
        "requests": len(stretch.requests),
        "slowdown": slowdown,
    }
    try:
        run = simulate(
            instance,
            stretch.requests,
            levels=levels,
            replicas=replicas,
            policy=policy,
            routing=routing_of(candidate),
            trace_block_tokens=block_tokens,
            seed=SEED,
            keep_steps=True,
            prepare=_gives_up(stretch, levels),
        )
    except _HopelessError as lost:
        return Replay(kept=False, outcomes=(), gave_up=str(lost), **whole)
    return _told(run, whole)


def routing_of(candidate: Candidate) -> str:
    """Where requests go: to their prefix, when that is worth anything."""
    return "prefix-aware" if candidate.hit_rate > HITS_MIN else "least-outstanding"


def _gives_up(stretch: Stretch, levels: Sequence[ServiceLevel]) -> Callable[[Fleet], None]:
    """Stops a replay that is lost: overload costs most time and tells least.

    Lost is when more requests of a class came to their first token late than its promise
    allows.  Or when more wait than a fleet could serve within the longest limit, even at
    several times the rate of arrivals, beside all that may be late.
    """
    requests = stretch.requests
    span_ns = max(requests[-1].arrival_ns - requests[0].arrival_ns, 1)
    limits = [level.limit_s("ttft") or level.limit_s("e2e") or math.inf for level in levels]
    shares = [1 - t.percentile / 100 for level in levels for t in level.targets]
    served = DRAIN_FACTOR * max(limits) * 1e9 * len(requests) / span_ns
    waiting_max = max(shares) * len(requests) + served

    def prepare(fleet: Fleet) -> None:
        late = _Late(fleet, levels)
        fleet.on_end = late.finished

        def check(now_ps: int) -> None:
            late.overdue(now_ps)
            if sum(r.scheduler.queue.waiting for r in fleet.replicas) > waiting_max:
                raise _HopelessError("requests pile up faster than they are served")

        for i in range(1, CHECKS + 1):
            fleet.later(i * span_ns * PS_PER_NS // CHECKS, check)

    return prepare


class _Late:
    """First tokens after their limit, by promise, until one promise is broken for good."""

    def __init__(self, fleet: Fleet, levels: Sequence[ServiceLevel]) -> None:
        self._fleet, self._of = fleet, fleet.requests.level
        self._watched: dict[int, list[_Watched]] = {}
        for number, level in enumerate(sorted(levels, key=lambda level: -level.priority)):
            members = self._of.count(number)
            for target in level.targets:
                if target.metric == "ttft" and members:
                    kept = max(math.ceil(target.percentile * members / 100 - 1e-9), 1)
                    said = f"{target.text} for {level.name} is missed by more than "
                    watched = _Watched(
                        limit_ps=target.limit_ns * PS_PER_NS,
                        may=members - kept,
                        said=f"{said}{members - kept:,} requests",
                    )
                    self._watched.setdefault(number, []).append(watched)

    def finished(self, replica: Replica, sequence: Served, _now_ps: int) -> None:
        """A request has its last token."""
        ttft_ps = sequence.first_ps + replica.host_ps - sequence.arrival_ps
        for watched in self._watched.get(self._of[sequence.id], ()):
            if ttft_ps > watched.limit_ps:
                watched.late += 1
                if watched.late > watched.may:
                    raise _HopelessError(watched.said)

    def overdue(self, now_ps: int) -> None:
        """Those who are still here count, too, once they are late."""
        everybody = [w for watched in self._watched.values() for w in watched]
        for watched in everybody:
            watched.overdue = 0
        for replica in self._fleet.replicas:
            for s in replica.sequences.values():
                told_ps = s.first_ps if s.generated_tokens else now_ps
                for watched in self._watched.get(self._of[s.id], ()):
                    watched.overdue += told_ps - s.arrival_ps > watched.limit_ps
        for watched in everybody:
            if watched.late + watched.overdue > watched.may:
                raise _HopelessError(watched.said)


@dataclass(slots=True, kw_only=True)
class _Watched:
    """A limit on first tokens of a class."""

    limit_ps: int
    may: int  # be late
    said: str  # when more are
    late: int = 0  # among the finished
    overdue: int = 0  # among those who are still here


# --- judging --------------------------------------------------------------------------------


def _told(run: Run, whole: dict[str, Any]) -> Replay:
    import numpy as np

    requests = run.requests
    ttft = np.sort(latencies_ps(requests)["ttft"])
    ttft = ttft[ttft >= 0]
    points = [nearest_rank(ttft, p) / PS_PER_S for p in range(101)] if len(ttft) else []
    prompts = max(int(column(requests, "input_tokens").sum()), 1)
    outcomes = tuple(
        Outcome(
            level=p.level, target=p.target, value_s=p.value_s, met_share=p.met_share, kept=p.kept
        )
        for p in promises(run)
    )
    totals = run.replicas
    return Replay(
        kept=all(o.kept for o in outcomes),
        outcomes=outcomes,
        ttft_s=tuple(points),
        hit_share=int(column(requests, "cached_tokens").sum()) / prompts,
        loaded_share=int(column(requests, "loaded_tokens").sum()) / prompts,
        utilization=sum(r.busy_ps for r in totals) / max(sum(r.up_ps for r in totals), 1),
        preemptions=sum(r.preemptions for r in totals),
        **whole,
    )
