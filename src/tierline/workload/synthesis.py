"""A trace drawn from a profile: the same lengths, arrivals, tenants and prefix reuse, from a seed.

`tierline synthesize` writes one; benchmarks and load tests replay it. Lengths come from the
profile's quantiles with its rank correlation (a Gaussian copula). Arrivals are a renewal stream
in even time, bent to the profile's bursts or to its day. Prefix blocks are made so that the
reuse curve of the result follows the profile's, see `_Chains`.
"""

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from tierline.base.errors import InputError
from tierline.base.names import lookup
from tierline.base.rng import stream
from tierline.workload.importers import BLOCK_TOKENS
from tierline.workload.profile import Arrivals, Lengths, Profile
from tierline.workload.request import Request
from tierline.workload.reuse import ReuseCurve
from tierline.workload.sessions import Sessions
from tierline.workload.trace import write_trace

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

Process = Literal["poisson", "gamma", "bursts", "day"]
_CHUNK = 10_000
_TRIES = 4  # ranges of distance, most lagging first
_NEAR = 32  # requests either way among which a chain to continue is looked for


def write_synthetic(
    profile: Profile, path: Path, *, seed: int, requests: int, arrivals: Process = "poisson"
) -> int:
    """Write a synthetic trace in our own format; returns how many requests it holds."""
    block_tokens = profile.reuse.block_tokens if profile.reuse else BLOCK_TOKENS
    drawn = synthesize(profile, seed=seed, requests=requests, arrivals=arrivals)
    return write_trace(path, drawn, block_tokens=block_tokens)


def synthesize(
    profile: Profile, *, seed: int, requests: int, arrivals: Process = "poisson"
) -> Iterator[Request]:
    """`requests` requests like the profile's, in order of arrival.

    `arrivals`: 'poisson'; 'gamma', with the profile's CV of gaps; 'bursts', Poisson with the
    profile's bursts at their times; 'day', Poisson with the profile's hours. Raises `InputError`
    when the profile has no arrivals, or not the fact that is asked for.
    """
    lookup("arrival process", arrivals, {name: name for name in get_args(Process)})
    if requests <= 0:
        raise InputError(f"{requests} requests to draw", hint="draw at least one")
    if profile.arrivals is None:
        raise InputError(
            f"{profile.source!r} has no arrival times, so it has no rate",
            hint="give a rate: --rps 20, or Profile.at_rate(20)",
        )
    if arrivals == "day" and profile.arrivals.day_shape is None:
        raise InputError(
            f"{profile.source!r} is shorter than a day, so it has no shape of a day",
            hint="draw poisson, gamma or bursts",
        )
    return _requests(profile, profile.arrivals, seed, requests, arrivals)


def _requests(
    profile: Profile, arrivals: Arrivals, seed: int, requests: int, process: Process
) -> Iterator[Request]:
    import numpy as np

    times = _times(arrivals, process, seed)
    lengths = _lengths(profile, seed)
    labels = stream(seed, "labels")
    tenants = _zipf_shares(profile.tenants or 0, profile.tenant_zipf or 0.0)
    priorities, shares = list(profile.priorities), np.cumsum(list(profile.priorities.values()))
    chains = _Chains(profile.reuse) if profile.reuse else None
    turns = _Turns(profile.sessions, arrivals, seed) if profile.sessions and not chains else None
    for _ in range(requests):
        input_tokens, output_tokens = next(lengths)
        blocks: tuple[int, ...] = ()
        session = 0
        if chains is not None:
            session, blocks = chains.next(input_tokens)
        elif turns is not None:
            session = turns.next()
        tenant, priority = labels.random(2).tolist()
        yield Request(
            arrival_ns=next(times),
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            prefix_blocks=blocks,
            session=f"s{session}" if chains or turns else "",
            tenant=f"t{int(np.searchsorted(tenants[:-1], tenant)) + 1}" if len(tenants) else "",
            priority=priorities[int(np.searchsorted(shares[:-1], priority))],
        )


# --- lengths --------------------------------------------------------------------------------


