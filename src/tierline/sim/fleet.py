"""Replicas under one clock: the event loop of a simulation.

Events leave in the order of (time, rank, replica, serial): at one instant bytes land
first, then steps end, then the operator acts (faults, scaling), then requests arrive, and
only then do idle replicas decide.  An event at the instant at which a step would begin is
seen first; a step that began earlier is not undone.

Nothing here decides how to serve: routing, scaling and schedulers do.

Invariants
    INV-SIM-1  every request that was accepted ends in exactly one outcome
    INV-SIM-2  a run is a function of its inputs and its seed
"""

import random
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from heapq import heappop, heappush
from itertools import count
from typing import Any

from tierline.base.clock import FOREVER_PS
from tierline.base.rng import stream_seed
from tierline.scheduling.sequence import Sequence
from tierline.sim.record import FINISHED, REFUSED, Requests, Steps
from tierline.sim.replica import CONTROL, LINK_DONE, Event, Pools, Replica
from tierline.sim.watch import Watch

Route = Callable[[Sequence, int], int | None]  # (request, now) -> replica, None: nobody accepts
Action = Callable[..., None]


class Fleet:
    """All replicas, the requests still to come, and what is due when."""

    def __init__(
        self,
        replicas: Iterable[Replica],
        *,
        arrivals: Iterator[Sequence],
        outputs: Seq[int],
        requests: Requests,
        route: Route | None = None,
        seed: int = 0,
        repeats_max: int = FOREVER_PS,
        steps: Steps | None = None,
        watch: Watch | None = None,
    ) -> None:
        """`arrivals` come in order of time; `outputs` and `requests` are by sequence id."""
        self.replicas: list[Replica] = []
        self.watch = watch
        self.outputs, self.requests, self.route = outputs, requests, route
        self.repeats_max, self.steps = repeats_max, steps
        self.rng = random.Random(stream_seed(seed, "fleet"))
        self.now_ps = 0
        self.pools: Pools | None = None
        self.homeless: list[Sequence] = []  # nobody accepts requests at the moment
        self.left = len(requests)  # to be finished or refused
        self.groups: dict[int, list[Replica]] = {}  # by model: those that take its requests
        self.on_end: Callable[[Replica, Sequence, int], None] | None = None
        self.progress: Callable[[int], None] | None = None
        self._arrivals = arrivals
        self._coming: Sequence | None = None  # the next to arrive, once the run was stopped
        self._last_ps = 0  # when something was done last
        self.heap: list[Event] = []  # what is due; replicas put their own events on it
        self._awake: dict[int, Replica] = {}
        self._serial = count()
        for replica in replicas:
            self.join(replica)

    def join(self, replica: Replica) -> None:
        """A replica takes part from now on."""
        assert replica.number == len(self.replicas)
        replica.fleet = self
        self.replicas.append(replica)
        if not replica.decodes_only:
            self.groups.setdefault(replica.model, []).append(replica)
        if self.watch is not None:
            self.watch.listen(replica)

    # --- what replicas and operators call ---------------------------------------------------

    def later(self, at_ps: int, action: Action, *arguments: Any) -> None:
        """Call `action(now_ps, *arguments)` at an instant."""
        serial = next(self._serial)
        heappush(self.heap, (at_ps, CONTROL, -1, serial, (action, arguments)))

    def wake(self, replica: Replica) -> None:
        """The replica should decide at the end of this instant."""
        self._awake[replica.number] = replica

    def finished(self, replica: Replica, s: Sequence, now_ps: int) -> None:
        """A request has its last token: write it down."""
        r, i = self.requests, s.id
        r.admitted_ps[i] = s.admitted_ps
        r.first_ps[i] = s.first_ps + replica.host_ps
        r.finish_ps[i] = now_ps + replica.host_ps
        r.output_tokens[i] = s.generated_tokens
        r.cached_tokens[i] = s.hit_tokens
        r.loaded_tokens[i] = s.loaded_tokens
        r.preemptions[i] = s.preemptions
        r.itl_max_ps[i] = replica.longest_gap_ps(s) if s.generated_tokens > 1 else 0
        r.replica[i] = replica.number
        assert r.outcome[i] != FINISHED, f"request {i} finished twice"
        r.outcome[i] = FINISHED
        self.left -= 1
        if self.on_end is not None:
            self.on_end(replica, s, now_ps)

    def lose(self, replica: Replica, now_ps: int) -> None:
        """A replica dies; whoever was there is routed again and begins anew."""
        lost = replica.die(now_ps)
        if self.pools is not None:
            self.pools.died(replica, now_ps)
        for sequence in lost:
            self.arrive(sequence.anew())

    def regain(self, replica: Replica, now_ps: int) -> None:
        """A replica serves from now on; whoever waited for one comes in."""
        replica.rise(now_ps)
        waiting, self.homeless = self.homeless, []
        for sequence in waiting:
            self.arrive(sequence)

    # --- the loop ---------------------------------------------------------------------------

    def run(self, until_ps: int = FOREVER_PS) -> int:
        """Until nothing is left to happen, or an instant; returns when something was done last.

        When every request has ended, operators act no more.  Bytes that still move then, and
        the ends of steps that were cut, are nothing that anybody waits for.
        """
        heap, replicas, awake = self.heap, self.replicas, self._awake
        coming = self._coming or next(self._arrivals, None)
        arrival_ps = coming.arrival_ps if coming is not None else FOREVER_PS
        arrived, last_ps = 0, self._last_ps
        while True:
            if heap and heap[0][0] <= arrival_ps:
                if heap[0][0] > until_ps:
                    break
                now_ps, rank, number, version, payload = heappop(heap)
                if rank != CONTROL or self.left:
                    self.now_ps = now_ps
                if rank == CONTROL:
                    if self.left:
                        last_ps = now_ps
                        payload[0](now_ps, *payload[1])
                elif rank == LINK_DONE:
                    replicas[number].link_done(payload, version, now_ps)
                else:
                    replica = replicas[number]
                    if replica.step_done(version, now_ps):
                        last_ps = now_ps
                        alone = not awake and arrival_ps > now_ps
                        if alone and replica.alive and (not heap or heap[0][0] > now_ps):
                            replica.ask(now_ps)  # nothing else is due: no need to wait
                            continue
                        awake[number] = replica
            elif coming is not None and arrival_ps <= until_ps:
                self.now_ps = now_ps = last_ps = arrival_ps
                self.arrive(coming)
                arrived += 1
                if self.progress is not None and not arrived & 1023:
                    self.progress(1024)
                coming = next(self._arrivals, None)
                arrival_ps = coming.arrival_ps if coming is not None else FOREVER_PS
            else:
                break
            if awake and arrival_ps > now_ps and not (heap and heap[0][0] <= now_ps):
                self._decide(now_ps)
        self._coming, self._last_ps = coming, last_ps
        return last_ps

    def next_ps(self) -> int:
        """When something happens next, after a run was stopped; FOREVER_PS: nothing."""
        due_ps = self.heap[0][0] if self.heap else FOREVER_PS
        if self._coming is None:
            self._coming = next(self._arrivals, None)
        return min(due_ps, self._coming.arrival_ps) if self._coming is not None else due_ps

    def _decide(self, now_ps: int) -> None:
        awake = self._awake
        if len(awake) == 1:
            waking = [awake.popitem()[1]]
        else:
            waking = [awake[n] for n in sorted(awake)]
            awake.clear()
        for replica in waking:
            if replica.step is None and replica.alive:
                replica.ask(now_ps)

    def arrive(self, sequence: Sequence) -> None:
        """Send a request to a replica; one that fits nowhere is refused.

        While nobody accepts, requests wait here (`homeless`) for whoever joins.
        """
        number = self.route(sequence, self.now_ps) if self.route is not None else 0
        if number is None:
            self.homeless.append(sequence)
            return
        replica = self._roomy(sequence, self.replicas[number])
        if replica is None or replica.refuses(sequence, self.now_ps):
            self.requests.outcome[sequence.id] = REFUSED
            self.left -= 1
            return
        if self.watch is not None:
            self.watch.routed(replica, sequence, self.now_ps)
        replica.arrive(sequence, self.now_ps)

    def _roomy(self, sequence: Sequence, chosen: Replica) -> Replica | None:
        """The chosen replica, or another that could ever hold the request; None: nobody could."""
        if chosen.could_hold(sequence):
            return chosen
        group = self.groups[chosen.model]
        able = [replica for replica in group if replica.accepting and replica.could_hold(sequence)]
        return min(able, key=lambda r: (r.requests_outstanding, r.number), default=None)
