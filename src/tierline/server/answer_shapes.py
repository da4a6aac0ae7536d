"""What is answered, as pydantic models: the second half of `/openapi.json`.

No answer is built from these: handlers write dictionaries, which is faster.  Tests hold both
together: they validate every kind of answer of a running server against what stands here, and
against OpenAI's own document.  A field with a default may be absent.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from tierline.server.openapi_words import ERRORS
from tierline.server.shapes import Shape

Count = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[float, Field(ge=0)]
Place = Annotated[int, Field(ge=0)]
Unix = Annotated[int, Field(ge=0)]
Ended = Literal["stop", "length", "tool_calls"]


# --- refusals -------------------------------------------------------------------------------


class Refusal(Shape):
    """What was wrong, in OpenAI's shape; `hint` is what to do instead."""

    message: str
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "billing_error",
        "permission_error",
        "rate_limit_error",
        "server_error",
    ]
    param: str | None
    code: Annotated[str, Field(json_schema_extra={"enum": sorted(ERRORS)})]
    hint: str = ""


class Refused(Shape):
    """Every answer that is no success; inside a stream, an event of its own."""

    error: Refusal


# --- what generations share -----------------------------------------------------------------


class Service(Shape):
    """How the request was served: our own part of every answer."""

    class_: str = Field(alias="class")
    priority: int
    queue_ms: Milliseconds | None
    ttft_ms: Milliseconds | None
    prefix_tier: str | None  # where the longest cached prefix lay; null: nothing was cached
    preemptions: Count


class Cached(Shape):
    """Of the prompt's tokens, those that were not computed again."""

    cached_tokens: Count


class TokensUsed(Shape):
    """What is charged."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: Cached


class Candidate(Shape):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class Scored(Candidate):
    """A token that came, and what could have come instead."""

    top_logprobs: list[Candidate]


class Scores(Shape):
    """The tokens of one answer."""

    content: list[Scored]
    refusal: None


# --- /v1/chat/completions -------------------------------------------------------------------


class FunctionMade(Shape):
    """A function's name and its arguments, as JSON text."""

    name: str
    arguments: str


class CallMade(Shape):
    """A call that the model wants made."""

    id: str
    type: Literal["function"]
    function: FunctionMade


class MessageMade(Shape):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[CallMade] = Field(default_factory=list)


class ChatChoice(Shape):
    """One answer of `n`."""

    index: Place
    message: MessageMade
    logprobs: Scores | None
    finish_reason: Ended


class ChatCompletion(Shape):
    """A whole chat."""

    id: str
    object: Literal["chat.completion"]
    created: Unix
    model: str
    choices: list[ChatChoice]
    usage: TokensUsed
    service_tier: Literal["default"]
    tierline: Service


class FunctionPart(Shape):
    """The name comes first, then pieces of the arguments."""

    name: str = ""
    arguments: str


class CallPart(Shape):
    """A piece of a call; those of one `index` belong together."""

    index: Place
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionPart


class MessagePart(Shape):
    """What has come since the last chunk."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    refusal: None = None
    tool_calls: list[CallPart] = Field(default_factory=list)


class ChatChunkChoice(Shape):
    """One answer of `n`, going on."""

    index: Place
    delta: MessagePart
    logprobs: Scores | None
    finish_reason: Ended | None


class ChatCompletionChunk(Shape):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: Unix
    model: str
    choices: list[ChatChunkChoice]
    usage: TokensUsed | None = None
    tierline: Service | None = None  # with the chunk that ends an answer


# --- /v1/completions ------------------------------------------------------------------------


class ScoresInColumns(Shape):
    """The tokens of one text; offsets are characters from its start."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[Place]


class TextChoice(Shape):
    """One text: those of the first prompt first."""

    index: Place
    text: str
    logprobs: ScoresInColumns | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(Shape):
    """Whole texts."""

    id: str
    object: Literal["text_completion"]
    created: Unix
    model: str
    choices: list[TextChoice]
    usage: TokensUsed
    tierline: Service


class TextChunkChoice(Shape):
    """One text, going on."""

    index: Place
    text: str
    logprobs: ScoresInColumns | None
    finish_reason: Literal["stop", "length"] | None


class TextChunk(Shape):
    """One event of streamed texts."""

    id: str
    object: Literal["text_completion"]
    created: Unix
    model: str
    choices: list[TextChunkChoice]
    usage: TokensUsed | None = None
    tierline: Service | None = None


# --- /v1/responses --------------------------------------------------------------------------

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(Shape):
    """The one part of a message."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)]
    logprobs: list[Scored]


class OutputMessage(Shape):
    """Text that the model said."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: Status
    content: list[OutputText]


class OutputCall(Shape):
    """A call that the model wants made."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


Output = Annotated[OutputMessage | OutputCall, Field(discriminator="type")]


class InputDetails(Shape):
    """Of the input's tokens."""

    cached_tokens: Count
    cache_write_tokens: Count


class OutputDetails(Shape):
    """Of the output's tokens."""

    reasoning_tokens: Count


class ResponseUsed(Shape):
    """What is charged."""

    input_tokens: Count
    input_tokens_details: InputDetails
    output_tokens: Count
    output_tokens_details: OutputDetails
    total_tokens: Count


class Why(Shape):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class Broken(Shape):
    """Why a response failed."""

    code: Literal["server_error"]
    message: str


