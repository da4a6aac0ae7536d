"""Simulating in one call: a deployment or an instance, requests, a policy, a seed.

`simulate` is what the command line, the planner and the accuracy checks call.  Everything
it does is a function of its arguments.
"""

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any

from tierline.base.clock import FOREVER_PS, PS_PER_NS, PS_PER_S
from tierline.base.errors import InputError
from tierline.base.names import lookup
from tierline.catalog.deployment import Disaggregation
from tierline.kv.chain import GroupedChain, TraceChain
from tierline.scheduling.policy import Policy
from tierline.scheduling.profiles import POLICIES
from tierline.scheduling.routing import ROUTERS
from tierline.scheduling.scaling import Scaling
from tierline.scheduling.sequence import Sequence
from tierline.sim.audit import run_checked
from tierline.sim.faults import Fault, inject, with_bursts
from tierline.sim.fleet import Fleet, Route
from tierline.sim.instance import Instance
from tierline.sim.pools import Pools
from tierline.sim.record import FAILED, Requests, Run, Steps
from tierline.sim.replica import Replica
from tierline.sim.scaler import Scaler
from tierline.sim.watch import Watch
from tierline.workload.request import Request
from tierline.workload.slo import ServiceLevel


def simulate(
    instances: Instance | Seq[Instance],
    requests: Seq[Request],
    *,
    levels: Seq[ServiceLevel],
    replicas: int = 1,
    policy: Policy | str = "tierline",
    routing: str = "prefix-aware",
    trace_block_tokens: int = 512,
    seed: int = 0,
    tenant_weights: Mapping[str, int] | None = None,
    keep_steps: bool = False,
    watch: Iterable[int] = (),
    repeats_max: int = FOREVER_PS,
    progress: Callable[[int], None] | None = None,
    faults: Iterable[Fault] = (),
    disaggregation: Disaggregation | None = None,
    scaling: Scaling | Mapping[str, Scaling] | None = None,
    check: bool = False,
    prepare: Callable[[Fleet], None] | None = None,
) -> Run:
    """Replay `requests` (in order of arrival) on a fleet.

    `instances` is one kind for all `replicas`, or one entry a replica; requests go among the
    replicas of their model.  With `disaggregation` the first replicas compute prompts and
    the others decode.  `scaling` (for every model, or by name) keeps the number of replicas,
    in each pool.  `faults` strike on the way; with `check` every invariant is asserted after
    every instant.  `prepare` may add what nobody else needs before the run starts.
    """
    kinds = list(instances) if not isinstance(instances, Instance) else [instances] * replicas
    if not requests:
        raise InputError("the trace has no requests", hint="nothing arrives, nothing to simulate")
    wrong = tuple(faults)
    requests = with_bursts(requests, wrong, seed=seed)
    chosen = lookup("policy", policy, POLICIES) if isinstance(policy, str) else policy
    requested = _Requested(
        requests,
        levels=tuple(levels) or (ServiceLevel(targets=()),),
        block_tokens=kinds[0].layout.block_tokens,
        trace_block_tokens=trace_block_tokens,
        prefix_cache=all(kind.prefix_cache for kind in kinds),
    )
    models = _models(kinds, requests, requested.columns)
    weights = tenant_weights
    if weights is None and len(requested.tenants) > 1:
        weights = {}
    lines = {id(kind): kind.line() for kind in kinds}
    members = [
        kind.replica(n, chosen, seed=seed, tenant_weights=weights, line=lines[id(kind)])
        for n, kind in enumerate(kinds)
    ]
    for replica, kind in zip(members, kinds, strict=True):
        replica.model = models.index(kind.cost.model.name)
    for replica in members[disaggregation.prefill_instances :] if disaggregation else ():
        replica.decodes_only = True
    fleet = Fleet(
        members,
        arrivals=iter(requested),
        outputs=requested.columns.output_tokens[:],
        requests=requested.columns,
        steps=Steps() if keep_steps else None,
        watch=Watch(watched) if (watched := list(watch)) else None,
        seed=seed,
        repeats_max=repeats_max,
    )
    fleet.route = _route(fleet, routing, seed=seed, block_tokens=kinds[0].layout.block_tokens)
    fleet.progress = progress
    decoders = [replica for replica in members if replica.decodes_only]
    if decoders:
        fleet.pools = Pools(decoders, layers=kinds[0].cost.model.layers)
    struck = inject(fleet, wrong)
    scalers = _scalers(fleet, scaling, decoders, models)
    if prepare is not None:
        prepare(fleet)
    with _uncollected():
        end_ps = run_checked(fleet) if check else fleet.run()
    run = _finish(fleet, requested, end_ps=end_ps, policy=chosen.name, seed=seed)
    run.models = models
    told = [*struck, *(moment for scaler in scalers for moment in scaler.moments)]
    run.faults = sorted(told, key=lambda moment: moment.at_ps)
    return run


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the cycle collector: a run makes no cycles, and walking what lives costs a tenth."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _models(kinds: Seq[Instance], requests: Seq[Request], columns: Requests) -> tuple[str, ...]:
    """Names of the models that the fleet serves; which one each request wants goes in a column.

    Raises `InputError` for a request that nobody serves.
    """
    models = tuple(dict.fromkeys(kind.cost.model.name for kind in kinds))
    numbers = {name: number for number, name in enumerate(models)}
    for i, request in enumerate(requests):
        if request.model:
            columns.model[i] = lookup("model of a request", request.model, numbers)
        elif len(models) > 1:
            raise InputError(
                f"request {i} names no model, and the fleet serves {len(models)}",
                hint=f"name one of {', '.join(models)} in the trace",
            )
    return models


