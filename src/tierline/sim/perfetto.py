"""A run as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

`tierline sim` writes it.  A process for each replica, with a track of its steps, counters of
batch, queue and KV blocks, and a track for each request that is followed: those watched, and
the slowest.  Times are in microseconds, as the format wants them.

A long run has more steps than a viewer likes.  Above `STEPS_MAX` only steps during the lives
of the followed requests are written, and of those the first; the trace says so of itself.

    INV-SIM-24  slices of one track never overlap
"""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tierline.base.files import packed, whole_file
from tierline.kv.transfer import TIER_NAMES
from tierline.sim.columns import column
from tierline.sim.life import life, slowest
from tierline.sim.record import OUTCOMES, Run, Steps

STEPS_MAX = 100_000
SLOWEST = 20
FLEET = 0  # process of what belongs to no replica
STEPS_TRACK = 1
REQUESTS_TRACK = 100  # plus the number of the request

Event = dict[str, Any]


def write_perfetto(run: Run, path: Path) -> None:
    """Write the trace, gzip when the name ends in .gz."""
    followed = followed_requests(run)
    steps = written_steps(run, followed)
    about = {
        "policy": run.policy,
        "seed": run.seed,
        "hash": run.hash(),
        "steps": 0 if run.steps is None else len(run.steps),
        "steps_written": len(steps),
    }
    with whole_file(path) as file:
        target = packed(file) if path.suffix == ".gz" else file
        with io.TextIOWrapper(target, encoding="utf-8", newline="") as text:
            text.write(f'{{"displayTimeUnit":"ms","otherData":{json.dumps(about)}')
            text.write(',"traceEvents":[\n')
            for i, event in enumerate(trace_events(run, followed, steps)):
                text.write(",\n" if i else "")
                text.write(json.dumps(event, separators=(",", ":")))
            text.write("\n]}\n")


def trace_events(run: Run, followed: Iterable[int], steps: Iterable[int]) -> Iterator[Event]:
    """Names first, then the steps and requests with these numbers, then faults."""
    yield _named("process_name", FLEET, 0, "fleet")
    for replica in run.replicas:
        name = f"replica {replica.number} {replica.name}".rstrip()
        yield _named("process_name", replica.number + 1, 0, name)
        yield _named("thread_name", replica.number + 1, STEPS_TRACK, "steps")
    if run.steps is not None:
        for number in steps:
            yield from _step(run.steps, number)
    for request in followed:
        yield from _request(run, request)
    for fault in run.faults:
        yield _instant(FLEET, 0, fault.at_ps, fault.what, fault.why) | {"s": "g"}


def followed_requests(run: Run) -> list[int]:
    """Those watched, and the slowest to end and to begin, each once and in order."""
    late = [*slowest(run, SLOWEST), *slowest(run, SLOWEST, latency="ttft")]
    return sorted({*run.moments, *late})


def written_steps(run: Run, followed: Iterable[int]) -> Sequence[int]:
    """Numbers of the steps that the trace holds."""
    import numpy as np

    steps = run.steps
    if steps is None or len(steps) <= STEPS_MAX:
        return range(0 if steps is None else len(steps))
    start, end, replica = (column(steps, name) for name in ("start_ps", "end_ps", "replica"))
    kept = np.zeros(len(steps), dtype=bool)
    for request in followed:
        mine = replica == run.requests.replica[request]
        for stretch in life(run, request):
            kept |= mine & (start < stretch.end_ps) & (end > stretch.start_ps)
    numbers: list[int] = np.flatnonzero(kept)[:STEPS_MAX].tolist()
    return numbers


def _step(steps: Steps, i: int) -> Iterator[Event]:
    process, start_ps, repeats = steps.replica[i] + 1, steps.start_ps[i], steps.repeats[i]
    parts = [f"prefill {steps.prefill_tokens[i]}"] if steps.prefill_tokens[i] else []
    parts += [f"decode {steps.decodes[i]}"] if steps.decodes[i] else []
    yield {
        **_slice(process, STEPS_TRACK, start_ps, steps.end_ps[i]),
        "name": " + ".join(parts) + (f" × {repeats}" if repeats > 1 else ""),
        "args": {
            "repeats": repeats,
            "context_tokens": steps.context_tokens[i],
            "preempted": steps.preempted[i],
        },
    }
    blocks = [steps.pages_used[i], *(stored[i] for stored in steps.stored_blocks)]
    for name, values in (
        ("batch tokens", {"prefill": steps.prefill_tokens[i], "decode": steps.decodes[i]}),
        ("waiting", {"requests": steps.waiting[i]}),
        ("KV blocks", dict(zip(TIER_NAMES, blocks, strict=True))),
    ):
        yield {"ph": "C", "pid": process, "ts": _us(start_ps), "name": name, "args": values}


def _request(run: Run, request: int) -> Iterator[Event]:
    requests = run.requests
    process = requests.replica[request] + 1  # the fleet's when no replica finished it
    track = REQUESTS_TRACK + request
    level = run.levels[requests.level[request]].name if run.levels else ""
    yield _named("thread_name", process, track, f"request {request} {level}".rstrip())
    for stretch in life(run, request):
        yield {
            **_slice(process, track, stretch.start_ps, stretch.end_ps),
            "name": stretch.kind,
            "args": {
                "input_tokens": requests.input_tokens[request],
                "output_tokens": requests.output_tokens[request],
                "cached_tokens": requests.cached_tokens[request],
                "outcome": OUTCOMES[requests.outcome[request]],
            },
        }
    for moment in run.moments.get(request, ()):
        yield _instant(process, track, moment.at_ps, moment.what, moment.why) | {"s": "t"}


def _slice(process: int, track: int, start_ps: int, end_ps: int) -> Event:
    at, until = _us(start_ps), _us(end_ps)
    return {"ph": "X", "pid": process, "tid": track, "ts": at, "dur": until - at}


def _instant(process: int, track: int, at_ps: int, name: str, why: str) -> Event:
    place = {"ph": "i", "pid": process, "tid": track, "ts": _us(at_ps)}
    return place | {"name": name, "args": {"why": why}}


def _named(what: str, process: int, track: int, name: str) -> Event:
    return {"ph": "M", "pid": process, "tid": track, "name": what, "args": {"name": name}}


def _us(at_ps: int) -> float:
    return at_ps / 1e6
