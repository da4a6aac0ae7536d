"""The report is one offline page that holds the answer, every finding, and nothing unescaped."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import jinja2
import pytest

from plans import small_plan
from tierline.perf.evidence import Evidence, Value
from tierline.planner import pictures, svg
from tierline.planner.figures import figures, knee_rps, work_point
from tierline.planner.finding import Plan
from tierline.planner.plan_json import plan_to_dict, plan_to_json
from tierline.planner.report import group_rejected, render_report, tiles
from tierline.planner.text import render_text

HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What a browser would load, and where links point."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.anchors: list[str] = []
        self.ids: list[str] = []
        self.scripts = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.scripts += tag == "script"
        if "id" in values:
            self.ids.append(values["id"] or "")
        if tag == "a" and (values.get("href") or "").startswith("#"):
            self.anchors.append((values["href"] or "")[1:])
        self.loads += [
            values[key] or ""
            for key in ("src", "srcset", "data", "poster", "action")
            if key in values
        ]
        if tag in ("link", "use", "image") or "@import" in (values.get("style") or ""):
            self.loads.append(str(values))


def named(plan: Plan, name: str) -> Plan:
    """The same plan for a model and a workload of a hostile name."""
    question = replace(
        plan.question, model=replace(plan.question.model, name=name), workload_name=name
    )
    return replace(plan, question=question, headline=f"{name} needs one GPU")


# --- the page -------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [True, False])
def test_page_is_small_and_loads_nothing(reuse):
    html = render_report(small_plan(reuse=reuse))
    page = Page(html)

    assert len(html.encode()) <= 1_000_000
    assert page.loads == []
    assert "url(" not in html
    assert "@import" not in html
    assert page.scripts == 1


def test_the_check_for_loads_sees_one():
    assert Page('<img src="https://example.org/x.png">').loads
    assert Page('<link rel="stylesheet" href="x.css">').loads


def test_all_findings_are_there_with_their_working():
    plan = small_plan()
    html = render_report(plan)
    shown = re.sub(r"\s+", " ", html)

    assert [f.step for f in plan.findings] == list(range(1, 15))
    for finding in plan.findings:
        assert f'id="finding-{finding.step}"' in html
        for words in (finding.answer, finding.formula, finding.substituted, finding.rule):
            assert str(jinja2.utils.markupsafe.escape(words)) in shown
    assert "Traceback" not in html


def test_every_link_inside_the_page_has_a_target():
    page = Page(render_report(small_plan()))

    assert len(set(page.anchors)) >= 10
    assert set(page.anchors) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_every_tile_leads_to_a_finding():
    plan = small_plan()
    steps = {f.step for f in plan.findings}

    assert {tile.step for tile in tiles(plan)} <= steps
    assert any(tile.amount == str(plan.recommended.pessimistic.gpus) for tile in tiles(plan))


def test_equal_plans_are_equal_bytes():
    assert render_report(small_plan()) == render_report(small_plan())
    assert plan_to_json(small_plan()) == plan_to_json(small_plan())


# --- escaping -------------------------------------------------------------------------------


def test_names_are_escaped_everywhere():
    html = render_report(named(small_plan(), HOSTILE))

    assert HOSTILE not in html
    assert "&lt;script&gt;alert(1)" in html
    assert Page(html).scripts == 1


def test_without_escaping_the_script_would_get_in(monkeypatch):
    """The negative control: what the test above forbids happens when escaping is off."""
    original = jinja2.Environment

    def unescaped(**options):
        return original(**options | {"autoescape": False})

    monkeypatch.setattr(jinja2, "Environment", unescaped)

    assert HOSTILE in render_report(named(small_plan(), HOSTILE))


def test_svg_escapes_words_and_attributes():
    drawn = svg.svg([svg.text(1, 2, HOSTILE), svg.dot(1, 2, "c", tip=HOSTILE)], label='"><script>')

    assert "<script>" not in drawn
    assert ElementTree.fromstring(drawn) is not None


# --- pictures -------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [True, False])
def test_every_picture_is_well_formed_and_names_what_it_shows(reuse):
    shown = figures(small_plan(reuse=reuse))

    assert len({p.name for p in shown}) == len(shown) == 11
    for picture in shown:
        assert picture.title
        assert " vs" not in picture.title
        if not picture.svg:
            continue
        root = ElementTree.fromstring(picture.svg)
        assert root.get("aria-label") == picture.title
        assert "nan" not in picture.svg.casefold()
        assert all(len(row) == len(picture.columns) for row in picture.rows)


def test_everything_drawn_lies_inside_its_picture():
    for picture in figures(small_plan()):
        root = ElementTree.fromstring(picture.svg)
        _, _, width, height = map(float, (root.get("viewBox") or "").split())
        for node in root.iter():
            for key, end in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                assert 0 <= float(node.get(key, 0)) <= end, (picture.name, node.attrib)


def test_malformed_svg_would_be_seen():
    with pytest.raises(ElementTree.ParseError):
        ElementTree.fromstring("<svg><text>a & b</svg>")


def test_unknown_reuse_says_what_fills_it():
    missing = next(p for p in figures(small_plan(reuse=False)) if p.name == "reuse")
    present = next(p for p in figures(small_plan()) if p.name == "reuse")

    assert missing.svg == ""
    assert "prefix_blocks" in missing.note
    assert missing.note.split(",")[0] in render_report(small_plan(reuse=False))
    assert present.svg


def test_unknown_arrivals_say_what_fills_them():
    plan = small_plan()
    plan = replace(plan, profile=replace(plan.profile, arrivals=None))
    missing = next(p for p in figures(plan) if p.name == "arrivals")

    assert missing.svg == ""
    assert "--trace" in missing.note


def test_a_plan_without_prices_says_so_and_draws_the_rest():
    plan = small_plan(priced=False)
    html = render_report(plan)
    empty = {p.name for p in figures(plan) if not p.svg}

    assert empty == {"pareto", "cost", "sensitivity"}
    assert "--price" in html
    assert "$" not in render_text(plan).splitlines()[0]


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0.5, "s", "500 ms"),
        (2, "s", "2 s"),
        (0.05, "%", "5%"),
        (1.2e6, "$", "$1.2 M"),
        (0, "", "0"),
    ],
)
def test_tick_words(value, unit, words):
    assert svg.short(value, unit) == words


@pytest.mark.parametrize(("low", "high"), [(1, 1e6), (0.3, 0.7), (5, 5), (90, 110), (1e-4, 2e-4)])
@pytest.mark.parametrize("log", [True, False])
def test_axes_have_a_few_ticks_inside_and_keep_order(low, high, log):
    axis = svg.x_axis(low, high, "x", log=log)
    places = [axis.at(value) for value, _ in axis.ticks]

    assert 2 <= len(places) <= 8
    assert places == sorted(places)
    assert all(axis.start - 0.5 <= p <= axis.end + 0.5 for p in places)


def test_roofline_points_stay_under_the_roof():
    best = small_plan().recommended
    for kind, sizes in (("decode", (1, 16, 256)), ("prefill", (128, 2048))):
        points = [work_point(best, kind, size, planned=False) for size in sizes]
        roofs = [
            min(best.gpu.flops_per_s["fp8"], p.intensity * best.gpu.memory_bytes_per_s)
            for p in points
        ]

        assert [p.intensity for p in points] == sorted(p.intensity for p in points)
        assert all(p.flops_per_s < roof for p, roof in zip(points, roofs, strict=True))


def test_knee_is_where_the_tail_leaves_the_middle():
    curve = small_plan().curve
    knee = knee_rps(curve)

    assert knee is not None
    assert curve[0].rate_rps < knee <= curve[-1].rate_rps
    assert knee_rps(curve[:1]) is None


def test_latency_title_names_the_rate_at_which_the_promise_breaks():
    points = [
        pictures.LatencyPoint(rate_rps=r, p50_s=0.1, p99_s=0.2 * r, low_s=0.1, high_s=None)
        for r in (1.0, 2.0, 3.0)
    ]
    first = pictures.latency("TTFT", points, limit_s=0.5, usable_rps=2.5, marks=[])
    never = pictures.latency("TTFT", points, limit_s=9.0, usable_rps=2.5, marks=[])

    assert "first, at 2.50 requests/s" in first.title
    assert "stays under" in never.title


# --- text and JSON --------------------------------------------------------------------------


def test_text_holds_the_headline_and_every_reason():
    plan = small_plan()
    words = " ".join(render_text(plan).split())

    assert words.startswith(" ".join(plan.headline.split()))
    for finding in plan.findings:
        assert " ".join(finding.answer.split()) in words
    for caveat in plan.caveats:
        assert " ".join(caveat.split()) in words


def test_json_holds_everything_and_no_nan():
    plan = small_plan(reuse=False)
    unknown = Value(
        amount=math.nan, unit="x", evidence=Evidence(kind="unknown", source="nobody said")
    )
    plan = replace(plan, facts={**plan.facts, "nothing": unknown})
    values = json.loads(plan_to_json(plan))

    assert values["facts"]["nothing"]["amount"] is None
    assert len(values["findings"]) == 14
    assert len(values["alternatives"]) == len(plan.alternatives)
    assert values["recommended"]["name"] == plan.recommended.name
    assert values["recommended"]["pessimistic"]["gpus"] == plan.recommended.pessimistic.gpus
    assert values["recommended"]["expected"]["point"]["ttft_p99_s"] > 0
    assert values["deployment_toml"] == plan.deployment.to_toml()
    assert set(values) == set(plan_to_dict(small_plan()))


def test_rejections_are_grouped_by_reason_and_none_is_lost():
    plan = small_plan()
    groups = group_rejected(plan.rejected)

    assert sum(len(items) for _, items in groups) == len(plan.rejected)
    assert len(groups) < max(len(plan.rejected), 2)
