"""How many replicas there should be, and who leaves.

The fleet reports an `Observation` every few seconds to an `Autoscaler` and gets the number of
replicas that it should have, with the reason.  What a number means is the fleet's business:
it starts replicas, which serve after their cold start, or drains them (`to_drain`,
`drained`).

Two opinions, and the larger counts:

    reactive   replicas that serve x load over target, load being KV memory or the queue,
               whichever is nearer its limit; within the tolerance the number stays
    forecast   arrivals expected when a replica that is started now would serve, over what
               one replica serves

The second starts replicas before they are missed, which the first cannot: a cold start lasts
minutes.  Between an opinion and a change stand two windows, which are cooldowns and
hysteresis at once: up to what was wanted throughout `up_window_ps`, down to the most that was
wanted during `down_window_ps`.

Invariants
    INV-SCHED-49  replicas_min <= number <= replicas_max, and 0 only when allowed, nothing is
                  outstanding, nothing is expected, and that has been so for idle_ps
    INV-SCHED-50  what was wanted within the last down window is not taken away: after going
                  up, no going below for as long
"""

from collections import abc, deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from tierline.base.clock import PS_PER_S
from tierline.perf.transfer import cold_start
from tierline.scheduling.routing import Candidate


def cold_start_ps(weights_bytes: float, *, bytes_per_s: float, init_s: float) -> int:
    """From asking for a replica until it serves: its weights, and everything after.

    >>> cold_start_ps(70e9, bytes_per_s=7e9, init_s=20) / 10**12
    30.0
    """
    start = cold_start(weights_bytes, bytes_per_s=bytes_per_s, init_s=init_s)
    return ceil(start.total_s * PS_PER_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """What is asked of an autoscaler."""

    replicas_min: int = 1
    replicas_max: int
    standby: int = 1  # warm beyond demand, as long as there is any
    kv_target_permille: int = 700  # of KV memory held by who runs
    waiting_target: int = 4  # requests in the queue of one replica
    tolerance_permille: int = 100  # of the target; within it the number stays
    up_window_ps: int = 15 * PS_PER_S
    down_window_ps: int = 300 * PS_PER_S
    idle_ps: int = 900 * PS_PER_S  # before the last replica goes, where replicas_min is 0
    lead_ps: int  # the cold start: `cold_start_ps`
    rps_per_replica: float  # within the promises, as planned
    forecasting: bool = True
    bucket_ps: int = 60 * PS_PER_S  # grain of the history of arrivals
    season_buckets: int = 1440  # a day
    look_ps: int = 5 * PS_PER_S  # between two observations
    drain_ps: int = 300 * PS_PER_S  # what a leaving replica has not answered then is routed anew

    def __post_init__(self) -> None:
        assert 0 <= self.replicas_min <= self.replicas_max
        assert self.rps_per_replica > 0
        assert self.bucket_ps > 0
        assert self.look_ps > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The fleet at one instant."""

    now_ps: int
    serving: int  # replicas that serve
    starting: int  # and that will
    kv_permille: int  # of the KV memory of those that serve, held by who runs
    requests_waiting: int  # queued anywhere
    requests_outstanding: int  # queued or running
    arrivals: int  # since the observation before


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How many replicas there should be, those that start included."""

    replicas: int
    reason: str


# --- the two opinions -----------------------------------------------------------------------


def reactive(seen: Observation, scaling: Scaling) -> int:
    """Replicas that would bring load to its target, without the standby."""
    if not seen.serving:
        return 1 if seen.requests_outstanding else 0
    load_permille = max(
        seen.kv_permille * 1000 // scaling.kv_target_permille,
        seen.requests_waiting * 1000 // (scaling.waiting_target * seen.serving),
    )
    needed_permille = seen.serving * load_permille
    there = seen.serving + seen.starting - scaling.standby
    if abs(needed_permille - 1000 * there) <= scaling.tolerance_permille * there:
        return there
    return -(-needed_permille // 1000)


def forecast(counts: Sequence[int], *, season: int, ahead: int) -> float:
    """Arrivals of the bucket `ahead` of the last one, from those so far.

    The level of the last minutes, times how earlier seasons went on from the same hour: what
    they had then, over what they had until now.  The first is a window as wide as the way
    there, so that the two meet and do not overlap.  Never above twice the larger of what is
    now and what was then.  Where earlier seasons were silent until now, what they had next;
    before a season is over, the line through the last buckets.
    """
    assert ahead > 0
    recent, around = max(season // 144, 1), max(ahead // 2, 1)  # ten minutes of a day
    last = len(counts) - 1
    here = _in_seasons_before(counts, last - recent + 1 - around, last, season)
    there = _in_seasons_before(counts, last + ahead - around, last + ahead + around, season)
    if here is None or there is None:
        return _on_a_line(counts[-max(recent, 6) :], ahead)
    level = sum(counts[-recent:]) / recent
    if not here:
        return level + there
    return min(level * there / here, 2 * max(level, there))


def _in_seasons_before(counts: Sequence[int], first: int, last: int, season: int) -> float | None:
    """Mean count from bucket `first` to `last`, whole seasons earlier; None before there were."""
    total = buckets = 0
    while (first := first - season) >= 0:
        last -= season
        if last < len(counts):
            total += sum(counts[first : last + 1])
            buckets += last + 1 - first
    return total / buckets if buckets else None


def _on_a_line(counts: Sequence[int], ahead: int) -> float:
    """Least squares, continued, never under nothing."""
    n = len(counts)
    if n < 2:
        return float(sum(counts))
    middle, mean = (n - 1) / 2, sum(counts) / n
    slope = sum((i - middle) * (c - mean) for i, c in enumerate(counts))
    slope /= sum((i - middle) ** 2 for i in range(n))
    return max(mean + slope * (middle + ahead), 0.0)


# --- the owner ------------------------------------------------------------------------------


class Autoscaler:
    """The only owner of the history that scaling looks at."""

    def __init__(self, scaling: Scaling, *, started_ps: int = 0) -> None:
        self._scaling = scaling
        self._counts: list[int] = []  # arrivals of complete buckets
        self._counting = 0  # of the one under way
        self._bucket_ends_ps = started_ps + scaling.bucket_ps
        self._wanted: deque[tuple[int, int]] = deque()  # (instant, replicas), oldest first
        self._busy_ps = started_ps  # when something was outstanding last

    def decide(self, seen: Observation) -> Decision:
        """Take note of what was seen, and say how many replicas there should be."""
        self._count(seen)
        scaling = self._scaling
        if seen.requests_outstanding or seen.arrivals:
            self._busy_ps = seen.now_ps
        load = reactive(seen, scaling)
        expected = self._expected_rps() if scaling.forecasting else 0.0
        ahead = ceil(expected / scaling.rps_per_replica - 1e-9)
        demand, reason = max((load, "load"), (ahead, f"{expected:.3g} requests/s expected"))
        silent = not (demand or seen.requests_outstanding or scaling.replicas_min)
        there = seen.serving + seen.starting
        if silent and (not there or seen.now_ps - self._busy_ps >= scaling.idle_ps):
            self._wanted.clear()
            return Decision(replicas=0, reason="idle")
        wanted = demand + scaling.standby if demand else 1
        wanted = min(max(wanted, scaling.replicas_min), scaling.replicas_max)
        return self._settle(wanted, reason, seen)

    def _settle(self, wanted: int, reason: str, seen: Observation) -> Decision:
        """Pass through the two windows."""
        now_ps, there = seen.now_ps, seen.serving + seen.starting
        scaling = self._scaling
        window_ps = max(scaling.up_window_ps, scaling.down_window_ps)
        self._wanted.append((now_ps, wanted))
        while self._wanted[0][0] < now_ps - window_ps:
            self._wanted.popleft()
        if not there:  # nobody serves, and somebody waits or is expected
            return Decision(replicas=wanted, reason=reason)
        up = min(w for t, w in self._wanted if t >= now_ps - scaling.up_window_ps)
        down = max(w for t, w in self._wanted if t >= now_ps - scaling.down_window_ps)
        if up > there:
            return Decision(replicas=up, reason=reason)
        if down < there:
            return Decision(replicas=down, reason=f"no more wanted for a while: {reason}")
        there = min(max(there, scaling.replicas_min), scaling.replicas_max)
        return Decision(replicas=there, reason="steady")

    def _count(self, seen: Observation) -> None:
        """Arrivals belong to the bucket in which they were reported."""
        while seen.now_ps >= self._bucket_ends_ps:
            self._counts.append(self._counting)
            self._counting = 0
            self._bucket_ends_ps += self._scaling.bucket_ps
        self._counting += seen.arrivals
        kept = 8 * self._scaling.season_buckets
        if len(self._counts) > 2 * kept:
            del self._counts[:-kept]

    def _expected_rps(self) -> float:
        """The rate expected when a replica that is started now would serve."""
        scaling = self._scaling
        if not self._counts:
            return 0.0
        ahead = 1 + -(-scaling.lead_ps // scaling.bucket_ps)
        count = forecast(self._counts, season=scaling.season_buckets, ahead=ahead)
        return count * PS_PER_S / scaling.bucket_ps


# --- leaving --------------------------------------------------------------------------------


def to_drain(replicas: abc.Sequence[Candidate], *, count: int) -> list[int]:
    """Who stops accepting: whoever is empty soonest, of equals the youngest."""
    leaving = sorted(
        (r for r in replicas if r.accepting),
        key=lambda r: (r.requests_outstanding, r.prompt_tokens_queued, -r.number),
    )
    return [replica.number for replica in leaving[:count]]


def drained(*, outstanding: int, since_ps: int, now_ps: int, bound_ps: int) -> bool:
    """Whether a draining replica goes now; at the bound, what is left is routed anew."""
    return not outstanding or now_ps - since_ps >= bound_ps