def _lengths(profile: Profile, seed: int) -> Iterator[tuple[int, int]]:
    """Pairs of lengths: the profile's quantiles at the ranks of a correlated normal pair."""
    rng = stream(seed, "lengths")
    # Spearman's rank correlation of a normal pair with Pearson's r is 6/pi asin(r/2).
    r = 2 * math.sin(math.pi / 6 * profile.length_correlation)
    while True:
        x, other = rng.standard_normal((2, _CHUNK))
        y = r * x + math.sqrt(1 - r * r) * other
        yield from zip(
            _at_ranks(profile.input, _normal_rank(x)).tolist(),
            _at_ranks(profile.output, _normal_rank(y)).tolist(),
            strict=True,
        )


def _normal_rank(z: "Floats") -> "Floats":
    import numpy as np

    return 0.5 * (1 + np.array([math.erf(v) for v in (z / math.sqrt(2)).tolist()]))


def _at_ranks(lengths: Lengths, ranks: "Floats") -> "npt.NDArray[np.int64]":
    import numpy as np

    percents = [*range(100), 99.9, 100]
    values = [*lengths.quantiles[:100], lengths.p99_9, lengths.quantiles[100]]
    drawn = np.interp(ranks * 100, percents, values)
    return np.maximum(1, np.round(drawn)).astype(np.int64)


# --- arrivals -------------------------------------------------------------------------------


def _times(arrivals: Arrivals, process: Process, seed: int) -> Iterator[int]:
    """Arrival times in ns: gaps of mean 1 in even time, bent by the rate over real time."""
    import numpy as np

    rng = stream(seed, "arrivals")
    shape = 1.0 if process != "gamma" else 1 / max(arrivals.iat_cv, 1e-3) ** 2
    edges_s, rates = _rate_steps(arrivals, process)
    work = np.concatenate([[0.0], np.cumsum(np.diff(edges_s) * rates)])  # arrivals since the start
    now = 0.0
    while True:
        even = now + np.cumsum(rng.gamma(shape, 1 / shape, _CHUNK))
        now = float(even[-1])
        cycles, rest = np.divmod(even, work[-1])
        seconds = cycles * edges_s[-1] + np.interp(rest, work, edges_s)
        yield from np.round(seconds * 1e9).astype(np.int64).tolist()


def _rate_steps(arrivals: Arrivals, process: Process) -> tuple["npt.NDArray[Any]", "Floats"]:
    """Edges in s, and the rate between them; the pattern repeats after the last edge."""
    import numpy as np

    if process == "day":
        assert arrivals.day_shape is not None
        weights = np.array(arrivals.day_shape, dtype=np.float64)
        return np.arange(25) * 3600.0, weights * arrivals.rate_rps
    if process != "bursts" or not arrivals.bursts:
        return np.array([0.0, arrivals.span_s]), np.array([arrivals.rate_rps])
    edges, factors = [0.0], []
    for burst in arrivals.bursts:
        edges += [burst.start_s, burst.start_s + burst.length_s]
        factors += [0.0, burst.factor]
    edges.append(max(arrivals.span_s, edges[-1]))
    factors.append(0.0)
    lengths, heights = np.diff(edges), np.array(factors)
    quiet = heights == 0
    # Between bursts runs whatever brings the whole to the profile's rate.
    rest = max(0.0, edges[-1] - float((lengths * heights).sum()))
    heights[quiet] = rest / max(float(lengths[quiet].sum()), 1e-9)
    return np.array(edges), np.asarray(heights * arrivals.rate_rps, dtype=np.float64)


# --- who ------------------------------------------------------------------------------------


def _zipf_shares(tenants: int, exponent: float) -> "Floats":
    """Cumulative shares of tenants by rank."""
    import numpy as np

    weights = np.arange(1, tenants + 1, dtype=float) ** -exponent
    return np.cumsum(weights) / weights.sum() if tenants else weights


class _Turns:
    """Session numbers without prefixes: the profile's turns, about a think time apart."""

    def __init__(self, sessions: Sessions, arrivals: Arrivals, seed: int) -> None:
        self._rng = stream(seed, "sessions")
        self._new_share = 1 / sessions.turns_mean
        self._lag = max(1.0, arrivals.rate_rps * (sessions.think_s_p50 or 0.0) / math.log(2))
        self._sessions = array("q")
        self._count = 0

    def next(self) -> int:
        """The session of the next request."""
        lag = 1 + int(self._rng.exponential(self._lag))
        if self._rng.random() < self._new_share or lag > len(self._sessions):
            session, self._count = self._count, self._count + 1
        else:
            session = self._sessions[-lag]
        self._sessions.append(session)
        return session


