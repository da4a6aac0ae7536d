"""/admin: what an operator may do to a running server, behind a token of its own.

`app` takes `routes`.  An API key opens nothing here, and the admin token asks no model anything.
Bodies and queries are checked like any other: a field that nobody knows is refused by name.  What
touches the engine's memory is done on its thread, between two steps (`AsyncEngine.call`).

Invariants
    INV-SRV-16  nothing under /admin is done or told without the admin token
"""

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tierline.base.errors import DoesNotFitError, TierlineError
from tierline.engine.engine import Engine
from tierline.kv.transfer import DEVICE, TIER_NAMES
from tierline.server.calls import bearer
from tierline.server.errors import ApiError, malformed, told
from tierline.server.http import read_body
from tierline.server.keys import TENANT, secret_file
from tierline.server.running import resized
from tierline.server.server import Server
from tierline.server.shapes import Name, Shape
from tierline.server.sse import ClientGone
from tierline.server.state import Key
from tierline.telemetry.logs import LEVELS, set_level

TOKEN_NAME = "admin.token"
LIMIT_MAX = 1000  # of one page

Day = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
Limit = Annotated[int, Field(ge=1, le=LIMIT_MAX)]
S = TypeVar("S", bound=Shape)

log = logging.getLogger("tierline.server")


class Nothing(Shape):
    """No field."""


class KeyAsked(Shape):
    """A key to be made."""

    tenant: str = TENANT
    name: str
    models: list[Name] | None = None  # None: every model
    budget_tokens: Annotated[int, Field(ge=1, lt=2**62)] | None = None
    expires_s: float | None = None  # Unix time


class KeyNamed(Shape):
    """A key that there is."""

    id: str


class TotalsAsked(Shape):
    """Which sums of usage."""

    by: str = "day"  # any of day, tenant, key_id, model, with commas between
    since: Day | None = None
    until: Day | None = None
    key_id: str | None = None
    tenant: str | None = None


class RecordsAsked(Shape):
    """Which page of usage records."""

    before: Annotated[int, Field(ge=1, lt=2**62)] | None = None
    limit: Limit = 100
    key_id: str | None = None
    tenant: str | None = None


class RunsAsked(Shape):
    """How many runs."""

    limit: Limit = 100


class LevelAsked(Shape):
    """What to log from now on."""

    level: str


class TiersAsked(Shape):
    """Sizes to change."""

    device_bytes: Annotated[int, Field(ge=1, lt=2**62)]


def admin_token(folder: Path) -> tuple[str, Path]:
    """The token in the data folder, made at the first start, and the file that it is in.

    Raises what `secret_file` raises.
    """
    return secret_file(folder, TOKEN_NAME), folder / TOKEN_NAME


def routes() -> list[BaseRoute]:
    """Every path under /admin."""
    return [
        _route("GET", "/admin/keys", Nothing, list_keys),
        _route("POST", "/admin/keys", KeyAsked, make_key, status=201),
        _route("DELETE", "/admin/keys/{id}", KeyNamed, revoke_key),
        _route("GET", "/admin/usage", TotalsAsked, totals),
        _route("GET", "/admin/usage/records", RecordsAsked, records),
        _route("GET", "/admin/runs", RunsAsked, runs),
        _route("GET", "/admin/drain", Nothing, drain_state),
        _route("POST", "/admin/drain", Nothing, drain),
        _route("DELETE", "/admin/drain", Nothing, undrain),
        _route("GET", "/admin/log-level", Nothing, log_level),
        _route("PUT", "/admin/log-level", LevelAsked, change_log_level),
        _route("GET", "/admin/tiers", Nothing, tiers),
        _route("PUT", "/admin/tiers", TiersAsked, change_tiers),
        _route("POST", "/admin/cache/reset", Nothing, reset_cache),
    ]


