"""What answers have in common, whichever endpoint gives them: how they stream, usage,
log-probabilities."""

from collections.abc import Iterable
from typing import Any, Protocol

import orjson

from tierline.engine.generation import Delta, TokenLogprob
from tierline.engine.tokenizer import Tokenizer
from tierline.server.calls import Call
from tierline.server.errors import ApiError
from tierline.server.life import Life
from tierline.server.service import Answering
from tierline.server.sse import EventStream

DONE = b"data: [DONE]\n\n"
FINISH_REASONS = {"stop": "stop", "length": "length", "cancelled": "stop", "error": "stop"}


def event(value: Any, *, name: str | None = None) -> bytes:
    """One server-sent event."""
    data = b"data: " + orjson.dumps(value) + b"\n\n"
    return data if name is None else b"event: " + name.encode() + b"\n" + data


class Telling(Protocol):
    """An endpoint's words for what comes: events, one after the other."""

    @property
    def outcome(self) -> str | None:
        """How it has ended, where the endpoint knows better than the engine."""

    def begin(self) -> bytes:
        """What goes before the first token."""

    def of(self, some: list[tuple[int, Delta]]) -> bytes:
        """What was generated."""

    def end(self) -> bytes:
        """What goes after the last token."""

    def failed(self, error: ApiError) -> bytes:
        """What is said when it is too late for a status."""


async def stream_to(call: Call, telling: Telling, answering: Answering) -> None:
    """Events as the engine makes tokens; an error before the first is an ordinary answer."""
    door, stalled_s = call.server.service, call.server.settings.stalled_s
    async with EventStream(call.send, call.receive, stalled_s=stalled_s) as stream:
        some = await answering.some()
        require_whole(some)
        door.streams_open += 1
        try:
            await stream.start((b"x-request-id", answering.life.id.encode()))
            await stream.write(telling.begin() + telling.of(some))
            while some := await answering.some():
                await stream.write(telling.of(some))
            await answering.finish(telling.outcome)
            await stream.close(telling.end())
        except ApiError as error:
            await stream.close(telling.failed(error))
            raise
        finally:
            door.streams_open -= 1


def last_chunk(head: bytes, life: Life) -> bytes:
    """What a chat or a completion used, and the end of its stream; `head` begins each chunk."""
    last = orjson.dumps({"choices": [], "usage": usage(life)})
    return head + b"," + last[1:] + b"\n\n" + DONE


def failed_chunk(error: ApiError) -> bytes:
    """The end of a chat's or a completion's stream that could not go on."""
    return event({"error": error.error}) + DONE


def usage(life: Life) -> dict[str, Any]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": life.prompt_tokens,
        "completion_tokens": life.output_tokens,
        "total_tokens": life.prompt_tokens + life.output_tokens,
        "prompt_tokens_details": {"cached_tokens": life.cached_tokens},
    }


def service(life: Life) -> dict[str, Any]:
    """How the request was served: our own part of every answer, under `tierline`."""
    return {
        "class": life.level,
        "priority": life.priority,
        "queue_ms": _ms(life.queue_s),
        "ttft_ms": _ms(life.ttft_s),
        "prefix_tier": life.tier or None,
        "preemptions": life.preemptions,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def failed(delta: Delta) -> ApiError:
    """What is told of an answer that the engine failed, or gave up."""
    if delta.finish_reason == "cancelled":
        return ApiError(503, "the server is stopping", code="stopping")
    return ApiError(
        500,
        f"the answer was broken off: {delta.error or 'the engine failed'}",
        code="generation_failed",
    )


def require_whole(deltas: Iterable[tuple[int, Delta]]) -> None:
    """Raise `ApiError` when an answer was broken off."""
    for _, delta in deltas:
        if delta.finish_reason in ("error", "cancelled"):
            raise failed(delta)


def chat_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """The `content` of a chat's log-probabilities."""
    return [
        {
            **_token(tokenizer, entry.token, entry.logprob),
            "top_logprobs": [_token(tokenizer, token, value) for token, value in entry.top],
        }
        for entry in logprobs
    ]


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    piece = tokenizer.token_bytes(token)
    return {
        "token": piece.decode(errors="replace"),
        "logprob": finite(logprob),
        "bytes": list(piece),
    }


def finite(logprob: float) -> float:
    """JSON has no infinity: what cannot come has OpenAI's -9999."""
    return max(logprob, -9999.0)
