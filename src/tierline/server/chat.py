"""/v1/chat/completions: a conversation in, the assistant's turn out, whole or as it comes."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import orjson

from tierline.base.errors import RequestError
from tierline.engine.generation import Delta, Grammar, TokenLogprob
from tierline.engine.sampling import SamplingParams
from tierline.server.answers import (
    DONE,
    FINISH_REASONS,
    chat_logprobs,
    failed,
    failed_chunk,
    last_chunk,
    require_whole,
    service,
    stream_to,
    usage,
)
from tierline.server.calls import (
    Call,
    Endpoint,
    require_length,
    sampling_of,
    served_as,
    work_of,
)
from tierline.server.errors import ApiError
from tierline.server.life import Life
from tierline.server.service import Answering, Work
from tierline.server.shapes import ChatAsked, Message, ToolChosen
from tierline.server.sse import ClientWatch
from tierline.server.structured import compiled, form_of, form_of_tools
from tierline.server.tools import (
    CallArguments,
    CallStart,
    Choice,
    Piece,
    TextPiece,
    Tool,
    ToolFormat,
    ToolParser,
    template_tools,
)

LONG_CHARACTERS = 20_000  # texts beyond this are tokenized beside the loop


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A checked request: what the engine is given, and how its text is read."""

    prompt: Sequence[int]
    params: SamplingParams
    grammar: Grammar | None
    structured: str
    tools: tuple[Tool, ...]
    calls: ToolFormat | None  # reads calls out of the text; None: text is text


async def chat(call: Call, asked: ChatAsked) -> None:
    """Handle one request."""
    conversation = await conversation_of(call, asked)
    request_id = f"chatcmpl-{call.server.new_id()}"
    work = work_of_chat(call, asked, conversation, request_id=request_id, endpoint="chat")
    async with call.server.service.answer(work) as answering:
        if asked.stream:
            await stream_to(call, Chunks(call, asked, conversation, work.life), answering)
        else:
            async with ClientWatch(call.receive):
                body = await _whole(call, asked, conversation, answering)
            await call.answer(body, (b"x-request-id", request_id.encode()))


def work_of_chat(
    call: Call, asked: ChatAsked, conversation: Conversation, *, request_id: str, endpoint: str
) -> Work:
    """What the engine is asked for; raises `ApiError`."""
    return work_of(
        call,
        served_as(call, asked, tier=asked.service_tier),
        request_id=request_id,
        endpoint=endpoint,
        prompts=[conversation.prompt],
        params=conversation.params,
        stream=bool(asked.stream),
        grammar=conversation.grammar,
        structured=conversation.structured,
        tools=len(conversation.tools),
    )


# --- what is asked --------------------------------------------------------------------------


async def conversation_of(call: Call, asked: ChatAsked) -> Conversation:
    """The prompt and everything that shapes the answer; raises `ApiError`."""
    tools = tuple(
        Tool(
            name=offered.function.name,
            description=offered.function.description or "",
            parameters=offered.function.parameters or {"type": "object", "properties": {}},
            strict=bool(offered.function.strict),
        )
        for offered in asked.tools or ()
    )
    choice = _choice(asked)
    calls = call.server.tools if tools and choice.kind != "none" else None
    prompt = await _prompt(call, asked, tools if choice.kind != "none" else ())
    require_length(call, len(prompt), param="messages")
    form = form_of(asked.response_format, asked.structured_outputs)
    if calls is not None:
        if form is not None and choice.kind in ("required", "function"):
            param = "structured_outputs" if asked.structured_outputs else "response_format"
            raise ApiError(
                400,
                f"tool_choice asks for a call, and {param} for something else",
                code="invalid_value",
                param=param,
                hint="ask for one of them",
            )
        form = form or form_of_tools(calls, tools, choice)
    most = asked.max_completion_tokens or asked.max_tokens
    params = sampling_of(
        asked,
        max_tokens=most or call.server.settings.output_tokens_default,
        logprobs=asked.top_logprobs or 0 if asked.logprobs else None,
        skip_special=calls.skip_special_tokens if calls is not None else None,
    )
    return Conversation(
        prompt=prompt,
        params=params,
        grammar=await compiled(call.server, form, asked),
        structured=form.kind if form else "",
        tools=tools,
        calls=calls,
    )


def _choice(asked: ChatAsked) -> Choice:
    parallel = asked.parallel_tool_calls is not False
    chosen = asked.tool_choice
    if isinstance(chosen, ToolChosen):
        names = [offered.function.name for offered in asked.tools or ()]
        if chosen.function.name not in names:
            raise ApiError(
                400,
                f"tool_choice names {chosen.function.name!r}, which is not in tools",
                code="invalid_value",
                param="tool_choice.function.name",
            )
        return Choice(kind="function", name=chosen.function.name, parallel=parallel)
    return Choice(kind=chosen or ("auto" if asked.tools else "none"), parallel=parallel)


