"""From an HTTP request to a checked body with its caller, and errors back: once for all endpoints.

An `Endpoint` is the ASGI application behind a route that takes JSON.  It knows who calls, reads
the body within its limits, checks its shape, and turns whatever its handler raises into one
answer.  A handler that has begun to stream reports errors in the stream.
"""

import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from tierline.base.errors import TierlineError
from tierline.engine.generation import Grammar
from tierline.engine.sampling import SamplingParams
from tierline.server.errors import ApiError, malformed, told
from tierline.server.http import read_body
from tierline.server.life import Life
from tierline.server.running import nearest
from tierline.server.server import Server
from tierline.server.service import Work
from tierline.server.shapes import Asked, ServiceLevelAsked, Shape, require_supported
from tierline.server.sse import ClientGone
from tierline.server.state import Key
from tierline.workload.slo import ServiceLevel

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
S = TypeVar("S", bound=Shape)

JSON_HEADERS = [(b"content-type", b"application/json")]
HEADER_LENGTH_MAX = 256
SAMPLING = {  # what the engine takes as it is asked for
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "n",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
}

NO_LIMITS = ServiceLevelAsked()

log = logging.getLogger("tierline.server")


@dataclass(slots=True, kw_only=True)
class Call:
    """One HTTP request on its way."""

    server: Server
    key: Key
    headers: dict[bytes, bytes]
    arrived_s: float
    arrival_ps: int
    receive: Receive
    send: Send

    def header(self, name: bytes) -> str | None:
        """A header of ours, as text."""
        value = self.headers.get(name)
        return None if value is None else value[:HEADER_LENGTH_MAX].decode("latin-1").strip()

    async def answer(self, body: bytes, *headers: tuple[bytes, bytes], status: int = 200) -> None:
        """Send a whole response."""
        await respond(self.send, status, body, headers=[*JSON_HEADERS, *headers])


class Endpoint(Generic[S]):
    """A route that takes JSON of one shape."""

    def __init__(self, shape: type[S], handle: Callable[[Call, S], Awaitable[None]]) -> None:
        self.shape, self.handle = shape, handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        server: Server = scope["app"].state.server
        started = False

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            call = _call(server, scope, receive, sending)
            await self._answer(call, scope)
        except ClientGone:
            return  # nobody is there to be told
        except Exception as error:
            refusal = _refusal(error)
            server.recorder.metrics.refused(refusal.status)
            if started:  # too late to say so with a status: the connection is cut
                return
            await refuse(send, refusal)

    async def _answer(self, call: Call, scope: Scope) -> None:
        settings = call.server.settings
        body = await read_body(
            call.receive,
            scope["headers"],
            bytes_max=settings.body_bytes_max,
            seconds_max=settings.body_s,
        )
        asked = self.shape.model_validate_json(body)
        require_supported(asked)
        model = getattr(asked, "model", None)
        if model is not None:
            require_model(call, model)
        await self.handle(call, asked)


def _call(server: Server, scope: Scope, receive: Receive, send: Send) -> Call:
    arrival_ps = server.service.now_ps
    headers = dict(scope["headers"])
    return Call(
        server=server,
        key=server.keys.check(bearer(headers)),
        headers=headers,
        arrived_s=server.clock_s(),
        arrival_ps=arrival_ps,
        receive=receive,
        send=send,
    )


def bearer(headers: dict[bytes, bytes]) -> str | None:
    """The token that a request shows, if any."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer":
        return None
    return token.decode("latin-1").strip()


def _refusal(error: Exception) -> ApiError:
    """What a caller is told; our own bugs are logged, and told without their inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return malformed(error)
    if isinstance(error, TierlineError):
        return told(error)
    # Its message could hold what somebody wrote, so only where it happened is logged.
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else "nowhere"
    log.error("a request failed with %s at %s", type(error).__name__, where)
    return ApiError(500, "the server failed at this request", code="internal_error")


async def refuse(send: Send, error: ApiError) -> None:
    """Answer with an error."""
    headers = [(k.lower().encode(), v.encode()) for k, v in error.headers.items()]
    await respond(send, error.status, error.body(), headers=[*JSON_HEADERS, *headers])


async def respond(
    send: Send, status: int, body: bytes, *, headers: list[tuple[bytes, bytes]]
) -> None:
    """Send a whole response."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


def require_model(call: Call, model: str) -> None:
    """Raise `ApiError`: 404 for a model that is not here, 403 for one the key is not for."""
    names = call.server.settings.model_names
    if model not in names:
        raise ApiError(
            404,
            f"the model {model[:100]!r} is not served here",
            code="model_not_found",
            param="model",
            hint=f"served: {', '.join(names)}",
        )
    call.server.keys.allow(call.key, call.server.model)


# --- what every generation asks for ---------------------------------------------------------


def sampling_of(
    asked: Asked, *, max_tokens: int | None, logprobs: int | None, skip_special: bool | None = None
) -> SamplingParams:
    """The engine's parameters; raises `ApiError`."""
    given = {
        name: value
        for name in asked.model_fields_set & SAMPLING
        if (value := getattr(asked, name)) is not None
    }
    skips = asked.skip_special_tokens if skip_special is None else skip_special
    return SamplingParams(
        max_tokens=max_tokens,
        logprobs=logprobs,
        logit_bias=_bias(asked.logit_bias),
        skip_special_tokens=skips,
        **given,
    )


