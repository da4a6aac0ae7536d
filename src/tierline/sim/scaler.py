"""An autoscaler in the loop: it looks, and replicas start, drain and leave.

`simulate(scaling=...)` makes one for each group of replicas that replace each other: those of
one model, or one pool of it.  How many there should be is decided by `scheduling.scaling`;
here is what a number means.  A replica that starts is paid for at once and serves after the
cold start.  One that is to go takes no more requests, and leaves when the last is answered,
or at a bound, when what is left is routed anew.  While nobody serves, requests wait in
`Fleet.homeless`, and are seen at the next look.

Invariants
    INV-SIM-45  a replica is paid for from the decision to start it until it has left
    INV-SIM-46  a replica that drains is given no request, and none that it has is cut short
                before the bound
"""

from bisect import bisect_right

from tierline.kv.transfer import NVME
from tierline.scheduling.scaling import (
    Autoscaler,
    Observation,
    Scaling,
    cold_start_ps,
    drained,
    to_drain,
)
from tierline.sim.fleet import Fleet
from tierline.sim.instance import Instance
from tierline.sim.record import Moment
from tierline.sim.replica import Replica

INIT_S = 20.0  # container, compilation, graphs, warm-up


def cold_start_of(instance: Instance, *, tier: int = NVME, init_s: float = INIT_S) -> int:
    """Picoseconds from asking for a replica until it serves, with its weights in a tier."""
    spec = instance.tier_specs[tier]
    rate = spec.read_bytes_per_s * instance.gpus / spec.shared_by_gpus
    weights_bytes = instance.cost.weights_bytes_per_gpu * instance.gpus
    return cold_start_ps(weights_bytes, bytes_per_s=rate, init_s=init_s)


class Scaler:
    """Keeps one group of replicas as large as its autoscaler wants it."""

    def __init__(self, fleet: Fleet, members: list[Replica], scaling: Scaling) -> None:
        """`members` is the live list that routing or the pool reads; it grows."""
        assert members, "a group begins with a replica, which others are made like"
        assert scaling.replicas_max >= 1, "nobody would ever serve"
        self.fleet, self.members, self.scaling = fleet, members, scaling
        self.moments: list[Moment] = []
        self._pattern = members[0]
        self._autoscaler = Autoscaler(scaling, started_ps=fleet.now_ps)
        self._starting: list[Replica] = []  # oldest first
        self._draining: dict[int, int] = {}  # number: since when
        self._arrived = 0  # requests that had come by the last look

    def start(self) -> None:
        """Look from now on."""
        self.fleet.later(self.fleet.now_ps + self.scaling.look_ps, self._look)

    def _look(self, now_ps: int) -> None:
        self._let_go(now_ps)
        seen = self._observation(now_ps)
        decision = self._autoscaler.decide(seen)
        more = decision.replicas - seen.serving - seen.starting
        if more:
            there = f"{seen.serving} serve, {seen.starting} start"
            why = f"{there}, {decision.replicas} wanted: {decision.reason}"
            self.moments.append(Moment(now_ps, "scaled", why))
        if more > 0:
            self._grow(more, now_ps)
        elif more < 0:
            self._shrink(-more, now_ps)
        self.fleet.later(now_ps + self.scaling.look_ps, self._look)

    def _observation(self, now_ps: int) -> Observation:
        serving = [r for r in self.members if r.accepting]
        total = sum(r.scheduler.pages.total for r in serving)
        held = sum(r.pages_held(now_ps) for r in serving)
        model, models = self._pattern.model, self.fleet.requests.model
        homeless = sum(models[s.id] == model for s in self.fleet.homeless)
        before = self._arrived
        self._arrived = bisect_right(self.fleet.requests.arrival_ps, now_ps)
        return Observation(
            now_ps=now_ps,
            serving=len(serving),
            starting=len(self._starting),
            kv_permille=held * 1000 // total if total else 0,
            requests_waiting=sum(r.scheduler.queue.waiting for r in self.members) + homeless,
            requests_outstanding=sum(r.requests_outstanding for r in self.members) + homeless,
            arrivals=models[before : self._arrived].count(model),
        )

    # --- more -------------------------------------------------------------------------------

    def _grow(self, count: int, now_ps: int) -> None:
        """Who was about to leave stays; the rest start."""
        for number in sorted(self._draining)[:count]:
            del self._draining[number]
            self.fleet.regain(self.fleet.replicas[number], now_ps)
            count -= 1
        for _ in range(count):
            self._begin(now_ps)

    def _begin(self, now_ps: int) -> None:
        replica = self._pattern.twin(len(self.fleet.replicas))
        replica.model, replica.decodes_only = self._pattern.model, self._pattern.decodes_only
        replica.alive = replica.accepting = False
        replica.up_since_ps = now_ps
        self.fleet.join(replica)
        if replica not in self.members:
            self.members.append(replica)
        self._starting.append(replica)
        self.fleet.later(now_ps + self.scaling.lead_ps, self._ready, replica)

    def _ready(self, now_ps: int, replica: Replica) -> None:
        if replica in self._starting:  # not given up meanwhile
            self._starting.remove(replica)
            self.fleet.regain(replica, now_ps)

    # --- fewer ------------------------------------------------------------------------------

    def _shrink(self, count: int, now_ps: int) -> None:
        """The youngest that start are given up first, then those that are empty soonest."""
        while count and self._starting:
            self._starting.pop().die(now_ps)
            count -= 1
        for number in to_drain(self.members, count=count):
            self.fleet.replicas[number].accepting = False
            self._draining[number] = now_ps
        self._let_go(now_ps)

    def _let_go(self, now_ps: int) -> None:
        for number, since_ps in sorted(self._draining.items()):
            replica = self.fleet.replicas[number]
            outstanding = len(replica.sequences) + len(replica.scheduler.held_back)
            leaves = drained(
                outstanding=outstanding,
                since_ps=since_ps,
                now_ps=now_ps,
                bound_ps=self.scaling.drain_ps,
            )
            if leaves or not replica.alive:  # a fault may have been faster
                del self._draining[number]
            if leaves and replica.alive:
                self.fleet.lose(replica, now_ps)
