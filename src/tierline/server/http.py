"""The HTTP edge: what a connection may do before any of our code sees its request.

`serve` runs an application under `uvicorn_config`, and every endpoint that takes a body reads it
through `read_body`.  Uvicorn parses HTTP/1.1 (httptools, strict: both lengths, bare line ends and
folded headers are refused); this module adds the limits that it has not: how long and how large
a request's head may be, how many connections there are, how long a reader may take nothing.

One rule covers slow and endless senders alike: bytes that do not become a complete head, a piece
of a body or the end of a message within `head_s` and `head_bytes_max` end their connection.

Invariants
    INV-SRV-40  a sender that makes no progress loses its connection, and nobody else anything
    INV-SRV-41  a body is in memory only up to its cap, and only for so long
"""

import asyncio
import functools
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from tierline.server.errors import ApiError
from tierline.server.sse import ClientGone

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Headers = Iterable[tuple[bytes, bytes]]

SEND_AT_ONCE = "send the whole request at once"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one connection may take, and how many there may be."""

    connections_max: int = 4096
    head_bytes_max: int = 64 << 10  # request line and headers
    head_s: float = 10.0
    linger_s: float = 2.0  # a refused sender is read for so long, so that it hears why
    unread_s: float = 60.0  # the peer acknowledges nothing, or takes nothing
    keep_alive_s: int = 75  # between two requests of one connection


class Connection(HttpToolsProtocol):
    """One connection, with limits."""

    def __init__(self, *arguments: Any, limits: Limits, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limits = limits
        self._unparsed_bytes = 0  # received since the last progress
        self._late: asyncio.TimerHandle | None = None  # runs while progress is owed
        self._unread: asyncio.TimerHandle | None = None  # runs while the peer takes too little
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Counted at once; it owes a head from now on."""
        super().connection_made(transport)
        _abort_when_silent(transport.get_extra_info("socket"), self._limits.unread_s)
        if len(self.connections) > self._limits.connections_max:
            self._refuse(
                503,
                "too_many_connections",
                "too many connections",
                "try again later, or reuse connections",
            )
        else:
            self._owe_progress()

    def connection_lost(self, exc: Exception | None) -> None:
        """No timer outlives its connection."""
        self._progressed()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; what is left over has to become something soon."""
        if self._refused:
            return
        self._unparsed_bytes += len(data)
        super().data_received(data)
        if self._unparsed_bytes > self._limits.head_bytes_max:
            self._refuse_large()
        elif self._unparsed_bytes and not self._refused:
            self._owe_progress()

    def on_headers_complete(self) -> None:
        """A complete head; one that came in a single packet is measured here."""
        if self._refused:
            return
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.head_bytes_max:
            self._refuse_large()
            return
        self._progressed()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        if not self._refused:
            self._progressed()
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request, also of one that was answered before."""
        if not self._refused:
            self._progressed()
            super().on_message_complete()
            self.cycle.more_body = False

    def on_response_complete(self) -> None:
        """An answer that did not wait for the whole body: the rest is dropped, for a while."""
        super().on_response_complete()
        if self.cycle.more_body and not self.transport.is_closing():
            self.loop.call_later(self._limits.linger_s, self._drop_unless_sent, self.cycle)

    def pause_writing(self) -> None:
        """The peer reads slower than we write; aborted if that lasts."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._limits.unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The peer has read."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        """What does not parse (uvicorn calls this)."""
        del msg
        if not self._refused:
            self._refuse(400, "invalid_http", "this is not a request of HTTP/1.1", "see RFC 9112")

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        super()._start_asgi_task(cycle, functools.partial(self._run, cycle, app))

    async def _run(self, cycle: Any, app: Any, scope: Any, receive: Any, send: Any) -> None:
        """A response that the application leaves unfinished is cut at once, never flushed."""
        await app(scope, receive, send)
        if cycle.response_started and not cycle.response_complete:
            cycle.disconnected = True
            self.transport.abort()

    def _owe_progress(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self._limits.head_s, self._refuse_late)

    def _progressed(self) -> None:
        self._unparsed_bytes = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse_late(self) -> None:
        self._late = None
        if self._unparsed_bytes:
            limit = self._limits.head_s
            self._refuse(
                408, "request_timeout", f"the request did not come within {limit:g} s", SEND_AT_ONCE
            )
        else:
            self.transport.abort()

    def _refuse_large(self) -> None:
        limit = self._limits.head_bytes_max
        self._refuse(
            431,
            "head_too_large",
            f"the request's head is larger than {limit:,} bytes",
            "send fewer or shorter headers",
        )

    def _refuse(self, status: int, code: str, message: str, hint: str) -> None:
        """Say why, then close; a response under way is cut, as nothing can be said inside it."""
        self._refused = True
        self._progressed()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
            return
        self.transport.write(_refusal(status, code, message, hint))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(self._limits.linger_s, self.transport.abort)

    def _drop_unless_sent(self, cycle: Any) -> None:
        if self.cycle is cycle and cycle.more_body:
            self.transport.abort()


class HttpServer(uvicorn.Server):
    """Uvicorn's server; signals are whose business it is to drain first."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """None: `serve` handles them, and sets `should_exit` when all is drained."""
        return nullcontext()


