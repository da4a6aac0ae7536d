"""A small application behind the real HTTP edge, on a thread of its own, and raw sockets to it."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tierline.server.browser import BrowserGuard, allowed_hosts
from tierline.server.errors import ApiError
from tierline.server.http import HttpServer, Limits, read_body, uvicorn_config
from tierline.server.sse import ClientGone, ClientWatch, EventStream, Stalled

BODY_MAX = 1 << 20
BODY_S = 0.5


@dataclass
class Edge:
    """The application: what it was asked, and how each of its blocks ended."""

    stalled_s: float = 0.5
    ping_s: float = 10.0
    ended: list[str] = field(default_factory=list)
    server: HttpServer | None = None
    port: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        answer = getattr(self, "do_" + scope["path"].rpartition("/")[2], None)
        if answer is None:
            await reply(send, 404, b"{}")
            return
        try:
            await answer(scope, receive, send)
        except ApiError as error:
            self.ended.append(error.code)
            await reply(send, error.status, error.body())
        except Stalled:
            self.ended.append("stalled")
        except ClientGone:
            self.ended.append("gone")

    async def do_quick(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers at once, and reads no body."""
        await reply(send, 200, b'{"ok":true}')

    async def do_body(self, scope: Any, receive: Any, send: Any) -> None:
        """Reads a body."""
        body = await read_body(receive, scope["headers"], bytes_max=BODY_MAX, seconds_max=BODY_S)
        self.ended.append("read")
        await reply(send, 200, json.dumps({"bytes": len(body)}).encode())

    async def do_wait(self, scope: Any, receive: Any, send: Any) -> None:
        """Computes for very long, without sending anything."""
        async with ClientWatch(receive):
            await asyncio.sleep(100)

    async def do_late(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends its whole answer inside of the watched block."""
        async with ClientWatch(receive):
            await asyncio.sleep(0.01)
            await reply(send, 200, b'{"ok":true}')
        self.ended.append("whole")

    async def do_big(self, scope: Any, receive: Any, send: Any) -> None:
        """An answer that no socket's buffer holds."""
        await reply(send, 200, b"x" * (64 << 20))
        self.ended.append("whole")

    async def do_count(self, scope: Any, receive: Any, send: Any) -> None:
        """A hundred events, slowly enough to be read one by one."""
        async with self.stream(receive, send) as stream:
            await stream.start()
            for i in range(100):
                await stream.write(b"data: %d\n\n" % i)
                await asyncio.sleep(0.005)
            await stream.close(b"data: [DONE]\n\n")
        self.ended.append("whole")

    async def do_silent(self, scope: Any, receive: Any, send: Any) -> None:
        """A stream that has started and says nothing."""
        async with self.stream(receive, send) as stream:
            await stream.start()
            await asyncio.sleep(100)

    async def do_flood(self, scope: Any, receive: Any, send: Any) -> None:
        """Events without end, as fast as they are taken."""
        async with self.stream(receive, send) as stream:
            await stream.start()
            try:
                while True:
                    await stream.write(b"data: " + b"x" * 10_000 + b"\n\n")
                    await asyncio.sleep(0)
            except Stalled:
                self.ended.append("told inside")  # as the outcome of a generation is
                raise

    def stream(self, receive: Any, send: Any) -> EventStream:
        return EventStream(send, receive, stalled_s=self.stalled_s, ping_s=self.ping_s)

    @property
    def connections(self) -> int:
        assert self.server is not None
        return len(self.server.server_state.connections)

    def await_idle(self) -> None:
        """Until no request is under way."""
        server = self.server
        assert server is not None
        until(lambda: not server.server_state.tasks, "the end of every task")

    def await_end(self, outcome: str) -> None:
        """Until a block has ended so, and nothing is left of any connection."""
        until(lambda: outcome in self.ended, f"{outcome} in {self.ended}")


async def reply(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def until(holds: Callable[[], bool], what: str, *, seconds: float = 10.0) -> None:
    """Wait for something that happens on another thread."""
    give_up_s = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < give_up_s, f"never came: {what}"
        time.sleep(0.005)


@contextmanager
def serving(edge: Edge, limits: Limits | None = None, **guard: Any) -> Iterator[Edge]:
    """The application on a port of loopback; at the end nothing may be left of it."""
    listener = socket.create_server(("127.0.0.1", 0))
    edge.port = listener.getsockname()[1]
    guard.setdefault("hosts", allowed_hosts("127.0.0.1"))
    config = uvicorn_config(
        BrowserGuard(edge, **guard), host="127.0.0.1", port=0, limits=limits, drain_s=1
    )
    edge.server = HttpServer(config)
    thread = threading.Thread(target=edge.server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: edge.server.started, "the server")
        yield edge
        edge.await_idle()
    finally:
        assert edge.server is not None
        edge.server.should_exit = True
        thread.join()
        listener.close()


def post(path: str, body: bytes, *headers: str, host: str = "127.0.0.1") -> bytes:
    """A request with a body of JSON."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}"]
    if not any(h.lower().startswith("content-type") for h in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def get(path: str, *headers: str, host: str = "127.0.0.1") -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]).encode()


class Client:
    """A raw connection: whatever one likes to send, byte by byte."""

    def __init__(self, port: int, *, buffer_bytes: int = 0) -> None:
        self.socket = socket.socket()
        if buffer_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        self.socket.settimeout(10)
        self.socket.connect(("127.0.0.1", port))

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self) -> bytes:
        """All there is, until the other side has closed."""
        pieces = []
        try:
            while piece := self.socket.recv(1 << 16):
                pieces.append(piece)
        except ConnectionResetError:
            pass
        return b"".join(pieces)

    def read_until(self, end: bytes) -> bytes:
        data = b""
        while end not in data:
            piece = self.socket.recv(1 << 16)
            assert piece, f"closed after {data!r}"
            data += piece
        return data

    def answer(self) -> tuple[int, dict[str, Any]]:
        """One response with a length: its status, and its body."""
        head, _, rest = self.read_until(b"\r\n\r\n").partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while len(rest) < length:
            rest += self.socket.recv(1 << 16)
        return int(head.split()[1]), json.loads(rest[:length])


def status(answer: bytes) -> int:
    """The status of the first response; 0: none."""
    return int(answer.split()[1]) if answer else 0
