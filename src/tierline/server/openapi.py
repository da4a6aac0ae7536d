"""`/openapi.json`: every path that a program may use, from the shapes that check bodies.

`app` serves it, `tools/docs.py` writes the reference from it.  Pages of the dashboard are for
people, and not in it.  Everything here happens once, at the first request for it.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import orjson
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from tierline.server import admin
from tierline.server import answer_shapes as told
from tierline.server.embeddings import EmbeddingsAsked
from tierline.server.openapi_words import (
    ERRORS,
    PARAMETERS,
    REQUEST_HEADERS,
    RESPONSE_HEADERS,
    WITHOUT_EFFECT,
)
from tierline.server.responses import ResponsesAsked
from tierline.server.server import Server
from tierline.server.shapes import (
    UNSUPPORTED,
    ChatAsked,
    CompletionAsked,
    DetokenizeAsked,
    Shape,
    TokenizeAsked,
)

JSON = "application/json"
EVENTS = "text/event-stream"
TEXT = "text/plain"
REFERENCE = "#/components/schemas/"

READS = (401, 402, 403, 405, 500, 503)
TAKES = (*READS, 400, 404, 408, 413, 415)
GENERATES = (*TAKES, 429, 504)
MANAGES = (400, 401, 403, 405, 500, 503)
CHANGES = (*MANAGES, 408, 413, 415)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    about: str
    tells: type[Shape] | None  # None: text
    asks: type[Shape] | None = None  # a body, or the query and path of a GET or DELETE
    streams: type[BaseModel] | None = None  # each of its events
    refuses: tuple[int, ...] = ()
    status: int = 200
    also: tuple[int, ...] = ()  # statuses with the same shape as success

    @property
    def group(self) -> str:
        """Under which heading it stands."""
        if self.path.startswith("/v1"):
            return "OpenAI's API"
        if self.path.startswith("/admin"):
            return "Administration"
        return "Texts" if self.method == "POST" else "Operations"

    @property
    def has_body(self) -> bool:
        """Whether what is asked comes in a body."""
        return self.method in ("POST", "PUT") and bool(self.asks and self.asks.model_fields)

    @property
    def generates(self) -> bool:
        """Whether it goes through the scheduler."""
        return 429 in self.refuses


OPERATIONS = (
    Operation(
        method="POST",
        path="/v1/chat/completions",
        about="Answer a conversation.",
        asks=ChatAsked,
        tells=told.ChatCompletion,
        streams=told.ChatCompletionChunk,
        refuses=GENERATES,
    ),
    Operation(
        method="POST",
        path="/v1/responses",
        about="Answer a conversation, as items and typed events; nothing is kept.",
        asks=ResponsesAsked,
        tells=told.ResponseMade,
        streams=told.ResponseEvent,
        refuses=GENERATES,
    ),
    Operation(
        method="POST",
        path="/v1/completions",
        about="Continue texts.",
        asks=CompletionAsked,
        tells=told.TextCompletion,
        streams=told.TextChunk,
        refuses=GENERATES,
    ),
    Operation(
        method="POST",
        path="/v1/embeddings",
        about="The mean of the model's last states over each input, at length 1.",
        asks=EmbeddingsAsked,
        tells=told.Embeddings,
        refuses=GENERATES,
    ),
    Operation(
        method="GET",
        path="/v1/models",
        about="The names that are served.",
        tells=told.Models,
        refuses=READS,
    ),
    Operation(
        method="GET",
        path="/v1/models/{name}",
        about="One of them.",
        tells=told.Model,
        refuses=(*READS, 404),
    ),
    Operation(
        method="POST",
        path="/tokenize",
        about="A text or a conversation as tokens.",
        asks=TokenizeAsked,
        tells=told.Tokenized,
        refuses=TAKES,
    ),
    Operation(
        method="POST",
        path="/detokenize",
        about="Tokens as text.",
        asks=DetokenizeAsked,
        tells=told.Detokenized,
        refuses=TAKES,
    ),
    Operation(
        method="GET",
        path="/health",
        about="Whether the process lives: 503 once its engine has failed.",
        tells=told.Health,
        also=(503,),
        refuses=(403, 405),
    ),
    Operation(
        method="GET",
        path="/ready",
        about="Whether to send requests here now: 503 while draining, or when something failed.",
        tells=told.Readiness,
        also=(503,),
        refuses=(403, 405),
    ),
    Operation(
        method="GET", path="/metrics", about="For Prometheus.", tells=None, refuses=(403, 405)
    ),
    Operation(
        method="GET",
        path="/openapi.json",
        about="This document.",
        tells=Shape,
        refuses=(403, 405),
    ),
    Operation(
        method="GET",
        path="/admin/keys",
        about="Every key, without what would open anything.",
        asks=admin.Nothing,
        tells=told.KeyList,
        refuses=MANAGES,
    ),
    Operation(
        method="POST",
        path="/admin/keys",
        about="Make a key; its text is in this answer and nowhere else.",
        asks=admin.KeyAsked,
        tells=told.KeyMade,
        status=201,
        refuses=CHANGES,
    ),
    Operation(
        method="DELETE",
        path="/admin/keys/{id}",
        about="Revoke a key.",
        asks=admin.KeyNamed,
        tells=told.KeyTold,
        refuses=(*MANAGES, 404),
    ),
    Operation(
        method="GET",
        path="/admin/usage",
        about="Sums of usage.",
        asks=admin.TotalsAsked,
        tells=told.SumList,
        refuses=MANAGES,
    ),
    Operation(
        method="GET",
        path="/admin/usage/records",
        about="Usage records, newest first.",
        asks=admin.RecordsAsked,
        tells=told.UsageRecords,
        refuses=MANAGES,
    ),
    Operation(
        method="GET",
        path="/admin/runs",
        about="What ran here, newest first.",
        asks=admin.RunsAsked,
        tells=told.RunList,
        refuses=MANAGES,
    ),
    Operation(
        method="GET",
        path="/admin/drain",
        about="Whether the door is closed, and who is still inside.",
        asks=admin.Nothing,
        tells=told.Draining,
        refuses=MANAGES,
    ),
    Operation(
        method="POST",
        path="/admin/drain",
        about="Take nothing new; who is inside ends as he would.",
        asks=admin.Nothing,
        tells=told.Draining,
        refuses=MANAGES,
    ),
    Operation(
        method="DELETE",
        path="/admin/drain",
        about="Open the door again.",
        asks=admin.Nothing,
        tells=told.Draining,
        refuses=MANAGES,
    ),
    Operation(
        method="GET",
        path="/admin/log-level",
        about="What is logged.",
        asks=admin.Nothing,
        tells=told.LogLevel,
        refuses=MANAGES,
    ),
    Operation(
        method="PUT",
        path="/admin/log-level",
        about="Log more, or less.",
        asks=admin.LevelAsked,
        tells=told.LogLevel,
        refuses=CHANGES,
    ),
    Operation(
        method="GET",
        path="/admin/tiers",
        about="Sizes and use of every tier that keeps KV.",
        asks=admin.Nothing,
        tells=told.TierList,
        refuses=MANAGES,
    ),
    Operation(
        method="PUT",
        path="/admin/tiers",
        about="Another size of the device's tier.",
        asks=admin.TiersAsked,
        tells=told.TierList,
        refuses=(*CHANGES, 409),
    ),
    Operation(
        method="POST",
        path="/admin/cache/reset",
        about="Forget every cached block that nobody uses.",
        asks=admin.Nothing,
        tells=told.CacheReset,
        refuses=MANAGES,
    ),
)


async def endpoint(request: Request) -> Response:
    """GET /openapi.json."""
    server: Server = request.app.state.server
    return Response(_text(server.settings.model_names, server.keys.required), media_type=JSON)


@functools.cache
def _text(models: tuple[str, ...], key_required: bool) -> bytes:
    made = document(version=version("tierline"), models=models, key_required=key_required)
    return orjson.dumps(made, option=orjson.OPT_SORT_KEYS)


def document(*, version: str, models: Sequence[str], key_required: bool) -> dict[str, Any]:
    """The document of a server of these models, or of any with ().

    Without `key_required` an API key may be sent, and changes nothing.
    """
    security: list[dict[str, list[str]]] = [{"key": []}] if key_required else [{}, {"key": []}]
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        methods = paths.setdefault(operation.path, {})
        methods[operation.method.lower()] = _described(operation, security)
    bearer = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tierline",
            "version": version,
            "description": "An OpenAI-compatible server. A parameter that no shape names is "
            "refused by its name; one that OpenAI knows and this server cannot honour says why.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": _naming(models),
            "responses": _refusals(),
            "securitySchemes": {
                "key": {**bearer, "description": "An API key."},
                "admin": {**bearer, "description": "The admin token of the data folder."},
            },
        },
    }


# --- shapes ---------------------------------------------------------------------------------


@functools.cache
def schemas() -> dict[str, Any]:
    """Every shape by name, with what each parameter means."""
    shapes: set[type[BaseModel]] = {told.Refused}
    for operation in OPERATIONS:
        shapes |= {one for one in (operation.asks, operation.tells, operation.streams) if one}
    ordered = sorted(shapes - {Shape, admin.Nothing}, key=lambda shape: shape.__name__)
    _, found = models_json_schema(
        [(shape, "validation") for shape in ordered], ref_template=REFERENCE + "{model}"
    )
    made = {name: _plain(schema) for name, schema in found["$defs"].items()}
    for operation in OPERATIONS:
        if operation.asks is not None and operation.asks.model_fields:
            _explain(made[operation.asks.__name__])
    return made


def _naming(models: Sequence[str]) -> dict[str, Any]:
    """The shapes, with the names that a model has here."""
    made = copy.deepcopy(schemas())
    for operation in OPERATIONS:
        if models and operation.asks is not None and "model" in operation.asks.model_fields:
            shape = made[operation.asks.__name__]
            nobody = [] if "model" in shape.get("required", ()) else [None]
            shape["properties"]["model"]["enum"] = [*models, *nobody]
    return made


def _plain(schema: Any) -> Any:
    """Without titles, which repeat names, and without defaults that mean: absent."""
    if isinstance(schema, list):
        return [_plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: _plain(value)
        for name, value in schema.items()
        if not (name == "title" and isinstance(value, str))
        and not (name == "default" and value in (None, "", []))
    }


def _explain(schema: dict[str, Any]) -> None:
    """Say of each parameter what it does, or why it does nothing."""
    for name, parameter in schema["properties"].items():
        if not set(parameter) - {"description"}:
            passing, why = UNSUPPORTED[name]
            parameter |= {"enum": [*passing, None], "description": f"Not supported: {why}."}
        elif name in WITHOUT_EFFECT:
            parameter["description"] = f"Accepted, without effect: {WITHOUT_EFFECT[name]}."
        else:
            whose, what = PARAMETERS[name]
            parameter["description"] = what
            parameter["x-origin"] = whose


# --- operations -----------------------------------------------------------------------------


def _described(operation: Operation, security: list[dict[str, list[str]]]) -> dict[str, Any]:
    words = operation.path.strip("/").replace("{", "").replace("}", "").replace(".", "/").split("/")
    made: dict[str, Any] = {
        "operationId": "_".join([operation.method.lower(), *words]).replace("-", "_"),
        "summary": operation.about,
        "tags": [operation.group],
        "responses": _responses(operation),
    }
    if operation.path.startswith("/admin"):
        made["security"] = [{"admin": []}]
    elif 401 in operation.refuses:
        made["security"] = security
    if operation.has_body:
        assert operation.asks is not None
        schema = {"$ref": REFERENCE + operation.asks.__name__}
        made["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    if parameters := _parameters(operation):
        made["parameters"] = parameters
    return made


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    """Of the path, the query and the headers."""
    found: list[dict[str, Any]] = []
    if operation.asks is not None and operation.asks.model_fields and not operation.has_body:
        schema = schemas()[operation.asks.__name__]
        for name, parameter in schema["properties"].items():
            place = "path" if f"{{{name}}}" in operation.path else "query"
            required = name in schema.get("required", ())
            found.append(
                {"name": name, "in": place, "required": required, "schema": _shown(parameter)}
            )
    elif "{name}" in operation.path:
        schema = {"type": "string", "description": "A model's name; it may contain slashes."}
        found.append({"name": "name", "in": "path", "required": True, "schema": schema})
    if operation.generates:
        found += [
            {"name": name, "in": "header", "description": what, "schema": _HEADER_SCHEMAS[name]}
            for name, what in REQUEST_HEADERS.items()
        ]
    return found


def _shown(parameter: dict[str, Any]) -> dict[str, Any]:
    """In a query there is no null: a parameter is there, or it is not."""
    branches = [one for one in parameter.get("anyOf", ()) if one != {"type": "null"}]
    if len(branches) != 1:
        return parameter
    shown: dict[str, Any] = branches[0]
    return {name: value for name, value in parameter.items() if name != "anyOf"} | shown


_HEADER_SCHEMAS: dict[str, dict[str, Any]] = {
    "X-Tierline-Priority": {"type": "integer", "minimum": -1000, "maximum": 1000},
    "X-Tierline-Deadline-Ms": {"type": "number", "minimum": 0.001, "maximum": 1e9},
    "X-Tierline-SLO": {"type": "string", "minLength": 1},
}
# status of a refusal -> its headers; 503 has one where the server drains
_REFUSAL_HEADERS = {405: ("Allow",), 429: ("Retry-After", "retry-after-ms"), 503: ("Retry-After",)}


def _told_in(*names: str) -> dict[str, Any]:
    """Headers of an answer."""
    numbers = ("Retry-After", "retry-after-ms")
    return {
        name: {
            "schema": {"type": "integer" if name in numbers else "string"},
            "description": RESPONSE_HEADERS[name],
        }
        for name in names
    }


def _responses(operation: Operation) -> dict[str, Any]:
    success: dict[str, Any] = {"description": "Success.", "content": _content(operation)}
    if operation.generates:
        pooled = operation.tells is told.Embeddings
        own = ("x-tierline-pooling",) if pooled else ()
        success["headers"] = _told_in("x-request-id", *own)
    made = {str(operation.status): success}
    for status in operation.also:
        made[str(status)] = {**success, "description": "Not now; the body says why."}
    for status in operation.refuses:
        made[str(status)] = {"$ref": f"#/components/responses/{_refusal_name(status)}"}
    return made


def _refusal_name(status: int) -> str:
    return f"Refused{status}"


def _refusals() -> dict[str, Any]:
    """Every status of a refusal, with the codes that it comes with."""
    made: dict[str, Any] = {}
    for status in sorted({status for operation in OPERATIONS for status in operation.refuses}):
        codes = [f"`{code}`: {what}" for code, (known, what) in ERRORS.items() if known == status]
        refused: dict[str, Any] = {
            "description": "\n".join(codes),
            "content": {JSON: {"schema": {"$ref": f"{REFERENCE}{told.Refused.__name__}"}}},
        }
        if status in _REFUSAL_HEADERS:
            refused["headers"] = _told_in(*_REFUSAL_HEADERS[status])
        made[_refusal_name(status)] = refused
    return made


def _content(operation: Operation) -> dict[str, Any]:
    if operation.tells is None:
        return {TEXT: {"schema": {"type": "string"}}}
    if operation.tells is Shape:
        return {JSON: {"schema": {"type": "object"}}}
    made: dict[str, Any] = {JSON: {"schema": {"$ref": REFERENCE + operation.tells.__name__}}}
    if operation.streams:
        name = operation.streams.__name__
        about = f"Server-sent events; the data of each is a {name}."
        made[EVENTS] = {
            "schema": {"type": "string", "description": about},
            "x-event-schema": {"$ref": REFERENCE + name},
        }
    return made
