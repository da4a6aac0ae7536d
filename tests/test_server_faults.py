"""What goes wrong around a server gives a clear answer, and whoever can be served is: a start that
cannot succeed says why and ends with 2, a signal drains, a kill loses no record, a fault of the
engine is told to everybody, and a client that does not read costs itself only."""

import asyncio
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

import servers
from edge import Client, post, until
from server_process import ServerProcess, refused, rows, serving
from servers import Served, engine_of, served
from tierline.base.clock import PS_PER_S
from tierline.cli import main
from tierline.engine.clock import SystemClock
from tierline.engine.engine import Engine
from tierline.server.app import application
from tierline.server.database import FILE_NAME
from tierline.server.life import Life
from tierline.server.running import running_of
from tierline.server.serve import listening, opened
from tierline.server.server import Settings
from tierline.server.sse import EventStream
from tiny_checkpoints import tiny_chat_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from bench_server_soak import clients as soak_clients

NAME = "tiny-llama"  # as a server calls what lies in this folder
LONG = 5_000  # tokens that nobody waits for
SLOW = "import time\nfrom tierline.engine.engine import Engine\nstep = Engine.step\n"
SLOW += "Engine.step = lambda self: (time.sleep(0.01), step(self))[1]\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of so many positions that a stream can last."""
    folder = tmp_path_factory.mktemp("faults")
    return tiny_chat_checkpoint(folder, max_position_embeddings=8192)


def tiny_server(
    tiny: Path, tmp_path: Path, *options: str | Path, first: str = ""
) -> AbstractContextManager[ServerProcess]:
    engine = ("--device=cpu", "--kernels=torch", "--kv-bytes=20MB")
    return serving(tiny, *engine, *options, log=tmp_path / "log", first=first)


# --- clients ----------------------------------------------------------------------------------


@dataclass
class Streamed:
    """What one client saw of one stream."""

    begun: Future[None]
    events: list[dict[str, Any]]
    done: bool = False  # it had its proper end
    cut: str = ""  # or how it was broken off
    status: int = 0

    @property
    def errors(self) -> list[dict[str, Any]]:
        return [event["error"] for event in self.events if "error" in event]

    @property
    def finish_reason(self) -> str | None:
        return next(
            (
                choice["finish_reason"]
                for event in self.events
                for choice in event.get("choices", ())
                if choice["finish_reason"]
            ),
            None,
        )


class Clients:
    """Streams that are read in the background."""

    def __init__(self, url: str, pool: ThreadPoolExecutor) -> None:
        self.http = httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_connections=100))
        self.pool = pool
        self.reading: list[Future[None]] = []

    def stream(self, tokens: int, **fields: Any) -> Streamed:
        """A stream, of which one chunk at least has come."""
        seen = Streamed(Future(), [])
        body = {"prompt": "a", "max_tokens": tokens, "stream": True, "ignore_eos": True, **fields}
        self.reading.append(self.pool.submit(self._read, body, seen))
        seen.begun.result(60)
        return seen

    def _read(self, body: dict[str, Any], seen: Streamed) -> None:
        try:
            with self.http.stream("POST", "/v1/completions", json={"model": NAME, **body}) as told:
                seen.status = told.status_code
                for line in told.iter_lines():
                    if line == "data: [DONE]":
                        seen.done = True
                    elif line.startswith("data: "):
                        seen.events.append(json.loads(line[6:]))
                        if not seen.begun.done():
                            seen.begun.set_result(None)
        except httpx.HTTPError as error:
            seen.cut = type(error).__name__
        finally:
            if not seen.begun.done():
                seen.begun.set_exception(AssertionError(f"it never began: {seen}"))

    def ask(self, tokens: int = 2, **fields: Any) -> httpx.Response:
        """A short completion, in one piece."""
        body = {"model": NAME, "prompt": "a", "max_tokens": tokens, "ignore_eos": True}
        return self.http.post("/v1/completions", json=body | fields)

    def settle(self) -> None:
        """Until every stream has ended somehow."""
        for reading in self.reading:
            reading.result(60)


@contextmanager
def clients_of(url: str) -> Iterator[Clients]:
    with ThreadPoolExecutor(40) as pool:
        clients = Clients(url, pool)
        try:
            yield clients
            clients.settle()
        finally:
            clients.http.close()


# --- a start that cannot succeed ----------------------------------------------------------------

