"""What a browser may do to this server on behalf of a page that is not ours.

A server on loopback is reachable from every page that its user visits.  `BrowserGuard` stands in
front of the whole application: it refuses a Host that is not this server's (a name that was
rebound to 127.0.0.1), refuses an Origin that is not this server's where state could change, and
tells the browser what our own pages may load and who may frame them.  No page of another origin
may read an answer, unless the operator names that origin.

Invariants
    INV-SRV-43  on loopback, a request that does not call this server by its own name changes
                nothing and reads nothing
"""

from collections.abc import Awaitable, Callable, MutableMapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware

from tierline.server.errors import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
PAGE_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
        b"form-action 'self'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


def allowed_hosts(host: str, *names: str) -> frozenset[str] | None:
    """The names by which a server that listens on `host` may be called; None: by any.

    Without `names` a server that other machines reach answers to any: it has a key, and we cannot
    know what its clients call it.
    """
    own = host.strip("[]").lower()
    if not names and not is_loopback(own):
        return None
    return LOOPBACK_NAMES | {own} | {name.strip("[]").lower() for name in names}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class BrowserGuard:
    """ASGI: checks Host and Origin, and adds the headers that make our pages safe."""

    def __init__(
        self, app: App, *, hosts: frozenset[str] | None, origins: tuple[str, ...] = ()
    ) -> None:
        self._hosts, self._origins = hosts, frozenset(origins)
        self._app = app if not origins else _shared_with(app, origins)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request, refused or passed on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif error := self._refusal(scope):
            await _send_refusal(error, send)
        elif scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
        else:
            await self._app(scope, receive, _with_page_headers(send))

    def _refusal(self, scope: Message) -> ApiError | None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 and (hosts or scope["http_version"] != "1.0"):
            return ApiError(
                400,
                "a request has exactly one Host header",
                code="invalid_host",
                hint="send the name that the server was called by",
            )
        called = _authority(hosts[0].decode("latin-1")) if hosts else None
        if self._hosts is not None and called and called[0] not in self._hosts:
            return ApiError(
                403,
                "this server does not answer to that Host",
                code="host_not_allowed",
                hint="call it by 127.0.0.1 or localhost",
            )
        if scope["method"] in READING_METHODS:
            return None
        return self._foreign(scope["headers"], called)

    def _foreign(
        self, headers: list[tuple[bytes, bytes]], called: tuple[str, int | None] | None
    ) -> ApiError | None:
        """A page of another origin asks for a change. Clients that are no browsers send none."""
        for name, value in headers:
            if name != b"origin":
                continue
            origin = value.decode("latin-1")
            if origin in self._origins or (called and _authority_of(origin) == called):
                continue
            return ApiError(
                403,
                "a page of another origin may not do this",
                code="origin_not_allowed",
                hint="ask from this server's own pages, or from a program that is no browser",
            )
        return None


@lru_cache(maxsize=256)
def _authority(text: str, scheme: str = "http") -> tuple[str, int | None]:
    """Name and port of a Host header, or of what follows the scheme in an Origin."""
    try:
        parts = urlsplit(f"//{text}")
        port = parts.port or {"http": 80, "https": 443}.get(scheme)
    except ValueError:
        return "", None
    if parts.netloc != text or "@" in text:
        return "", None  # what no browser sends
    return (parts.hostname or "").lower(), port


def _authority_of(origin: str) -> tuple[str, int | None]:
    scheme, _, rest = origin.partition("://")
    return _authority(rest, scheme)


def _shared_with(app: App, origins: tuple[str, ...]) -> App:
    """Answers that pages of these origins may read: with keys, never with cookies."""
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after", "retry-after-ms"),
        max_age=600,
    )


def _with_page_headers(send: Send) -> Send:
    async def send_more(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *PAGE_HEADERS]
        await send(message)

    return send_more


async def _send_refusal(error: ApiError, send: Send) -> None:
    body = error.body()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
