"""An engine on a thread of its own, for an event loop: what a server holds.

The engine thread computes steps for as long as anybody waits and sleeps otherwise.  Requests
and cancellations go to it through one queue, between steps; what a step added, and who was let
in before the next, goes back to the loop in one call.  Either side wakes the other at most once
a turn of its own: a wake-up costs as much as a token.  The thread never waits for a reader: a
stream that nobody reads only fills its own list, which is bounded by its request's tokens.

When the thread ends, by `stop` or by a bug, everybody who waits is told, and whoever comes later.

Invariants
    INV-ENG-5  nobody waits for an engine that has ended
    INV-SRV-4  the engine's thread waits for no client
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from tierline.base.errors import DependencyError
from tierline.engine.engine import Engine
from tierline.engine.generation import Delta
from tierline.engine.observation import StepSample
from tierline.engine.sampling import SamplingParams

Command = Callable[[], None]
Call = tuple[Callable[..., None], tuple[Any, ...]]
Named = Callable[[int, Sequence[int]], None]
T = TypeVar("T")


class Stream:
    """The deltas of one request, as they come."""

    __slots__ = ("_arrived", "_came", "_coming", "_engine", "_left", "request_id")

    def __init__(self, engine: "AsyncEngine", request_id: int, answers: int) -> None:
        self._engine, self.request_id = engine, request_id
        self._coming = self._left = answers  # that have not ended: as told, and as read
        self._arrived: list[Delta | BaseException] = []  # and not read
        self._came = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Until every answer has ended; whoever leaves early cancels the rest."""
        try:
            while deltas := await self.some():
                for delta in deltas:
                    yield delta
        finally:
            self.close()

    async def some(self) -> list[Delta]:
        """All that has come and was not read, one delta at least; none once all have ended."""
        if not self._left:
            return []
        while not self._arrived:
            self._came.clear()
            await self._came.wait()
        deltas: list[Delta] = []
        for delta in self._arrived:
            if isinstance(delta, BaseException):
                self._left = 0
                raise delta
            self._left -= delta.finish_reason is not None
            deltas.append(delta)
        self._arrived = []
        return deltas

    def close(self) -> None:
        """Nobody reads on: what is not finished is cancelled."""
        if self._left and self._coming:
            self._engine.cancel(self.request_id)
        self._left = 0

    def push(self, delta: Delta | BaseException) -> bool:
        """To be called on the event loop; True: nothing more will come."""
        self._arrived.append(delta)
        self._came.set()
        self._coming -= isinstance(delta, BaseException) or delta.finish_reason is not None
        return not self._coming