class _Chains:
    """Prefix blocks whose reuse curve follows a given one.

    The curve says which share of block accesses must be found at each range of LRU distance.
    Each request serves the range that lags most: it continues the chain last touched at about
    that distance, and adds new blocks. Where nothing lags it starts a new chain. Nothing here
    is drawn, so the curve is met to the grain of a request.

    A Fenwick tree over requests holds how many blocks each was the last to touch; the sum over
    later requests is the distance of what a request holds.
    """

    def __init__(self, curve: ReuseCurve) -> None:
        self._block_tokens = curve.block_tokens
        self._upper = [p.cached_tokens // curve.block_tokens for p in curve.points]
        rates = [p.block_hit_rate for p in curve.points]
        self._share = [b - a for a, b in zip([0.0, *rates], rates, strict=False)]
        self._served = [0.0] * len(rates)
        self._accesses = 0
        self._blocks = 0
        self._chains: list[tuple[int, ...]] = []  # by request; empty once a later one continues it
        self._session = array("q")
        self._sessions = 0
        self._touched = array("q", [0] * 1024)  # the tree; its size is a power of two
        self._touched_total = 0

    def next(self, input_tokens: int) -> tuple[int, tuple[int, ...]]:
        """Session number and blocks of the next request."""
        count = math.ceil(input_tokens / self._block_tokens)
        self._accesses += count
        lag = [s * self._accesses - done for s, done in zip(self._share, self._served, strict=True)]
        # A range that begins beyond all that was touched cannot be served yet.
        within = range(max(1, bisect_left(self._upper, self._touched_total)))
        ranges = sorted(within, key=lag.__getitem__, reverse=True)
        tries = (self._continue(r, count, lag[r]) for r in ranges[:_TRIES])
        reused = next(filter(None, tries), ())
        if not reused:
            self._session.append(self._sessions)
            self._sessions += 1
        fresh = range(self._blocks, self._blocks + count - len(reused))
        self._blocks += len(fresh)
        blocks = (*reused, *fresh)
        self._chains.append(blocks)
        self._add(len(self._chains) - 1, count)
        return self._session[-1], blocks

    def _continue(self, range_: int, count: int, lag: float) -> tuple[int, ...]:
        """Up to `count` leading blocks of a chain near the middle of the range.

        Nothing when the range lags by less than half of that: parts of chains are not taken,
        since what remains of a chain is lost to later requests.
        """
        low = self._upper[range_ - 1] if range_ else 0
        middle = (low + self._upper[range_] - count) // 2
        at = self._nearest(self._request_at(max(middle, 0)), count)
        if at is None or lag < min(count, len(self._chains[at])) / 2:
            return ()
        reused = self._chains[at][:count]
        self._served[range_] += len(reused)
        self._add(at, -len(reused))
        self._chains[at] = ()
        self._session.append(self._session[at])
        return reused

    def _nearest(self, request: int, count: int) -> int | None:
        """The request near this one whose chain fits best: a long one is kept for a long prompt."""
        near = range(max(0, request - _NEAR), min(len(self._chains), request + _NEAR))
        held = [at for at in near if self._chains[at]]
        return min(held, key=lambda at: abs(len(self._chains[at]) - count), default=None)

    def _request_at(self, distance: int) -> int:
        """The latest request with at least `distance` blocks touched after it."""
        before = self._touched_total - distance
        at, width = 0, len(self._touched)
        while width := width // 2:
            if at + width < len(self._touched) and self._touched[at + width] < before:
                at += width
                before -= self._touched[at]
        return min(at, len(self._chains) - 1)

    def _add(self, request: int, blocks: int) -> None:
        if request + 1 >= len(self._touched):
            self._grow()
        self._touched_total += blocks
        node = request + 1
        while node < len(self._touched):
            self._touched[node] += blocks
            node += node & -node

    def _grow(self) -> None:
        """Twice the size: the new root of the old half is the sum of all before."""
        size = len(self._touched)
        self._touched.extend([0] * size)
        self._touched[size] = self._touched_total