Break = Callable[[Path, Path], list[str | Path]]


def copied(tiny: Path, folder: Path) -> Path:
    return Path(shutil.copytree(tiny, folder / "model"))


def cut_weights(tiny: Path, folder: Path) -> list[str | Path]:
    path = copied(tiny, folder)
    (weights,) = path.glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    return [path]


def no_weights(tiny: Path, folder: Path) -> list[str | Path]:
    path = copied(tiny, folder)
    for weights in path.glob("*.safetensors"):
        weights.unlink()
    return [path]


def broken_config(tiny: Path, folder: Path) -> list[str | Path]:
    path = copied(tiny, folder)
    (path / "config.json").write_text('{"hidden_size": 64,')
    return [path]


def broken_tokenizer(tiny: Path, folder: Path) -> list[str | Path]:
    path = copied(tiny, folder)
    (path / "tokenizer.json").write_text('{"model":')
    return [path]


def other_shape(tiny: Path, folder: Path) -> list[str | Path]:
    path = copied(tiny, folder)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    return [path]


def nan_weights(tiny: Path, folder: Path) -> list[str | Path]:
    path = copied(tiny, folder) / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"].fill_(math.nan)
    save_file(weights, path, metadata={"format": "pt"})
    return [path.parent]


def no_gguf(tiny: Path, folder: Path) -> list[str | Path]:
    path = folder / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(range(256)))
    return [path]


def nothing_there(tiny: Path, folder: Path) -> list[str | Path]:
    return [folder / "no-such-model"]


def file_for_folder(tiny: Path, folder: Path) -> list[str | Path]:
    (folder / "data").write_text("mine")
    return [tiny, "--data", folder / "data"]


def foreign_data(tiny: Path, folder: Path) -> list[str | Path]:
    (folder / FILE_NAME).write_bytes(b"not a database at all" * 100)
    return [tiny, "--data", folder]


def broken_deployment(tiny: Path, folder: Path) -> list[str | Path]:
    (folder / "deployment.toml").write_text("[model\n")
    return [folder / "deployment.toml"]


STARTS: list[tuple[str, Break, str, str]] = [
    ("no such host", lambda model, _: [model, "--host=256.0.0.1"], "cannot listen on", "--host"),
    ("no such port", lambda model, _: [model, "--port=70000"], "--port is 70000", "65535"),
    ("no room", lambda model, _: [model, "--open-max=0"], "--open-max is 0", "1 or more"),
    ("no key", lambda model, _: [model, "--host=0.0.0.0"], "has no key", "--key"),
    ("no memory", lambda model, _: [model, "--kv-bytes=1kB"], "", ""),
    ("no model", nothing_there, "no-such-model", "demo"),
    ("model cut short", cut_weights, "safetensors", "again"),
    ("model without weights", no_weights, "weights|safetensors", ""),
    ("model of another shape", other_shape, "does not hold the weights", ""),
    ("model of NaN", nan_weights, "does not answer: .*NaN", "checkpoint"),
    ("config broken", broken_config, r"config\.json", ""),
    ("tokenizer broken", broken_tokenizer, r"tokenizer\.json", ""),
    ("GGUF broken", no_gguf, r"model\.gguf", ""),
    ("data folder is a file", file_for_folder, "cannot keep data in", "data folder"),
    ("data is not ours", foreign_data, "damaged", "restore it"),
    ("deployment broken", broken_deployment, r"deployment\.toml", ""),
]


def told_by(words: str) -> tuple[str, str]:
    """The message and the hint of a command that failed as it should."""
    assert "Traceback" not in words
    error, _, hint = words.partition("\n\nhint: ")
    assert error.startswith("error: "), words
    return error, hint


def refused_here(
    capsys: pytest.CaptureFixture[str], *options: str | Path, port: int = 0
) -> tuple[int, str]:
    """As `refused`, in this process: most of its time is a new process's imports."""
    status = main(["serve", f"--port={port}", *map(str, options)])
    out, words = capsys.readouterr()
    assert not out
    return status, words


