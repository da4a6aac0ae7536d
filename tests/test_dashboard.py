"""The dashboard says what was recorded: views of real recordings, and pages that stand alone."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import resources
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request

from engines import tiny_engine
from recorded import Arrival, life_of, record
from servers import Served, engine_of, served
from tierline.base.clock import PS_PER_S
from tierline.engine.engine import Engine
from tierline.server import dashboard
from tierline.server.dashboard_life import WORDS, Stretch, life_view, stretches
from tierline.server.dashboard_models import models_view
from tierline.server.dashboard_now import PERCENTILES, now_view
from tierline.server.dashboard_pages import PAGES, code, embedded, fragment
from tierline.server.dashboard_pictures import CELLS, beside_columns, memory_strip
from tierline.server.dashboard_plan import plan_view
from tierline.server.dashboard_requests import requests_view
from tierline.server.dashboard_seen import Seen
from tierline.server.life import Event, Life
from tierline.server.running import Running, running_of
from tiny_checkpoints import VOCABULARY, tiny_checkpoint

STATIC = resources.files("tierline.server") / "static"
LEVELS = ("interactive", "standard", "batch")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen2", tmp_path_factory.mktemp("dashboard"))


@pytest.fixture(scope="module")
def recording(checkpoint: Path) -> tuple[Seen, Running]:
    """Twenty requests that overlap, one of them cancelled, and what was seen just after."""
    engine = tiny_engine(checkpoint)
    running = running_of(engine)
    arrivals = [
        Arrival(
            at_s=1 + i * 1e-5,
            prompt=tuple((7 * i + j) % VOCABULARY for j in range(40 + 3 * i)),
            output_tokens=8 + i,
            level=LEVELS[i % 3],
            cancelled_after=4 if i == 5 else None,
        )
        for i in range(20)
    ]
    recorder = record(engine, running, arrivals)
    now_ps = engine.clock.now_ps()
    now_s = now_ps / PS_PER_S
    seen = Seen(
        now_ps=now_ps,
        now_s=now_s,
        started_s=0.0,
        model="tiny",
        state="ready",
        live=(),
        past=recorder.past,
        steps=recorder.steps,
        levels=running.levels,
        gaps_s={name: gaps.at(now_s, PERCENTILES) or () for name, gaps in recorder.gaps.items()},
    )
    return seen, running


def empty(running: Running) -> Seen:
    return Seen(
        now_ps=PS_PER_S,
        now_s=1.0,
        started_s=0.0,
        model="tiny",
        state="ready",
        live=(),
        past=(),
        steps=(),
        levels=running.levels,
        gaps_s={},
    )


# Now


def test_now_counts_what_was_recorded(recording):
    seen, _ = recording
    said = now_view(seen)["said"]
    for level in LEVELS:
        lives = [life for life in seen.past if life.level == level]

        assert said[f"{level} requests"][0] == str(len(lives))
        slowest_s = max(life.ttft_s for life in lives)
        assert said[f"{level} ttft p99"][1] == f"{slowest_s:.9f} s"
    last = seen.steps[-1]
    assert said["kv-held"][0] == "0 %"
    assert said["kv-cached"][1] == f"{last.kv_pages_cached:g} of {last.kv_pages:g}"


def test_now_draws_each_step_once_and_every_token(recording):
    seen, _ = recording
    numbers, decodes, tokens, _ = now_view(seen)["series"]["steps"]["columns"]
    steps = list(seen.steps)[-len(numbers) :]

    assert numbers == [step.number for step in steps]
    assert sum(decodes) == sum(step.decodes for step in steps)
    assert sum(tokens) - sum(decodes) == sum(step.prefill_tokens for step in steps)


def test_tokens_a_second_add_up(recording):
    """A first token comes of a prompt's last chunk, all others of decodes."""
    seen, _ = recording
    _, output, prompt = now_view(
        replace(seen, now_s=seen.now_s + 1, now_ps=seen.now_ps + PS_PER_S)
    )["series"]["rates"]["columns"]

    assert sum(output) == sum(life.output_tokens for life in seen.past)
    assert sum(prompt) == sum(life.prompt_tokens - life.cached_tokens for life in seen.past)


def test_a_broken_promise_is_said_first_and_a_kept_one_is_not_blamed(recording):
    seen, _ = recording
    view = now_view(seen)

    assert "every promise is kept" in view["said"]["answer"][0]
    assert view["said"]["interactive ttft kept"][0].startswith("✓ kept")

    slow = replace(seen, gaps_s={"interactive": (9.0, 9.0, 9.0)})

    view = now_view(slow)
    assert "interactive ITL p95 is 9.00 s, over its" in view["said"]["answer"][0]
    assert view["said"]["interactive itl kept"][0].startswith("✗ broken")


