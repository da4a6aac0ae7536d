"""/v1/responses: OpenAI's newer shape over the same conversation; nothing is kept between calls.

A body is translated into a chat (`ChatAsked`), so prompts, tools, forms and limits are those of
/v1/chat/completions.  What differs is the answer: a list of items, and a stream of typed events.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, ValidationError, model_validator

from tierline.engine.generation import Delta
from tierline.server.answers import (
    chat_logprobs,
    event,
    failed,
    require_whole,
    service,
    stream_to,
)
from tierline.server.calls import Call, Endpoint
from tierline.server.chat import Conversation, conversation_of, work_of_chat
from tierline.server.errors import ApiError, malformed
from tierline.server.life import Life
from tierline.server.shapes import (
    MESSAGES_MAX,
    TOOLS_MAX,
    WHOLE_MAX,
    ChatAsked,
    Function,
    JsonSchema,
    Name,
    ServiceLevelAsked,
    Shape,
    StreamOptions,
)
from tierline.server.sse import ClientWatch
from tierline.server.tools import CallArguments, CallEnd, CallStart, Piece, TextPiece

# --- what may be asked ----------------------------------------------------------------------


class InputPart(Shape):
    """A piece of an input message; only texts are read."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: Any = None  # what our own answers hold may be sent back
    logprobs: Any = None
    detail: Any = None
    image_url: Any = None
    file_id: Any = None
    filename: Any = None
    file_data: Any = None
    file_url: Any = None
    prompt_cache_breakpoint: Any = None

    @model_validator(mode="after")
    def _text_only(self) -> "InputPart":
        if self.type not in ("input_text", "output_text", "refusal"):
            raise ValueError("only parts of text are supported: this model reads text")
        if (self.refusal if self.type == "refusal" else self.text) is None:
            raise ValueError(f"a part of type {self.type} needs its text")
        return self


class Item(Shape):
    """One item of the input: a message, a call that was made, or what came of it."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "system", "developer", "assistant"] | None = None
    content: str | list[InputPart] | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    call_id: Name | None = None
    name: Name | None = None
    namespace: str | None = None
    caller: Any = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    summary: Any = None
    encrypted_content: Any = None

    @model_validator(mode="after")
    def _complete(self) -> "Item":
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
            "reasoning": (),
        }[self.type]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"an item of type {self.type} needs {' and '.join(missing)}")
        return self


class ResponseTool(Function):
    """A function that the model may call, without the wrapping of a chat's."""

    type: Literal["function"]


class ResponseToolChosen(Shape):
    """`tool_choice` that names a function."""

    type: Literal["function"]
    name: Name


class TextFormat(Shape):
    """What the text has to look like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextAsked(Shape):
    """How the text is to be."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesAsked(Shape):
    """The body of /v1/responses."""

    model: Name
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MESSAGES_MAX, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=WHOLE_MAX)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=TOOLS_MAX)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChosen | None = None
    parallel_tool_calls: bool | None = None
    text: TextAsked | None = None
    truncation: Literal["disabled"] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None  # accepted: tenants come from keys
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    deadline_ms: Annotated[float, Field(gt=0, le=1e9)] | None = None  # of the first token
    slo: Name | ServiceLevelAsked | None = None
    store: Any = None
    background: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    reasoning: Any = None
    max_tool_calls: Any = None
    moderation: Any = None
    context_management: Any = None
    prompt_cache_options: Any = None


def as_chat(asked: ResponsesAsked) -> ChatAsked:
    """The same request as a chat; raises `ApiError` for what a chat cannot be."""
    tools = [_tool(tool) for tool in asked.tools] if asked.tools else None
    chosen: Any = asked.tool_choice
    if isinstance(chosen, ResponseToolChosen):
        chosen = {"type": "function", "function": {"name": chosen.name}}
    wants_logprobs = bool(asked.include) or asked.top_logprobs is not None
    slo = asked.slo.model_dump() if isinstance(asked.slo, ServiceLevelAsked) else asked.slo
    body = {
        "model": asked.model,
        "messages": _messages(asked),
        "stream": asked.stream,
        "max_completion_tokens": asked.max_output_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "logprobs": wants_logprobs,
        "top_logprobs": asked.top_logprobs if wants_logprobs else None,
        "tools": tools,
        "tool_choice": chosen,
        "parallel_tool_calls": asked.parallel_tool_calls,
        "response_format": _format(asked.text),
        "service_tier": asked.service_tier,
        "priority": asked.priority,
        "deadline_ms": asked.deadline_ms,
        "slo": slo,
    }
    try:
        return ChatAsked.model_validate({k: v for k, v in body.items() if v is not None})
    except ValidationError as error:
        raise malformed(error) from None


