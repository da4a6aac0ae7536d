"""What a run was worth: latencies, promises kept, work done, fairness and money.

`tierline sim`, the planner's replay and the benchmarks call `summary`; the pages take the
columns it takes (`latencies_ps`, `good_requests`), so that a picture and a table never
disagree.  Pure functions of a `Run`.

Percentiles are by nearest rank: the smallest observed value that at least p % of the values
do not exceed.  Nothing is interpolated, and nothing is a float before it is shown.  A latency
is told of the requests that came to it; a promise counts every request that arrived, and to
one that was refused, failed or left unfinished it was not kept.

    INV-SIM-20  every request is counted once: outcomes add up in all, by class and by tenant
    INV-SIM-21  a promise is kept exactly when its percentile over all that arrived (of ITL:
                over all gaps they should have had) is within its limit

The ITL of a request is the longest gap between two of its tokens, its TPOT the mean gap.  A
request of one token has neither and cannot break such a promise.  A *promise* on ITL is about
single gaps, as `workload.slo` defines it and the planner reckons: a run that kept its steps
knows them all (`gaps`), and in one that did not the longest gaps stand for them, which is
stricter.  A *good* request has no gap beyond the limit.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import TYPE_CHECKING

from tierline.base.clock import FOREVER_PS, PS_PER_NS, PS_PER_S
from tierline.kv.transfer import TIER_NAMES
from tierline.sim.columns import Column, column
from tierline.sim.fairness import Fairness, fairness
from tierline.sim.gaps import gaps_of
from tierline.sim.record import FINISHED, Requests, Run

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LATENCIES = ("ttft", "itl", "tpot", "e2e", "queueing")
PERCENTILES = (50, 90, 95, 99)
PS_PER_HOUR = 3600 * PS_PER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How one latency is distributed over the requests that came to it. Seconds."""

    requests: int
    mean_s: float | None = None
    p50_s: float | None = None
    p90_s: float | None = None
    p95_s: float | None = None
    p99_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """How one group of requests fared: all, one class, or one tenant."""

    name: str
    requests: int
    finished: int
    refused: int
    failed: int
    unfinished: int
    input_tokens: int
    output_tokens: int  # of the finished ones
    good: int  # finished within every limit of their class
    good_share: float  # of those that arrived
    goodput_rps: float
    ttft: Spread
    itl: Spread
    tpot: Spread
    e2e: Spread
    queueing: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """One target of one class, and what became of it."""

    level: str
    target: str  # as a person types it: ttft_p99=2s
    limit_s: float
    value_s: float | None  # the percentile over all that arrived; None: never came
    met_share: float  # of the class's requests, or gaps, within the limit
    of: str  # requests, or gaps between two tokens
    kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What the replicas did in all."""

    replicas: int
    gpu_hours: float
    utilization: float  # time in steps over time paid for
    utilization_least: float  # of one replica
    utilization_most: float
    steps: int
    prefill_tokens: int
    decode_tokens: int
    preemptions: int
    hit_share: dict[str, float]  # of the prompt tokens of admitted requests, by tier
    evicted_blocks: dict[str, int]  # by tier
    moved_bytes: dict[str, int]  # by kind of transfer


@dataclass(frozen=True, slots=True, kw_only=True)
class Money:
    """Dollars; None where no replica has a price or nothing came out."""

    usd: float | None
    usd_per_million_output_tokens: float | None
    usd_per_good_request: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run in numbers."""

    policy: str
    seed: int
    hash: str
    duration_s: float
    all: Group
    levels: tuple[Group, ...]
    tenants: tuple[Group, ...]
    promises: tuple[Promise, ...]
    fleet: Fleet
    fairness: Fairness
    money: Money
    fleet_events: int  # times something broke or was mended, or a replica came or went

    def to_json(self) -> str:
        """One JSON object; unknown is null."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)


def summary(run: Run, *, weights: Mapping[str, float] | None = None, mixes: bool = True) -> Summary:
    """The run in numbers; `weights` are the tenants' shares, 1 for each that is not named.

    `mixes` says whether the policy computes prompts in steps with decodes (`Policy.mixes`).
    """
    grouped = Grouped(run)
    everyone = grouped.group("all", grouped.everyone)
    return Summary(
        policy=run.policy,
        seed=run.seed,
        hash=run.hash(),
        duration_s=run.duration_s,
        all=everyone,
        levels=grouped.groups([level.name for level in run.levels], "level"),
        tenants=grouped.groups(run.tenants, "tenant"),
        promises=promises(run, mixes=mixes),
        fleet=fleet(run),
        fairness=fairness(run, weights or {}),
        money=money(run, good=everyone.good, output_tokens=everyone.output_tokens),
        fleet_events=len(run.faults),
    )


# --- per request ----------------------------------------------------------------------------


def latencies_ps(requests: Requests) -> dict[str, Column]:
    """Every latency of every request in picoseconds; -1 where it never came to that.

    TPOT is rounded up, so that it is within a whole limit exactly when the true mean is.
    """
    import numpy as np

    arrival, first = column(requests, "arrival_ps"), column(requests, "first_ps")
    finish, admitted = column(requests, "finish_ps"), column(requests, "admitted_ps")
    gaps = column(requests, "output_tokens") - 1
    streamed = (finish >= 0) & (gaps > 0)
    return {
        "ttft": np.where(first >= 0, first - arrival, -1),
        "itl": np.where(streamed, column(requests, "itl_max_ps"), -1),
        "tpot": np.where(streamed, -((first - finish) // np.maximum(gaps, 1)), -1),
        "e2e": np.where(finish >= 0, finish - arrival, -1),
        "queueing": np.where(admitted >= 0, admitted - arrival, -1),
    }


def promised_ps(requests: Requests) -> dict[str, Column]:
    """The latencies as promises see them: for ever when unfinished, nothing of one token."""
    import numpy as np

    finished = column(requests, "outcome") == FINISHED
    return {
        name: np.where(finished, np.maximum(values, 0), FOREVER_PS)
        for name, values in latencies_ps(requests).items()
    }


def good_requests(run: Run) -> "npt.NDArray[np.bool_]":
    """Which requests finished within every limit of their class."""
    levels, values = column(run.requests, "level"), promised_ps(run.requests)
    good: npt.NDArray[np.bool_] = column(run.requests, "outcome") == FINISHED
    for number, level in enumerate(run.levels):
        mine = levels == number
        for target in level.targets:
            good &= ~mine | (values[target.metric] <= target.limit_ns * PS_PER_NS)
    return good


# --- percentiles, groups and promises -------------------------------------------------------


def nearest_rank(ordered: Column, percent: float) -> int:
    """The smallest of the values, given in order, that `percent` of them do not exceed."""
    rank = ceil(percent * len(ordered) / 100 - 1e-9)
    return int(ordered[max(rank, 1) - 1])


def spread(values_ps: Column) -> Spread:
    """The distribution of the values that are there (not -1)."""
    import numpy as np

    ordered = np.sort(values_ps[values_ps >= 0])
    if not len(ordered):
        return Spread(requests=0)
    p50, p90, p95, p99 = (nearest_rank(ordered, p) / PS_PER_S for p in PERCENTILES)
    mean_s = float(ordered.mean()) / PS_PER_S
    return Spread(requests=len(ordered), mean_s=mean_s, p50_s=p50, p90_s=p90, p95_s=p95, p99_s=p99)


class Grouped:
    """The columns of a run, taken once, and groups cut out of them."""

    def __init__(self, run: Run) -> None:
        import numpy as np

        self._requests, self._duration_s = run.requests, run.duration_s
        self._latencies = latencies_ps(run.requests)
        self._good = good_requests(run)
        self._outcome = column(run.requests, "outcome")
        self._input = column(run.requests, "input_tokens")
        self._output = column(run.requests, "output_tokens")
        self.everyone = np.arange(len(run.requests))

    def group(self, name: str, members: Column) -> Group:
        """The group of the requests with these numbers."""
        import numpy as np

        outcome, good = self._outcome[members], int(self._good[members].sum())
        finished, refused, failed, unfinished = np.bincount(outcome, minlength=4).tolist()
        return Group(
            name=name,
            requests=len(members),
            finished=finished,
            refused=refused,
            failed=failed,
            unfinished=unfinished,
            input_tokens=int(self._input[members].sum()),
            output_tokens=int(self._output[members][outcome == FINISHED].sum()),
            good=good,
            good_share=good / max(len(members), 1),
            goodput_rps=good / self._duration_s if self._duration_s else 0.0,
            ttft=spread(self._latencies["ttft"][members]),
            itl=spread(self._latencies["itl"][members]),
            tpot=spread(self._latencies["tpot"][members]),
            e2e=spread(self._latencies["e2e"][members]),
            queueing=spread(self._latencies["queueing"][members]),
        )

    def groups(self, names: Sequence[str], column_name: str) -> tuple[Group, ...]:
        """A group for each name; `column_name` holds indexes into the names."""
        import numpy as np

        labels = column(self._requests, column_name)
        order = np.argsort(labels, kind="stable")
        edges = np.searchsorted(labels[order], np.arange(len(names) + 1))
        return tuple(
            self.group(name, order[edges[i] : edges[i + 1]]) for i, name in enumerate(names)
        )


def promises(run: Run, *, mixes: bool = True) -> tuple[Promise, ...]:
    """Every target of every class that anybody asked for, and whether it was kept."""
    import numpy as np

    levels, values = column(run.requests, "level"), promised_ps(run.requests)
    made = []
    for number, level in enumerate(run.levels):
        mine = levels == number
        for target in level.targets if mine.any() else ():
            limit_ps = target.limit_ns * PS_PER_NS
            gaps = target.metric == "itl" and run.steps is not None
            if gaps:
                value_ps, met = _of_gaps(run, mine, target.percentile, limit_ps, mixes=mixes)
            else:
                ordered = np.sort(values[target.metric][mine])
                value_ps = nearest_rank(ordered, target.percentile)
                met = float((ordered <= limit_ps).mean())
            made.append(
                Promise(
                    level=level.name,
                    target=target.text,
                    limit_s=target.limit_s,
                    value_s=value_ps / PS_PER_S if value_ps < FOREVER_PS else None,
                    met_share=met,
                    of="gaps" if gaps else "requests",
                    kept=value_ps <= limit_ps,
                )
            )
    return tuple(made)


def _of_gaps(
    run: Run, mine: "npt.NDArray[np.bool_]", percent: float, limit_ps: int, *, mixes: bool
) -> tuple[int, float]:
    """The percentile over all gaps of some requests, and the share of them within the limit.

    Tokens of a request that never finished never come: its gaps have no end.
    """
    gaps = gaps_of(run, mine, mixes=mixes)
    lost = mine & (column(run.requests, "outcome") != FINISHED)
    endless = int((column(run.requests, "output_tokens")[lost] - 1).sum())
    total = gaps.total + endless
    if not total:
        return 0, 1.0
    met = gaps.within_share(limit_ps) * gaps.total / total
    rank = ceil(percent * total / 100 - 1e-6)
    if rank > gaps.total:
        return FOREVER_PS, met
    return gaps.percentile_ps(100 * rank / gaps.total), met


# --- fleet, fairness, money -----------------------------------------------------------------


def fleet(run: Run) -> Fleet:
    """The replicas added up."""
    totals = run.replicas
    busy = [r.busy_ps / r.up_ps for r in totals if r.up_ps]
    moved: dict[str, int] = {}
    for replica in totals:
        for kind, count in replica.moved_bytes.items():
            moved[kind] = moved.get(kind, 0) + count
    return Fleet(
        replicas=len(totals),
        gpu_hours=sum(r.gpus * r.up_ps for r in totals) / PS_PER_HOUR,
        utilization=sum(r.busy_ps for r in totals) / max(sum(r.up_ps for r in totals), 1),
        utilization_least=min(busy, default=0.0),
        utilization_most=max(busy, default=0.0),
        steps=sum(r.steps for r in totals),
        prefill_tokens=sum(r.prefill_tokens for r in totals),
        decode_tokens=sum(r.decode_tokens for r in totals),
        preemptions=sum(r.preemptions for r in totals),
        hit_share=hit_share(run),
        evicted_blocks={
            name: sum(r.evicted_blocks[tier] for r in totals)
            for tier, name in enumerate(TIER_NAMES)
        },
        moved_bytes=dict(sorted(moved.items())),
    )


def hit_share(run: Run) -> dict[str, float]:
    """Prompt tokens that were found cached, by the tier they were in, over all of them.

    What came from below the device is split as the loads were: requests that wait for one
    load share it, so tokens are counted by request and tiers by transfer.
    """
    requests = run.requests
    prompt = int(column(requests, "input_tokens")[column(requests, "admitted_ps") >= 0].sum())
    loaded = int(column(requests, "loaded_tokens").sum())
    device = int(column(requests, "cached_tokens").sum()) - loaded
    carried = [sum(r.loaded_tokens[tier] for r in run.replicas) for tier in range(len(TIER_NAMES))]
    below = [loaded * tokens / max(sum(carried), 1) for tokens in carried[1:]]
    return {
        name: tokens / max(prompt, 1)
        for name, tokens in zip(TIER_NAMES, [device, *below], strict=True)
    }


def money(run: Run, *, good: int, output_tokens: int) -> Money:
    """What the time paid for cost; a fleet with an unpriced replica has no cost."""
    if not run.replicas or any(r.usd_per_hour <= 0 for r in run.replicas):
        return Money(usd=None, usd_per_million_output_tokens=None, usd_per_good_request=None)
    usd = sum(r.usd_per_hour * r.up_ps for r in run.replicas) / PS_PER_HOUR
    return Money(
        usd=usd,
        usd_per_million_output_tokens=usd / output_tokens * 1e6 if output_tokens else None,
        usd_per_good_request=usd / good if good else None,
    )