def _route(
    method: str,
    path: str,
    shape: type[S],
    handle: Callable[[Server, S], Awaitable[Any]],
    *,
    status: int = 200,
) -> BaseRoute:
    """Token, then shape, then what is asked for; errors in the shape of all others."""

    async def endpoint(request: Request) -> Response:
        server: Server = request.app.state.server
        _require_operator(server, request)
        try:
            answer = await handle(server, await _asked(server, request, shape))
        except ValidationError as error:
            raise malformed(error) from None
        except TierlineError as error:
            raise told(error) from None
        except ClientGone:
            return Response(status_code=400)  # nobody is there to read it
        return Response(orjson.dumps(answer), status, media_type="application/json")

    return Route(path, endpoint, methods=[method], name=handle.__name__)


def _require_operator(server: Server, request: Request) -> None:
    token = server.settings.admin_token
    if not token:
        raise ApiError(
            403,
            "this server has no admin token, so nobody may administer it",
            code="admin_disabled",
            hint="start it with a data folder or an admin token",
        )
    shown = bearer(dict(request.scope["headers"])) or ""
    if not hmac.compare_digest(shown.encode(), token.encode()):
        raise ApiError(
            401,
            "the admin token is needed here, and no API key is one",
            code="invalid_admin_token",
            headers={"WWW-Authenticate": "Bearer"},
            hint=f"send `Authorization: Bearer <token>`; it may be in {TOKEN_NAME} of the data "
            "folder",
        )


async def _asked(server: Server, request: Request, shape: type[S]) -> S:
    """The body where one is expected, else the query, with what the path names."""
    if request.method in ("POST", "PUT") and shape.model_fields:
        settings = server.settings
        body = await read_body(
            request.receive,
            request.scope["headers"],
            bytes_max=settings.body_bytes_max,
            seconds_max=settings.body_s,
        )
        return shape.model_validate_json(body)
    return shape.model_validate_strings(dict(request.query_params) | request.path_params)


# --- keys -----------------------------------------------------------------------------------


async def list_keys(server: Server, _: Nothing) -> Any:
    """Every kept key, without what would open anything."""
    return _listed([_key(key) for key in server.keys.list()])


async def make_key(server: Server, asked: KeyAsked) -> Any:
    """A new key; its text is in this answer and nowhere else."""
    names = server.settings.model_names
    unknown = [name for name in asked.models or () if name not in names]
    if unknown:
        raise ApiError(
            400,
            f"the model {unknown[0][:100]!r} is not served here",
            code="model_not_found",
            param="models",
            hint=f"served: {', '.join(names)}",
        )
    key, text = await server.keys.create(
        tenant=asked.tenant,
        name=asked.name,
        # Its other names are the same model.
        models=None if asked.models is None else [server.model] * bool(asked.models),
        budget_tokens=asked.budget_tokens,
        expires_s=asked.expires_s,
    )
    log.info("an API key was made", extra={"fields": {"key_id": key.id, "tenant": key.tenant}})
    return _key(key) | {"key": text}


async def revoke_key(server: Server, asked: KeyNamed) -> Any:
    """Nobody new is served with it; requests that are inside end as they would."""
    key = await server.keys.revoke(asked.id)
    log.info("an API key was revoked", extra={"fields": {"key_id": key.id, "tenant": key.tenant}})
    return _key(key)


def _key(key: Key) -> dict[str, Any]:
    shown = asdict(key)
    del shown["digest"], shown["pepper"]
    return shown


# --- what was used, and by which run --------------------------------------------------------


async def totals(server: Server, asked: TotalsAsked) -> Any:
    """Sums of usage."""
    by = [name.strip() for name in asked.by.split(",") if name.strip()]
    bounds = asked.model_dump(exclude={"by"})
    found = await server.state.totals(by=by, **bounds)
    return _listed([dict(shown.pop("by")) | shown for shown in map(asdict, found)])


async def records(server: Server, asked: RecordsAsked) -> Any:
    """Usage records, newest first."""
    found, before = await server.state.page(**asked.model_dump())
    return _listed([asdict(usage) for usage in found]) | {"next_before": before}