def _tool(tool: ResponseTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _format(text: TextAsked | None) -> dict[str, Any] | None:
    if text is None or text.format is None:
        return None
    wanted = text.format
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    schema = JsonSchema.model_validate(
        {"name": wanted.name or "answer", "schema": wanted.schema_, "strict": wanted.strict}
    )
    return {"type": "json_schema", "json_schema": schema.model_dump(by_alias=True)}


def _messages(asked: ResponsesAsked) -> list[dict[str, Any]]:
    """Items as turns; calls that follow each other are of one turn."""
    messages: list[dict[str, Any]] = []
    if asked.instructions:
        messages.append({"role": "system", "content": asked.instructions})
    if isinstance(asked.input, str):
        return [*messages, {"role": "user", "content": asked.input}]
    for item in asked.input:
        if item.type == "message":
            messages.append({"role": item.role, "content": _text(item.content)})
        elif item.type == "function_call":
            made = {
                "id": item.call_id,
                "type": "function",
                "function": {"name": item.name, "arguments": item.arguments},
            }
            if not (messages and messages[-1]["role"] == "assistant"):
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(made)
        elif item.type == "function_call_output":
            told = {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
            messages.append(told)
    return messages


def _text(content: str | list[InputPart] | None) -> str:
    if isinstance(content, list):
        return "".join(part.text or part.refusal or "" for part in content)
    return content or ""


# What a chat calls otherwise, where a refusal names it.
OWN_NAMES = {
    "messages": "input",
    "response_format": "text.format",
    "response_format.json_schema.schema": "text.format.schema",
}


def own_name(param: str) -> str:
    """A chat's parameter as this endpoint knows it."""
    if param.startswith("tools."):
        return param.replace(".function.", ".")
    return OWN_NAMES.get(param, param)


# --- what is answered -----------------------------------------------------------------------


async def responses(call: Call, asked: ResponsesAsked) -> None:
    """Handle one request."""
    try:
        chat = as_chat(asked)
        conversation = await conversation_of(call, chat)
    except ApiError as error:
        error.param = error.param and own_name(error.param)
        raise
    request_id = f"resp_{call.server.new_id()}"
    work = work_of_chat(call, chat, conversation, request_id=request_id, endpoint="responses")
    async with call.server.service.answer(work) as answering:
        told = Telling(call, asked, conversation, work.life)
        if asked.stream:
            await stream_to(call, told, answering)
            return
        async with ClientWatch(call.receive):
            while some := await answering.some():
                require_whole(some)
                told.of(some)
            await answering.finish(told.outcome)
        await call.answer(orjson.dumps(told.response()), (b"x-request-id", request_id.encode()))


@dataclass(slots=True)
class Output:
    """One item of the answer, as far as it is known."""

    item: dict[str, Any]
    text: list[str] = field(default_factory=list)  # of a message, or a call's arguments
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_message(self) -> bool:
        """Whether it is text; else it is a call."""
        return bool(self.item["type"] == "message")

    def part(self) -> dict[str, Any]:
        """The one part of a message."""
        text = "".join(self.text)
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": self.logprobs,
        }

    def told(self, status: str) -> dict[str, Any]:
        """The item, with what is in it."""
        if self.is_message:
            return {**self.item, "status": status, "content": [self.part()]}
        return {**self.item, "status": status, "arguments": "".join(self.text)}


class Telling:
    """The answer to one request: the events that tell it, and the whole."""

    def __init__(
        self, call: Call, asked: ResponsesAsked, conversation: Conversation, life: Life
    ) -> None:
        self._call, self._asked, self._life = call, asked, life
        calls = conversation.calls
        self._parser = calls.parser(conversation.tools) if calls else None
        self._outputs: list[Output] = []
        self._open: Output | None = None
        self._reason: str | None = None
        self._events: list[bytes] = []
        self._number = 0
        self._logprobs = conversation.params.logprobs is not None

    def begin(self) -> bytes:
        """The first two events of every stream."""
        for name in ("response.created", "response.in_progress"):
            self._say(name, response=self.response())
        return self._said()

    def of(self, some: Sequence[tuple[int, Delta]]) -> bytes:
        """Events of what has come; raises `ApiError` for an answer that was broken off."""
        for _, delta in some:
            if delta.finish_reason in ("error", "cancelled"):
                raise failed(delta)
            self._take(delta)
        return self._said()

    def end(self) -> bytes:
        """The last event: the whole response."""
        name = "response.incomplete" if self._reason == "length" else "response.completed"
        self._say(name, response=self.response())
        return self._said()

    def failed(self, error: ApiError) -> bytes:
        """The last event of a response that was broken off."""
        whole = {**self.response(), "status": "failed"}
        whole["error"] = {"code": "server_error", "message": error.message}
        self._say("response.failed", response=whole)
        return self._said()

    @property
    def outcome(self) -> str | None:
        """`tool_calls` when there were any; None: as the engine says."""
        called = any(not output.is_message for output in self._outputs)
        return "tool_calls" if called and self._reason == "stop" else None

    # --- from tokens to items ---------------------------------------------------------------

    def _take(self, delta: Delta) -> None:
        if self._parser is None:
            self._text(delta.text, delta)
        else:
            for piece in self._parser.push(delta.text):
                self._piece(piece, delta)
        if delta.finish_reason is None:
            return
        self._reason = delta.finish_reason
        for piece in self._parser.end() if self._parser else ():
            self._piece(piece, delta)
        self._close("incomplete" if self._reason == "length" else "completed")

    def _piece(self, piece: Piece, delta: Delta) -> None:
        if isinstance(piece, TextPiece):
            self._text(piece.text, delta)
        elif isinstance(piece, CallStart):
            self._close("completed")
            new_id = self._call.server.new_id
            item = {"type": "function_call", "id": f"fc_{new_id()}", "call_id": f"call_{new_id()}"}
            self._begin({**item, "name": piece.name})
        elif isinstance(piece, CallArguments):
            assert self._open is not None
            self._open.text.append(piece.text)
            self._say("response.function_call_arguments.delta", delta=piece.text, **self._place())
        elif isinstance(piece, CallEnd):
            self._close("completed")

    def _text(self, text: str, delta: Delta) -> None:
        scored = self._scored(delta)
        if not (text or scored):
            return
        if self._open is None or not self._open.is_message:
            self._close("completed")
            new_id = self._call.server.new_id()
            self._begin({"type": "message", "id": f"msg_{new_id}", "role": "assistant"})
        assert self._open is not None
        self._open.text.append(text)
        self._open.logprobs += scored
        place = {**self._place(), "content_index": 0}
        self._say("response.output_text.delta", delta=text, logprobs=scored, **place)

    def _scored(self, delta: Delta) -> list[dict[str, Any]]:
        tokenizer = self._call.server.engine.engine.tokenizer
        if not self._logprobs or tokenizer is None:
            return []
        return chat_logprobs(tokenizer, delta.logprobs)

    def _begin(self, item: dict[str, Any]) -> None:
        opened = self._open = Output(item)
        self._outputs.append(opened)
        empty = opened.told("in_progress")
        if opened.is_message:
            empty["content"] = []
        at = len(self._outputs) - 1
        self._say("response.output_item.added", output_index=at, item=empty)
        if opened.is_message:
            place = {**self._place(), "content_index": 0}
            self._say("response.content_part.added", part=opened.part(), **place)

    def _close(self, status: str) -> None:
        """The item under way is complete."""
        closed = self._open
        if closed is None:
            return
        place = self._place()
        if closed.is_message:
            part = closed.part()
            placed = {**place, "content_index": 0}
            self._say(
                "response.output_text.done",
                text=part["text"],
                logprobs=part["logprobs"],
                **placed,
            )
            self._say("response.content_part.done", part=part, **placed)
        else:
            self._say(
                "response.function_call_arguments.done",
                arguments="".join(closed.text),
                name=closed.item["name"],
                **place,
            )
        closed.item["status"] = status
        at = place["output_index"]
        self._say("response.output_item.done", output_index=at, item=closed.told(status))
        self._open = None

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open.item["id"], "output_index": len(self._outputs) - 1}

    def _say(self, kind: str, /, **fields: Any) -> None:
        told = {"type": kind, "sequence_number": self._number, **fields}
        self._events.append(event(told, name=kind))
        self._number += 1

    def _said(self) -> bytes:
        events, self._events = self._events, []
        return b"".join(events)

    # --- the whole --------------------------------------------------------------------------

    def response(self) -> dict[str, Any]:
        """The response as far as it is known."""
        asked, life = self._asked, self._life
        ended = self._reason is not None
        short = self._reason == "length"
        chosen: Any = asked.tool_choice or "auto"
        if isinstance(chosen, ResponseToolChosen):
            chosen = chosen.model_dump()
        wanted = asked.text.format if asked.text and asked.text.format else TextFormat()
        told = {
            "id": life.id,
            "object": "response",
            "created_at": int(life.arrived_s),
            "status": ("incomplete" if short else "completed") if ended else "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if short else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": life.model,
            "output": [o.told(o.item.get("status", "in_progress")) for o in self._outputs],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "temperature": life.temperature,
            "text": {"format": wanted.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": chosen,
            "tools": [_tool_told(tool) for tool in asked.tools or ()],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
        }
        return told | ({"usage": self._usage(), "tierline": service(life)} if ended else {})

    def _usage(self) -> dict[str, Any]:
        life = self._life
        return {
            "input_tokens": life.prompt_tokens,
            "input_tokens_details": {"cached_tokens": life.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": life.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": life.prompt_tokens + life.output_tokens,
        }


def _tool_told(tool: ResponseTool) -> dict[str, Any]:
    told = tool.model_dump()
    return {**told, "strict": bool(tool.strict), "parameters": tool.parameters or {}}


ENDPOINT = Endpoint(ResponsesAsked, responses)
