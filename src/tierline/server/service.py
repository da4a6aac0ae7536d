"""One request's way: admitted, answered, ended once, recorded.

Endpoints make a `Work` of a body and read its `Answering`.  Whatever happens in between (a
client that leaves, an engine that fails, a deadline that passes) the block around an answering
ends its life with one outcome and hands its usage record to the state.

    async with service.answer(work) as answering:
        while some := await answering.some():
            ...                          # deltas, each with the number of its choice
        await answering.finish()         # the record is kept: the last bytes may go out

    INV-SRV-2  a greedy answer through the server is the engine's own
    INV-SRV-3  the books agree, and who has left holds nothing
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from tierline.base.clock import PS_PER_S
from tierline.base.errors import DependencyError, TierlineError
from tierline.engine.async_engine import AsyncEngine, Stream
from tierline.engine.generation import Delta, Grammar
from tierline.engine.sampling import SamplingParams
from tierline.server.errors import ApiError, overloaded, told
from tierline.server.life import Life
from tierline.server.recorder import Recorder
from tierline.server.sse import ClientGone, Stalled
from tierline.server.state import State, usage_of
from tierline.telemetry.logs import log_prompt, logs_prompts

DRAINING_RETRY_S = 10  # another instance should take it well before

log = logging.getLogger("tierline.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an endpoint wants answered. Choice i of prompt p is number p x n + i."""

    life: Life
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    grammar: Grammar | None = None
    ttft_s: float | None = None
    itl_s: float | None = None
    deadline_s: float | None = None  # of the first token, from its arrival: or it is not wanted
    pooled: bool = False  # embeddings: no token is generated


class Service:
    """Owner of the door: how many may be inside, and whether it is open."""

    def __init__(
        self, engine: AsyncEngine, recorder: Recorder, state: State, *, open_max: int
    ) -> None:
        """`open_max` requests may be here at once, waiting ones included."""
        self.engine, self.recorder, self.state = engine, recorder, state
        self.open_max = open_max
        self.draining = False
        self.stopping = False  # and not to be undone
        self.streams_open = 0
        self._failure_logged = False

    @property
    def now_ps(self) -> int:
        """The engine's clock."""
        return self.engine.engine.clock.now_ps()

    @asynccontextmanager
    async def answer(self, work: Work) -> AsyncIterator["Answering"]:
        """Admit the work and yield its answers; its life has ended when the block has.

        Raises `ApiError`: 429 when there is no room or it would be too late, 503 while
        draining, 400 for what the engine cannot serve, 504 when its deadline passes.
        """
        life = work.life
        self.recorder.begin(life)
        self._log_prompts(work)
        answering = Answering(self, work)
        try:
            await self._admit(work, answering)
            yield answering
        except BaseException as error:
            self._failed(answering, error)
            raise
        finally:
            answering.close()
            if not life.outcome:
                self.end(life, "cancelled", "its answer was not read to the end")

    def _log_prompts(self, work: Work) -> None:
        """Only where the operator asked for it."""
        tokenizer = self.engine.engine.tokenizer
        if tokenizer is not None and logs_prompts():
            for prompt in work.prompts:
                log_prompt(work.life.id, tokenizer.decode(prompt, skip_special=False))

    async def _admit(self, work: Work, answering: "Answering") -> None:
        """Let it in, or raise why not."""
        life = work.life
        try:
            if self.draining:
                raise ApiError(
                    503,
                    "the server is draining and takes nothing new",
                    code="draining",
                    hint="send it to another instance",
                    headers={"Retry-After": str(DRAINING_RETRY_S)},
                )
            if len(self.recorder.live) > self.open_max:
                raise await self._full(life)
            for prompt in work.prompts:
                answering.streams.append(await self._add(work, prompt))
        except ApiError as error:
            if not answering.streams:
                self.end(life, "refused", error.code)
            raise

    async def _add(self, work: Work, prompt: Sequence[int]) -> Stream:
        life, limited = work.life, work.deadline_s is not None
        options: dict[str, Any] = {"pooled": True} if work.pooled else {}
        try:
            return await self.engine.add(
                prompt,
                work.params,
                named=partial(self.recorder.named, life),
                rank=-life.priority,
                ttft_s=work.deadline_s if limited else work.ttft_s,
                itl_s=work.itl_s,
                tenant=life.tenant,
                arrival_ps=life.arrival_ps,
                grammar=work.grammar,
                refuses=limited,
                **options,
            )
        except TierlineError as error:
            raise self.told(error) from None

    def told(self, error: TierlineError) -> ApiError:
        """What a caller is told of an error of the engine's.

        When that has failed, its error is logged once, and only its name is told: what it says
        could hold words of others.
        """
        if not self.engine.failed:
            return told(error)
        cause = error.__cause__
        if cause is None:
            return ApiError(
                503,
                "the server is stopping",
                code="stopping",
                hint="send it to another instance",
                headers={"Retry-After": str(DRAINING_RETRY_S)},
            )
        if not self._failure_logged:
            self._failure_logged = True
            log.error("the engine has failed", exc_info=cause)
        return ApiError(503, f"the engine has failed: {type(cause).__name__}", code="unavailable")

    async def _full(self, life: Life) -> ApiError:
        """When another try makes sense: what the scheduler predicts for a newcomer like this."""
        engine = self.engine.engine
        try:
            wait_s = await self.engine.call(
                lambda: engine.predicted_ttft_s(life.prompt_tokens, rank=-life.priority)
            )
        except TierlineError as error:
            return told(error)
        return overloaded(
            f"{self.open_max:,} requests are here already", retry_after_s=max(wait_s, 1.0)
        )

    def _failed(self, answering: "Answering", error: BaseException) -> None:
        """The outcome of a life whose block was left by an error."""
        life = answering.life
        if life.outcome:
            return
        if isinstance(error, Stalled):
            self.end(life, "stalled", "its client stopped reading")
        elif isinstance(error, (ClientGone, asyncio.CancelledError, GeneratorExit)):
            self.end(life, "cancelled", "its client went away")
        elif isinstance(error, ApiError):
            self.end(life, "late" if error.code == "deadline_passed" else "error", error.code)
        else:
            self.end(life, "error", type(error).__name__)

    def end(self, life: Life, outcome: str, error: str = "") -> "asyncio.Future[bool] | None":
        """Its one outcome; the future of its usage record, None for who was turned away."""
        self.recorder.end(life, outcome, self.now_ps, error)
        return None if outcome == "refused" else self.state.record(usage_of(life))


