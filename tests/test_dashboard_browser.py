"""A browser shows the dashboard live, through a restart, without errors, barriers or network."""

# ruff: noqa: F811 - fixtures of another module are asked for by their names

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from demo_model import demo_model
from server_process import serving
from servers import Served, engine_of, served
from test_report_browser import axe, browser, sideways  # noqa: F401 - fixtures
from tierline.engine.engine import Engine
from tierline.server.dashboard_pages import PAGES
from tiny_checkpoints import tiny_checkpoint

pytestmark = pytest.mark.slow

PATHS = [path for path, _ in PAGES]
WIDTHS = (360, 640, 1280)  # 640 is 1280 at 200 % zoom
PATIENCE_MS = 30_000
TOKEN = "admin-token-of-this-test"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen2", tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return engine_of(checkpoint)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Served]:
    """A tiny model that has answered a few requests of each class."""
    with served(engine) as one:
        for i in range(9):
            complete(one.url, slo=("interactive", "standard", "batch")[i % 3])
        yield one


def complete(url: str, *, tokens: int = 8, **fields: Any) -> str:
    """One answer; its request's id."""
    body = {"model": "tiny", "prompt": [5] * 40, "max_tokens": tokens, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body | fields, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


@contextmanager
def opened(
    browser: Any, url: str, *, width: int = 1280, scheme: str = "light", scripts: bool = True
) -> Iterator[Any]:
    """A page, what it asked for, and what it complained of."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts
    )
    page = context.new_page()
    page.asked, page.said = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.set_default_timeout(PATIENCE_MS)
    page.goto(url, wait_until="load")
    yield page
    context.close()


def is_live(page: Any) -> None:
    """The page's policy forbids eval, so tests wait for selectors, not for functions."""
    page.wait_for_selector('#link:has-text("● live")')


def reads(page: Any, place: str, text: str) -> None:
    """Until the place says it."""
    page.wait_for_selector(f'[data-said="{place}"]:text-is("{text}")')


# Every page


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", [*PATHS, "request"])
def test_page_complains_of_nothing_asks_nobody_else_and_fits(browser, server, path, width):
    if path == "request":
        path = f"/dashboard/requests/{complete(server.url)}"
    with opened(browser, server.url + path, width=width) as page:
        is_live(page)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")

        assert page.said == []
        assert all(url.startswith(server.url) for url in page.asked)
        assert sideways(page) <= 0


def test_the_checks_see_a_complaint_and_inline_code(browser, server):
    """Negative control: the policy refuses what the pages must not have."""
    with opened(browser, f"{server.url}/dashboard") as page:
        page.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<p style=\"color:red\">x</p>')"
        )
        page.evaluate("new Image().src = 'http://127.0.0.2/x.png'")
        page.wait_for_timeout(300)

        assert any("style" in said for said in page.said)
        assert any("127.0.0.2" in said for said in page.said)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", [*PATHS, "request", "/login"])
def test_axe_finds_no_barrier(browser, server, axe, path, scheme):
    if path == "request":
        path = f"/dashboard/requests/{complete(server.url)}"
    with opened(browser, server.url + path, scheme=scheme) as page:
        is_live(page)
        page.evaluate(axe)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    barriers = [(v["id"], [n["html"][:120] for n in v["nodes"]][:3]) for v in found["violations"]]

    assert barriers == []


def test_axe_would_see_faint_words(browser, server, axe):
    with opened(browser, f"{server.url}/dashboard") as page:
        page.evaluate("document.querySelector('h1').setAttribute('class', 'absent')")
        page.evaluate("document.documentElement.style.setProperty('--soft', '#ccc')")
        page.evaluate(axe)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")

        assert "color-contrast" in [v["id"] for v in found["violations"]]


@pytest.mark.parametrize("path", PATHS)
def test_keyboard_reaches_everything(browser, server, path):
    """Tab comes past every link, field, button and part that scrolls, in the order of the page."""
    can_focus = """() => [...document.querySelectorAll(
        'a[href], button:not([disabled]), input, select, textarea, summary, [tabindex="0"]')]
        .filter(e => e.checkVisibility() && !e.closest('details:not([open]) > :not(summary)'))"""
    with opened(browser, server.url + path) as page:
        is_live(page)
        page.evaluate("document.querySelectorAll('[hx-get]').forEach(e => e.replaceWith(e))")
        wanted = page.evaluate(f"({can_focus})().length")
        page.evaluate("window.reached = new Set()")
        for _ in range(wanted + 3):
            page.keyboard.press("Tab")
            page.evaluate("window.reached.add(document.activeElement)")
        missed = page.evaluate(
            f"({can_focus})().filter(e => !window.reached.has(e)).map(e => e.outerHTML)"
        )

    # Rows that came anew meanwhile are other elements.
    assert [one for one in missed if "/dashboard/requests/" not in one] == []


