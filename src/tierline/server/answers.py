"""What answers have in common, whichever endpoint gives them: ids, usage, log-probabilities."""

from collections.abc import Iterable
from typing import Any

import orjson

from tierline.engine.generation import Delta, TokenLogprob
from tierline.engine.tokenizer import Tokenizer
from tierline.server.errors import ApiError
from tierline.server.life import Life

DONE = b"data: [DONE]\n\n"
FINISH_REASONS = {"stop": "stop", "length": "length", "cancelled": "stop", "error": "stop"}


def event(value: Any, *, name: str | None = None) -> bytes:
    """One server-sent event."""
    data = b"data: " + orjson.dumps(value) + b"\n\n"
    return data if name is None else b"event: " + name.encode() + b"\n" + data


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
