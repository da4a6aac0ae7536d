"""Does a server that is loaded for long keep its books, its memory and its word?

Question   500 clients at once on the demo model, for ten minutes: chats and completions, streamed
           and whole, of every class, some with a deadline; one in five leaves, in the queue or
           in the middle of its answer.
Wanted     every request that was taken in has one recorded outcome and no more; whoever read an
           answer to its end is on record as served; no KV block is held at the end; nothing but
           ordinary events in the log; memory that does not grow (its slope over the second half).
Method     `tierline serve demo` is one process, the clients another, memory is read from /proc
           every second, and how long /health takes then: it waits for nothing but the event
           loop.  The KV cache is small, so that all of it has been touched before the
           second half begins.  Latencies are the clients' own: with 500 of them before one CPU,
           nearly all of it is waiting.  Exit status 1 when something is not as wanted.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from server_process import ServerProcess, rows, serving

CLIENTS, SECONDS, LEAVING = 500, 600.0, 0.2
TOKENS_MAX = 24  # of an answer: many of them end
KV_BYTES = "150MB"  # 6,500 tokens
SLOPE_MAX_MB_PER_MIN = 1.0
PATIENCE_S = 600.0  # once nothing new is asked for; beyond it, something hangs
CLASSES = ("interactive", "standard", "standard", "batch")
WORDS = [
    "the",
    "sea",
    "is",
    "calm",
    "tonight",
    "and",
    "tall",
    "ships",
    "lie",
    "upon",
    "straits",
    "while",
    "french",
    "lights",
    "gleam",
]
DONE = b"data: [DONE]\n\n"


# --- the clients, a process of their own ------------------------------------------------------


@dataclass
class Seen:
    """What the clients saw."""

    sent: int = 0
    whole: list[str] = field(default_factory=list)  # ids of answers read to their end
    left: list[str] = field(default_factory=list)  # ids of answers begun and left
    left_unanswered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    tokens: int = 0


def body_of(draw: random.Random, model: str) -> tuple[str, dict[str, Any]]:
    """A path and what is asked there."""
    stream = draw.random() < 0.75
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": draw.randint(1, TOKENS_MAX),
        "stream": stream,
        "slo": draw.choice(CLASSES),
        "temperature": draw.choice([0, 0.8]),
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    if draw.random() < 0.05:
        body["deadline_ms"] = draw.choice([100, 5_000, 60_000])
    if draw.random() < 0.05:
        body["n"] = 2
    text = " ".join(draw.choices(WORDS, k=draw.randint(1, 40)))
    if draw.random() < 0.5:
        return "/v1/completions", body | {"prompt": text}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}


async def ask(
    port: int, model: str, stay_s: float, until_s: float, draw: random.Random, seen: Seen
) -> None:
    """One request on a connection of its own, read to its end or left before it.

    Late work has two percent of an overloaded server: who stays waits until the load is over.
    """
    path, body = body_of(draw, model)
    leaves = draw.random() < LEAVING
    end_s = time.perf_counter() + draw.uniform(0.0, stay_s) if leaves else until_s + PATIENCE_S
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(text)}\r\n\r\n"
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionResetError:  # it ended between taking the connection and taking us
        seen.broken["not connected"] += 1
        return
    data = b""
    began_s, first_s = time.perf_counter(), 0.0
    try:
        writer.write(head.encode() + text)
        seen.sent += 1
        async with asyncio.timeout(end_s - time.perf_counter()):
            while part := await reader.read(1 << 16):
                first_s = first_s or time.perf_counter()
                data += part
                if leaves and b"data: " in data and draw.random() < 0.2:
                    raise TimeoutError
        seen_whole(seen, data, body["stream"])
        seen.first_s.append(first_s - began_s)
        seen.total_s.append(time.perf_counter() - began_s)
    except TimeoutError:
        if not leaves:
            seen.broken["no answer"] += 1
        elif b"data: " in data:
            seen.left.append(id_in(data))
        else:
            seen.left_unanswered += 1
    except (OSError, ValueError) as error:
        seen.broken[type(error).__name__ + ": " + str(error)[:100]] += 1
    finally:
        writer.transport.abort()


def seen_whole(seen: Seen, data: bytes, stream: bool) -> None:
    """An answer to its end; raises `ValueError` when it is not one."""
    head, _, rest = data.partition(b"\r\n\r\n")
    status = head.split(b" ")[1].decode() if head else "nothing"
    if status != "200":
        error = json.loads(rest)["error"]
        seen.refused[f"{status} {error['code']}"] += 1
        return
    if stream and DONE not in rest:
        raise ValueError("a stream without an end")
    if b'"error":{' in rest:
        raise ValueError("an error in an answer")
    at = rest.rindex(b'"completion_tokens":') + len(b'"completion_tokens":')
    seen.tokens += int(rest[at : at + 8].split(b",")[0])
    seen.whole.append(id_in(data))


def id_in(data: bytes) -> str:
    """The request's id: in its header, or in its first chunk."""
    for mark, end in ((b"x-request-id: ", b"\r"), (b'"id":"', b'"')):
        at = data.find(mark)
        if at >= 0:
            return data[at + len(mark) :].split(end)[0].decode()
    raise ValueError("no id in " + repr(data[:100]))