class Answering:
    """The answers of one request, as they come."""

    __slots__ = (
        "_begun",
        "_merged",
        "_pumping",
        "_pumps",
        "_reasons",
        "_service",
        "life",
        "streams",
        "work",
    )

    def __init__(self, service: Service, work: Work) -> None:
        self._service, self.work, self.life = service, work, work.life
        self.streams: list[Stream] = []
        self._begun: set[int] = set()  # choices that were heard of
        self._reasons: dict[int, str] = {}
        self._merged: asyncio.Queue[tuple[int, list[Delta] | BaseException]] | None = None
        self._pumps: list[asyncio.Task[None]] = []
        self._pumping = 0  # of them, not at their end

    async def some(self) -> list[tuple[int, Delta]]:
        """What has come, each with its choice; waits for it; [] once all have ended.

        Raises `ApiError` 504 when the deadline passes before the first token, 503 when the
        engine has failed.
        """
        if self.work.deadline_s is None or self.life.first_ps is not None:
            return await self._read()
        passed_s = (self._service.now_ps - self.life.arrival_ps) / PS_PER_S
        try:
            async with asyncio.timeout(max(self.work.deadline_s - passed_s, 0.0)):
                return await self._read()
        except TimeoutError:
            raise ApiError(
                504,
                f"no token came within {self.work.deadline_s:g} s",
                code="deadline_passed",
                hint="allow more time, or raise its priority",
            ) from None

    async def _read(self) -> list[tuple[int, Delta]]:
        try:
            if len(self.streams) == 1:
                at, deltas = 0, await self.streams[0].some()
            else:
                at, deltas = await self._next_of_many()
        except DependencyError as error:
            raise self._service.told(error) from None
        n = self.work.params.n
        return [self._account(at * n + delta.index, delta) for delta in deltas]

    def _account(self, choice: int, delta: Delta) -> tuple[int, Delta]:
        recorder, life = self._service.recorder, self.life
        if choice not in self._begun:
            self._begun.add(choice)
            if delta.index == 0:
                recorder.cached(life, delta)
        recorder.tokens(life, choice, delta)
        if delta.finish_reason is not None:
            self._reasons[choice] = delta.finish_reason
            if delta.finish_reason == "error":
                life.error = delta.error or "error"
        return choice, delta

    async def _next_of_many(self) -> tuple[int, list[Delta]]:
        """What any of several prompts' streams has to say next."""
        if self._merged is None:
            self._merged = asyncio.Queue()
            self._pumps = [
                asyncio.create_task(self._pump(at, stream))
                for at, stream in enumerate(self.streams)
            ]
            self._pumping = len(self._pumps)
        while self._pumping:
            at, deltas = await self._merged.get()
            if isinstance(deltas, BaseException):
                raise deltas
            if deltas:
                return at, deltas
            self._pumping -= 1
        return 0, []

    async def _pump(self, at: int, stream: Stream) -> None:
        assert self._merged is not None
        try:
            while deltas := await stream.some():
                self._merged.put_nowait((at, deltas))
            self._merged.put_nowait((at, []))
        except DependencyError as error:
            self._merged.put_nowait((at, error))

    @property
    def outcome(self) -> str:
        """How it has ended, all answers together: the worst of them."""
        reasons = set(self._reasons.values())
        for worst in ("error", "cancelled", "length"):
            if worst in reasons:
                return worst
        return "stop"

    async def finish(self, outcome: str | None = None) -> None:
        """All answers are read: end the life and wait until its usage is on record."""
        recorded = self._service.end(self.life, outcome or self.outcome, self.life.error)
        if recorded is not None:
            await recorded

    def close(self) -> None:
        """Nobody reads on."""
        for pump in self._pumps:
            pump.cancel()
        for stream in self.streams:
            stream.close()