def test_who_waits_is_counted_by_class(recording):
    seen, running = recording
    arrival = Arrival(at_s=1.0, prompt=(1, 2, 3), output_tokens=4, level="batch")
    waiting = life_of(arrival, running, number=99)
    here = replace(seen, live=(waiting,), now_ps=waiting.arrival_ps + 70 * PS_PER_S)
    said = now_view(here)["said"]

    assert said["batch waiting"][0] == "1"
    assert said["interactive waiting"][0] == "0"
    assert "1 waits; the longest for 1 min" in said["answer"][0].replace(", the", "; the")


def test_nothing_recorded_is_said_and_what_would_fill_it(recording):
    _, running = recording
    seen = empty(running)

    assert now_view(seen)["said"]["answer"][0] == (
        "Ready and idle: no request has come since the start."
    )
    assert requests_view(seen, show="all", level="")["answer"].startswith("No request has come")
    assert plan_view(seen, running)["replayable"] == 0
    assert "nothing was computed yet" in models_view(seen, running)["answer"]


def test_what_is_old_is_not_recent(recording):
    seen, _ = recording
    later = replace(seen, now_ps=seen.now_ps + 301 * PS_PER_S)

    assert not later.recent()
    assert len(seen.recent()) == 20
    assert "no request in the last 5 min; 20 before that" in now_view(later)["said"]["answer"][0]


# Requests


def test_every_life_is_covered_by_its_stretches(recording):
    """INV-SRV-53."""
    seen, _ = recording
    for life in seen.past:
        parts = stretches(life, seen.now_ps)

        assert covers(parts, life)
        assert {part.kind for part in parts} <= set(WORDS)
        assert parts[-1].kind == "decode"
        prompt = next(part for part in parts if part.kind == "prompt")
        assert prompt.start_ps == life.admitted_ps


def covers(parts: Sequence[Stretch], life: Life) -> bool:
    ends = parts[0].start_ps == life.arrival_ps and parts[-1].end_ps == life.finished_ps
    return ends and all(a.end_ps == b.start_ps for a, b in pairwise(parts))


def test_a_hole_in_a_life_would_be_seen(recording):
    """The control: any stretch that is left out, or ends too early."""
    seen, _ = recording
    for life in seen.past:
        parts = stretches(life, seen.now_ps)
        for i, part in enumerate(parts):
            shorter = part._replace(end_ps=part.end_ps - 1)

            assert not covers([*parts[:i], shorter, *parts[i + 1 :]], life)
            assert len(parts) == 1 or not covers([*parts[:i], *parts[i + 1 :]], life)


def lived(*events: tuple[str, int, int], first: int | None, end: int | None) -> Life:
    life = Life(
        id="x",
        endpoint="chat",
        model="m",
        tenant="",
        key_id="",
        level="standard",
        priority=0,
        stream=True,
        arrived_s=0.0,
        arrival_ps=0,
        prompt_tokens=9,
        output_tokens_max=9,
    )
    life.events = [Event(kind, at, until) for kind, at, until in events]
    life.first_ps, life.finished_ps = first, end
    return life


@pytest.mark.parametrize(
    ("life", "kinds"),
    [
        (lived(("queued", 0, 0), first=None, end=5), ["queued"]),
        (
            lived(
                ("queued", 0, 0),
                ("loading", 2, 2),
                ("admitted", 4, 4),
                ("prefill", 4, 6),
                ("prefill", 7, 9),
                first=9,
                end=20,
            ),
            ["queued", "loading", "prompt", "decode"],
        ),
        (
            lived(
                ("queued", 0, 0),
                ("admitted", 1, 1),
                ("prefill", 1, 3),
                ("preempted", 5, 5),
                ("admitted", 8, 8),
                ("prefill", 8, 9),
                first=3,
                end=20,
            ),
            ["queued", "prompt", "decode", "preempted", "prompt", "decode"],
        ),
        (
            lived(("queued", 0, 0), ("admitted", 1, 1), ("prefill", 1, 3), first=None, end=None),
            ["queued", "prompt"],
        ),
    ],
)
def test_stretches_of_lives_of_every_kind(life, kinds):
    parts = stretches(life, 30)

    assert [part.kind for part in parts] == kinds
    assert parts[-1].end_ps == (life.finished_ps or 30)


def test_a_life_says_who_was_beside_it(recording):
    seen, _ = recording
    life = seen.past[-1]
    view = life_view(seen, life)
    others = sum(
        tokens
        for step in seen.steps
        if step.end_ps > life.arrival_ps and step.start_ps < life.finished_ps
        for request, tokens, _ in step.chunks
        if request not in life.engine_ids
    )

    assert f"{others:,} prompt tokens" in view["beside_title"]
    assert life not in [other for other, _ in view["others"]]
    assert f"{life.output_tokens} tokens at" in view["answer"]


