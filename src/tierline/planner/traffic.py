"""What the planner replays: the same requests for every candidate, at the load it sizes for.

Common random numbers: candidates are compared on one stretch of one trace, so that luck is
the same for all.  A question without a trace gets a Poisson stream drawn from its profile.

Load.  A plan is sized for growth and safety, and so is its replay.  Where that is several
times what was recorded, a slice of the fleet gets one recorded population (or whole copies
of it, with prefixes of their own) and the trace runs faster by what is left: three times the
load is three populations, and not one that repeats itself three times as fast, which a
prefix cache would like too well.

Length.  A screening takes the busiest stretch of some hundred requests, a decision the whole
trace, or its busiest stretch where the whole would take too long; `Stretch.what` says so.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from tierline.planner.candidates import Load
from tierline.workload.importers import BLOCK_TOKENS
from tierline.workload.profile import Arrivals, Profile
from tierline.workload.request import Request
from tierline.workload.synthesis import synthesize

SCREENED_REQUESTS = 1_200
DECIDED_REQUESTS_MAX = 20_000
HELD_REQUESTS_MAX = 100_000  # of a trace, in memory
DRAWN_REQUESTS = 6_000  # where there is no trace: those of ten minutes, within these bounds
DRAWN_REQUESTS_MIN = 1_500
DRAWN_S = 600.0
DRAWN_S_MIN = 150.0  # several times what a request stays, or its batch never fills
SLICE_MIN = 2
COPY_APART_NS = 7_000_000_000
SEED = 0
BLOCK_TOKENS_KV = 16  # of the KV cache, as the deployment file has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Requests to replay, in order of arrival, and what they are, for the reader."""

    requests: tuple[Request, ...]
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """The requests of a question, and how much faster than recorded the plan wants them."""

    requests: tuple[Request, ...]
    name: str  # of the trace, or how the requests were drawn
    drawn: bool
    block_tokens: int
    factor: float  # of the recorded load that the fleet is sized for, safety applied
    planned: float  # the same without safety
    positions_max: int  # of the model: longer requests are cut, as the closed form does
    notes: tuple[str, ...] = ()
    _laid: dict[tuple[float, int], Stretch] = field(default_factory=dict, compare=False)

    def slice_of(self, instances: int) -> int:
        """How many of so many instances are replayed, with their share of the load.

        All of them, unless one recorded population loads fewer, or a drawn stream would be
        over before the batch of so many instances has filled.
        """
        if self.drawn:
            span_s = (self.requests[-1].arrival_ns - self.requests[0].arrival_ns) / 1e9
            share = span_s / self.factor / DRAWN_S_MIN
        else:
            share = 1 / self.factor if self.factor >= 2 else 1.0
        return min(max(math.ceil(instances * share), SLICE_MIN), instances)

    def decision(self, instances: int) -> Stretch:
        """What decides: everything, or the busiest stretch that is not too long to replay."""
        return self._at(self.factor, instances, DECIDED_REQUESTS_MAX)

    def everyday(self, instances: int) -> Stretch:
        """The same requests at the load that is expected, without safety."""
        return self._at(self.planned, instances, DECIDED_REQUESTS_MAX)

    def screening(self, instances: int) -> Stretch:
        """The busiest stretch of what decides, short."""
        return self._at(self.factor, instances, SCREENED_REQUESTS)

    def _at(self, factor: float, instances: int, requests_max: int) -> Stretch:
        share = factor * self.slice_of(instances) / instances
        if (share, requests_max) not in self._laid:
            self._laid[share, requests_max] = self._lay(share, requests_max)
        return self._laid[share, requests_max]

    def _lay(self, share: float, requests_max: int) -> Stretch:
        copies = max(int(share), 1)
        part, said = busiest(self.requests, max(requests_max // copies, 1)), self.name
        if len(part) < len(self.requests):
            said = f"the busiest {len(part):,} requests of {said}"
        laid = copied(part, copies=copies, faster=share / copies)
        if copies > 1:
            said += f", {copies} copies of it beside each other"
        return Stretch(
            requests=tuple(_cut(r, self.positions_max, self.block_tokens) for r in laid), what=said
        )


def traffic_of(
    profile: Profile,
    load: Load,
    *,
    safety: float,
    positions_max: int,
    requests: Sequence[Request] = (),
    block_tokens: int = BLOCK_TOKENS,
) -> Traffic:
    """What to replay for `load`: the trace, or where there is none requests like the profile's."""
    traced = bool(requests) and profile.arrivals is not None
    if traced:
        assert profile.arrivals is not None
        planned = load.rate_rps / busy_rate(profile.arrivals)
        name = f"the trace, {len(requests):,} requests"
    else:
        # As many as ten minutes hold, so that the longest outputs are seen to their end.
        count = round(load.rate_rps * safety * DRAWN_S)
        count = min(max(count, DRAWN_REQUESTS_MIN), DRAWN_REQUESTS)
        drawn = synthesize(profile.at_rate(load.rate_rps), seed=SEED, requests=count)
        requests, planned = list(drawn), 1.0
        name = f"{count:,} requests drawn from the workload's lengths as a Poisson stream"
        block_tokens = profile.reuse.block_tokens if profile.reuse else block_tokens
    notes: tuple[str, ...] = ()
    if not names_blocks(block_tokens):
        requests = [replace(r, prefix_blocks=()) for r in requests]
        notes = (
            f"the trace's prefix blocks of {block_tokens} tokens do not divide into KV blocks of "
            f"{BLOCK_TOKENS_KV}, so no reuse was replayed",
        )
        block_tokens = BLOCK_TOKENS
    return Traffic(
        requests=tuple(requests),
        name=name,
        drawn=not traced,
        block_tokens=block_tokens,
        factor=planned * safety,
        planned=planned,
        positions_max=positions_max,
        notes=notes,
    )


def names_blocks(block_tokens: int) -> bool:
    """Whether blocks of a trace are whole KV blocks, or parts of one, by a power of two."""
    larger, smaller = max(block_tokens, BLOCK_TOKENS_KV), min(block_tokens, BLOCK_TOKENS_KV)
    parts, rest = divmod(larger, smaller)
    return not rest and not parts & (parts - 1)


def busy_rate(arrivals: Arrivals) -> float:
    """The rate of a busy minute: one in twenty is busier. The mean, where most are empty."""
    return arrivals.by_minute.p95 or arrivals.rate_rps


def busy_requests(reader: Iterable[Request], profile: Profile) -> tuple[Request, ...]:
    """The requests of a trace in order of arrival, of a long one those of its busiest hours.

    A trace may be larger than memory, so a long one is read a second time and only that part
    of it is kept: whole steps of the profile's series around the busiest one.
    """
    arrivals = profile.arrivals
    if arrivals is None:
        return ()
    if profile.requests <= HELD_REQUESTS_MAX:
        return tuple(sorted(reader, key=lambda r: r.arrival_ns))
    step_s, counts = arrivals.series_step_s, arrivals.series_rps
    sums = [0.0, *accumulate(rate * arrivals.series_step_s for rate in counts)]
    best = (0.0, 0, 0)
    last = 0
    for first in range(len(counts)):
        last = max(last, first + 1)
        while last < len(counts) and sums[last + 1] - sums[first] <= HELD_REQUESTS_MAX:
            last += 1
        best = max(best, ((sums[last] - sums[first]) / (last - first), -first, last))
    start_ns = min(r.arrival_ns for r in reader)
    low_ns = start_ns + round(-best[1] * step_s * 1e9)
    high_ns = start_ns + round(best[2] * step_s * 1e9)
    held = [r for r in reader if low_ns <= r.arrival_ns < high_ns]
    return tuple(sorted(held, key=lambda r: r.arrival_ns))


def copied(requests: Sequence[Request], *, copies: int, faster: float) -> list[Request]:
    """`copies` of the requests beside each other, all `faster` than recorded.

    Every copy has prefixes of its own: other users, not the same ones again.
    """
    start_ns = requests[0].arrival_ns
    names = max((max(r.prefix_blocks) for r in requests if r.prefix_blocks), default=0) + 1
    laid = []
    for copy in range(copies):
        for r in requests:
            arrival_ns = round((r.arrival_ns - start_ns) / faster) + copy * COPY_APART_NS
            patience_ns = None if r.deadline_ns is None else r.deadline_ns - r.arrival_ns
            laid.append(
                replace(
                    r,
                    arrival_ns=arrival_ns,
                    prefix_blocks=tuple(block + copy * names for block in r.prefix_blocks)
                    if copy
                    else r.prefix_blocks,
                    model="",  # all of them are asked of the model that is planned
                    deadline_ns=None if patience_ns is None else arrival_ns + patience_ns,
                )
            )
    laid.sort(key=lambda r: r.arrival_ns)
    return laid


def busiest(requests: tuple[Request, ...], requests_max: int) -> tuple[Request, ...]:
    """The stretch of so many consecutive requests with the most tokens a second."""
    if len(requests) <= requests_max:
        return requests
    tokens = [0, *accumulate(r.input_tokens + r.output_tokens for r in requests)]

    def rate(first: int) -> float:
        span_ns = requests[first + requests_max - 1].arrival_ns - requests[first].arrival_ns
        return (tokens[first + requests_max] - tokens[first]) / max(span_ns, 1)

    starts = range(0, len(requests) - requests_max + 1, max(requests_max // 20, 1))
    first = max(starts, key=lambda at: (rate(at), -at))
    return requests[first : first + requests_max]


def _cut(request: Request, positions_max: int, block_tokens: int) -> Request:
    """The request within what the model can read: the output is kept, the prompt is cut."""
    if request.input_tokens + request.output_tokens <= positions_max:
        return request
    outputs = min(request.output_tokens, positions_max // 2)
    inputs = max(positions_max - outputs, 1)
    blocks = request.prefix_blocks[: -(-inputs // block_tokens)]
    return replace(
        request, input_tokens=inputs, output_tokens=max(outputs, 1), prefix_blocks=blocks
    )
