"""The pages to watch a server with: routes, the look that every view is made from, live updates.

`app` takes `routes()` in.  Each page is a view (`dashboard_*`: a function of what is seen, and of
nothing else) in a template, complete without a script; `/dashboard/events` sends the Now view
again once a second while anybody watches.  Nothing of a prompt or an answer is ever seen here.

    INV-SRV-52  no page asks another origin for anything, and none has inline code
"""

import asyncio
import contextlib
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from tierline.base.clock import PS_PER_S
from tierline.base.errors import TierlineError
from tierline.base.units import format_seconds
from tierline.catalog.gpus import gpu_names
from tierline.scheduling.profiles import POLICIES
from tierline.server.dashboard_life import life_view
from tierline.server.dashboard_login import form, login, login_page, watched
from tierline.server.dashboard_models import models_view
from tierline.server.dashboard_now import PERCENTILES, now_view
from tierline.server.dashboard_pages import answered, fragment, page
from tierline.server.dashboard_plan import plan_view, whatif_view
from tierline.server.dashboard_requests import SHOWS, requests_view
from tierline.server.dashboard_seen import Seen
from tierline.server.prediction import scale_of
from tierline.server.recorder import PAST_MAX, STEPS_MAX
from tierline.server.replay import traffic_of
from tierline.server.sse import ClientGone, EventStream
from tierline.server.whatif import ask, change_of

TILES = (
    ("output-rate", "tokens/s generated, last 10 s"),
    ("prompt-rate", "prompt tokens/s computed, last 10 s"),
    ("running", "requests running"),
    ("waiting", "requests waiting"),
    ("hit-rate", "of prompt tokens from the cache, 5 min"),
    ("kv-held", "of the KV cache held"),
)
EVENTS_S = 1.0
LAST_STEPS = 20


def routes() -> list[BaseRoute]:
    """Everything that the dashboard answers to."""
    return [
        Route("/", to_now),
        Route("/login", login_page),
        Route("/login", login, methods=["POST"]),
        Route("/dashboard", watched(now_page)),
        Route("/dashboard/requests", watched(requests_page)),
        Route("/dashboard/requests/{id}", watched(request_page)),
        Route("/dashboard/playground", watched(playground_page)),
        Route("/dashboard/plan", watched(plan_page)),
        Route("/dashboard/what-if", watched(whatif), methods=["POST"]),
        Route("/dashboard/models", watched(models_page)),
        Route("/dashboard/events", watched(events)),
        Mount("/dashboard/static", StaticFiles(packages=[("tierline.server", "static")])),
    ]


def look(request: Request) -> Seen:
    """The server that answers this request, as it is now."""
    server = request.app.state.server
    recorder, now_ps = server.recorder, server.service.now_ps
    now_s = now_ps / PS_PER_S
    return Seen(
        now_ps=now_ps,
        now_s=server.clock_s(),
        started_s=server.started_s,
        model=server.model,
        state=server.not_ready or "ready",
        live=tuple(recorder.live.values()),
        past=recorder.past,
        steps=recorder.steps,
        levels=server.running.levels,
        gaps_s={name: gaps.at(now_s, PERCENTILES) or () for name, gaps in recorder.gaps.items()},
    )


async def to_now(request: Request) -> Response:
    """The address that people type."""
    del request
    return RedirectResponse("/dashboard", status_code=307)


async def now_page(request: Request) -> Response:
    """What the server is doing."""
    seen = look(request)
    view = now_view(seen)
    steps = list(zip(*view["series"]["steps"]["columns"], strict=True))
    return page(
        "now.html.j2",
        seen,
        here="/dashboard",
        title="Now",
        view=view,
        tiles=TILES,
        absent=("DRAM", "NVMe"),
        last_steps=steps[: -LAST_STEPS - 1 : -1],
    )


async def requests_page(request: Request) -> Response:
    """Who is here, and who was; with `rows` in the query only the rows, for a page that lives."""
    seen, query = look(request), request.query_params
    show, level = query.get("show", "all"), query.get("class", "")
    show = show if show in SHOWS else "all"
    return page(
        "rows.html.j2" if "rows" in query else "requests.html.j2",
        seen,
        here="/dashboard/requests",
        title="Requests",
        view=requests_view(seen, show=show, level=level),
        show=show,
        shows=SHOWS,
        chosen=level,
        kept=PAST_MAX,
    )