async def _prompt(call: Call, asked: ChatAsked, tools: Sequence[Tool]) -> list[int]:
    messages = [as_dict(message) for message in asked.messages]
    size = sum(len(message.text) for message in asked.messages)
    options = {"add_generation_prompt": asked.add_generation_prompt}
    variables = _variables(asked)
    if size <= LONG_CHARACTERS:
        return prompt_of(call, messages, tools, **options, **variables)
    return await asyncio.to_thread(prompt_of, call, messages, tools, **options, **variables)


def _variables(asked: ChatAsked) -> dict[str, Any]:
    """What `chat_template_kwargs` sets; what we set ourselves may not be set there."""
    variables = asked.chat_template_kwargs or {}
    for name in variables:
        if not name.isidentifier() or name in ("messages", "tools", "now", "add_generation_prompt"):
            raise ApiError(
                400,
                "chat_template_kwargs has a name that a template cannot be given",
                code="invalid_value",
                param="chat_template_kwargs",
            )
    return variables


def prompt_of(
    call: Call, messages: list[dict[str, Any]], tools: Sequence[Tool], **variables: Any
) -> list[int]:
    """A conversation as tokens; raises `ApiError` when the model has no chat template."""
    engine, reads = call.server.engine.engine, call.server.tools
    if engine.chat is None or reads is None:
        raise ApiError(
            400,
            "this model has no chat template",
            code="no_chat_template",
            param="messages",
            hint="use /v1/completions",
        )
    now = datetime.fromtimestamp(call.arrived_s, UTC)
    offered = template_tools(tools) if reads.templated and tools else None
    try:
        told = reads.messages(messages, tools)
        return engine.chat.encode(told, now=now, tools=offered, **variables)
    except RequestError as error:
        raise ApiError(
            400, str(error), code="invalid_value", param="messages", hint=error.hint
        ) from None


def as_dict(message: Message) -> dict[str, Any]:
    """A message as chat templates know it."""
    role = "system" if message.role == "developer" else message.role
    told: dict[str, Any] = {"role": role, "content": message.text}
    if message.tool_calls:
        told["tool_calls"] = [
            {
                "id": made.id,
                "type": "function",
                "function": {"name": made.function.name, "arguments": made.function.arguments},
            }
            for made in message.tool_calls
        ]
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            told[name] = value
    return told


# --- a whole answer -------------------------------------------------------------------------


@dataclass(slots=True)
class Turn:
    """One choice, gathered."""

    parser: ToolParser | None
    text: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = "stop"

    def add(self, delta: Delta) -> None:
        """One more step."""
        if self.parser is None:
            self.text.append(delta.text)
        else:
            self._pieces(self.parser.push(delta.text))
        self.logprobs += delta.logprobs
        if delta.finish_reason is None:
            return
        self.finish_reason = FINISH_REASONS[delta.finish_reason]
        if self.parser is not None:
            self._pieces(self.parser.end())
            if self.calls and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"

    def _pieces(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, TextPiece):
                self.text.append(piece.text)
            elif isinstance(piece, CallStart):
                self.calls.append({"name": piece.name, "arguments": ""})
            elif isinstance(piece, CallArguments):
                self.calls[piece.index]["arguments"] += piece.text


async def gather(answering: Answering, conversation: Conversation) -> list[Turn]:
    """Every choice to its end; raises `ApiError` when one was broken off."""
    tools, calls = conversation.tools, conversation.calls
    turns = [Turn(calls.parser(tools) if calls else None) for _ in range(conversation.params.n)]
    while some := await answering.some():
        require_whole(some)
        for choice, delta in some:
            turns[choice].add(delta)
    called = any(turn.finish_reason == "tool_calls" for turn in turns)
    await answering.finish("tool_calls" if called else None)
    return turns


async def _whole(
    call: Call, asked: ChatAsked, conversation: Conversation, answering: Answering
) -> bytes:
    turns = await gather(answering, conversation)
    life = answering.life
    tokenizer = call.server.engine.engine.tokenizer
    choices = []
    for index, turn in enumerate(turns):
        logprobs = None
        if asked.logprobs and tokenizer is not None:
            content = chat_logprobs(tokenizer, turn.logprobs)
            logprobs = {"content": content, "refusal": None}
        choices.append(
            {
                "index": index,
                "message": _message(turn, call),
                "logprobs": logprobs,
                "finish_reason": turn.finish_reason,
            }
        )
    return orjson.dumps(
        {
            "id": life.id,
            "object": "chat.completion",
            "created": int(life.arrived_s),
            "model": life.model,
            "choices": choices,
            "usage": usage(life),
            "service_tier": "default",
            "tierline": service(life),
        }
    )


