"""What does the server add to a model that answers at once?

Question   requests/s, streamed tokens/s and the latency of one request, where the network's
           logits are a fixed row: HTTP, JSON, the chat template, tokens, admission, scheduler,
           sampler, text, records and the two threads are all real and all that is left.
Budget     2,000 requests/s or 20,000 streamed tokens/s on two cores, one of which the client
           uses; a p50 of 2 ms for one request alone.
Baseline   the same client against a server of twenty lines that answers every request with the
           same bytes: no server can beat it, and it says what the client itself can do.
Peer       vLLM's own server for CPUs (`--vllm-python`) on the same tiny random model, in the same
           rounds; it computes that model, which is some 60,000 parameters.
Method     each server and each client a process of its own, in a session of its own (whoever
           stops other processes meanwhile has to spare all that come from this one: a peer that
           cannot compute is never ready).  The measurements of all servers alternate, three
           rounds, medians; who is not measured is stopped, as something of vLLM computes on after
           its last request.  The client counts the tokens that each answer says
           it has, and fails when one is missing.  Beside wall time stands the server's processor
           time, which a busy machine disturbs less: its least over the rounds.  `others_share` is
           what processes other than server and client used of the machine meanwhile.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine_process import CORES, cpu_s, watching

HERE = Path(__file__).parent
ROUNDS = 3
READY_S = 600  # vLLM compiles first: 30 s on two idle cores
AWAKE_S = 0.3
REQUESTS_ASKED, TOKENS_ASKED, ALONE_ASKED_MS = 2000, 20_000, 2.0
STREAMS = 64
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "ignore_eos": True,
}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
KINDS: dict[str, dict[str, Any]] = {
    "alone": {"clients": 1, "each": 300, "body": {**CHAT, "max_tokens": 1}},
    "requests": {"clients": 32, "each": 100, "body": {**CHAT, "max_tokens": 1}},
    "streams": {"clients": STREAMS, "each": 4, "body": {**CHAT, **STREAM, "max_tokens": 128}},
}


# --- the servers, each in a process of its own ------------------------------------------------


def write_model(folder: Path) -> Path:
    """A tiny random model with a tokenizer and a chat template, as both servers read it."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from tiny_checkpoints import tiny_checkpoint

    path = tiny_checkpoint("llama", folder, head_dim=32, max_position_embeddings=2048)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<pad>",
                "chat_template": TEMPLATE,
            }
        )
    )
    return path


def serve_ours(path: str, port: int) -> None:
    """Our server over an engine whose network answers at once."""
    import numpy as np
    import torch

    from tierline.engine.build import EngineOptions, open_engine
    from tierline.server.running import running_of
    from tierline.server.serve import opened, serve, settle
    from tierline.server.server import Settings

    options = EngineOptions(
        dtype="fp32", kernels="torch", device="cpu", kv_bytes=100_000_000, sequences_max=STREAMS
    )
    engine = open_engine(path, options)
    torch.set_num_threads(1)

    class AtOnce:
        """Every row of logits is the same row, and there already: greedy rows are only read."""

        rows = np.zeros((STREAMS, engine.vocabulary), dtype=np.float32)
        rows[:, ord("A")] = 9.0

        def logits(self, batch: Any, arena: Any) -> torch.Tensor:
            del arena
            return torch.from_numpy(self.rows[: len(batch.wanted)])

    engine.executor.network = AtOnce()

    async def run() -> None:
        bound = socket.create_server(("127.0.0.1", port))
        settings = Settings(model_names=("tiny",))
        async with opened(engine, running_of(engine), settings) as server:
            await serve(server, bound, drain_s=1, started=lambda _: None)

    import uvloop

    settle()
    uvloop.run(run())


class Canned(asyncio.Protocol):
    """The baseline: an answer that is ready before the question."""

    WHOLE = b'{"usage":{"completion_tokens":1}}'
    EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"A"}}]}\n\n'
    LAST = b'data: {"usage":{"completion_tokens":128}}\n\ndata: [DONE]\n\n'

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if b'"stream": true' not in data:
            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(self.WHOLE)
            self.transport.write(head + self.WHOLE)
            return
        self.transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        self._next(128)

    def _next(self, left: int) -> None:
        event = self.EVENT if left else self.LAST
        self.transport.write(b"%x\r\n%s\r\n" % (len(event), event))
        if left:
            asyncio.get_running_loop().call_soon(self._next, left - 1)
        else:
            self.transport.write(b"0\r\n\r\n")


def serve_canned(port: int) -> None:
    """The baseline's process."""
    import uvloop

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Canned, "127.0.0.1", port)
        await server.serve_forever()

    uvloop.run(run())


# --- measuring --------------------------------------------------------------------------------