def _route(fleet: Fleet, routing: str, *, seed: int, block_tokens: int) -> Route:
    """Requests go among the replicas of their model; groups grow while the fleet runs."""
    router = lookup("routing", routing, ROUTERS)
    routes = {
        model: router(group, seed=seed, block_tokens=block_tokens)
        for model, group in fleet.groups.items()
    }
    if len(routes) == 1:
        return next(iter(routes.values()))
    models = fleet.requests.model
    return lambda sequence, now_ps: routes[models[sequence.id]](sequence, now_ps)


def _scalers(
    fleet: Fleet,
    scaling: Scaling | Mapping[str, Scaling] | None,
    decoders: list[Replica],
    models: Seq[str],
) -> list[Scaler]:
    """One for each group of replicas that is to be scaled, started."""
    if scaling is None:
        return []
    groups = [*fleet.groups.values(), *([decoders] if decoders else [])]
    scalers = []
    for group in groups:
        name = models[group[0].model]
        wanted = scaling.get(name) if isinstance(scaling, Mapping) else scaling
        if wanted is not None:
            scalers.append(Scaler(fleet, group, wanted))
    for scaler in scalers:
        scaler.start()
    return scalers


def _finish(
    fleet: Fleet,
    requested: "_Requested",
    *,
    end_ps: int,
    policy: str,
    seed: int,
) -> Run:
    for replica in fleet.replicas:
        replica.settle(end_ps)
    for sequence in fleet.homeless:  # nobody came to serve it
        requested.columns.outcome[sequence.id] = FAILED
    return Run(
        requests=requested.columns,
        levels=requested.levels,
        tenants=requested.tenants,
        replicas=[replica.totals for replica in fleet.replicas],
        steps=fleet.steps,
        moments=fleet.watch.moments if fleet.watch is not None else {},
        end_ps=end_ps,
        policy=policy,
        seed=seed,
    )


