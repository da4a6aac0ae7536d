"""What may be asked, as pydantic models: they check bodies and make `/openapi.json`.

Names, defaults and limits are OpenAI's; what vLLM adds is named as there, and so few that it
stands here in sight.  A field that nobody knows is refused by name.  A field that OpenAI knows
and this server cannot honour is in `UNSUPPORTED` with the reason; values that change nothing
(`store: false`) pass.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tierline.engine.sampling import LOGPROBS_MAX, N_MAX, STOP_CHARACTERS_MAX, STOPS_MAX
from tierline.server.errors import ApiError, unsupported

WHOLE_MAX = 2**31 - 1
TEXT_NAME_MAX = 256
PROMPTS_MAX = 2048
MESSAGES_MAX = 4096
TOOLS_MAX = 128

# A list of many wrong items stops at the first: a message for each would hold up everybody.
Tokens = Annotated[list[Annotated[int, Field(ge=0, le=WHOLE_MAX)]], Field(fail_fast=True)]
Name = Annotated[str, Field(min_length=1, max_length=TEXT_NAME_MAX)]
Stop = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS_MAX)]

# name -> (values that ask for nothing, why others are refused)
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "this server makes text only"),
    "modalities": ((["text"],), "this server makes text only"),
    "web_search_options": ((), "this server does not search the web"),
    "prediction": ((), "predicted outputs are not used here"),
    "functions": ((), "it was replaced by tools"),
    "function_call": ((), "it was replaced by tool_choice"),
    "store": ((False,), "answers are not kept"),
    "reasoning_effort": (("none",), "the model's template has no such switch"),
    "verbosity": (("medium",), "the model's template has no such switch"),
    "moderation": ((), "there is no moderation model here"),
    "prompt_cache_options": ((), "prefixes are cached by what they say, for as long as they fit"),
    "background": ((False,), "answers are not kept"),
    "previous_response_id": ((), "answers are not kept: send the whole conversation"),
    "conversation": ((), "conversations are not kept: send the whole one"),
    "prompt": ((), "prompt templates are not kept here"),
    "reasoning": ((), "the model's template has no such switch"),
    "max_tool_calls": ((), "there are no built-in tools"),
    "context_management": ((), "inputs are not shortened here"),
    "best_of": ((1,), "ask for n answers and choose"),
    "suffix": (("",), "this model continues texts, it does not fill gaps"),
}


class Shape(BaseModel):
    """JSON of one fixed form."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Shape):
    """How a stream ends."""

    include_usage: bool = False
    include_obfuscation: bool | None = None  # accepted: nothing is ever padded here


class StructuredOutputs(Shape):
    """vLLM's way to bound an answer: exactly one of these."""

    json_schema: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None


class ServiceLevelAsked(Shape):
    """Latency targets of this request's own."""

    ttft_ms: Annotated[float, Field(gt=0, le=1e9)] | None = None
    itl_ms: Annotated[float, Field(gt=0, le=1e9)] | None = None


class Asked(Shape):
    """What every kind of generation takes."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=WHOLE_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS_MAX, fail_fast=True)] | None = None
    stop_token_ids: Tokens | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: Annotated[int, Field(ge=1, le=N_MAX)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=WHOLE_MAX)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=WHOLE_MAX)] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # accepted: tenants come from keys
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None  # larger is more urgent
    deadline_ms: Annotated[float, Field(gt=0, le=1e9)] | None = None  # of the first token
    slo: Name | ServiceLevelAsked | None = None  # a class's name, or targets


class Part(Shape):
    """A piece of a message: text, or a kind that is refused by its name."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    prompt_cache_breakpoint: Any = None  # accepted: prefixes are cached by what they say

    @model_validator(mode="after")
    def _text_only(self) -> "Part":
        if self.type == "refusal" and self.refusal is not None:
            return self
        if self.type != "text":
            raise ValueError("only parts of type text are supported: this model reads text")
        if self.text is None:
            raise ValueError("a part of type text needs a text")
        return self


class Called(Shape):
    """The function of a call that was made."""

    name: Name
    arguments: str


class ToolCall(Shape):
    """A call that the model made earlier."""

    id: Name
    type: Literal["function"] = "function"
    function: Called
    index: int | None = None  # clients that join streams send it back


class Message(Shape):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=TOOLS_MAX)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    annotations: Any = None  # what our own answers hold may be sent back
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _complete(self) -> "Message":
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a message of role tool needs the tool_call_id it answers")
        if self.content is None and not (self.role == "assistant"):
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the assistant calls tools")
        return self

    @property
    def text(self) -> str:
        """Its parts joined."""
        if self.content is None:
            return self.refusal or ""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or part.refusal or "" for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MESSAGES_MAX, fail_fast=True)]


class Function(Shape):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolOffered(Shape):
    """A tool of a chat."""

    type: Literal["function"]
    function: Function


class ChoiceOfFunction(Shape):
    """The name of the one to call."""

    name: Name


class ToolChosen(Shape):
    """`tool_choice` that names a function."""

    type: Literal["function"]
    function: ChoiceOfFunction


class JsonSchema(Shape):
    """A schema with a name."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Shape):
    """What an answer has to look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given exactly when the type is json_schema")
        return self


class ChatAsked(Asked):
    """The body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=WHOLE_MAX)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MAX)] | None = None
    tools: Annotated[list[ToolOffered], Field(max_length=TOOLS_MAX)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChosen | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    metadata: dict[str, str] | None = None  # accepted: nothing is kept
    safety_identifier: str | None = None  # accepted: tenants come from keys
    prompt_cache_key: str | None = None  # accepted: prefixes are cached by what they say
    prompt_cache_retention: str | None = None  # accepted, likewise
    audio: Any = None
    modalities: Any = None
    web_search_options: Any = None
    prediction: Any = None
    functions: Any = None
    function_call: Any = None
    store: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    moderation: Any = None
    prompt_cache_options: Any = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatAsked":
        if self.top_logprobs is not None and not self.logprobs:
            raise _needs("top_logprobs", "logprobs: true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise _needs("tool_choice", "tools")
        return self


def _needs(param: str, other: str) -> ApiError:
    """Raised by a validator as it is, for a `ValueError` of a whole body names no parameter."""
    return ApiError(
        400,
        f"{param} needs {other}",
        code="invalid_value",
        param=param,
        hint=f"leave out {param}, or send {other.partition(':')[0]}, too",
    )


class CompletionAsked(Asked):
    """The body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=PROMPTS_MAX, fail_fast=True)]
        | Annotated[Tokens, Field(min_length=1)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=PROMPTS_MAX, fail_fast=True)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MAX)] | None = None
    best_of: Any = None
    suffix: Any = None


class TokenizeAsked(Shape):
    """The body of /tokenize: a text, or a conversation."""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> "TokenizeAsked":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")
        return self


class DetokenizeAsked(Shape):
    """The body of /detokenize."""

    model: Name | None = None
    tokens: Tokens


def require_supported(asked: Shape) -> None:
    """Raise `ApiError` for the first parameter that is set and has no effect here."""
    for name in sorted(asked.model_fields_set):
        if type(asked).model_fields[name].annotation is not Any:
            continue  # a shape that honours it says what it takes
        passing, why = UNSUPPORTED[name]
        value = getattr(asked, name)
        if value is not None and value not in passing:
            raise unsupported(name, why)