async def clients(
    port: int, count: int, seconds: float, *, seed: int, model: str = "demo", stay_s: float = 40.0
) -> dict[str, Any]:
    """`count` clients ask again and again until the time is over, and then wait to the end.

    Who will leave does so within `stay_s`.  All stop as soon as nobody is listening.
    """
    seen = Seen()
    until_s = time.perf_counter() + seconds

    async def client(number: int) -> None:
        draw = random.Random(f"{seed} {number}")
        await asyncio.sleep(draw.uniform(0, stay_s / 20))
        with suppress(ConnectionRefusedError):
            while time.perf_counter() < until_s:
                await ask(port, model, stay_s, until_s, draw, seen)

    await asyncio.gather(*map(client, range(count)))
    return {
        "sent": seen.sent,
        "whole": seen.whole,
        "left": seen.left,
        "left_unanswered": seen.left_unanswered,
        "refused": seen.refused,
        "broken": seen.broken,
        "tokens": seen.tokens,
        "first_s": quantiles(seen.first_s),
        "total_s": quantiles(seen.total_s),
        "cpu_s": round(time.process_time(), 1),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cut = statistics.quantiles(values, n=100)
    return {f"p{p}": round(cut[p - 1], 3) for p in (50, 95, 99)}


# --- what came of it ------------------------------------------------------------------------


@dataclass
class Watched:
    """The server as it is seen from outside, once a second for as long as the clients are there."""

    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds, bytes
    health_s: list[float] = field(default_factory=list)

    def look(self, server: ServerProcess, at_s: float) -> None:
        asked_s = time.perf_counter()
        with urllib.request.urlopen(f"{server.url}/health", timeout=60) as answer:
            answer.read()
        self.health_s.append(time.perf_counter() - asked_s)
        self.memory.append((at_s, float(server.rss_bytes)))


def watched(process: "subprocess.Popen[bytes]", server: ServerProcess) -> Watched:
    start_s, found = time.monotonic(), Watched()
    while process.poll() is None:
        found.look(server, time.monotonic() - start_s)
        time.sleep(1)
    return found


def slope(samples: list[tuple[float, float]]) -> tuple[float, float]:
    """MB a minute by least squares, and its standard error (as if samples were independent)."""
    if len(samples) < 3:
        return 0.0, 0.0
    x, y = zip(*samples, strict=True)
    fit = statistics.linear_regression(x, y)
    spread = sum((at - statistics.fmean(x)) ** 2 for at in x)
    left = sum((b - fit.intercept - fit.slope * a) ** 2 for a, b in samples)
    error = (left / (len(x) - 2) / spread) ** 0.5
    return fit.slope * 60 / 1e6, error * 60 / 1e6


def blocks_held(server: ServerProcess, folder: Path) -> int:
    """As the operator is told, by the engine itself."""
    token = (folder / "admin.token").read_text().strip()
    asked = urllib.request.Request(
        f"{server.url}/admin/tiers", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return sum(tier["blocks_held"] for tier in json.load(answer)["data"])


def wrong(seen: dict[str, Any], told: dict[str, Any]) -> list[str]:
    """What does not agree between what clients saw, the records, the metrics and the log."""
    found = []
    recorded = dict(told["records"])
    if len(recorded) != len(told["records"]):
        found.append("a request is recorded twice")
    if sorted(told["logged"]) != sorted(recorded.items()):
        found.append("log and records differ")
    outcomes = Counter(told["metrics"])
    refused = outcomes.pop("refused", 0)
    if outcomes != Counter(recorded.values()):
        found.append(f"metrics say {outcomes}, records {Counter(recorded.values())}")
    unserved = [i for i in seen["whole"] if recorded.get(i) not in ("stop", "length")]
    if unserved:
        found.append(f"{len(unserved)} were answered, and are not recorded as served")
    missing = [i for i in seen["left"] if i not in recorded]
    if missing:
        found.append(f"{len(missing)} were begun, and are not on record")
    accepted = len(recorded) + refused
    if not seen["sent"] - seen["left_unanswered"] <= accepted <= seen["sent"]:
        found.append(f"{accepted} outcomes of {seen['sent']} sent")
    if seen["broken"]:
        found.append(f"clients saw {seen['broken']}")
    if told["never_ended"]:
        found.append(f"{told['never_ended']} never ended")
    if told["blocks_held"] or told["running"]:
        found.append(f"{told['blocks_held']} blocks held, {told['running']} requests running")
    if told["troubles"]:
        found.append(f"in the log: {told['troubles'][:3]}")
    return found


def told_by(server: ServerProcess, folder: Path) -> dict[str, Any]:
    """The server's own view, once nobody is there."""
    give_up_s = time.monotonic() + 30
    while server.metric("vllm:num_requests_running") and time.monotonic() < give_up_s:
        time.sleep(0.5)
    ended = [event for event in server.events() if event["message"] == "request ended"]
    troubles = [e for e in server.events() if e["level"] not in ("info", "debug")]
    samples = server.samples()
    metrics: Counter[str] = Counter()
    for name, labels, value in samples:
        if name == "tierline:requests_total" and value:
            metrics[labels["outcome"]] += int(value)
    return {
        "records": rows(folder, "SELECT request_id, outcome FROM usage"),
        "logged": [(e["request_id"], e["outcome"]) for e in ended if e["outcome"] != "refused"],
        "metrics": dict(metrics),
        "running": server.metric("vllm:num_requests_running"),
        "preemptions": server.metric("vllm:num_preemptions_total"),
        "blocks_held": blocks_held(server, folder),
        "troubles": troubles,
    }


def never_ended(server: ServerProcess) -> int:
    """Lives that were still there when a server that nobody asked any more was told to end."""
    (draining,) = [event for event in server.events() if event["message"] == "draining"]
    return int(draining["requests"])


def soak(count: int, seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    """The figures, and under `wrong` what is not as wanted."""
    data = folder / "data"
    options = ["--data", data, "--kv-bytes", KV_BYTES, "--open-max", str(2 * count)]
    with serving("demo", *options, log=folder / "log") as server:
        asked = {"port": server.port, "count": count, "seconds": seconds, "seed": seed}
        command = [sys.executable, __file__, "--client", json.dumps(asked)]
        report = folder / "seen.json"  # not a pipe: nobody reads while memory is watched
        before_bytes = server.rss_bytes
        with report.open("wb") as out, subprocess.Popen(command, stdout=out) as process:
            seen_from_outside = watched(process, server)
        seen = json.loads(report.read_bytes())
        told = told_by(server, data)
        status = server.end()
        told["never_ended"] = never_ended(server)
    samples = seen_from_outside.memory
    loaded = [sample for sample in samples if sample[0] <= seconds]
    grows, error = slope(loaded[len(loaded) // 2 :])
    failures = wrong(seen, told)
    if status:
        failures.append(f"it ended with {status}")
    if grows > SLOPE_MAX_MB_PER_MIN + 2 * error and seconds >= SECONDS:
        failures.append(f"memory grows by {grows:.2f} MB/min")
    return {
        "clients": count,
        "seconds": seconds,
        "sent": seen["sent"],
        "answered": len(seen["whole"]),
        "left": len(seen["left"]) + seen["left_unanswered"],
        "refused": seen["refused"],
        "outcomes": told["metrics"],
        "preemptions": told["preemptions"],
        "tokens_per_s": round(seen["tokens"] / samples[-1][0], 1),
        "first_s": seen["first_s"],
        "total_s": seen["total_s"],
        "health_s": quantiles(seen_from_outside.health_s),
        "rss_mb": [round(b / 1e6, 1) for b in (before_bytes, loaded[-1][1], samples[-1][1])],
        "slope_mb_per_min": round(grows, 3),
        "slope_error_mb_per_min": round(error, 3),
        "rss_every_minute_mb": [round(b / 1e6) for _, b in samples[::60]],
        "client_cpu_s": seen["cpu_s"],
        "wrong": failures,
    }


def main() -> int:
    """One JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.client:
        import uvloop

        print(json.dumps(uvloop.run(clients(**json.loads(asked.client)))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(asked.clients, asked.seconds, asked.seed, Path(folder))
    print(json.dumps({"benchmark": "server_soak", **figures}))
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