class AsyncEngine:
    """Owns an engine and its thread, on behalf of one event loop."""

    def __init__(
        self, engine: Engine, *, watcher: Callable[[StepSample], None] | None = None
    ) -> None:
        """`watcher` is told of every step, on the event loop, before its deltas are."""
        self.engine = engine
        self._watcher = watcher
        self._sample: StepSample | None = None  # of the step whose deltas are delivered next
        if watcher is not None:
            engine.watch(self._watched)
        self._asked: list[Command] = []  # in this turn of the loop
        self._inbox: SimpleQueue[Command] = SimpleQueue()
        self._outbox: list[Call] = []  # for the loop; the thread's own
        self._streams: dict[int, Stream] = {}  # touched on the loop only, as the next two are
        self._entering: set[asyncio.Future[Any]] = set()
        self._ended: BaseException | None = None  # why nobody is served any more
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._stopping = False

    async def start(self) -> None:
        """Begin to serve, for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End after the step under way; who is still here is told, and holds nothing."""
        self._hand_over()
        self._inbox.put(self._stop)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)
        if self._ended is None:
            for request_id in self._streams:  # the thread is gone: the engine is ours
                self.engine.cancel(request_id)
            self._end(DependencyError("the engine was stopped"))

    async def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        named: Named | None = None,
        **service: Any,
    ) -> Stream:
        """Take a request in (`Engine.add`); raises what that raises.

        `named` is told its number and the names of its prompt's blocks on the event loop, before
        any sample or delta of it comes.
        """
        entered = self._entry()
        self._ask(lambda: self._enter(entered, prompt, params, named, service))
        try:
            stream: Stream = await entered
            return stream
        except asyncio.CancelledError:
            if entered.done() and not entered.cancelled() and entered.exception() is None:
                entered.result().close()
            raise
        finally:
            self._entering.discard(entered)

    async def call(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises, called on the engine's thread between two steps."""
        asked = self._entry()
        self._ask(lambda: self._answer(asked, function))
        try:
            found: T = await asked
            return found
        finally:
            self._entering.discard(asked)

    def _entry(self) -> "asyncio.Future[Any]":
        """A future that is not waited for in vain when the engine ends."""
        if self._ended is not None:
            raise _told(self._ended)
        entry: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._entering.add(entry)
        return entry

    @property
    def failed(self) -> str:
        """Why nobody is served any more, without what an error says: that may be words of a prompt.

        "" while the engine is well.
        """
        if self._ended is None or isinstance(self._ended, DependencyError):
            return str(self._ended or "")
        return f"the engine has failed: {type(self._ended).__name__}"

    def cancel(self, request_id: int) -> None:
        """Nobody wants the answers any more; who reads them sees them end."""
        self._ask(lambda: self._deliver(self.engine.cancel(request_id)))

    def _ask(self, command: Command) -> None:
        """What others ask for in the same turn of the loop comes with it."""
        self._asked.append(command)
        if len(self._asked) == 1:
            asyncio.get_running_loop().call_soon(self._hand_over)

    def _hand_over(self) -> None:
        for command in self._asked:
            self._inbox.put(command)
        self._asked.clear()

    # --- on the engine's thread -------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                deltas = self.engine.step()
                if deltas or self._sample:
                    self._deliver(deltas)
        except BaseException as error:  # our bug: nobody may wait for ever because of it
            self._call(self._end, error)
        self._send()

    def _obey(self) -> None:
        """Everything that was asked for since the last step; waits while there is nothing to do."""
        waits = self.engine.idle
        while not self._stopping:
            if waits:
                self._send()
            try:
                command = self._inbox.get(block=waits)
            except Empty:
                break
            command()
            waits = self.engine.idle
        self._send()

    def _enter(
        self,
        entered: "asyncio.Future[Stream]",
        prompt: Sequence[int],
        params: SamplingParams,
        named: Named | None,
        service: dict[str, Any],
    ) -> None:
        try:
            request_id = self.engine.add(prompt, params, **service)
        except Exception as error:
            self._call(self._refused, entered, error)
        else:
            told = None
            if named is not None:
                told = partial(named, request_id, self.engine.chain(request_id))
            self._call(self._entered, entered, request_id, params.n, told)

    def _answer(self, asked: "asyncio.Future[T]", function: Callable[[], T]) -> None:
        try:
            found = function()
        except Exception as error:
            self._call(self._refused, asked, error)
        else:
            self._call(self._found, asked, found)

    def _stop(self) -> None:
        self._stopping = True

    def _watched(self, sample: StepSample) -> None:
        self._sample = sample

    def _deliver(self, deltas: list[Delta]) -> None:
        sample, self._sample = self._sample, None
        self._call(self._spread, deltas, sample)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        """To be called on the loop, with the next `_send`."""
        self._outbox.append((function, arguments))

    def _send(self) -> None:
        assert self._loop is not None
        calls, self._outbox = self._outbox, []
        if not calls:
            return
        try:
            self._loop.call_soon_threadsafe(self._receive, calls)
        except RuntimeError:  # the loop was closed without a stop: nobody is left
            self._stopping = True

    # --- on the event loop ------------------------------------------------------------------

    def _receive(self, calls: Sequence[Call]) -> None:
        for function, arguments in calls:
            function(*arguments)

    def _entered(
        self,
        entered: "asyncio.Future[Stream]",
        request_id: int,
        answers: int,
        told: Command | None,
    ) -> None:
        stream = self._streams[request_id] = Stream(self, request_id, answers)
        if told is not None:
            told()
        if entered.cancelled():
            stream.close()
        else:
            entered.set_result(stream)

    def _refused(self, asked: "asyncio.Future[Any]", error: Exception) -> None:
        if not asked.done():
            asked.set_exception(error)

    def _found(self, asked: "asyncio.Future[T]", found: T) -> None:
        if not asked.done():
            asked.set_result(found)

    def _spread(self, deltas: list[Delta], sample: StepSample | None) -> None:
        if sample is not None and self._watcher is not None:
            self._watcher(sample)
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is not None and stream.push(delta):
                del self._streams[delta.request_id]

    def _end(self, error: BaseException) -> None:
        """The thread serves nobody any more (INV-ENG-5)."""
        self._ended = error
        for entered in self._entering:
            if not entered.done():
                entered.set_exception(_told(error))
        for stream in self._streams.values():
            stream.push(_told(error))
        self._streams.clear()


def _told(error: BaseException) -> BaseException:
    """What one caller raises: an error of its own, with its own traceback."""
    if isinstance(error, DependencyError):
        return DependencyError(str(error))
    told = DependencyError(f"the engine has failed: {type(error).__name__}: {error}")
    told.__cause__ = error
    return told
