"""Server-sent events out, and clients that leave or stop reading.

Every endpoint that generates runs inside one of the two blocks here, because a client that
leaves takes its generation along: `ClientWatch` for an answer in one piece, `EventStream` for a
stream of events.  Both interrupt their block wherever it waits, as `asyncio.timeout` does, and
leave it by `ClientGone`, or by `Stalled` when the client has stopped reading.

    async with EventStream(send, receive) as stream:
        ...                                  # queued: nothing is sent, the watch is on
        await stream.start()
        await stream.write(b"data: {}\\n\\n")  # one event or several
        await stream.close()

`send` waits for nobody but this stream's client, so a reader that stalls holds up its own task
only; the engine's thread never knows.

Invariants
    INV-SRV-42  a client that leaves, or stops reading for `stalled_s`, ends its own block only
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from types import TracebackType
from typing import Any, Self

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

WATCHED_FROM_S = 0.05
PING = b": ping\n\n"  # a comment: clients skip it, proxies see traffic
EVENT_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx: pass events on at once
)


class ClientGone(Exception):  # noqa: N818 - it names what happened
    """The client closed its connection before the answer was complete."""


class Stalled(ClientGone):
    """The client is there, and has not read for too long."""


class ClientWatch:
    """A block that ends by `ClientGone` as soon as the client leaves.

    To be entered after the body has been read: from then on it alone calls `receive`.  A client
    that leaves at once is noticed after `WATCHED_FROM_S`, as most answers that take no longer
    need no task that waits beside them.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._why: ClientGone | None = None  # the block is being left
        self._begin: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._begin = self._loop.call_later(WATCHED_FROM_S, self._watch)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()
        if self._why is None:
            return
        cancels = self._task.uncancel()  # ours is answered; somebody else's goes on
        if kind is asyncio.CancelledError and cancels <= self._cancelling:
            raise self._why from None

    def end(self) -> None:
        """Stop watching: the answer is complete."""
        assert self._begin is not None
        self._begin.cancel()
        if self._watcher is not None:
            self._watcher.cancel()

    def interrupt(self, why: ClientGone) -> None:
        """Leave the block by `why`, from wherever it waits."""
        if self._why is None:
            self._why = why
            self._task.cancel()

    def _watch(self) -> None:
        self._watcher = self._loop.create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.interrupt(ClientGone())


class EventStream:
    """One client's stream of events, from its headers to its end."""

    def __init__(
        self,
        send: Send,
        receive: Receive,
        *,
        headers: Iterable[tuple[bytes, bytes]] = (),
        stalled_s: float = 30.0,
        ping_s: float = 15.0,
    ) -> None:
        self._send, self._watch = send, ClientWatch(receive)
        self._headers = [*EVENT_HEADERS, *headers]
        self._stalled_s, self._ping_s = stalled_s, ping_s
        self._loop = asyncio.get_running_loop()
        self._since_s = 0.0  # what it is doing now began then
        self._sending = self._stalled = False
        self._timer: asyncio.TimerHandle | None = None
        self._ping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._watch.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._rest()
        await self._watch.__aexit__(kind, error, trace)

    async def start(self, *headers: tuple[bytes, bytes]) -> None:
        """Send the status and the headers; pings keep a silent stream open from now on."""
        started = {"type": "http.response.start", "status": 200}
        await self._give({**started, "headers": [*self._headers, *headers]})
        self._tick()

    async def write(self, events: bytes) -> None:
        """Send events, whole ones; waits while the client reads slower than they come."""
        await self._give({"type": "http.response.body", "body": events, "more_body": True})

    async def close(self, events: bytes = b"") -> None:
        """Send the last events, if any, and end the response."""
        await self._give({"type": "http.response.body", "body": events, "more_body": False})
        self._rest()
        self._watch.end()

    async def _give(self, message: Message) -> None:
        self._since_s, self._sending = self._loop.time(), True
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if self._stalled:  # told by its name from here on, also to blocks inside of ours
                raise Stalled from None
            raise
        self._sending = False

    def _tick(self) -> None:
        """Look whether the client has stalled, or has heard nothing for long; and when next."""
        limit_s = self._stalled_s if self._sending else self._ping_s
        due_s = self._since_s + limit_s
        if self._loop.time() < due_s:
            soon_s = self._loop.time() + self._stalled_s  # another send may block meanwhile
            self._timer = self._loop.call_at(min(due_s, soon_s), self._tick)
        elif self._sending:
            self._stalled = True
            self._watch.interrupt(Stalled())
        else:
            self._ping = self._loop.create_task(self.write(PING))
            self._timer = self._loop.call_later(min(self._ping_s, self._stalled_s), self._tick)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._ping is not None:
            self._ping.cancel()
