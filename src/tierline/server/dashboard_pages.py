"""Templates: how a view becomes a page. Everything is escaped that was not drawn or made here."""

import time
from functools import cache
from typing import Any

import jinja2
import orjson
from markupsafe import Markup, escape
from starlette.responses import HTMLResponse

from tierline.base.markup import templates
from tierline.server.dashboard_seen import Seen

PAGES = (
    ("/dashboard", "Now"),
    ("/dashboard/requests", "Requests"),
    ("/dashboard/playground", "Playground"),
    ("/dashboard/plan", "Plan"),
    ("/dashboard/models", "Models and tiers"),
)


@cache
def _templates() -> jinja2.Environment:
    return templates("tierline.server", json=embedded, instant=instant, code=code)


def embedded(value: Any) -> Markup:
    """JSON that may stand in a data block of a page: nothing in it ends the block.

    >>> embedded("</script>")
    Markup('"\\\\u003c/script\\\\u003e"')
    """
    text = orjson.dumps(value).decode()
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def code(text: str) -> Markup:
    """Words in which what stands between backticks is something to type.

    >>> code("run `tierline calibrate` & wait")
    Markup('run <code>tierline calibrate</code> &amp; wait')
    """
    parts = [escape(part) for part in text.split("`")]
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts)
    )


def instant(unix_s: float) -> Markup:
    """A time of day as an element that a script turns into the reader's zone."""
    at = time.gmtime(unix_s)
    whole, short = time.strftime("%Y-%m-%dT%H:%M:%SZ", at), time.strftime("%H:%M:%S", at)
    return Markup(f'<time datetime="{whole}" title="{whole}">{short} UTC</time>')


def fragment(name: str, **facts: Any) -> str:
    """A template filled; a fact that it names and nobody gave is an error."""
    return _templates().get_template(name).render(**facts)


def page(
    name: str, seen: Seen, *, here: str, title: str, status: int = 200, **facts: Any
) -> HTMLResponse:
    """A page of the dashboard, or with a template of rows only a part of it."""
    text = fragment(
        name,
        pages=PAGES,
        here=here,
        title=title,
        model=seen.model,
        state=seen.state,
        at=time.strftime("%H:%M:%S UTC", time.gmtime(seen.now_s)),
        levels=seen.levels,
        **facts,
    )
    return answered(text, status)


def answered(text: str, status: int = 200) -> HTMLResponse:
    """HTML that no cache keeps."""
    return HTMLResponse(text, status, headers={"cache-control": "no-store"})
