"""/v1/embeddings: the mean of the model's last states over each input, at length 1.

A chat model was not made for this, so every answer says how its vectors came to be: `tierline`
in the body, `x-tierline-pooling` among the headers.  Inputs go through the scheduler as prompts
do, beside whoever is being answered; nothing is generated.
"""

import asyncio
import base64
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import Field

from tierline.engine.sampling import SamplingParams
from tierline.server.answers import require_whole, service
from tierline.server.calls import Call, Endpoint, require_length, served_as, work_of
from tierline.server.chat import LONG_CHARACTERS
from tierline.server.completions import no_tokenizer
from tierline.server.errors import ApiError
from tierline.server.service import Answering
from tierline.server.shapes import (
    PROMPTS_MAX,
    WHOLE_MAX,
    Asked,
    Name,
    ServiceLevelAsked,
    Shape,
    Tokens,
)
from tierline.server.sse import ClientWatch

POOLING = "mean"
HEADER = (b"x-tierline-pooling", POOLING.encode())
Some = Field(min_length=1, max_length=PROMPTS_MAX)


class EmbeddingsAsked(Shape):
    """The body of /v1/embeddings: one text or several, or their tokens."""

    model: Name
    input: (
        str
        | Annotated[list[str], Some]
        | Annotated[Tokens, Field(min_length=1)]
        | Annotated[list[Annotated[Tokens, Field(min_length=1)]], Some]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=WHOLE_MAX)] | None = None
    user: str | None = None  # accepted: tenants come from keys
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    deadline_ms: Annotated[float, Field(gt=0, le=1e9)] | None = None  # of the first vector
    slo: Name | ServiceLevelAsked | None = None


async def embeddings(call: Call, asked: EmbeddingsAsked) -> None:
    """Handle one request."""
    _require_dimensions(asked, call.server.engine.engine.executor.hidden)
    prompts = await _prompts(call, asked)
    urgency = Asked(
        model=asked.model, priority=asked.priority, deadline_ms=asked.deadline_ms, slo=asked.slo
    )
    work = work_of(
        call,
        served_as(call, urgency),
        request_id=f"embd-{call.server.new_id()}",
        endpoint="embeddings",
        prompts=prompts,
        params=SamplingParams(max_tokens=1),
        pooled=True,
    )
    async with call.server.service.answer(work) as answering, ClientWatch(call.receive):
        vectors = await _vectors(answering)
    await call.answer(
        _body(answering, asked, vectors), HEADER, (b"x-request-id", work.life.id.encode())
    )


def _require_dimensions(asked: EmbeddingsAsked, hidden: int) -> None:
    if asked.dimensions not in (None, hidden):
        raise ApiError(
            400,
            f"this model's vectors have {hidden:,} dimensions: they were not trained to be cut",
            code="unsupported_parameter",
            param="dimensions",
            hint=f"leave out dimensions, or ask for {hidden}",
        )


async def _prompts(call: Call, asked: EmbeddingsAsked) -> list[list[int]]:
    """Each input as tokens; raises `ApiError`."""
    tokenizer = call.server.engine.engine.tokenizer
    given: Any = asked.input
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    prompts: list[list[int]] = []
    for one in given:
        if not isinstance(one, str):
            tokens = list(one)
        elif tokenizer is None:
            raise no_tokenizer("input")
        elif len(one) > LONG_CHARACTERS:
            tokens = await asyncio.to_thread(tokenizer.encode, one, special=True)
        else:
            tokens = tokenizer.encode(one, special=True)
        if not tokens:
            raise ApiError(400, "an input is empty", code="invalid_value", param="input")
        require_length(call, len(tokens), param="input")
        prompts.append(tokens)
    return prompts


async def _vectors(answering: Answering) -> list[NDArray[np.float32]]:
    """The vector of each input, once all are there."""
    life = answering.life
    found: dict[int, NDArray[np.float32]] = {}
    while some := await answering.some():
        require_whole(some)
        for choice, delta in some:
            assert delta.embedding is not None
            found[choice] = delta.embedding
            if life.first_ps is None:
                life.first_ps = delta.at_ps  # no token ever comes: this is what was waited for
    await answering.finish()
    return [found[choice] for choice in range(life.answers)]


def _body(
    answering: Answering, asked: EmbeddingsAsked, vectors: list[NDArray[np.float32]]
) -> bytes:
    life = answering.life
    plain = asked.encoding_format == "float"
    data = [
        {"object": "embedding", "index": index, "embedding": vector if plain else _packed(vector)}
        for index, vector in enumerate(vectors)
    ]
    return orjson.dumps(
        {
            "object": "list",
            "data": data,
            "model": life.model,
            "usage": {"prompt_tokens": life.prompt_tokens, "total_tokens": life.prompt_tokens},
            "tierline": service(life) | {"pooling": POOLING, "normalized": True},
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


def _packed(vector: NDArray[np.float32]) -> str:
    """Little-endian float32 in base64, as OpenAI sends it."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


ENDPOINT = Endpoint(EmbeddingsAsked, embeddings)