async def request_page(request: Request) -> Response:
    """The life of one request; 404 when it is not remembered."""
    seen, name = look(request), request.path_params["id"]
    known = (life for life in (*seen.live, *reversed(seen.past)) if life.id == name)
    life = next(known, None)
    here, title = "/dashboard/requests", f"Request {name[-6:]}"
    if life is None:
        return page("unknown.html.j2", seen, here=here, title=title, status=404, kept=PAST_MAX)
    template = "life.html.j2" if "part" in request.query_params else "request.html.j2"
    return page(template, seen, here=here, title=title, view=life_view(seen, life), kept=STEPS_MAX)


async def playground_page(request: Request) -> Response:
    """A conversation with the model, through the same address that clients use."""
    seen, server = look(request), request.app.state.server
    alone = server.running.here.itl_s
    return page(
        "playground.html.j2",
        seen,
        here="/dashboard/playground",
        title="Playground",
        predicted={"itl": format_seconds(alone[0][1])} if alone else None,
        key=server.keys.required,
        chat=server.tools is not None,
        default_level=server.running.default_level,
        address=f"{request.url.scheme}://{request.url.netloc}",
    )


async def plan_page(request: Request) -> Response:
    """Predicted against measured, and the what-if form."""
    return _plan(request, given={}, result="")


def _plan(request: Request, *, given: dict[str, str], result: str) -> Response:
    seen, running = look(request), request.app.state.server.running
    return page(
        "plan.html.j2",
        seen,
        here="/dashboard/plan",
        title="Plan",
        view=plan_view(seen, running),
        policy=running.policy,
        policies=sorted(POLICIES),
        gpus=gpu_names(),
        given=given,
        result=result,
    )


async def whatif(request: Request) -> Response:
    """The answer to the form: as a part where htmx asks, else in the whole page."""
    given = await form(request)
    result = fragment("whatif.html.j2", **await _simulated(request, given))
    if "hx-request" in request.headers:
        return answered(result)
    return _plan(request, given=given, result=result)


async def _simulated(request: Request, given: dict[str, str]) -> dict[str, Any]:
    """One simulation at a time: it takes a processor that requests are served with."""
    seen, state, running = look(request), request.app.state, request.app.state.server.running
    nothing = {"view": None, "error": "", "hint": ""}
    if getattr(state, "simulating", False):
        return nothing | {"error": "Another simulation runs", "hint": "it takes at most 60 s"}
    state.simulating = True
    try:
        change = change_of(given)
        traffic = traffic_of(tuple(seen.past), seen.levels, block_tokens=running.block_tokens)
        scale = scale_of(seen.steps, running)
        answer = await ask(traffic, running, change, scale=scale)
    except TierlineError as error:
        return nothing | {"error": str(error), "hint": error.hint or ""}
    finally:
        state.simulating = False
    return nothing | {"view": whatif_view(answer)}


async def models_page(request: Request) -> Response:
    """What resides where."""
    seen, running = look(request), request.app.state.server.running
    return page(
        "models.html.j2",
        seen,
        here="/dashboard/models",
        title="Models and tiers",
        view=models_view(seen, running),
        device=running.here.machine,
    )


class Events(Response):
    """One watcher's updates: an answer that runs until the watcher leaves."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The Now view, each second, until the watcher leaves or the server stops."""
        del scope
        with contextlib.suppress(ClientGone):
            async with EventStream(send, receive) as stream:
                await stream.start()
                try:
                    while True:
                        await stream.write(_told(self._request))
                        await asyncio.sleep(EVENTS_S)
                except asyncio.CancelledError:  # by a server that stops: end as streams do
                    await stream.close()


def _told(request: Request) -> bytes:
    """The event of this second: one view for everybody who watches."""
    state = request.app.state
    second = int(state.server.clock_s() / EVENTS_S)
    known: tuple[int, bytes] = getattr(state, "told", (0, b""))
    if known[0] != second:
        view = orjson.dumps(now_view(look(request)))
        known = state.told = (second, b"event: now\ndata: " + view + b"\n\n")
    return known[1]


async def events(request: Request) -> Response:
    """`text/event-stream` of what the Now page shows."""
    return Events(request)