@pytest.mark.parametrize("path", PATHS)
def test_pages_read_without_a_script(browser, server, path):
    with opened(browser, server.url + path, scripts=False) as page:
        assert len(page.locator("h1").inner_text()) > 20
        assert page.locator("#link").inner_text().startswith("as of")
        if path == "/dashboard":
            assert page.locator("details.numbers tbody tr").first.is_visible()
        if path == "/dashboard/playground":
            assert "curl" in page.locator("noscript").inner_text()


# Live


def test_now_is_updated_in_place(browser, server):
    """Numbers change while the page stays: nothing is loaded again, nothing moves."""
    with opened(browser, f"{server.url}/dashboard") as page:
        is_live(page)
        cell = page.locator('[data-said="batch requests"]')
        before = int(cell.inner_text())
        drawn = "document.querySelector('#plot-steps canvas').toDataURL()"
        picture = page.evaluate(drawn)
        page.evaluate("document.querySelector('h1').dataset.kept = 'yes'")
        height = page.evaluate("document.documentElement.scrollHeight")
        for _ in range(3):
            complete(server.url, slo="batch")
        reads(page, "batch requests", str(before + 3))

        assert page.evaluate("document.querySelector('h1').dataset.kept") == "yes"
        assert page.evaluate("document.documentElement.scrollHeight") == height
        assert page.evaluate(drawn) != picture
        assert page.said == []


def test_requests_appear_as_they_come(browser, server):
    with opened(browser, f"{server.url}/dashboard/requests") as page:
        is_live(page)
        name = complete(server.url)
        page.wait_for_selector(f"a[href='/dashboard/requests/{name}']")
        page.click(f"a[href='/dashboard/requests/{name}']")
        page.wait_for_url(f"**/dashboard/requests/{name}")

        assert "first token after" in page.locator("h1").inner_text()
        assert page.said == []


def test_a_page_survives_a_restart(browser, checkpoint, engine):
    """The page says that nobody answers, and is live again by itself."""
    with served(engine, host="127.0.0.1") as first:
        port = int(first.url.rpartition(":")[2])
        page_of = opened(browser, f"{first.url}/dashboard")
        page = page_of.__enter__()
        is_live(page)
    try:
        page.wait_for_selector('#link:has-text("no answer since")')
        with on_port(engine, port) as second:
            is_live(page)
            complete(second.url, slo="batch")
            reads(page, "batch requests", "1")
    finally:
        page_of.__exit__(None, None, None)


@contextmanager
def on_port(engine: Engine, port: int) -> Iterator[Served]:
    """A server on a port that was another's."""
    import servers

    listening = servers.listening
    servers.listening = lambda host, _: listening(host, port)
    try:
        with served(engine) as server:
            yield server
    finally:
        servers.listening = listening


def test_a_hidden_tab_lets_its_connection_go(browser, server):
    hide = """(hidden) => {
        Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});
        document.dispatchEvent(new Event('visibilitychange'));
    }"""
    with opened(browser, f"{server.url}/dashboard") as page:
        is_live(page)
        ended: list[str] = []
        page.on("requestfailed", lambda request: ended.append(request.url))
        page.on("requestfinished", lambda request: ended.append(request.url))
        page.evaluate(hide, True)
        page.wait_for_timeout(500)
        asked = len(page.asked)
        page.evaluate(hide, False)
        page.wait_for_timeout(500)

        assert f"{server.url}/dashboard/events" in ended
        assert page.asked[asked:] == [f"{server.url}/dashboard/events"]


# Plan


def test_the_whole_plan_page_follows_what_is_measured(browser, server):
    changed = "([where, was]) => document.querySelector(where).innerText !== was"
    with opened(browser, f"{server.url}/dashboard/plan") as page:
        is_live(page)
        places = ("#rows", "#curve figcaption")
        before = [page.locator(place).inner_text() for place in places]
        for _ in range(20):
            complete(server.url)
        for place, was in zip(places, before, strict=True):
            page.wait_for_function(changed, arg=[place, was])

        assert [page.locator(place).count() for place in ("#said", "#curve")] == [1, 1]
        assert page.said == []