@pytest.mark.parametrize("how", ["here", pytest.param("process", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("broken", "said", "hint"), [s[1:] for s in STARTS], ids=[s[0] for s in STARTS]
)
def test_a_start_that_cannot_succeed_says_why(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    broken: Break,
    said: str,
    hint: str,
    how: str,
) -> None:
    """INV-SRV-6: 2, what is wrong, and what to do where that is not plain from it."""
    options = broken(tiny, tmp_path)
    status, words = refused(*options) if how == "process" else refused_here(capsys, *options)
    told = told_by(words)

    assert status == 2
    assert re.search(said, told[0])
    assert hint in told[1]


BINDS_FIRST = """
import socket
from tierline.server import serve
load, other = serve.open_engine, socket.socket()
other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
def loaded_late(*given):
    other.bind(("127.0.0.1", int({port})))
    other.listen()
    return load(*given)
serve.open_engine = loaded_late
"""


def test_a_port_that_is_taken_is_not_shared(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, words = refused_here(capsys, tiny, port=port)

    said_of_a_port(port, status, words)


@pytest.mark.slow
def test_a_port_that_is_taken_while_the_model_is_loaded_is_not_shared(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    status, words = refused(tiny, f"--port={port}", first=BINDS_FIRST.format(port=port))

    said_of_a_port(port, status, words)


def said_of_a_port(port: int, status: int, words: str) -> None:
    assert status == 2
    assert f"cannot listen on port {port}" in told_by(words)[0]
    assert "--port 0" in told_by(words)[1]


@pytest.mark.slow
def test_a_data_folder_has_one_server(tiny: Path, tmp_path: Path) -> None:
    """The second says who has it, and the first serves on."""
    with tiny_server(tiny, tmp_path, "--data", tmp_path / "data") as server:
        status, words = refused(tiny, "--data", tmp_path / "data")
        with clients_of(server.url) as clients:
            answer = clients.ask()
        ended = server.end()

    assert (status, ended, answer.status_code) == (2, 0, 200)
    assert f"in use by process {server.process.pid}" in told_by(words)[0]


def mounted(folder: Path, options: str) -> None:
    """A small disk; skips where nobody may mount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount; what the state does then, tests/test_state.py shows")


@contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    mounted(folder, options)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_read_only_data_folder_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Permission bits do not bind root; a disk that is mounted read-only does."""
    with disk(tmp_path / "disk", "ro,size=1m") as folder:
        found = [refused_here(capsys, tiny, "--data", data) for data in (folder / "new", folder)]

    for status, words in found:
        assert status == 2
        assert "Read-only file system" in told_by(words)[0]
        assert "that you may write to" in told_by(words)[1]


@pytest.mark.slow
def test_a_full_disk_stops_no_answer_and_loses_no_record(tiny: Path, tmp_path: Path) -> None:
    """While there is no room it is not ready and says why; with room all is written."""
    with (
        disk(tmp_path / "disk", "size=2m") as folder,
        tiny_server(tiny, tmp_path, "--data", folder / "data") as server,
        clients_of(server.url) as clients,
    ):
        assert clients.ask().status_code == 200
        fill(folder / "ballast")
        while server.metric("tierline:ready"):
            assert clients.ask().status_code == 200
        ready = clients.http.get("/ready")
        answers = [clients.ask() for _ in range(5)]
        waiting = server.metric("tierline:usage_records_pending")
        (folder / "ballast").unlink()
        until(lambda: not server.metric("tierline:usage_records_pending"), "records", seconds=20)
        again = clients.http.get("/ready").status_code
        served_ = server.metric("tierline:requests_total")
        status = server.end()
        found = rows(folder / "data", "SELECT count(*), count(DISTINCT request_id) FROM usage")
    logged = [event["message"] for event in server.events()]

    assert ready.status_code == 503
    assert "full" in ready.json()["reason"]
    assert [answer.status_code for answer in answers] == [200] * 5
    assert waiting >= 5
    assert (again, status) == (200, 0)
    assert found == [(served_, served_)]
    assert logged.count(ready.json()["reason"]) == logged.count("usage is recorded again") == 1


def fill(ballast: Path) -> None:
    """Until nothing more fits."""
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def test_a_disk_without_room_for_the_first_byte_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with disk(tmp_path / "disk", "size=64k") as folder:
        (folder / "data").mkdir()
        fill(folder / "ballast")
        status, words = refused_here(capsys, tiny, "--data", folder / "data")

    assert status == 2
    assert "cannot keep data in" in told_by(words)[0]
    assert "on a disk with room" in told_by(words)[1]


# --- signals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_closes_the_door_and_who_is_inside_ends(
    tiny: Path, tmp_path: Path, number: int
) -> None:
    """INV-SRV-5: nothing of theirs is cut, newcomers are sent elsewhere, and the exit is 0."""
    data = tmp_path / "data"
    with (
        tiny_server(tiny, tmp_path, "--data", data, first=SLOW) as server,
        clients_of(server.url) as clients,
    ):
        inside = [clients.stream(150) for _ in range(6)]
        server.process.send_signal(number)
        until(lambda: clients.http.get("/ready").status_code == 503, "a closed door")
        late, health = clients.ask(), clients.http.get("/health")
        under_way = not any(stream.done for stream in inside)
        clients.settle()
        status = server.process.wait(30)

    assert under_way
    assert all(stream.done and not stream.errors for stream in inside)
    assert [stream.finish_reason for stream in inside] == ["length"] * 6
    assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
    assert int(late.headers["Retry-After"]) > 0
    assert (health.status_code, status) == (200, 0)
    assert rows(data, "SELECT outcome, output_tokens FROM usage") == [("length", 150)] * 6
    assert rows(data, "SELECT ended FROM runs") == [("stopped",)]


@pytest.mark.slow
def test_who_is_inside_when_the_time_is_over_is_told(tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with (
        tiny_server(tiny, tmp_path, "--data", data, "--drain=0.5", first=SLOW) as server,
        clients_of(server.url) as clients,
    ):
        inside = [clients.stream(LONG) for _ in range(3)]
        status = server.end()
        clients.settle()

    assert status == 0
    assert all(stream.done and not stream.cut for stream in inside)
    assert [error["code"] for stream in inside for error in stream.errors] == ["stopping"] * 3
    assert rows(data, "SELECT outcome FROM usage") == [("error",)] * 3
    assert rows(data, "SELECT ended FROM runs") == [("stopped",)]


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(tiny: Path, tmp_path: Path, second: int) -> None:
    """Without waiting for anybody, and with everybody on record."""
    data = tmp_path / "data"
    with (
        tiny_server(tiny, tmp_path, "--data", data, "--drain=600", first=SLOW) as server,
        clients_of(server.url) as clients,
    ):
        inside = [clients.stream(LONG) for _ in range(3)]
        server.process.send_signal(signal.SIGTERM)
        until(lambda: clients.http.get("/ready").status_code == 503, "a closed door")
        status = server.end(second)
        clients.settle()

    assert status == 0
    assert all(stream.errors or stream.cut for stream in inside)
    assert "told twice: stopping at once" in [event["message"] for event in server.events()]
    assert rows(data, "SELECT count(*) FROM usage") == [(3,)]
    assert rows(data, "SELECT ended FROM runs") == [("stopped",)]


# --- kill -9 ------------------------------------------------------------------------------------


HASTY = """
from tierline.server.state import State
import time
write = State._write
def later(self, group):
    self._call(lambda: [f.done() or f.set_result(True) for _, f in group if f is not None])
    time.sleep(0.05)
    return write(self, group)
State._write = later
"""


def kill_after(server: ServerProcess, answers: int) -> None:
    """As soon as so many requests have ended there."""
    while server.metric("tierline:requests_total") < answers:
        time.sleep(0.02)
    server.process.kill()


def killed_and_restarted(
    tiny: Path, tmp_path: Path, *, kills: int, first: str = "", answers: int = 40
) -> set[str]:
    """Ids of answers that a client read to their end, and that are not on record as served."""
    data, lost = tmp_path / "data", set()
    for kill in range(kills):
        with tiny_server(tiny, tmp_path, "--data", data, first=first) as server:
            killer = threading.Thread(target=kill_after, args=(server, answers))
            killer.start()
            told = asyncio.run(soak_clients(server.port, 16, 60, seed=kill, model=NAME, stay_s=1.0))
            killer.join()
            assert server.process.wait() == -signal.SIGKILL
        assert len(told["whole"]) >= answers / 2  # their last bytes may not have come
        on_record = dict(rows(data, "SELECT request_id, outcome FROM usage"))
        lost |= {i for i in told["whole"] if on_record.get(i) not in ("stop", "length")}
    return lost


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_kill_under_load_loses_no_answered_request(
    tiny: Path, tmp_path: Path, kills: int
) -> None:
    """INV-SRV-10 and INV-SRV-11, through the whole server; the next run says it was a kill."""
    lost = killed_and_restarted(tiny, tmp_path, kills=kills)
    data = tmp_path / "data"
    with tiny_server(tiny, tmp_path, "--data", data) as server:
        with clients_of(server.url) as clients:
            answer = clients.ask()
        status = server.end()
    sums = "sum(requests), sum(prompt_tokens), sum(output_tokens) FROM"

    assert not lost
    assert (answer.status_code, status) == (200, 0)
    ended = [("killed",)] * kills + [("stopped",)]
    assert rows(data, "SELECT ended FROM runs ORDER BY number") == ended
    assert rows(data, f"SELECT {sums} days") == rows(data, f"SELECT {sums} runs")
    assert rows(data, f"SELECT {sums} days") == rows(
        data,
        "SELECT count(DISTINCT request_id), sum(prompt_tokens), sum(output_tokens) FROM usage",
    )
    assert rows(data, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.slow
def test_answering_before_the_record_would_be_seen(tiny: Path, tmp_path: Path) -> None:
    """Negative control: records that are acknowledged 50 ms before they are written."""
    assert killed_and_restarted(tiny, tmp_path, kills=2, first=HASTY)


# --- inside -----------------------------------------------------------------------------------


BROKEN = """
from tierline.engine.clock import SystemClock
from tierline.engine.engine import Engine
add, step, asked, steps = Engine.add, Engine.step, [], []
def counted(self, *given, **named):
    asked.append(1)
    return add(self, *given, **named)
def failing(self):
    if len(asked) >= 5:
        steps.append(1)
    if len(steps) > 30:
        raise RuntimeError("the words of a prompt")
    return step(self)
Engine.add, Engine.step = counted, failing
"""


def test_an_engine_that_dies_is_told_to_everybody(tiny: Path, tmp_path: Path) -> None:
    """INV-SRV-6: nobody waits for it, /health says so, and it is in the log without its words."""
    data = tmp_path / "data"
    with (
        tiny_server(tiny, tmp_path, "--data", data, first=BROKEN) as server,
        clients_of(server.url) as clients,
    ):
        inside = [clients.stream(LONG) for _ in range(5)]
        clients.settle()
        health, late = clients.http.get("/health"), clients.ask()
        ready = clients.http.get("/ready")
        status = server.end()
    errors = [event for event in server.events() if event["level"] == "error"]

    assert all(stream.done and not stream.cut for stream in inside)
    assert [error["code"] for stream in inside for error in stream.errors] == ["unavailable"] * 5
    assert (health.status_code, health.json()["status"]) == (503, "failed")
    assert (late.status_code, ready.status_code, status) == (503, 503, 0)
    assert rows(data, "SELECT outcome FROM usage WHERE outcome != 'refused'") == [("error",)] * 5
    assert [event["exception"] for event in errors] == ["builtins.RuntimeError"]
    told = [error["message"] for stream in inside for error in stream.errors]
    told += [late.text, health.text, ready.text]
    assert all("RuntimeError" in text for text in told)
    assert "words of a prompt" not in server.log.read_text() + "".join(told)


@contextmanager
def stalling(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, *, stalled_s: float
) -> Iterator[tuple[Served, Life]]:
    """A server, and the life of a stream whose client takes next to nothing of it."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": LONG, "ignore_eos": True}
    sent = post("/v1/completions", json.dumps(body | {"stream": True, "logprobs": 20}).encode())
    monkeypatch.setattr(servers, "listening", narrow)
    with (
        served(engine_of(tiny, kv_bytes=40_000_000), stalled_s=stalled_s) as server,
        Client(int(server.url.rpartition(":")[2]), buffer_bytes=4096) as client,
    ):
        client.send(sent)
        until(lambda: bool(server.server.recorder.live), "its arrival")
        (life,) = server.server.recorder.live.values()
        yield server, life


def answers_until_its_end(url: str, life: Life, *, patience_s: float) -> int:
    """How many short answers another client gets meanwhile, one after the other."""
    asked = {"model": "tiny", "prompt": "b", "max_tokens": 8, "ignore_eos": True}
    answered = 0
    with httpx.Client(base_url=url, timeout=patience_s) as client:
        while not life.outcome:
            answer = client.post("/v1/completions", json=asked).json()
            assert answer["usage"]["completion_tokens"] == 8
            answered += 1
    return answered


def test_a_client_that_does_not_read_costs_itself_only(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-SRV-4 and INV-SRV-42 through the whole server: others' answers come meanwhile."""
    with stalling(tiny, monkeypatch, stalled_s=1.0) as (server, life):
        answered = answers_until_its_end(server.url, life, patience_s=60)
        recorder = server.server.recorder
        outcomes = {outcome: count for outcome, count in recorder.outcomes.items() if count}

    assert answered > 5
    assert outcomes == {"stalled": 1, "length": answered}
    assert life.output_tokens < LONG


def test_an_engine_that_waits_for_a_reader_would_be_seen(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: no step is computed while a send is under way, and nobody is cut."""
    sending: set[EventStream] = set()
    give, step = EventStream._give, Engine.step

    async def noted(self: EventStream, message: Any) -> None:
        sending.add(self)
        try:
            await give(self, message)
        finally:
            sending.discard(self)

    def waiting(self: Engine) -> Any:
        while sending:
            time.sleep(0.001)
        return step(self)

    monkeypatch.setattr(EventStream, "_give", noted)
    monkeypatch.setattr(Engine, "step", waiting)
    with (
        stalling(tiny, monkeypatch, stalled_s=600) as (server, life),
        pytest.raises(httpx.ReadTimeout),
    ):
        answers_until_its_end(server.url, life, patience_s=2)


def narrow(host: str, port: int) -> socket.socket:
    """A socket whose connections take little that nobody reads."""
    bound = listening(host, port)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return bound


class WallClock:
    """What an engine must not be timed by."""

    def __init__(self, now_s: list[float]) -> None:
        self._now_s, self._real = now_s, SystemClock()

    def now_ps(self) -> int:
        """The time of day, which jumps."""
        return int(self._now_s[0]) * PS_PER_S + self._real.now_ps()


def served_amid_jumps(
    tiny: Path, data: Path, jumps_s: Sequence[float], *, by_wall: bool = False
) -> list[tuple[float, ...]]:
    """Arrival, TTFT, end and queueing of requests, amid each of which the time of day jumps."""
    now_s = [1.7e9]

    async def run() -> None:
        engine = engine_of(tiny)
        if by_wall:
            engine.clock = WallClock(now_s)
        settings, running = Settings(model_names=("tiny",)), running_of(engine)
        async with (
            opened(engine, running, settings, data=data, clock_s=lambda: now_s[0]) as server,
            httpx.AsyncClient(
                transport=httpx.ASGITransport(application(server)), base_url="http://127.0.0.1"
            ) as client,
        ):
            for jump_s in jumps_s:
                body = {"model": "tiny", "prompt": "a", "max_tokens": 40, "ignore_eos": True}
                asked = asyncio.create_task(client.post("/v1/completions", json=body))
                while not server.recorder.live:
                    await asyncio.sleep(0)
                now_s[0] += jump_s
                assert (await asked).status_code == 200

    asyncio.run(run())
    return rows(data, "SELECT arrived_s, ttft_s, e2e_s, queue_s FROM usage")


def test_clocks_that_jump_break_no_record(tiny: Path, tmp_path: Path) -> None:
    """A day forward in the middle of a request, then a year back: durations are the engine's."""
    found = served_amid_jumps(tiny, tmp_path / "data", [86_400.0, -365 * 86_400.0, 0.0])
    days = rows(tmp_path / "data", "SELECT day, requests FROM days ORDER BY day")
    ((started_s, seen_s, ended_s),) = rows(
        tmp_path / "data", "SELECT started_s, seen_s, ended_s FROM runs"
    )

    assert [row[0] for row in found] == [1.7e9, 1.7e9 + 86_400, 1.7e9 - 364 * 86_400]
    assert all(0 <= value < 60 for row in found for value in row[1:])
    assert days == [("2022-11-15", 1), ("2023-11-14", 1), ("2023-11-15", 1)]
    assert started_s <= ended_s
    assert started_s <= seen_s


def test_durations_by_the_time_of_day_would_be_seen(tiny: Path, tmp_path: Path) -> None:
    """Negative control of the test above: an engine whose clock jumps, too."""
    ((_, _, e2e_s, _),) = served_amid_jumps(tiny, tmp_path / "data", [86_400.0], by_wall=True)

    assert e2e_s >= 86_400