async def runs(server: Server, asked: RunsAsked) -> Any:
    """What ran here, newest first; this run is the first."""
    return _listed([asdict(run) for run in await server.state.runs(limit=asked.limit)])


def _listed(values: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": values}


# --- the door -------------------------------------------------------------------------------


async def drain_state(server: Server, _: Nothing) -> Any:
    """Whether the door is closed, and who is still inside."""
    return {"draining": server.service.draining, "requests": len(server.recorder.live)}


async def drain(server: Server, _: Nothing) -> Any:
    """Take nothing new; who is inside ends as he would."""
    server.service.draining = True
    log.info("draining", extra={"fields": {"requests": len(server.recorder.live)}})
    return await drain_state(server, _)


async def undrain(server: Server, _: Nothing) -> Any:
    """Open the door again, unless the process is about to end."""
    if server.service.stopping:
        raise ApiError(409, "the server was told to stop", code="stopping")
    server.service.draining = False
    log.info("open again")
    return await drain_state(server, _)


# --- logs -----------------------------------------------------------------------------------


async def log_level(_server: Server, _: Nothing) -> Any:
    """What is logged."""
    number = logging.getLogger("tierline").getEffectiveLevel()
    names = {number: name for name, number in LEVELS.items()}
    return {"level": names.get(number, logging.getLevelName(number).lower())}


async def change_log_level(server: Server, asked: LevelAsked) -> Any:
    """Log more, or less; prompts are logged no more than before."""
    set_level(asked.level)
    return await log_level(server, Nothing())


# --- memory ---------------------------------------------------------------------------------


async def tiers(server: Server, _: Nothing) -> Any:
    """Sizes and use of every tier that keeps KV."""
    engine = server.engine.engine
    return _listed(await server.engine.call(lambda: tiers_of(engine)))


async def change_tiers(server: Server, asked: TiersAsked) -> Any:
    """Another size of the device's tier, at most what was allocated; nobody is preempted."""
    engine = server.engine.engine

    def resize() -> list[dict[str, Any]]:
        engine.resize_kv(asked.device_bytes)
        return tiers_of(engine)

    try:
        found = await server.engine.call(resize)
    except DoesNotFitError as error:
        raise ApiError(
            409, str(error), code="does_not_fit", param="device_bytes", hint=error.hint
        ) from None
    server.running = await asyncio.to_thread(resized, server.running, engine)
    server.recorder.metrics.resized(kv_blocks=found[0]["blocks"])
    log.info("the device's tier was resized", extra={"fields": {"bytes": found[0]["bytes"]}})
    return _listed(found)


async def reset_cache(server: Server, _: Nothing) -> Any:
    """Forget every cached block that nobody uses."""
    blocks = await server.engine.call(server.engine.engine.reset_cache)
    log.info("the prefix cache was reset")
    return {"blocks_forgotten": blocks}


def tiers_of(engine: Engine) -> list[dict[str, Any]]:
    """The device first; blocks are held (somebody uses them), cached (kept for reuse) or free."""
    scheduler = engine.scheduler
    layout, pages, index = scheduler.layout, scheduler.pages, scheduler.index
    per_block = layout.pages_per_block
    cached_blocks = index.evictable_blocks
    device = {
        "tier": TIER_NAMES[DEVICE],
        "bytes": pages.total * layout.page_bytes,
        "blocks": pages.total // per_block,
        "blocks_held": -(-(pages.total - pages.free) // per_block) - cached_blocks,
        "blocks_cached": cached_blocks,
    }
    lower = [
        {
            "tier": TIER_NAMES[number],
            "bytes": tier.capacity_blocks * index.block_bytes,
            "blocks": tier.capacity_blocks,
            "blocks_held": 0,
            "blocks_cached": tier.stored_blocks,
        }
        for number, tier in enumerate(index.tiers)
        if number != DEVICE and tier.capacity_blocks
    ]
    return [device, *lower]
