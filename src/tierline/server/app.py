"""The application: which path leads where, and what stands in front of all of them."""

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route

from tierline.server import (
    admin,
    chat,
    completions,
    dashboard,
    embeddings,
    openapi,
    responses,
    texts,
)
from tierline.server.browser import BrowserGuard, allowed_hosts
from tierline.server.calls import Endpoint, bearer
from tierline.server.errors import ApiError
from tierline.server.server import Server

Handler = Callable[[Request], Awaitable[Response]]
App = Callable[[Any, Any, Any], Awaitable[None]]


def application(server: Server) -> App:
    """The ASGI application of one server."""
    app = Starlette(
        routes=routes(),
        exception_handlers={ApiError: _refused, HTTPException: _not_here},
    )
    app.state.server = server
    return BrowserGuard(_past_routing(app), hosts=allowed_hosts(server.settings.host))


def _past_routing(app: Starlette) -> App:
    """Straight to the endpoints that take JSON: they need nothing of what stands before routes.

    Everything else goes the whole way; half a dozen calls of Starlette's for each message of a
    request were a tenth of its processor time.
    """
    endpoints = {
        route.path: route.endpoint
        for route in routes()
        if isinstance(route, Route) and isinstance(route.endpoint, Endpoint)
    }

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        endpoint = endpoints.get(scope["path"]) if scope.get("method") == "POST" else None
        if endpoint is None:
            await app(scope, receive, send)
        else:
            scope["app"] = app
            await endpoint(scope, receive, send)

    return serve


def routes() -> list[BaseRoute]:
    """Every path of the server."""
    return [
        Route("/v1/chat/completions", chat.ENDPOINT, methods=["POST"]),
        Route("/v1/responses", responses.ENDPOINT, methods=["POST"]),
        Route("/v1/completions", completions.ENDPOINT, methods=["POST"]),
        Route("/v1/embeddings", embeddings.ENDPOINT, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/tokenize", texts.TOKENIZE, methods=["POST"]),
        Route("/detokenize", texts.DETOKENIZE, methods=["POST"]),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi.endpoint),
        *admin.routes(),
        *dashboard.routes(),
    ]


def answered(value: Any, status: int = 200) -> Response:
    """A JSON response."""
    return Response(orjson.dumps(value), status, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.app.state.server.recorder.metrics.refused(error.status)
    headers = error.headers
    return Response(error.body(), error.status, headers, media_type="application/json")


async def _not_here(request: Request, error: Exception) -> Response:
    """Paths and methods that nobody knows: in the same shape as every refusal."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = _methods(request)
        wrong = ApiError(
            405,
            "this path does not take that method",
            code="method_not_allowed",
            hint=f"use {allowed}",
            headers={"Allow": allowed},
        )
    else:
        wrong = ApiError(
            error.status_code,
            "there is nothing at this path",
            code="not_found",
            hint="see /openapi.json",
        )
    return await _refused(request, wrong)


def _methods(request: Request) -> str:
    """What this path takes, by all of its routes: Starlette names those of the first."""
    found: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return ", ".join(sorted(found))


async def models(request: Request) -> Response:
    """The models served, or one of them."""
    server: Server = request.app.state.server
    server.keys.check(bearer(dict(request.scope["headers"])))
    told = [
        {
            "id": name,
            "object": "model",
            "created": int(server.started_s),
            "owned_by": "tierline",
            "root": server.running.model,
            "max_model_len": server.running.positions_max,
        }
        for name in server.settings.model_names
    ]
    wanted = request.path_params.get("name")
    if wanted is None:
        return answered({"object": "list", "data": told})
    for model in told:
        if model["id"] == wanted:
            return answered(model)
    raise ApiError(
        404,
        f"the model {wanted[:100]!r} is not served here",
        code="model_not_found",
        param="model",
        hint=f"served: {', '.join(server.settings.model_names)}",
    )


async def health(request: Request) -> Response:
    """Whether the process lives: 503 once its engine has failed, for restarting it helps."""
    server: Server = request.app.state.server
    failed = server.engine.failed
    return answered({"status": "failed" if failed else "ok", "reason": failed}, _status(failed))


async def ready(request: Request) -> Response:
    """Whether to send requests here now."""
    server: Server = request.app.state.server
    why = server.not_ready
    return answered({"ready": not why, "reason": why}, _status(why))


def _status(trouble: str) -> int:
    return 503 if trouble else 200


async def metrics(request: Request) -> Response:
    """Prometheus' exposition."""
    server: Server = request.app.state.server
    recorder, door = server.recorder, server.service
    if not recorder.live:
        recorder.metrics.idle()
    recorder.metrics.standing(
        streams_open=door.streams_open,
        usage_records_pending=server.state.waiting,
        ready=not server.not_ready,
    )
    text, kind = recorder.metrics.exposition(request.headers.get("accept", ""))
    return Response(text, media_type=None, headers={"content-type": kind})
