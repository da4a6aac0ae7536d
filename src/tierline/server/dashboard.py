"""The pages to watch a server with: routes, the look that every view is made from, live updates.

`app` takes `routes()` in.  Each page is a view (`dashboard_*`: a function of what is seen, and of
nothing else) in a template, complete without a script; `/dashboard/events` sends the Now view
again once a second while anybody watches.  Nothing of a prompt or an answer is ever seen here.

    INV-SRV-51  a page shows only to whom the server lets watch; others are sent to /login
    INV-SRV-52  no page asks another origin for anything, and none has inline code
"""

import asyncio
import time
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any

import jinja2
import orjson
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from tierline.base.clock import PS_PER_S
from tierline.server.dashboard_life import life_view
from tierline.server.dashboard_now import PERCENTILES, now_view
from tierline.server.dashboard_requests import SHOWS, requests_view
from tierline.server.dashboard_seen import Seen
from tierline.server.sse import ClientGone, EventStream

PAGES = (
    ("/dashboard", "Now"),
    ("/dashboard/requests", "Requests"),
    ("/dashboard/playground", "Playground"),
    ("/dashboard/plan", "Plan"),
    ("/dashboard/models", "Models and tiers"),
)
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
FOLDER = resources.files("tierline.server")

Page = Callable[[Request], Response]


@cache
def _templates() -> jinja2.Environment:
    templates = FOLDER / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (templates / name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"svg": Markup, "json": embedded, "instant": instant}
    return environment


def embedded(value: Any) -> Markup:
    """JSON that may stand in a data block of a page: nothing in it ends the block.

    >>> embedded("</script>")
    Markup('"\\\\u003c/script\\\\u003e"')
    """
    text = orjson.dumps(value).decode()
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def instant(unix_s: float) -> Markup:
    """A time of day as an element that a script turns into the reader's zone."""
    at = time.gmtime(unix_s)
    whole, short = time.strftime("%Y-%m-%dT%H:%M:%SZ", at), time.strftime("%H:%M:%S", at)
    return Markup(f'<time datetime="{whole}" title="{whole}">{short} UTC</time>')


def render(
    name: str, seen: Seen, *, here: str, title: str, status: int = 200, **facts: Any
) -> HTMLResponse:
    """A page; a fact that its template names and nobody gave is an error."""
    text = (
        _templates()
        .get_template(name)
        .render(
            pages=PAGES,
            here=here,
            title=title,
            model=seen.model,
            state=seen.state,
            at=time.strftime("%H:%M:%S UTC", time.gmtime(seen.now_s)),
            levels=seen.levels,
            **facts,
        )
    )
    return HTMLResponse(text, status, headers={"cache-control": "no-store"})


def now_page(request: Request) -> Response:
    """What the server is doing."""
    seen = look(request)
    view = now_view(seen)
    steps = list(zip(*view["series"]["steps"]["columns"], strict=True))
    return render(
        "now.html.j2",
        seen,
        here="/dashboard",
        title="Now",
        view=view,
        tiles=TILES,
        absent=("DRAM", "NVMe"),
        last_steps=steps[: -LAST_STEPS - 1 : -1],
    )


def requests_page(request: Request) -> Response:
    """Who is here, and who was; with `rows` in the query only the rows, for a page that lives."""
    seen, query = look(request), request.query_params
    show = query.get("show", "all")
    show, level = show if show in SHOWS else "all", query.get("class", "")
    return render(
        "rows.html.j2" if "rows" in query else "requests.html.j2",
        seen,
        here="/dashboard/requests",
        title="Requests",
        view=requests_view(seen, show=show, level=level),
        show=show,
        shows=SHOWS,
        chosen=level,
    )


def request_page(request: Request) -> Response:
    """The life of one request; 404 when it is not remembered."""
    seen, name = look(request), request.path_params["id"]
    known = (life for life in (*seen.live, *reversed(seen.past)) if life.id == name)
    life = next(known, None)
    here, title = "/dashboard/requests", f"Request {name[-6:]}"
    if life is None:
        template, facts, status = "unknown.html.j2", {"kept": len(seen.past)}, 404
    else:
        template = "life.html.j2" if "part" in request.query_params else "request.html.j2"
        facts, status = {"view": life_view(seen, life)}, 200
    return render(template, seen, here=here, title=title, status=status, **facts)


class Events:
    """One watcher's updates, as an answer that runs until the watcher leaves."""

    def __init__(self, request: Request) -> None:
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The Now view, each second."""
        del scope
        try:
            async with EventStream(send, receive) as stream:
                await stream.start()
                while True:
                    view = orjson.dumps(now_view(look(self._request)))
                    await stream.write(b"event: now\ndata: " + view + b"\n\n")
                    await asyncio.sleep(EVENTS_S)
        except ClientGone:
            pass


async def events(request: Request) -> Response:
    """`text/event-stream` of what the Now page shows."""
    return Events(request)  # type: ignore[return-value]


# --- the look -------------------------------------------------------------------------------


def look(request: Request) -> Seen:
    """The server that answers this request, as it is now."""
    server = request.app.state.server
    recorder, now_ps = server.recorder, server.service.now_ps
    now_s = now_ps / PS_PER_S
    return Seen(
        now_ps=now_ps,
        now_s=server.clock_s(),
        model=server.model,
        state=server.not_ready or "ready",
        live=tuple(recorder.live.values()),
        past=recorder.past,
        steps=recorder.steps,
        levels=server.running.levels,
        gaps_s={name: gaps.at(now_s, PERCENTILES) or () for name, gaps in recorder.gaps.items()},
    )


def routes() -> list[BaseRoute]:
    """Everything that the dashboard answers to."""
    return [
        Route("/", to_now),
        Route("/dashboard", now_page),
        Route("/dashboard/requests", requests_page),
        Route("/dashboard/requests/{id}", request_page),
        Route("/dashboard/events", events),
        Mount("/dashboard/static", StaticFiles(packages=[("tierline.server", "static")])),
    ]


def to_now(request: Request) -> Response:
    """The address that people type."""
    del request
    return RedirectResponse("/dashboard", status_code=307)
