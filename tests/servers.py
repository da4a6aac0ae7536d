"""Real servers for tests: the whole application on a free port, in this process or another."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tierline.engine.build import EngineOptions, open_engine
from tierline.engine.engine import Engine
from tierline.server.app import application
from tierline.server.http import HttpServer, uvicorn_config
from tierline.server.running import running_of
from tierline.server.serve import listening, opened
from tierline.server.server import Server, Settings

MODEL = "tiny"


class Served:
    """A server that runs on a thread of this process."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop, url: str) -> None:
        self.server, self.loop, self.url = server, loop, url

    def on_loop(self, function: Callable[[], Any]) -> Any:
        """What `function` returns, called (or awaited) on the server's event loop."""

        async def call() -> Any:
            found = function()
            return await found if asyncio.iscoroutine(found) else found

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(30)


def engine_of(path: Path, **options: Any) -> Engine:
    """An engine for a server: torch, fp32, small, unless `options` say otherwise."""
    chosen = {"dtype": "fp32", "kernels": "torch", "device": "cpu", "kv_bytes": 4_000_000}
    return open_engine(path, EngineOptions(**(chosen | options)))


@contextmanager
def served(
    engine: Engine, *, data: Path | None = None, keys: tuple[str, ...] = (), **settings: Any
) -> Iterator[Served]:
    """`engine` behind a real socket; afterwards everybody has ended and no block is held."""
    names = settings.pop("model_names", (MODEL,))
    chosen = replace(Settings(model_names=names), **settings)
    ready: threading.Event = threading.Event()
    found: dict[str, Any] = {}

    async def main() -> None:
        running = running_of(engine)
        async with opened(engine, running, chosen, data=data, keys=keys) as server:
            bound = listening(chosen.host, 0)
            port = bound.getsockname()[1]
            http = HttpServer(uvicorn_config(application(server), host=chosen.host, port=port))
            task = asyncio.create_task(http.serve(sockets=[bound]))
            while not http.started and not task.done():
                await asyncio.sleep(0.005)
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()
            found.update(
                served=Served(server, loop, f"http://127.0.0.1:{port}"),
                stop=lambda: loop.call_soon_threadsafe(stop.set),
            )
            ready.set()
            await stop.wait()
            http.should_exit = True
            http.force_exit = True
            await task
            assert not server.recorder.live

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            found["error"] = error
            raise
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="server")
    thread.start()
    ready.wait(60)
    if "error" in found:
        thread.join()
        raise found["error"]
    try:
        yield found["served"]
    finally:
        found["stop"]()
        thread.join(60)
        assert not thread.is_alive()
    engine.require_idle()