def test_a_promise_that_was_missed_is_told(recording):
    seen, _ = recording
    kept = next(life for life in seen.past if life.ttft_limit_s is not None)
    missed = replace(kept, ttft_limit_s=1e-9)

    assert "later than the promised" in life_view(seen, missed)["answer"]
    assert "within the promised" in life_view(seen, kept)["answer"]


def test_requests_are_filtered_and_newest_first(recording):
    seen, _ = recording
    rows = requests_view(seen, show="all", level="")["rows"]
    failed = requests_view(seen, show="failed", level="")["rows"]
    batch = requests_view(seen, show="past", level="batch")["rows"]

    newest = sorted(seen.past, key=lambda life: life.arrival_ps, reverse=True)

    assert [row["id"] for row in rows] == [life.id for life in newest]
    assert [row["state"] for row in failed] == ["cancelled"]
    assert {row["level"] for row in batch} == {"batch"}
    assert not requests_view(seen, show="live", level="")["rows"]


# Pictures


def test_the_strip_fills_and_shows_the_least_block(recording):
    seen, _ = recording
    step = seen.steps[0]
    for held, cached in ((0, 0), (1, 1), (step.kv_pages, 0), (step.kv_pages // 2, 0)):
        free = step.kv_pages - held - cached
        drawn = memory_strip(replace(step, kv_pages_free=free, kv_pages_cached=cached))
        counts = [drawn.count(f'class="{kind}"') for kind in ("held", "cached", "free")]

        assert sum(counts) == CELLS
        assert (counts[0] > 0) == (held > 0)
        assert (counts[1] > 0) == (cached > 0)


def test_pictures_carry_no_inline_style(recording):
    """INV-SRV-52: the pages' policy would drop it."""
    seen, running = recording
    view = life_view(seen, seen.past[3])
    drawn = view["bar"] + view["beside"] + plan_view(seen, running)["curve"]
    drawn += models_view(seen, running)["bar"] + beside_columns([(1, 2), (0, 0)])

    assert "style=" not in drawn
    assert "<script" not in drawn


# Pages


def test_what_a_client_says_is_escaped(recording):
    seen, _ = recording
    life = replace(seen.past[0], error="<script>alert(1)</script>", tenant='"><b>', outcome="error")
    text = fragment("life.html.j2", view=life_view(seen, life), kept=1)

    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "<script>" not in code("`<script>`")


def test_data_blocks_cannot_be_ended_from_within():
    assert "</script>" not in embedded({"a": "</script><script>"})
    assert json.loads(embedded({"a": "</script>&"})) == {"a": "</script>&"}


def test_vendored_files_are_the_ones_that_were_written_down():
    told = re.findall(
        r"^(\S+) +\S+ +[\d.]+ .* ([0-9a-f]{64})$", (STATIC / "vendor/README").read_text(), re.M
    )

    assert len(told) == 3
    for name, sha256 in told:
        assert hashlib.sha256((STATIC / "vendor" / name).read_bytes()).hexdigest() == sha256


# Over HTTP


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return engine_of(checkpoint)


@pytest.fixture(scope="module")
def open_server(engine: Engine) -> Iterator[Served]:
    with served(engine) as server:
        yield server


@pytest.mark.parametrize("path", [path for path, _ in PAGES])
def test_every_page_stands_alone(open_server, path):
    """INV-SRV-52: complete without a script, nothing inline, nothing from elsewhere, small."""
    with httpx.Client(base_url=open_server.url) as client:
        answer = client.get(path)
        asked = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
        size = len(answer.content) + sum(
            len(client.get(url).content)
            for url in set(asked)
            if url.startswith("/dashboard/static")
        )

    assert answer.status_code == 200
    assert re.search(r"<h1[^>]*>\s*\S", answer.text)
    assert all(url.startswith(("/", "#")) for url in asked)
    assert not re.search(r'<script(?![^>]*(src=|type="application/json"))', answer.text)
    assert not re.search(r"\sstyle=|\son\w+=|javascript:", answer.text)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert size < 1_000_000


def test_a_request_is_there_while_it_runs_and_afterwards(open_server):
    with httpx.Client(base_url=open_server.url, timeout=30) as client:
        body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 5, "ignore_eos": True}
        made = client.post("/v1/completions", json=body)
        page = client.get(f"/dashboard/requests/{made.json()['id']}")
        rows = client.get("/dashboard/requests?rows=1")

        assert made.status_code == 200
        assert page.status_code == 200
        assert "5 tokens at" in page.text
        assert f"/dashboard/requests/{made.json()['id']}" in rows.text
        assert "<html" not in rows.text
        assert client.get("/dashboard/requests/nobody").status_code == 404


def unsaid(url: str) -> set[str]:
    """Places of the page of which its events say nothing, or the other way round."""
    with httpx.Client(base_url=url, timeout=30) as client:
        page = client.get("/dashboard").text
        with client.stream("GET", "/dashboard/events") as answer:
            lines = answer.iter_lines()
            name, data = next(lines), next(lines)
            assert answer.headers["content-type"].startswith("text/event-stream")
    said = json.loads(data.removeprefix("data: "))["said"]
    first = json.loads(re.search(r'id="first">(.*?)</script>', page)[1])["said"]

    assert name == "event: now"
    assert said["interactive requests"][0] in page
    return (set(re.findall(r'data-said="([^"]+)"', page)) - said.keys()) | (
        first.keys() ^ said.keys()
    )


def test_events_say_what_the_page_says(open_server):
    """INV-SRV-50."""
    assert unsaid(open_server.url) == set()


def test_events_that_say_less_would_be_seen(open_server, monkeypatch):
    """The control."""

    told = dashboard._told

    def less(request: Request) -> bytes:
        return told(request).replace(b'"answer":', b'"another":')

    monkeypatch.setattr(dashboard, "_told", less)

    assert unsaid(open_server.url) == {"answer", "another"}


def test_a_server_that_stops_ends_its_watchers_without_a_complaint(engine, caplog):
    heard: list[str] = []

    def watch(url: str) -> None:
        with httpx.stream("GET", f"{url}/dashboard/events", timeout=30) as answer:
            heard.extend(answer.iter_lines())
        heard.append("whole")  # a stream that is cut raises

    with served(engine) as server:
        watcher = threading.Thread(target=watch, args=(server.url,))
        watcher.start()
        while not heard:
            time.sleep(0.01)
    watcher.join(30)

    assert heard[-1] == "whole"
    assert "Exception in ASGI" not in caplog.text


def test_a_wrong_change_is_refused_with_a_hint(open_server):
    with httpx.Client(base_url=open_server.url, timeout=60) as client:
        for form, told in (
            ({"policy": "tierlin"}, "tierline"),
            ({"load": "many"}, "a number"),
            ({"colour": "red"}, "colour"),
        ):
            answer = client.post("/dashboard/what-if", data=form, headers={"hx-request": "true"})

            assert answer.status_code == 200
            assert "✗" in answer.text
            assert told in answer.text


def test_what_if_shows_three_sides(open_server):
    with httpx.Client(base_url=open_server.url, timeout=90) as client:
        body = {"model": "tiny", "prompt": [5] * 40, "max_tokens": 9, "ignore_eos": True}
        for _ in range(3):
            client.post("/v1/completions", json=body)
        part = client.post("/dashboard/what-if", data={"load": "2"}, headers={"hx-request": "true"})
        whole = client.post("/dashboard/what-if", data={"load": "2"})

    assert "load x 2" in part.text
    assert "<html" not in part.text
    assert "simulated<br>as it is" in part.text
    assert "<html" in whole.text
    assert "load x 2" in whole.text


# Who may watch


TOKEN = "admin-token-of-this-test"


@pytest.fixture
def closed_server(engine: Engine) -> Iterator[Served]:
    with served(engine, keys=("sk-one-two-three-four-five-six",), admin_token=TOKEN) as server:
        yield server


def test_pages_are_behind_the_admin_token_where_keys_are_needed(closed_server):
    """INV-SRV-51."""
    secret = [path for path, _ in PAGES] + ["/dashboard/events", "/dashboard/requests/x"]
    with httpx.Client(base_url=closed_server.url) as client:
        for path in secret:
            answer = client.get(path)

            assert answer.status_code == 303, path
            assert answer.headers["location"] == "/login"
        assert client.post("/dashboard/what-if").status_code == 303
        wrong = client.post("/login", data={"token": "sk-one-two-three-four-five-six"})
        assert wrong.status_code == 401
        assert "set-cookie" not in wrong.headers

        right = client.post("/login", data={"token": TOKEN})
        cookie = right.headers["set-cookie"].lower()
        assert right.headers["location"] == "/dashboard"
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert TOKEN not in cookie
        assert client.get("/dashboard").status_code == 200
        assert client.get("/login").status_code == 303
        keyless = {"model": "tiny", "prompt": [1], "max_tokens": 1}
        assert client.post("/v1/completions", json=keyless).status_code == 401


def test_signing_in_takes_a_small_form(closed_server):
    with httpx.Client(base_url=closed_server.url) as client:
        answer = client.post("/login", data={"token": "x" * 20_000})

    assert answer.status_code == 413