class Served:
    """One server's process, and the figures of its rounds."""

    def __init__(self, name: str, command: list[str], folder: Path, **env: str) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        with self.log.open("wb") as words:
            self.process = subprocess.Popen(
                [part.replace("PORT", str(self.port)) for part in command],
                stdout=words,
                stderr=words,
                env={**os.environ, **env},
                start_new_session=True,
            )
        self.figures: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}

    def await_ready(self, path: str = "/health") -> None:
        """Until it answers."""
        give_up_s = time.monotonic() + READY_S
        while time.monotonic() < give_up_s:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=1).read()
            except OSError:
                time.sleep(0.1)
            else:
                return
        said = self.log.read_text()[-2000:]
        raise TimeoutError(f"{self.name} was not ready in {READY_S} s; it said: {said}")

    def measure(self, kind: str) -> None:
        """One round of one kind, by a server that sleeps before and after."""
        os.killpg(self.process.pid, signal.SIGCONT)
        time.sleep(AWAKE_S)
        self._measure(kind)
        os.killpg(self.process.pid, signal.SIGSTOP)

    def _measure(self, kind: str) -> None:
        asked = {"port": self.port, "path": "/v1/chat/completions", **KINDS[kind]}
        used_s = cpu_s(self.process.pid)
        with watching(self.process.pid) as watched:
            client = subprocess.run(
                [sys.executable, str(HERE / "server_client.py"), json.dumps(asked)],
                capture_output=True,
                text=True,
                check=False,
            )
        assert client.returncode == 0, client.stderr[-2000:] + self.log.read_text()[-2000:]
        told = json.loads(client.stdout)
        count = KINDS[kind]["clients"] * KINDS[kind]["each"] * KINDS[kind]["body"]["max_tokens"]
        told["cpu_us"] = (cpu_s(self.process.pid) - used_s) * 1e6 / count
        others = watched.others_share - told["client_cpu_share"] / CORES
        self.figures[kind].append({**told, "others": max(others, 0.0)})

    def median(self, kind: str, figure: str) -> float:
        return statistics.median(round_[figure] for round_ in self.figures[kind])

    def summary(self) -> dict[str, float]:
        told = {
            "alone_ms_p50": self.median("alone", "total_ms_p50"),
            "requests_per_s": self.median("requests", "requests_per_s"),
            "requests_ms_p99": self.median("requests", "total_ms_p99"),
            "streamed_tokens_per_s": self.median("streams", "tokens_per_s"),
            "stream_first_ms_p50": self.median("streams", "first_ms_p50"),
            "cpu_us_per_request": min(r["cpu_us"] for r in self.figures["requests"]),
            "cpu_us_per_token": min(r["cpu_us"] for r in self.figures["streams"]),
            "others_share": self.median("streams", "others"),
        }
        return {name: round(value, 3 if value < 10 else 1) for name, value in told.items()}

    def end(self) -> None:
        """The process and whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def servers(folder: Path, vllm_python: str | None) -> list[Served]:
    """Started one after another, all waiting."""
    path = str(write_model(folder))
    own = [sys.executable, __file__]
    found = [
        Served("canned", [*own, "--canned", "PORT"], folder),
        Served("tierline", [*own, "--ours", path, "PORT"], folder),
    ]
    if vllm_python:
        # The console script asks for the version of a package that the CPU wheel is not named.
        command = [vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", path]
        command += ["--served-model-name", "tiny", "--dtype", "float32", "--max-num-seqs"]
        command += [str(STREAMS), "--host", "127.0.0.1", "--port", "PORT"]
        found.append(Served("vllm", command, folder, VLLM_CPU_KVCACHE_SPACE="1"))
    return found


def main() -> None:
    """One JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--vllm-python", help="interpreter that has vLLM for CPUs")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--ours", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--canned", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.ours:
        serve_ours(asked.ours[0], int(asked.ours[1]))
        return
    if asked.canned:
        serve_canned(asked.canned)
        return
    with tempfile.TemporaryDirectory() as name:
        running: list[Served] = []
        try:
            running = servers(Path(name), asked.vllm_python)
            running[0].await_ready("/health")
            for one in running[1:]:
                one.await_ready()
            for one in running:
                os.killpg(one.process.pid, signal.SIGSTOP)
            for _ in range(asked.rounds):
                for kind in KINDS:
                    for one in running:
                        one.measure(kind)
        finally:
            for one in running:
                one.end()
    told = {one.name: one.summary() for one in running}
    ours = told["tierline"]
    within = {
        "requests": ours["requests_per_s"] >= REQUESTS_ASKED,
        "tokens": ours["streamed_tokens_per_s"] >= TOKENS_ASKED,
        "alone": ours["alone_ms_p50"] <= ALONE_ASKED_MS,
    }
    print(json.dumps({"benchmark": "server", **told, "met": within}))


if __name__ == "__main__":
    main()
