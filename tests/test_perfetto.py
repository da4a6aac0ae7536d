"""A trace opens in Perfetto: well formed, a track never overlaps itself, nothing left out in
silence; the life of a request has no gap in it."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from runs import served_run
from tierline.base.clock import PS_PER_S
from tierline.sim import perfetto
from tierline.sim.life import KINDS, Stretch, life, slowest
from tierline.sim.measure import latencies_ps
from tierline.sim.perfetto import followed_requests, write_perfetto, written_steps
from tierline.sim.record import Moment, Run


def loaded(run: Run, path: Path) -> dict[str, Any]:
    write_perfetto(run, path)
    found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return found


@pytest.fixture(scope="module")
def run() -> Run:
    return served_run()


# --- lives ----------------------------------------------------------------------------------


def gaps(stretches: tuple[Stretch, ...], start_ps: int, end_ps: int) -> int:
    """Picoseconds that a life leaves out or counts twice."""
    edges = [start_ps, *(e for s in stretches for e in (s.start_ps, s.end_ps)), end_ps]
    return sum(abs(b - a) for a, b in zip(edges[::2], edges[1::2], strict=True))


def test_a_life_has_no_gap(run: Run) -> None:
    """INV-SIM-23, of every request that finished."""
    requests = run.requests
    for number in range(len(requests)):
        if requests.finish_ps[number] >= 0:
            stretches = life(run, number)

            assert gaps(stretches, requests.arrival_ps[number], requests.finish_ps[number]) == 0
            assert {s.kind for s in stretches} <= set(KINDS)


def test_a_missing_stretch_is_a_gap(run: Run) -> None:
    """Negative control of the test above."""
    first, *rest = life(run, 40)

    assert rest
    assert gaps(tuple(rest), first.start_ps, rest[-1].end_ps) == first.end_ps - first.start_ps


def test_moments_tell_what_columns_do_not_know() -> None:
    """Loaded, preempted, computed again: the kinds in their order, each for as long as it took."""
    watched = served_run(count=60)
    at = watched.requests.arrival_ps[9]
    turns = "arrived,behind,loading,admitted,chunk,first token,preempted,admitted,decoding,finished"
    watched.requests.finish_ps[9] = at + 9 * PS_PER_S
    watched.moments[9] = [
        Moment(at + i * PS_PER_S, what, "") for i, what in enumerate(turns.split(","))
    ]

    assert [(s.kind, (s.end_ps - s.start_ps) // PS_PER_S) for s in life(watched, 9)] == [
        ("queued", 2),
        ("loading", 2),
        ("prefill", 1),
        ("decode", 1),
        ("preempted", 1),
        ("prefill", 1),
        ("decode", 1),
    ]


def test_who_never_finished_ends_where_it_was_last_seen(run: Run) -> None:
    lost = served_run(count=60)
    arrival_ps = lost.requests.arrival_ps[3]
    assert life(lost, 3)[-1].end_ps == lost.end_ps  # nothing says when it was refused

    lost.moments[3] = [Moment(arrival_ps, "arrived", ""), Moment(arrival_ps + 5, "refused", "")]
    assert life(lost, 3) == (Stretch(kind="queued", start_ps=arrival_ps, end_ps=arrival_ps + 5),)


def test_the_slowest_come_first(run: Run) -> None:
    ttft_ps = latencies_ps(run.requests)["ttft"]
    found = slowest(run, 5, latency="ttft")

    assert [ttft_ps[i] for i in found] == sorted(ttft_ps, reverse=True)[:5]
    assert len(slowest(run, 10_000)) == 298  # who was refused or failed has no end


# --- the trace ------------------------------------------------------------------------------


def overlaps(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Slices that begin before the one before them on their track has ended."""
    ends: dict[tuple[int, int], float] = {}
    found = []
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        track = (event["pid"], event["tid"])
        if event["ts"] < ends.get(track, 0) - 1e-3:  # a nanosecond is the viewer's grain
            found.append(event)
        ends[track] = event["ts"] + event["dur"]
    return found


def test_no_track_overlaps_itself(run: Run, tmp_path: Path) -> None:
    """INV-SIM-24."""
    events = loaded(run, tmp_path / "trace.json.gz")["traceEvents"]

    assert overlaps(events) == []
    assert len([e for e in events if e["ph"] == "X"]) > 300


def test_a_longer_step_would_overlap(tmp_path: Path) -> None:
    """Negative control of the test above."""
    run = served_run(count=60)
    assert run.steps is not None
    run.steps.end_ps[10] += PS_PER_S

    assert len(overlaps(loaded(run, tmp_path / "trace.json.gz")["traceEvents"])) >= 1


def test_everything_is_named_and_every_step_is_there(run: Run, tmp_path: Path) -> None:
    trace = loaded(run, tmp_path / "trace.json.gz")
    events = trace["traceEvents"]
    named = {
        (e["pid"], e["tid"] if e["name"] == "thread_name" else None)
        for e in events
        if e["ph"] == "M"
    }
    steps = [e for e in events if e["ph"] == "X" and e["tid"] == perfetto.STEPS_TRACK]

    assert run.steps is not None
    assert trace["otherData"]["steps_written"] == len(steps) == len(run.steps)
    assert trace["otherData"]["hash"] == run.hash()
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} <= named
    assert {e["pid"] for e in events} <= {pid for pid, _ in named}
    assert {e["name"] for e in events if e["ph"] == "C"} == {"batch tokens", "waiting", "KV blocks"}
    assert any("half its speed" in e.get("args", {}).get("why", "") for e in events)
    assert any(e["ph"] == "i" and e["name"] == "chunk" for e in events)


def test_a_long_run_keeps_the_steps_of_the_followed_and_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perfetto, "STEPS_MAX", 50)
    about = loaded(run, tmp_path / "trace.json.gz")["otherData"]
    (slow,) = slowest(run, 1, latency="ttft")
    kept = written_steps(run, [slow])
    steps, requests = run.steps, run.requests

    assert steps is not None
    assert about["steps_written"] == 50 < about["steps"]
    assert kept
    for i in kept:
        assert steps.replica[i] == requests.replica[slow]
        assert steps.end_ps[i] > requests.arrival_ps[slow]
        assert steps.start_ps[i] < requests.finish_ps[slow]
    assert slow in followed_requests(run)


def test_equal_runs_are_equal_traces(tmp_path: Path) -> None:
    for name in "ab":
        write_perfetto(served_run(count=40), tmp_path / name / "trace.json.gz")

    assert (tmp_path / "a/trace.json.gz").read_bytes() == (
        tmp_path / "b/trace.json.gz"
    ).read_bytes()
