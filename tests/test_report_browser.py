"""A browser shows the pages without network, errors, sideways scrolling or barriers."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from plans import small_plan
from runs import sim_page_of
from tierline.planner.report import render_report

pytestmark = pytest.mark.slow

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = (360, 640, 1280)  # 640 is 1280 at 200 % zoom


def missing(what: str) -> NoReturn:
    """A tool that is not here: the release run needs it, a developer may do without."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright import sync_api
    except ImportError:
        missing("no playwright; install the extra named browser")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        missing("no chromium on the path; set CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, from its package; too large to keep here."""
    if shutil.which("npm") is None:
        missing("no npm to get axe-core with")
    folder = tmp_path_factory.mktemp("axe")
    done = subprocess.run(
        ["npm", "install", "--no-save", "--ignore-scripts", "--prefix", str(folder), "axe-core@4"],
        cwd=folder,
        capture_output=True,
        timeout=120,
        check=False,
    )
    source = folder / "node_modules" / "axe-core" / "axe.min.js"
    if done.returncode or not source.is_file():
        missing("axe-core cannot be installed here")
    return source.read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=[True, False], ids=["reuse known", "reuse unknown"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render_report(small_plan(reuse=request.param)), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["report", "report of no reuse", "simulation"])
def any_page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of page; what holds for one must hold for all."""
    if request.param == "simulation":
        text = sim_page_of()
    else:
        text = render_report(small_plan(reuse=request.param == "report"))
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(text, encoding="utf-8")
    return path


def opened(browser: Any, report: Path, *, width: int = 1280, scheme: str = "light") -> Any:
    """A page with every part unfolded, and what it asked for and complained of."""
    page = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme
    ).new_page()
    page.asked, page.said = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    return page


def sideways(page: Any) -> int:
    """Pixels that the page is wider than its window."""
    return page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_page_asks_for_nothing_complains_of_nothing_and_fits(browser, any_page, width):
    page = opened(browser, any_page, width=width)

    assert page.asked == [any_page.as_uri()]
    assert page.said == []
    assert sideways(page) <= 0


def test_the_checks_see_a_request_an_error_and_a_wide_page(browser, any_page, tmp_path):
    broken = tmp_path / "broken.html"
    extra = '<script src="missing.js"></script><div style="width:3000px">x</div>'
    broken.write_text(any_page.read_text(encoding="utf-8").replace("</main>", f"{extra}</main>"))
    page = opened(browser, broken)

    assert len(page.asked) == 2
    assert page.said
    assert sideways(page) > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_no_barrier(browser, any_page, axe, scheme, width):
    page = opened(browser, any_page, width=width, scheme=scheme)
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    barriers = [(v["id"], [n["html"][:120] for n in v["nodes"]][:3]) for v in found["violations"]]

    assert barriers == []


def test_axe_would_see_faint_words(browser, any_page, axe):
    page = opened(browser, any_page)
    page.add_style_tag(content="p { color: #bbb !important }")
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")

    assert "color-contrast" in [v["id"] for v in found["violations"]]


def test_words_in_pictures_do_not_cover_each_other(browser, any_page):
    """Boxes of the labels of one picture, shrunk by two pixels, keep apart."""
    covered = """() => [...document.querySelectorAll('figure')].flatMap(figure => {
        const boxes = [...figure.querySelectorAll('svg[role=img] text')].map(t =>
            [t.textContent, t.getBoundingClientRect()]);
        return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
            p.left + 2 < q.right - 2 && q.left + 2 < p.right - 2 &&
            p.top + 4 < q.bottom - 4 && q.top + 4 < p.bottom - 4
        ).map(([b]) => figure.id + ': ' + a + ' / ' + b));
    })"""
    for width in WIDTHS:
        page = opened(browser, any_page, width=width)

        assert page.evaluate(covered) == []


def test_a_link_to_a_step_opens_it_by_keyboard(browser, report):
    page = browser.new_page()
    page.goto(report.as_uri())
    page.keyboard.press("Tab")  # skip link
    page.keyboard.press("Tab")  # first tile: GPUs
    page.keyboard.press("Enter")

    page.wait_for_function("location.hash === '#finding-11'", timeout=5000)

    assert page.evaluate("document.querySelector('#finding-11').open")


def test_print_shows_the_working(browser, report):
    """Folded parts open on paper."""
    page = browser.new_page()
    page.goto(report.as_uri())
    seen = "document.querySelector('#finding-4 code').checkVisibility()"

    assert not page.evaluate(seen)

    page.emulate_media(media="print")

    assert page.evaluate(seen)