def test_what_if_answers_in_the_page(browser, server):
    with opened(browser, f"{server.url}/dashboard/plan") as page:
        is_live(page)
        page.fill("[name=load]", "2")
        page.click("#simulate")
        page.wait_for_selector("#answer table", timeout=90_000)

        assert "load x 2" in page.locator("#answer h3").inner_text()
        assert page.locator("#answer svg").count() >= 1
        assert page.said == []
        page.fill("[name=load]", "lots")
        page.click("#simulate")
        page.wait_for_selector('#answer:has-text("✗")')


# Who may watch


def test_signing_in_by_a_form(browser, engine):
    with (
        served(engine, keys=("sk-one-two-three-four-five-six",), admin_token=TOKEN) as server,
        opened(browser, f"{server.url}/dashboard/plan") as page,
    ):
        assert page.url.endswith("/login")

        page.fill("#token", "wrong")
        page.press("#token", "Enter")
        page.wait_for_selector("[role=alert]")
        page.fill("#token", TOKEN)
        page.press("#token", "Enter")
        page.wait_for_url("**/dashboard")
        is_live(page)
        page.goto(f"{server.url}/dashboard/playground")

        assert page.locator("[name=key]").is_visible()


# Playground, with a model that says something


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("real") / "log"
    with serving(demo_model(), "--kv-bytes=200MB", log=log) as server:
        yield server.url


def test_playground_streams_an_answer_and_tells_its_tokens(browser, real):
    with opened(browser, f"{real}/dashboard/playground") as page:
        is_live(page)
        page.fill("[name=temperature]", "0")
        page.fill("[name=max_tokens]", "24")
        page.fill("#message", "What is the capital of France?")
        page.press("#message", "Enter")
        page.wait_for_selector(".turn.assistant .sum")

        assert "Paris" in page.locator(".turn.assistant .words").inner_text()
        tokens = page.locator(".turn.assistant .t")
        assert 2 < tokens.count() <= 24
        tokens.nth(1).hover()
        assert re.search(r"had [\d.]+ %", page.locator("#token caption").inner_text())
        assert page.locator("#token tbody tr").count() == 5
        first = page.locator("#token caption").inner_text()
        page.locator(".turn.assistant .words").focus()
        page.keyboard.press("ArrowRight")
        assert page.locator("#token caption").inner_text() != first
        assert "in the prompt" in page.locator(".sum").inner_text()
        page.click(".sum a")
        page.wait_for_url("**/dashboard/requests/chatcmpl-*")
        assert page.said == []


def test_playground_stops_and_refuses(browser, real):
    with opened(browser, f"{real}/dashboard/playground") as page:
        page.fill("[name=max_tokens]", "1500")
        page.fill("#message", "Count from one to a thousand, in words.")
        page.click("#send")
        page.wait_for_selector(".turn.assistant .t")
        page.click("#stop")
        page.wait_for_selector('#status:text-is("Stopped.")')
        page.fill("[name=temperature]", "7")
        page.evaluate("document.getElementById('ask').noValidate = true")
        page.fill("#message", "Again.")
        page.press("#message", "Enter")
        page.wait_for_selector('#status:text-is("Refused.")')

        assert "temperature" in page.locator(".late").last.inner_text()
        until_s = time.monotonic() + 20
        while "cancelled" not in (rows := httpx.get(f"{real}/dashboard/requests?rows=1").text):
            assert time.monotonic() < until_s, rows
            time.sleep(0.2)


def test_playground_keeps_to_a_schema(browser, real):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    with opened(browser, f"{real}/dashboard/playground") as page:
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        page.fill("[name=schema]", "{nonsense")
        page.fill("#message", "A number, please.")
        page.press("#message", "Enter")
        page.wait_for_selector('#status:has-text("does not parse")')
        page.fill("[name=schema]", json.dumps(schema | {"additionalProperties": False}))
        page.fill("[name=max_tokens]", "40")
        page.press("#message", "Enter")
        page.wait_for_selector(".turn.assistant .sum")

        text = page.locator(".turn.assistant .words").inner_text()
        assert re.fullmatch(r'\s*\{\s*"n"\s*:\s*-?\d+\s*\}\s*', text), text
