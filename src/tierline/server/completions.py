"""/v1/completions: texts or tokens in, what follows out, whole or as it comes."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from tierline.engine.generation import Delta, TokenLogprob
from tierline.engine.tokenizer import Tokenizer
from tierline.server.answers import (
    DONE,
    FINISH_REASONS,
    failed,
    failed_chunk,
    finite,
    last_chunk,
    require_whole,
    service,
    stream_to,
    usage,
)
from tierline.server.calls import Call, Endpoint, require_length, sampling_of, served_as, work_of
from tierline.server.chat import LONG_CHARACTERS
from tierline.server.errors import ApiError
from tierline.server.life import Life
from tierline.server.service import Answering
from tierline.server.shapes import CompletionAsked
from tierline.server.sse import ClientWatch
from tierline.server.structured import compiled, form_of

DEFAULT_TOKENS = 16  # OpenAI's


async def completions(call: Call, asked: CompletionAsked) -> None:
    """Handle one request."""
    texts, prompts = await _prompts(call, asked)
    form = form_of(None, asked.structured_outputs)
    params = sampling_of(
        asked, max_tokens=asked.max_tokens or DEFAULT_TOKENS, logprobs=asked.logprobs
    )
    if asked.echo and asked.logprobs is not None:
        raise ApiError(
            400,
            "echo with logprobs is not supported: prompts are not scored",
            code="unsupported_parameter",
            param="echo",
            hint="ask for one of them",
        )
    work = work_of(
        call,
        served_as(call, asked),
        request_id=f"cmpl-{call.server.new_id()}",
        endpoint="completions",
        prompts=prompts,
        params=params,
        stream=bool(asked.stream),
        grammar=await compiled(call.server, form, asked),
        structured=form.kind if form else "",
    )
    echoed = [text if asked.echo else "" for text in texts for _ in range(params.n)]
    async with call.server.service.answer(work) as answering:
        if asked.stream:
            chunks = Chunks(call, asked, echoed, answering.life)
            await stream_to(call, chunks, answering)
        else:
            async with ClientWatch(call.receive):
                body = await _whole(call, asked, echoed, answering)
            await call.answer(body, (b"x-request-id", work.life.id.encode()))


async def _prompts(call: Call, asked: CompletionAsked) -> tuple[list[str], list[list[int]]]:
    """Each prompt as text (where an echo needs it) and as tokens; raises `ApiError`."""
    tokenizer = call.server.engine.engine.tokenizer
    given: Any = asked.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    texts: list[str] = []
    prompts: list[list[int]] = []
    for one in given:
        if isinstance(one, str):
            if tokenizer is None:
                raise no_tokenizer("prompt")
            long = len(one) > LONG_CHARACTERS
            encode = tokenizer.encode
            tokens = (
                await asyncio.to_thread(encode, one, special=True)
                if long
                else encode(one, special=True)
            )
            texts.append(one)
        else:
            tokens = list(one)
            texts.append(tokenizer.decode(tokens) if asked.echo and tokenizer else "")
        if not tokens:
            raise ApiError(400, "a prompt is empty", code="invalid_value", param="prompt")
        require_length(call, len(tokens), param="prompt")
        prompts.append(tokens)
    return texts, prompts


def no_tokenizer(param: str) -> ApiError:
    """400: this model reads tokens only."""
    return ApiError(
        400,
        "this model came without a tokenizer",
        code="no_tokenizer",
        param=param,
        hint="send token ids",
    )


async def _whole(
    call: Call, asked: CompletionAsked, echoed: Sequence[str], answering: Answering
) -> bytes:
    life = answering.life
    texts = [[text] for text in echoed]
    scored: list[list[TokenLogprob]] = [[] for _ in echoed]
    reasons = ["stop"] * len(echoed)
    while some := await answering.some():
        require_whole(some)
        for choice, delta in some:
            texts[choice].append(delta.text)
            scored[choice] += delta.logprobs
            if delta.finish_reason is not None:
                reasons[choice] = FINISH_REASONS[delta.finish_reason]
    await answering.finish()
    tokenizer = call.server.engine.engine.tokenizer
    choices = [
        {
            "index": index,
            "text": "".join(texts[index]),
            "logprobs": _logprobs(tokenizer, scored[index], len(echoed[index]))
            if asked.logprobs is not None and tokenizer
            else None,
            "finish_reason": reasons[index],
        }
        for index in range(len(echoed))
    ]
    return orjson.dumps(
        {
            "id": life.id,
            "object": "text_completion",
            "created": int(life.arrived_s),
            "model": life.model,
            "choices": choices,
            "usage": usage(life),
            "tierline": service(life),
        }
    )


def _logprobs(
    tokenizer: Tokenizer, scored: Sequence[TokenLogprob], offset: int
) -> dict[str, list[Any]]:
    """The columns of the old format; offsets are characters from the start of the text."""
    offsets = []
    for entry in scored:
        offsets.append(offset)
        offset += len(tokenizer.token_text(entry.token))
    return {
        "tokens": [token_name(tokenizer, entry.token) for entry in scored],
        "token_logprobs": [finite(entry.logprob) for entry in scored],
        "top_logprobs": [
            {token_name(tokenizer, token): finite(value) for token, value in entry.top}
            for entry in scored
        ],
        "text_offset": offsets,
    }


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """Its text, or, as OpenAI has it, the bytes of a token that is a part of a character."""
    piece = tokenizer.token_bytes(token)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class Chunks:
    """The events of one streamed completion."""

    outcome = None  # the engine's

    def __init__(
        self, call: Call, asked: CompletionAsked, echoed: Sequence[str], life: Life
    ) -> None:
        self._life = life
        self._echoed = echoed
        self._offsets = [len(text) for text in echoed]
        scored = asked.logprobs is not None
        self._tokenizer = call.server.engine.engine.tokenizer if scored else None
        self._usage = asked.stream_options is not None and asked.stream_options.include_usage
        head = {
            "id": life.id,
            "object": "text_completion",
            "created": int(life.arrived_s),
            "model": life.model,
        }
        self._head = b"data: " + orjson.dumps(head)[:-1]
        self._rest = b',"usage":null}\n\n' if self._usage else b"}\n\n"
        self._plain = [
            self._head + b',"choices":[{"index":%d,"text":' % index for index in range(life.answers)
        ]
        self._plain_end = b',"logprobs":null,"finish_reason":null}]' + self._rest

    def begin(self) -> bytes:
        """The prompts, where they were to be repeated."""
        return b"".join(self._chunk(i, text) for i, text in enumerate(self._echoed) if text)

    def of(self, some: Sequence[tuple[int, Delta]]) -> bytes:
        """Events of what has come; raises `ApiError` for an answer that was broken off."""
        events: list[bytes] = []
        for index, delta in some:
            if delta.finish_reason in ("error", "cancelled"):
                raise failed(delta)
            if delta.finish_reason is None and self._tokenizer is None:
                if delta.text:
                    events += (self._plain[index], orjson.dumps(delta.text), self._plain_end)
                continue
            reason = FINISH_REASONS[delta.finish_reason] if delta.finish_reason else None
            scored = self._scored(index, delta)
            events.append(self._chunk(index, delta.text, finish=reason, logprobs=scored))
        return b"".join(events)

    def _scored(self, index: int, delta: Delta) -> Mapping[str, list[Any]] | None:
        if self._tokenizer is None or not delta.logprobs:
            return None
        scored = _logprobs(self._tokenizer, delta.logprobs, self._offsets[index])
        texts = (self._tokenizer.token_text(entry.token) for entry in delta.logprobs)
        self._offsets[index] += sum(map(len, texts))
        return scored

    def _chunk(
        self,
        index: int,
        text: str,
        *,
        finish: str | None = None,
        logprobs: Mapping[str, list[Any]] | None = None,
    ) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        told = b',"tierline":' + orjson.dumps(service(self._life)) if finish else b""
        return self._head + b',"choices":[' + orjson.dumps(choice) + b"]" + told + self._rest

    def end(self) -> bytes:
        """What it used, if that was asked for, and the end."""
        return last_chunk(self._head, self._life) if self._usage else DONE

    def failed(self, error: ApiError) -> bytes:
        """The end of a stream that cannot go on."""
        return failed_chunk(error)


ENDPOINT = Endpoint(CompletionAsked, completions)
