"""Answers of a given form: what a body asks for, as a grammar that is compiled beside the loop."""

import asyncio

import orjson

from tierline.base.errors import RequestError
from tierline.engine.grammar import Grammar, Wanted
from tierline.server.errors import ApiError
from tierline.server.server import Server
from tierline.server.shapes import ResponseFormat, StructuredOutputs


def wanted_of(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None
) -> Wanted | None:
    """The form that is asked for, if any; raises `ApiError` for two, or for none that is one."""
    asked = [w for w in (_of_format(response_format), _of_structured(structured)) if w]
    if len(asked) > 1:
        raise ApiError(
            400,
            "response_format and structured_outputs both bound the answer",
            code="invalid_value",
            param="structured_outputs",
            hint="use one of them",
        )
    return asked[0] if asked else None


def _of_format(asked: ResponseFormat | None) -> Wanted | None:
    if asked is None or asked.type == "text":
        return None
    if asked.json_schema is None or asked.json_schema.schema_ is None:
        return Wanted(kind="json_object", text="")
    return Wanted(kind="json_schema", text=orjson.dumps(asked.json_schema.schema_).decode())


def _of_structured(asked: StructuredOutputs | None) -> Wanted | None:
    if asked is None:
        return None
    schema = asked.json_schema
    if isinstance(schema, dict):
        schema = orjson.dumps(schema).decode()
    given = {
        "json_schema": schema,
        "json_object": "" if asked.json_object else None,
        "regex": asked.regex,
        "choice": tuple(asked.choice) if asked.choice else None,
        "ebnf": asked.grammar,
    }
    found = [(kind, text) for kind, text in given.items() if text is not None]
    if len(found) != 1:
        raise ApiError(
            400,
            "structured_outputs needs exactly one of json, json_object, regex, choice, grammar",
            code="invalid_value",
            param="structured_outputs",
        )
    kind, text = found[0]
    return Wanted(kind=kind, text=text)


async def compiled(server: Server, wanted: Wanted | None) -> Grammar | None:
    """The grammar of a form; raises `ApiError` for one that is wrong or not supported."""
    if wanted is None:
        return None
    grammars = server.grammars
    if grammars is None:
        raise ApiError(
            400,
            "this model has no tokenizer: its answers cannot be bound to a form",
            code="unsupported_parameter",
            param="response_format",
        )
    try:
        return await asyncio.to_thread(grammars.compile, wanted)
    except RequestError as error:
        raise ApiError(
            400, str(error), code="invalid_grammar", param="response_format", hint=error.hint
        ) from None
