"""The life of one request as stretches of time: queued, loading, prefill, preempted, decode.

The trace, the page and `tierline explain` all draw these.  Where the run watched the request,
its moments cut the life; else its columns do, which know no load and no preemption.

    INV-SIM-23  the stretches of a life follow each other without a gap, from its arrival to
                its end
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tierline.sim.columns import column
from tierline.sim.measure import latencies_ps
from tierline.sim.record import FINISHED, Moment, Run

BESIDE_MAX = 14
KINDS = ("queued", "loading", "prefill", "preempted", "decode")

# What a moment turns the life into; what is not listed is told, and turns nothing.
TURNS = {
    "arrived": "queued",
    "loading": "loading",
    "chunk": "prefill",
    "first token": "decode",
    "decoding": "decode",
    "preempted": "preempted",
    "overtaken": "queued",
    "lost": "queued",
    "handed over": "loading",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A time in which one thing happened to a request."""

    kind: str  # one of KINDS
    start_ps: int
    end_ps: int


def life(run: Run, request: int) -> tuple[Stretch, ...]:
    """What the request did from its arrival to its end, or to the end of the run."""
    requests = run.requests
    arrival_ps, finish_ps = requests.arrival_ps[request], requests.finish_ps[request]
    end_ps = finish_ps if finish_ps >= 0 else run.end_ps
    moments = run.moments.get(request)
    if requests.outcome[request] != FINISHED and moments:
        end_ps = moments[-1].at_ps
    turns = [(arrival_ps, "queued"), *(_watched(moments) if moments else _known(run, request))]
    cut: list[Stretch] = []
    for (start_ps, kind), (until_ps, _) in zip(turns, [*turns[1:], (end_ps, "")], strict=True):
        if cut and cut[-1].kind == kind:
            start_ps = cut.pop().start_ps
        if until_ps > start_ps:
            cut.append(Stretch(kind=kind, start_ps=start_ps, end_ps=until_ps))
    return tuple(cut)


def _watched(moments: Sequence[Moment]) -> list[tuple[int, str]]:
    """Turns from moments; admission begins the prefill unless a load has begun it."""
    turns: list[tuple[int, str]] = []
    for moment in moments:
        kind = TURNS.get(moment.what)
        if moment.what == "admitted" and (not turns or turns[-1][1] != "loading"):
            kind = "prefill"
        if kind is not None:
            turns.append((moment.at_ps, kind))
    return turns


def _known(run: Run, request: int) -> list[tuple[int, str]]:
    """Turns from the columns of a request that nobody watched."""
    requests = run.requests
    marks = (
        (requests.admitted_ps[request], "prefill"),
        (requests.first_ps[request], "decode"),
    )
    return [(at_ps, kind) for at_ps, kind in marks if at_ps >= 0]


def slowest(run: Run, count: int, *, latency: str = "e2e") -> list[int]:
    """The requests with the largest latency, slowest first; the earlier one among equals."""
    import numpy as np

    values = latencies_ps(run.requests)[latency]
    order = np.argsort(-values, kind="stable")[:count]
    return [int(i) for i in order if values[i] >= 0]


def beside(
    run: Run, request: int, *, start_ps: int, end_ps: int, most: int = BESIDE_MAX
) -> list[int]:
    """Who was served on its replica between two instants: the longest there, in their turn.

    Served is whoever was admitted and has had its first token by the end.
    """
    import numpy as np

    requests = run.requests
    admitted, finish = column(requests, "admitted_ps"), column(requests, "finish_ps")
    first = column(requests, "first_ps")
    left_ps = np.where(finish >= 0, finish, run.end_ps)
    shared = np.minimum(left_ps, end_ps) - np.maximum(admitted, start_ps)
    here = (column(requests, "replica") == requests.replica[request]) & (admitted >= 0)
    here &= (first >= 0) & (first <= end_ps) & (shared > 0)
    here[request] = False
    order = np.argsort(-np.where(here, shared, -1), kind="stable")[:most]
    return sorted((int(i) for i in order if here[i]), key=lambda i: (int(admitted[i]), i))


def beside_its_wait(run: Run, request: int) -> list[int]:
    """Who was served while it waited for its first token."""
    requests = run.requests
    first_ps = requests.first_ps[request]
    end_ps = first_ps if first_ps >= 0 else run.end_ps
    return beside(run, request, start_ps=requests.arrival_ps[request], end_ps=end_ps)