def uvicorn_config(
    app: Any, *, host: str, port: int, limits: Limits | None = None, drain_s: int | None = None
) -> uvicorn.Config:
    """How uvicorn runs `app`; a socket that is bound already goes to `HttpServer.serve`.

    `drain_s`: requests that are still running so long after `should_exit` are cancelled.
    """
    limits = limits or Limits()
    connection = functools.partial(Connection, limits=limits)
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="uvloop",
        http=cast("type[asyncio.Protocol]", connection),
        ws="none",
        lifespan="off",  # `serve` opens and closes what the application needs
        interface="asgi3",
        log_config=None,  # who serves decides where logs go
        log_level="error",  # a stranger's bad request is not worth a line
        access_log=False,
        proxy_headers=False,  # nobody may say that he is somebody else
        server_header=False,
        headers=[("server", "tierline")],
        timeout_keep_alive=limits.keep_alive_s,
        timeout_graceful_shutdown=drain_s,
    )


async def read_body(
    receive: Receive, headers: Headers, *, bytes_max: int, seconds_max: float
) -> bytes:
    """A request's JSON text, as bytes that are valid UTF-8.

    Raises `ApiError`: 415 for another content type, 413 above `bytes_max` (told before a byte is
    read where the length was announced), 408 when it has not all come within `seconds_max`, 400
    for invalid UTF-8; `ClientGone` when the client left before the end.
    """
    _check_announced(headers, bytes_max)
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds_max):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > bytes_max:
                    raise _too_large(bytes_max)
                more = message.get("more_body", False)
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not come within {seconds_max:g} s",
            code="request_timeout",
            hint=SEND_AT_ONCE,
        ) from None
    return _utf8(b"".join(pieces))


def _check_announced(headers: Headers, bytes_max: int) -> None:
    """What the headers say of a body that is still to come."""
    kind = b""
    for name, value in headers:
        if name == b"content-type":
            kind = value.partition(b";")[0].strip().lower()
        elif name == b"content-length" and int(value) > bytes_max:
            raise _too_large(bytes_max)
        elif name == b"content-encoding" and value.strip().lower() != b"identity":
            raise _unsupported("a compressed body is not supported", "send it uncompressed")
    if kind != b"application/json":
        raise _unsupported(
            "the body has to be application/json",
            "send the header `Content-Type: application/json`",
        )


def _utf8(body: bytes) -> bytes:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(
            400,
            f"the body is not valid UTF-8 at byte {error.start:,}",
            code="invalid_encoding",
            hint="encode it as UTF-8",
        ) from None
    return body


def _too_large(bytes_max: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {bytes_max:,} bytes",
        code="request_too_large",
        hint="send a shorter input",
    )


def _unsupported(message: str, hint: str) -> ApiError:
    return ApiError(415, message, code="unsupported_media_type", hint=hint)


def _refusal(status: int, code: str, message: str, hint: str) -> bytes:
    """A whole response, for a request that never became one."""
    body = ApiError(status, message, code=code, hint=hint).body()
    head = (
        "server: tierline\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return STATUS_LINE[status] + head.encode() + body


def _abort_when_silent(connection: Any, seconds: float) -> None:
    """The system drops a peer that acknowledges nothing, or takes nothing, for so long (Linux)."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, option, int(seconds * 1000))