class _Requested:
    """Requests as sequences, made when they arrive so that few live at once."""

    def __init__(
        self,
        requests: Seq[Request],
        *,
        levels: tuple[ServiceLevel, ...],
        block_tokens: int,
        trace_block_tokens: int,
        prefix_cache: bool,
    ) -> None:
        self.levels = tuple(sorted(levels, key=lambda level: -level.priority))
        self._requests = requests
        self._start_ns = requests[0].arrival_ns
        self._trace_block_tokens = trace_block_tokens
        self._chain = _chains(block_tokens, trace_block_tokens) if prefix_cache else None
        self._ttft_ps = [_limit_ps(level, "ttft") for level in self.levels]
        self._itl_ps = [_limit_ps(level, "itl") for level in self.levels]
        self._tpot_ps = [_limit_ps(level, "tpot") for level in self.levels]
        self.tenants = tuple(sorted({r.tenant for r in requests}))
        adapters = sorted({r.adapter for r in requests} - {""})
        self._adapters = {name: i for i, name in enumerate(["", *adapters])}
        self.columns = self._columns()

    def _columns(self) -> Requests:
        columns = Requests(len(self._requests))
        tenant_of = {name: i for i, name in enumerate(self.tenants)}
        ranks = [-level.priority for level in self.levels]
        last = len(ranks) - 1
        for i, r in enumerate(self._requests):
            level = min(bisect_left(ranks, -r.priority), last)
            columns.arrival_ps[i] = (r.arrival_ns - self._start_ns) * PS_PER_NS
            columns.input_tokens[i] = max(r.input_tokens, 1)
            columns.output_tokens[i] = max(r.output_tokens, 1)
            columns.level[i] = level
            columns.tenant[i] = tenant_of[r.tenant]
            due_ps = self._due_ps(r, level, columns.arrival_ps[i])
            columns.due_ps[i] = due_ps if due_ps < FOREVER_PS else -1
            itl_ps = min(self._itl_ps[level], self._tpot_ps[level])
            columns.itl_target_ps[i] = itl_ps if itl_ps < FOREVER_PS else -1
        return columns

    def _due_ps(self, r: Request, level: int, arrival_ps: int) -> int:
        if r.deadline_ns is not None:
            return (r.deadline_ns - self._start_ns) * PS_PER_NS
        limit = self._ttft_ps[level]
        return arrival_ps + limit if limit < FOREVER_PS else FOREVER_PS

    def __iter__(self) -> Iterator[Sequence]:
        columns, itl_ps, tenants = self.columns, self._itl_ps, self.tenants
        for i, r in enumerate(self._requests):
            level = columns.level[i]
            due_ps = columns.due_ps[i]
            chain: Any = None
            if self._chain is not None and r.prefix_blocks:
                chain = self._chain(self._whole(i, r), self._salt(i, r))
            yield Sequence(
                i,
                arrival_ps=columns.arrival_ps[i],
                prompt_tokens=columns.input_tokens[i],
                output_max_tokens=columns.output_tokens[i],
                rank=level,
                due_ps=due_ps if due_ps >= 0 else FOREVER_PS,
                itl_ps=itl_ps[level],
                tpot_ps=self._tpot_ps[level],
                tenant=tenants[columns.tenant[i]],
                adapter=r.adapter,
                chain=chain,
            )

    def _salt(self, i: int, r: Request) -> int:
        """Tenants do not see each other's cache, and adapters compute another one."""
        return int(self.columns.tenant[i]) + len(self.tenants) * self._adapters[r.adapter]

    def _whole(self, i: int, r: Request) -> Seq[int]:
        """Ids for the whole prompt: a trace may name its full blocks only, or its shared ones.

        What it does not name is nobody else's: negative ids, which no trace has.
        """
        missing = -(-r.input_tokens // self._trace_block_tokens) - len(r.prefix_blocks)
        if missing <= 0:
            return r.prefix_blocks
        first = -(i + 1) << 24
        return (*r.prefix_blocks, *range(first, first + missing))


def _limit_ps(level: ServiceLevel, metric: str) -> int:
    limit_s = level.limit_s(metric)
    return FOREVER_PS if limit_s is None else round(limit_s * PS_PER_S)


def _chains(block_tokens: int, trace_block_tokens: int) -> Callable[[Seq[int], int], Any]:
    """How a trace's blocks become names of KV blocks, by tenant.

    Raises `InputError` where one is not a power of two times the other.
    """
    larger, smaller = max(block_tokens, trace_block_tokens), min(block_tokens, trace_block_tokens)
    parts, rest = divmod(larger, smaller)
    if rest or parts & (parts - 1):
        raise InputError(
            f"KV blocks of {block_tokens} tokens do not divide the trace's of {trace_block_tokens}",
            hint="choose a KV block size that is a power of two times the trace's, or a part of it",
        )
    if block_tokens > trace_block_tokens:
        return lambda ids, tenant: GroupedChain(ids, group=parts, salt_number=tenant)
    if parts == 1:
        return lambda ids, tenant: ids if not tenant else TraceChain(ids, salt_number=tenant)
    return lambda ids, tenant: TraceChain(ids, parts=parts, salt_number=tenant)