class ResponseMade(Shape):
    """A response, whole or as far as it has come."""

    id: str
    object: Literal["response"]
    created_at: Unix
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: Broken | None
    incomplete_details: Why | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[Output]
    parallel_tool_calls: bool
    previous_response_id: None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsed | None = None
    tierline: Service | None = None


class Event(Shape):
    """What all events have."""

    sequence_number: Place


class OfResponse(Event):
    """The response so far; the last event of a stream has it whole."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseMade


class OfItem(Event):
    """An item begins, or is complete."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: Place
    item: Output


class OfPart(Event):
    """The part of a message begins, or is complete."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    item_id: str
    output_index: Place
    content_index: Place
    part: OutputText


class TextDelta(Event):
    """More text."""

    type: Literal["response.output_text.delta"]
    item_id: str
    output_index: Place
    content_index: Place
    delta: str
    logprobs: list[Scored]


class TextDone(Event):
    """A text is complete."""

    type: Literal["response.output_text.done"]
    item_id: str
    output_index: Place
    content_index: Place
    text: str
    logprobs: list[Scored]


class ArgumentsDelta(Event):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    item_id: str
    output_index: Place
    delta: str


class ArgumentsDone(Event):
    """A call is complete."""

    type: Literal["response.function_call_arguments.done"]
    item_id: str
    output_index: Place
    name: str
    arguments: str


class ResponseEvent(
    RootModel[OfResponse | OfItem | OfPart | TextDelta | TextDone | ArgumentsDelta | ArgumentsDone]
):
    """One event of a streamed response."""

    root: Annotated[
        OfResponse | OfItem | OfPart | TextDelta | TextDone | ArgumentsDelta | ArgumentsDone,
        Field(discriminator="type"),
    ]


# --- the other paths of /v1, and texts ------------------------------------------------------


class ServiceOfEmbedding(Service):
    """How vectors came to be, too."""

    pooling: Literal["mean"]
    normalized: Literal[True]


class PromptUsed(Shape):
    """What is charged."""

    prompt_tokens: Count
    total_tokens: Count


class Embedding(Shape):
    """One input's vector; in base64 its float32 are little-endian."""

    object: Literal["embedding"]
    index: Place
    embedding: list[float] | str


class Embeddings(Shape):
    """One vector for each input, in their order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PromptUsed
    tierline: ServiceOfEmbedding


class Model(Shape):
    """A model under one of its names."""

    id: str
    object: Literal["model"]
    created: Unix
    owned_by: Literal["tierline"]
    root: str
    max_model_len: Count


class Models(Shape):
    """Every name that is served."""

    object: Literal["list"]
    data: list[Model]


class Tokenized(Shape):
    """A text as tokens."""

    count: Count
    max_model_len: Count
    tokens: list[Count]
    token_strs: list[str] = Field(default_factory=list)


class Detokenized(Shape):
    """Tokens as text."""

    prompt: str


# --- operations -----------------------------------------------------------------------------


class Health(Shape):
    """Whether the process lives."""

    status: Literal["ok", "failed"]
    reason: str


class Readiness(Shape):
    """Whether to send requests here now."""

    ready: bool
    reason: str


class KeyTold(Shape):
    """A key, without what would open anything. Times are Unix seconds."""

    id: str
    tenant: str
    name: str
    models: list[str] | None
    budget_tokens: Count | None
    created_s: float
    expires_s: float | None
    revoked_s: float | None
    spent_tokens: Count


class KeyMade(KeyTold):
    """A new key, with its text: here and nowhere else."""

    key: str


class KeyList(Shape):
    """Every key that is kept."""

    object: Literal["list"]
    data: list[KeyTold]


class Sums(Shape):
    """Usage that shares a day, a tenant, a key, a model, as `by` said."""

    day: str = ""
    tenant: str = ""
    key_id: str = ""
    model: str = ""
    requests: Count
    prompt_tokens: Count
    cached_tokens: Count
    output_tokens: Count


class SumList(Shape):
    """Sums of usage."""

    object: Literal["list"]
    data: list[Sums]


class UsageRecord(Shape):
    """What one request used."""

    request_id: str
    key_id: str
    tenant: str
    model: str
    endpoint: str
    level: str
    outcome: str
    prompt_tokens: Count
    cached_tokens: Count
    output_tokens: Count
    arrived_s: float
    queue_s: float | None
    ttft_s: float | None
    e2e_s: float | None


class UsageRecords(Shape):
    """One page of records, newest first."""

    object: Literal["list"]
    data: list[UsageRecord]
    next_before: Count | None


class RunTold(Shape):
    """One run of the server."""

    number: Count
    started_s: float
    seen_s: float
    ended_s: float | None
    ended: str
    model: str
    options: dict[str, Any]
    requests: Count
    prompt_tokens: Count
    cached_tokens: Count
    output_tokens: Count


class RunList(Shape):
    """Runs, newest first."""

    object: Literal["list"]
    data: list[RunTold]


class Draining(Shape):
    """Whether the door is closed, and how many are inside."""

    draining: bool
    requests: Count


class LogLevel(Shape):
    """What is logged."""

    level: str


class Tier(Shape):
    """One tier of memory that keeps KV."""

    tier: str
    bytes: Count
    blocks: Count
    blocks_held: Count
    blocks_cached: Count


class TierList(Shape):
    """Every tier, the device first."""

    object: Literal["list"]
    data: list[Tier]


class CacheReset(Shape):
    """How many blocks were forgotten."""

    blocks_forgotten: Count
