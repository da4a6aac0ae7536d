"""Signing in, where `Server.may_watch` asks for it: the admin token gives a cookie.

The cookie only proves that its owner knew the token: it opens the pages and nothing under /admin
or /v1, is sent to this site only, and no script reads it.  Another token ends every session.

    INV-SRV-51  a page shows only to whom the server lets watch; others are sent to /login
"""

import hmac
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from tierline.server.admin import TOKEN_NAME
from tierline.server.dashboard_pages import answered, fragment
from tierline.server.errors import ApiError
from tierline.server.server import WATCH_COOKIE, Server

SIGNED_IN_S = 30 * 86_400
FORM_BYTES_MAX = 16_384

Page = Callable[[Request], Awaitable[Response]]


def watched(page: Page) -> Page:
    """The page for those who may watch; others go to sign in (INV-SRV-51)."""

    async def guarded(request: Request) -> Response:
        if request.app.state.server.may_watch(request):
            return await page(request)
        if "hx-request" in request.headers:  # a part of a page that is open: the whole one moves
            return Response(status_code=401, headers={"HX-Redirect": "/login"})
        if request.headers.get("accept", "").startswith("text/event-stream"):
            return Response(status_code=401)
        return RedirectResponse("/login", status_code=303)

    return guarded


async def login_page(request: Request) -> Response:
    """Where one signs in; who may watch already is sent on."""
    if request.app.state.server.may_watch(request):
        return RedirectResponse("/dashboard", status_code=303)
    return _login(request, wrong=False)


async def login(request: Request) -> Response:
    """The token, checked in constant time."""
    server: Server = request.app.state.server
    token = server.settings.admin_token
    given = (await form(request)).get("token", "").strip()
    if not token or not hmac.compare_digest(given.encode(), token.encode()):
        return _login(request, wrong=True)
    response = RedirectResponse("/dashboard", status_code=303)
    response.set_cookie(
        WATCH_COOKIE,
        server.watch_cookie,
        max_age=SIGNED_IN_S,
        path="/",
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


def _login(request: Request, *, wrong: bool) -> Response:
    possible = bool(request.app.state.server.settings.admin_token)
    text = fragment("login.html.j2", possible=possible, wrong=wrong and possible, file=TOKEN_NAME)
    return answered(text, 401 if wrong else 200)


async def form(request: Request) -> dict[str, str]:
    """The fields of a small form. Raises `ApiError` 413 for a large one."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > FORM_BYTES_MAX:
            raise ApiError(413, "the form is too large", code="request_too_large")
    return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))
