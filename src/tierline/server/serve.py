"""What `tierline serve` runs: everything opened in order, served, drained, closed in order.

`run` is all of it; `opened` is what tests and benchmarks start a real server with, `serve` adds
the socket and the signals.  The first SIGTERM or SIGINT closes the door and lets what is inside
finish, within a limit; the second stops at once.

    INV-SRV-5  a server that is told to end cuts nobody in time
    INV-SRV-6  what keeps a server from serving is said, and nobody waits in vain
"""

import asyncio
import gc
import logging
import resource
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from tierline.base.errors import InputError
from tierline.engine.async_engine import AsyncEngine
from tierline.engine.build import open_engine
from tierline.engine.demo import NAMES
from tierline.engine.engine import Engine
from tierline.engine.grammar import Grammars
from tierline.kv.transfer import TIER_NAMES
from tierline.server.admin import TOKEN_NAME, admin_token
from tierline.server.app import application
from tierline.server.browser import is_loopback
from tierline.server.deployed import Serving, running_of_serving, serving_of
from tierline.server.http import HttpServer, uvicorn_config
from tierline.server.keys import Keys
from tierline.server.recorder import Recorder
from tierline.server.running import Running, render_running
from tierline.server.server import Server, Settings
from tierline.server.service import Service
from tierline.server.state import State
from tierline.server.tools import tool_format
from tierline.server.warmup import Measured, warmed
from tierline.telemetry.metrics import Metrics
from tierline.telemetry.spans import request_tracer


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What an operator asked for."""

    target: str  # a model, or a deployment file
    model: str | None = None  # the checkpoint of a deployment, where it is not found by itself
    options: Mapping[str, Any]  # of the engine, as given
    host: str
    port: int
    keys: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # (): as the model is called
    data: Path | None = None  # None: nothing outlives the process
    tool_format: str | None = None
    input_tokens_max: int | None = None
    open_max: int
    drain_s: float
    version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A server that takes requests now, for whoever started it."""

    url: str
    running: Running
    measured: Measured  # at the start
    names: tuple[str, ...]
    admin: str  # where the admin token is, in words

    def __str__(self) -> str:
        return (
            f"{render_running(self.running, measured=f'{self.measured}')}\n"
            f"dashboard  {self.url}/dashboard\n"
            f"API        {self.url}/v1  (model {self.names[0]!r})\n"
            f"admin      {self.admin}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The same for a program."""
        return {
            "url": self.url,
            "dashboard": f"{self.url}/dashboard",
            "models": list(self.names),
            "admin": self.admin,
            "running": self.running.to_dict(),
            "measured": self.measured.to_dict(),
        }


DRAIN_POLL_S = 0.05
IDS_AT_ONCE = 256
# Objects more than went, until the young are looked at; then older ones each fifth time, and all
# each tenth: clients that leave and connections that close leave cycles, some kB each.
COLLECTED_EVERY = (10_000, 5, 2)
BACKLOG = 2048  # connections that wait to be accepted
CONNECTIONS_S = 2  # pages and idle connections have so long once all requests have ended
log = logging.getLogger("tierline.server")


def run(wish: Wish, *, started: Callable[[Started], None]) -> None:
    """Serve until told to stop; `started` is told once requests are taken.

    Raises `TierlineError` for whatever keeps it from serving, before anything is served.
    """
    _require(wish)
    _allow_connections()
    bound = listening(wish.host, wish.port)
    with bound:
        serving = serving_of(wish.target, model=wish.model, given=wish.options)
        engine = open_engine(serving.path, serving.options)
        running = running_of_serving(serving, engine)
        measured = warmed(engine, running)
        settle()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(wish, serving, engine, running, measured, bound, started))


def settle() -> None:
    """What is here now stays: collections of garbage need not walk it, and come less often.

    With Python's own settings they took a sixth of a busy server's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTED_EVERY)


def _allow_connections() -> None:
    """As many open files as the system lets this process have: each client is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _require(wish: Wish) -> None:
    for name, value, least in (
        ("--input-max", wish.input_tokens_max, 1),
        ("--open-max", wish.open_max, 1),
        ("--drain", wish.drain_s, 0),
    ):
        if value is not None and not value >= least:
            raise InputError(f"{name} is {value}", hint=f"give {least} or more")
    if not 0 <= wish.port < 1 << 16:
        raise InputError(f"--port is {wish.port}", hint="a port is at most 65535; 0: a free one")