def _bias(asked: dict[str, float] | None) -> dict[int, float]:
    bias: dict[int, float] = {}
    for token, value in (asked or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ApiError(
                400,
                "a key of logit_bias is not a token id",
                code="invalid_value",
                param="logit_bias",
                hint="token ids as text, such as {'50256': -100}; /tokenize gives them",
            )
        bias[int(token)] = value
    return bias


def require_length(call: Call, tokens: int, *, param: str) -> None:
    """Raise `ApiError`: 413 over the operator's cap, 400 over what the model can read."""
    cap = call.server.settings.input_tokens_max
    if cap is not None and tokens > cap:
        raise ApiError(
            413,
            f"the input has {tokens:,} tokens; this server takes {cap:,}",
            code="input_too_long",
            param=param,
            hint="send a shorter input",
        )
    most = call.server.running.positions_max
    if tokens >= most:
        raise ApiError(
            400,
            f"the input has {tokens:,} tokens; the model takes {most:,} with the answer",
            code="context_length_exceeded",
            param=param,
            hint="send a shorter input",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """How urgent a request is, and what it was promised."""

    level: ServiceLevel
    priority: int
    ttft_s: float | None
    itl_s: float | None
    deadline_s: float | None


def served_as(call: Call, asked: Asked | None, *, tier: str | None = None) -> Served:
    """The class of a request from its body, else from its headers; raises `ApiError`.

    `tier` is OpenAI's `service_tier`: `priority` is our most urgent class, `flex` the least.  A
    priority without either takes the class nearest to it, for order comes from promises.
    """
    slo = asked.slo if asked and asked.slo is not None else call.header(b"x-tierline-slo")
    running = call.server.running
    own = slo if isinstance(slo, ServiceLevelAsked) else NO_LIMITS
    priority: float | None = asked.priority if asked else None
    if priority is None:
        priority = _number(call, b"x-tierline-priority", "priority", low=-1000, high=1000)
    name = slo if isinstance(slo, str) else _unnamed(call, tier, None if slo else priority)
    level = next((level for level in running.levels if level.name == name), None)
    if level is None:
        raise ApiError(
            400,
            f"no service class {name[:64]!r}",
            code="unknown_service_class",
            param="slo",
            hint=f"classes: {', '.join(level.name for level in running.levels)}",
        )
    deadline_ms = asked.deadline_ms if asked and asked.deadline_ms is not None else None
    if deadline_ms is None:
        deadline_ms = _number(call, b"x-tierline-deadline-ms", "deadline_ms", low=1e-3, high=1e9)
    return Served(
        level=level,
        priority=level.priority if priority is None else int(priority),
        ttft_s=level.limit_s("ttft") if own.ttft_ms is None else own.ttft_ms / 1e3,
        itl_s=level.limit_s("itl") if own.itl_ms is None else own.itl_ms / 1e3,
        deadline_s=None if deadline_ms is None else deadline_ms / 1e3,
    )


def _unnamed(call: Call, tier: str | None, priority: float | None) -> str:
    """The class of who names none."""
    running = call.server.running
    if tier in ("priority", "fast"):
        return running.levels[0].name
    if tier == "flex":
        return running.levels[-1].name
    return running.default_level if priority is None else nearest(running.levels, priority).name


def _number(call: Call, header: bytes, param: str, *, low: float, high: float) -> float | None:
    text = call.header(header)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise ApiError(
            400,
            f"the header {header.decode()} is not a number from {low:g} to {high:g}",
            code="invalid_value",
            param=param,
        )
    return value


def work_of(
    call: Call,
    served: Served,
    *,
    request_id: str,
    endpoint: str,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stream: bool = False,
    grammar: Grammar | None = None,
    structured: str = "",
    tools: int = 0,
    pooled: bool = False,
) -> Work:
    """What the engine is asked for, and the life that begins with it."""
    server = call.server
    prompt_tokens = sum(map(len, prompts))
    room = max(server.running.positions_max - prompt_tokens, 1)
    life = Life(
        id=request_id,
        endpoint=endpoint,
        model=server.model,
        tenant=call.key.tenant,
        key_id=call.key.id,
        level=served.level.name,
        priority=served.priority,
        stream=stream,
        arrived_s=call.arrived_s,
        arrival_ps=call.arrival_ps,
        prompt_tokens=prompt_tokens,
        output_tokens_max=min(params.max_tokens or room, room),
        answers=len(prompts) * params.n,
        temperature=params.temperature,
        structured=structured,
        tools=tools,
        ttft_limit_s=served.deadline_s or served.ttft_s,
        itl_limit_s=served.itl_s,
        traceparent=call.header(b"traceparent") or "",
    )
    return Work(
        life=life,
        prompts=prompts,
        params=params,
        grammar=grammar,
        ttft_s=served.ttft_s,
        itl_s=None if pooled else served.itl_s,
        deadline_s=served.deadline_s,
        pooled=pooled,
    )
