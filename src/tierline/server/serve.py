"""What `tierline serve` runs: everything opened in order, served, drained, closed in order.

`opened` is also what tests and benchmarks start a real server with; `serve` adds the socket and
the signals.  The first SIGTERM or SIGINT closes the door and lets what is inside finish, within
a limit; the second stops at once.
"""

import asyncio
import logging
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tierline.base.errors import InputError
from tierline.engine.async_engine import AsyncEngine
from tierline.engine.engine import Engine
from tierline.engine.grammar import Grammars
from tierline.server.app import application
from tierline.server.browser import is_loopback
from tierline.server.http import HttpServer, uvicorn_config
from tierline.server.keys import Keys
from tierline.server.recorder import Recorder
from tierline.server.running import Running
from tierline.server.server import Server, Settings
from tierline.server.service import Service
from tierline.server.state import State
from tierline.server.tools import tool_format
from tierline.telemetry.metrics import Metrics
from tierline.telemetry.spans import request_tracer

DRAIN_POLL_S = 0.05
CONNECTIONS_S = 2  # pages and idle connections have so long once all requests have ended

log = logging.getLogger("tierline.server")


@asynccontextmanager
async def opened(
    engine: Engine,
    running: Running,
    settings: Settings,
    *,
    data: Path | None = None,
    keys: Sequence[str] = (),
    tool_format_name: str | None = None,
    version: str = "",
    options: Mapping[str, Any] | None = None,
    clock_s: Callable[[], float] = time.time,
) -> AsyncIterator[Server]:
    """A server that takes requests, without a socket; stopped and closed afterwards.

    `data` is the folder of what outlives the process (None: nothing does), `keys` are API keys
    beside those that are kept there.
    """
    state = State.open(data)
    ended = "failed"
    try:
        known = await Keys.open(state, static=keys, clock_s=clock_s)
        if not (known.required or is_loopback(settings.host)):
            raise InputError(
                f"others could reach this server on {settings.host!r}, and it has no key",
                hint="give one with --key, or listen on 127.0.0.1",
            )
        await state.begin_run(model=running.model, options=options or {}, now_s=clock_s())
        server = _server(engine, running, settings, state, known, tool_format_name, version)
        await server.engine.start()
        try:
            yield server
            ended = "stopped"
        finally:
            await server.engine.stop()
            await _settled(server)
    finally:
        await state.close(ended=ended, now_s=clock_s())


def _server(
    engine: Engine,
    running: Running,
    settings: Settings,
    state: State,
    keys: Keys,
    tool_format_name: str | None,
    version: str,
) -> Server:
    layout = engine.scheduler.layout
    levels = [level.name for level in running.levels]
    metrics = Metrics(
        settings.model_names[0],
        levels=levels,
        positions_max=running.positions_max,
        block_tokens=layout.block_tokens,
        kv_blocks=engine.scheduler.pages.total // layout.pages_per_block,
        version=version,
    )
    recorder = Recorder(
        metrics, request_tracer(version), levels=levels, pages_per_block=layout.pages_per_block
    )
    served = AsyncEngine(engine, watcher=recorder.step)
    tokenizer = engine.tokenizer
    reads = None
    if tokenizer is not None and engine.chat is not None:
        special = tokenizer.special_texts
        reads = tool_format(engine.chat.template, named=tool_format_name, special=special)
    return Server(
        settings=settings,
        running=running,
        engine=served,
        service=Service(served, recorder, state, open_max=settings.open_max),
        recorder=recorder,
        state=state,
        keys=keys,
        grammars=Grammars(tokenizer, vocabulary=engine.vocabulary) if tokenizer else None,
        tools=reads,
        started_s=time.time(),
        clock_s=time.time,
        new_id=lambda: secrets.token_hex(12),
    )


async def _settled(server: Server) -> None:
    """Everybody who was inside when the engine stopped has ended, and is on record."""
    for _ in range(100):
        if not server.recorder.live:
            return
        await asyncio.sleep(0.01)


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound; raises `InputError` when that is not possible."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family)
    except OSError as error:
        raise InputError(f"cannot listen on {host!r}: {error}", hint="give --host") from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise InputError(
            f"cannot listen on port {port} of {host!r}: {error.strerror}",
            hint="is another server there? --port 0 takes a free one",
        ) from None
    return bound


async def serve(
    server: Server, bound: socket.socket, *, drain_s: float, started: Callable[[str], None]
) -> None:
    """Serve until a signal comes; `started` is told the address.

    The first signal drains for at most `drain_s` seconds, the second stops at once.
    """
    app = application(server)
    host, port = bound.getsockname()[:2]
    http = HttpServer(uvicorn_config(app, host=host, port=port, drain_s=CONNECTIONS_S))
    loop = asyncio.get_running_loop()
    signalled = asyncio.Event()
    signals = (signal.SIGTERM, signal.SIGINT)

    def told() -> None:
        if signalled.is_set():
            log.warning("told twice: stopping at once")
            http.should_exit = http.force_exit = True
        signalled.set()

    for number in signals:
        loop.add_signal_handler(number, told)
    running = asyncio.create_task(http.serve(sockets=[bound]))
    try:
        while not http.started and not running.done():
            await asyncio.sleep(0.01)
        started(f"http://{_named(host)}:{port}")
        waiting = asyncio.create_task(signalled.wait())
        await asyncio.wait((waiting, running), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        await _drained(server, http, drain_s)
        http.should_exit = True
        await running
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _named(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)


async def _drained(server: Server, http: HttpServer, drain_s: float) -> None:
    """The door is closed; what is inside finishes, or the time is up."""
    server.service.draining = True
    log.info("draining", extra={"fields": {"requests": len(server.recorder.live)}})
    until_s = time.monotonic() + drain_s
    while server.recorder.live and time.monotonic() < until_s and not http.should_exit:
        await asyncio.sleep(DRAIN_POLL_S)