def _message(turn: Turn, call: Call) -> dict[str, Any]:
    text = "".join(turn.text)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if turn.calls:
        message["content"] = text or None
        message["tool_calls"] = [
            {"id": f"call_{call.server.new_id()}", "type": "function", "function": made}
            for made in turn.calls
        ]
    return message


# --- an answer as it comes ------------------------------------------------------------------


class Chunks:
    """The events of one streamed chat."""

    def __init__(
        self, call: Call, asked: ChatAsked, conversation: Conversation, life: Life
    ) -> None:
        self._call, self._asked, self._life = call, asked, life
        tools, calls = conversation.tools, conversation.calls
        self._parsers = [calls.parser(tools) if calls else None for _ in range(life.answers)]
        self._called = [False] * life.answers
        self._usage = asked.stream_options is not None and asked.stream_options.include_usage
        head = {
            "id": life.id,
            "object": "chat.completion.chunk",
            "created": int(life.arrived_s),
            "model": life.model,
        }
        self._head = b"data: " + orjson.dumps(head)[:-1]  # the object goes on
        self._rest = b',"usage":null}\n\n' if self._usage else b"}\n\n"
        self._plain = [  # of a text chunk, up to its text: what nearly every event is
            self._head + b',"choices":[{"index":%d,"delta":{"content":' % index
            for index in range(life.answers)
        ]
        self._plain_end = b'},"logprobs":null,"finish_reason":null}]' + self._rest

    def begin(self) -> bytes:
        """Whose turn it is, for every choice."""
        role = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._chunk(index, role) for index in range(self._life.answers))

    def of(self, some: Sequence[tuple[int, Delta]]) -> bytes:
        """Events of what has come; raises `ApiError` for an answer that was broken off."""
        events = []
        for index, delta in some:
            if delta.finish_reason in ("error", "cancelled"):
                raise failed(delta)
            parser = self._parsers[index]
            if parser is not None:
                events.append(self._of_calls(index, delta, parser))
            elif delta.finish_reason is None and not delta.logprobs:
                if delta.text:
                    events += (self._plain[index], orjson.dumps(delta.text), self._plain_end)
            else:
                events.append(self._last_or_logprobs(index, delta))
        return b"".join(events)

    def _last_or_logprobs(self, index: int, delta: Delta) -> bytes:
        events = b""
        if delta.text or delta.logprobs:
            events = self._chunk(index, {"content": delta.text}, logprobs=self._logprobs(delta))
        if delta.finish_reason is not None:
            events += self._chunk(index, {}, finish=FINISH_REASONS[delta.finish_reason])
        return events

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        tokenizer = self._call.server.engine.engine.tokenizer
        if not self._asked.logprobs or tokenizer is None:
            return None
        return {"content": chat_logprobs(tokenizer, delta.logprobs), "refusal": None}

    def _of_calls(self, index: int, delta: Delta, parser: ToolParser) -> bytes:
        pieces = list(parser.push(delta.text))
        if delta.finish_reason is not None:
            pieces += parser.end()
        events = [self._piece(index, piece) for piece in pieces]
        if delta.finish_reason is not None:
            reason = FINISH_REASONS[delta.finish_reason]
            if self._called[index] and reason == "stop":
                reason = "tool_calls"
            events.append(self._chunk(index, {}, finish=reason))
        return b"".join(events)

    def _piece(self, index: int, piece: Piece) -> bytes:
        if isinstance(piece, TextPiece):
            return self._chunk(index, {"content": piece.text})
        if isinstance(piece, CallStart):
            self._called[index] = True
            made: Mapping[str, Any] = {
                "index": piece.index,
                "id": f"call_{self._call.server.new_id()}",
                "type": "function",
                "function": {"name": piece.name, "arguments": ""},
            }
            return self._chunk(index, {"tool_calls": [made]})
        if isinstance(piece, CallArguments):
            more = {"index": piece.index, "function": {"arguments": piece.text}}
            return self._chunk(index, {"tool_calls": [more]})
        return b""

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        *,
        finish: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        told = b',"tierline":' + orjson.dumps(service(self._life)) if finish else b""
        return self._head + b',"choices":[' + orjson.dumps(choice) + b"]" + told + self._rest

    @property
    def outcome(self) -> str | None:
        """`tool_calls` when there were any; None: as the engine says."""
        return "tool_calls" if any(self._called) else None

    def end(self) -> bytes:
        """What it used, if that was asked for, and the end."""
        return last_chunk(self._head, self._life) if self._usage else DONE

    def failed(self, error: ApiError) -> bytes:
        """The end of a stream that cannot go on."""
        return failed_chunk(error)


ENDPOINT = Endpoint(ChatAsked, chat)