async def _run(
    wish: Wish,
    serving: Serving,
    engine: Engine,
    running: Running,
    measured: Measured,
    bound: socket.socket,
    started: Callable[[Started], None],
) -> None:
    # Without a folder to keep one in, there is a token for this run.
    token = "" if wish.data else secrets.token_urlsafe(32)
    admin = f"token in {wish.data / TOKEN_NAME}" if wish.data else f"token {token}, for this run"
    settings = Settings(
        model_names=wish.names or _names(wish, serving, running),
        host=wish.host,
        input_tokens_max=wish.input_tokens_max,
        open_max=wish.open_max,
        admin_token=token,
    )
    told = {k: v for k, v in wish.options.items() if isinstance(v, (str, int, float, bool))}
    async with opened(
        engine,
        running,
        settings,
        data=wish.data,
        keys=wish.keys,
        tool_format_name=wish.tool_format,
        version=wish.version,
        options=told,
    ) as server:

        def ready(url: str) -> None:
            log.info("serving", extra={"fields": {"address": url, "model": running.model}})
            started(
                Started(
                    url=url,
                    running=running,
                    measured=measured,
                    names=settings.model_names,
                    admin=admin,
                )
            )

        await serve(server, bound, drain_s=wish.drain_s, started=ready)


def _names(wish: Wish, serving: Serving, running: Running) -> tuple[str, ...]:
    """What clients may call the model: as it was asked for by name, and as it calls itself."""
    if serving.deployment is not None:
        ref = serving.deployment.model
        names = [ref.served_name, ref.name, running.model]
    elif wish.target.lower() in NAMES:
        names = [wish.target.lower(), running.model]
    else:
        names = [running.model]
    return tuple(dict.fromkeys(names))


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
        if data is not None and not settings.admin_token:
            settings = replace(settings, admin_token=admin_token(data)[0])
        known = await Keys.open(state, static=keys, clock_s=clock_s)
        if not (known.required or is_loopback(settings.host)):
            raise InputError(
                f"others could reach this server on {settings.host!r}, and it has no key",
                hint="give one with --key, or listen on 127.0.0.1",
            )
        await state.begin_run(model=running.model, options=options or {}, now_s=clock_s())
        server = _server(
            engine, running, settings, state, known, tool_format_name, version, clock_s
        )
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
    clock_s: Callable[[], float],
) -> Server:
    layout = engine.scheduler.layout
    levels = [level.name for level in running.levels]
    metrics = Metrics(
        settings.model_names[0],
        levels=levels,
        tiers=TIER_NAMES,
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
        started_s=clock_s(),
        clock_s=clock_s,
        new_id=partial(next, _ids()),
    )


def _ids() -> Iterator[str]:
    """Texts of 24 characters that nobody can guess, drawn from the system many at a time.

    It would cost little to ask for each, but the interpreter is given away meanwhile.
    """
    while True:
        drawn = secrets.token_hex(IDS_AT_ONCE * 12)
        yield from (drawn[at : at + 24] for at in range(0, len(drawn), 24))


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
        # asyncio looks at the protocol before it turns Nagle's delay (40 ms an answer) off.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise InputError(f"cannot listen on {host!r}: {error}", hint="give --host") from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise _taken(host, port, error) from None
    return bound


def _taken(host: str, port: int, error: OSError) -> InputError:
    return InputError(
        f"cannot listen on port {port} of {host!r}: {error.strerror}",
        hint="is another server there? --port 0 takes a free one",
    )


async def serve(
    server: Server, bound: socket.socket, *, drain_s: float, started: Callable[[str], None]
) -> None:
    """Serve until a signal comes; `started` is told the address.

    The first signal drains for at most `drain_s` seconds, the second stops at once.  Who is still
    inside then is told so.  Raises `InputError` when the port was taken since it was bound.
    """
    app = application(server)
    host, port = bound.getsockname()[:2]
    try:
        bound.listen(BACKLOG)
    except OSError as error:  # two that bind before either listens: both may
        raise _taken(host, port, error) from None
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
        await server.engine.stop()
        http.should_exit = True
        await running
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _named(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)


async def _drained(server: Server, http: HttpServer, drain_s: float) -> None:
    """The door is closed; what is inside finishes, or the time is up."""
    server.service.draining = server.service.stopping = True
    log.info("draining", extra={"fields": {"requests": len(server.recorder.live)}})
    until_s = time.monotonic() + drain_s
    while server.recorder.live and time.monotonic() < until_s and not http.should_exit:
        await asyncio.sleep(DRAIN_POLL_S)
