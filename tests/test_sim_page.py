"""The page of a simulation is one offline file whose pictures say what the summary says."""

import re
from dataclasses import replace

import jinja2
import pytest

from runs import LEVELS, finished, page_of, run_of, served_run, sim_page_of
from test_report import HOSTILE, Page
from tierline.base.clock import PS_PER_S
from tierline.planner.sim_figures import (
    BINS,
    latency_figures,
    life_figure,
    mean_over_time,
    memory_figure,
    queue_points,
    sim_figures,
)
from tierline.sim.compare import good_difference
from tierline.sim.life import beside_its_wait
from tierline.sim.measure import summary
from tierline.sim.record import REFUSED, Run

# --- the page -------------------------------------------------------------------------------


def test_page_is_small_and_loads_nothing() -> None:
    html = sim_page_of()
    page = Page(html)

    assert len(html.encode()) < 300_000
    assert page.loads == []
    assert page.scripts == 0
    assert "url(" not in html
    assert "@import" not in html


def test_every_link_inside_the_page_has_a_target() -> None:
    page = Page(sim_page_of())

    assert len(set(page.anchors)) >= 4
    assert set(page.anchors) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_the_answer_stands_before_the_doubts_and_those_before_the_pictures() -> None:
    html = sim_page_of()
    order = ["<h1>urgent-first: 96.7%", 'id="wrong"', "Step times are fitted", 'id="pictures"']
    places = [html.index(words) for words in order]

    assert places == sorted(places)
    assert "fcfs 63.0%" in html  # the other policy, in the answer itself


def test_equal_runs_are_equal_pages() -> None:
    assert sim_page_of() == sim_page_of()
    assert sim_page_of() != sim_page_of(request=40)


def test_a_lone_policy_is_compared_with_nobody() -> None:
    assert "side by side" in sim_page_of()
    assert "side by side" not in sim_page_of(several=False)


def hostile() -> tuple[Run, dict[str, object]]:
    run = served_run(count=60, policy="fcfs")
    run.policy = run.tenants[0].__class__(HOSTILE)
    run.tenants = (HOSTILE, "b", "c")
    run.levels = (replace(LEVELS[0], name=HOSTILE), *LEVELS[1:])
    facts = dict.fromkeys(("model", "trace", "deployment", "fleet", "command"), HOSTILE)
    return run, facts | {"caveats": (HOSTILE,)}


def test_names_are_escaped_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    run, page = hostile()
    html = page_of([run, run], **page)

    assert HOSTILE not in html
    assert html.count("&lt;script&gt;alert(1)") > 10

    original = jinja2.Environment
    monkeypatch.setattr(
        jinja2, "Environment", lambda **options: original(**options | {"autoescape": False})
    )
    assert HOSTILE in page_of([run], **page)  # control: escaping is what did it


@pytest.mark.parametrize(
    "run",
    [
        run_of([]),
        run_of([{"outcome": REFUSED}]),
        run_of([finished(0, 1, 1, 1)]),
        run_of([finished(0, 1, 2, 5)], levels=(replace(LEVELS[0], targets=()),)),
    ],
    ids=["nothing", "one refused", "one token", "nothing promised"],
)
def test_little_to_show_is_said_and_not_drawn(run: Run) -> None:
    html = page_of([run])

    assert "kept no steps" in html
    assert "Traceback" not in html
    assert not re.search(r"\bnan\b", html)


# --- the pictures ---------------------------------------------------------------------------


def test_pictures_say_what_the_summary_says() -> None:
    runs = [served_run(policy=name) for name in ("urgent-first", "fcfs")]
    told = summary(runs[0])
    pictures = {p.title: p for p in latency_figures(runs)}
    shares = {f"{p.met_share:.1%}" for p in told.promises if p.of == "requests"}

    assert len(pictures) == len(told.promises) == 5
    assert shares <= {title.partition(" ")[0] for title in pictures}
    worst = next(iter(pictures.values()))
    assert worst.rows[0][0] == "urgent-first"
    assert worst.rows[1][1] == "38.3%"  # the share of fcfs within the same limit


def test_every_picture_carries_its_numbers_and_a_title_of_its_own() -> None:
    pictures = sim_figures([served_run(watched=119)], 119)

    assert len({p.name for p in pictures}) == len({p.title for p in pictures}) == len(pictures)
    for picture in pictures:
        assert picture.rows, picture.name
        assert any(c.isdigit() for c in picture.title), picture.name
        assert "<script" not in picture.svg


def waiting(run: Run, at_ps: int) -> int:
    r = run.requests
    return sum(
        r.arrival_ps[i] <= at_ps < r.admitted_ps[i] for i in range(len(r)) if r.admitted_ps[i] >= 0
    )


def test_the_queue_is_what_counting_finds() -> None:
    """In each stretch no instant has more waiting, and one has as many."""
    run = served_run()
    requests = run.requests
    points = queue_points(run, run.end_ps)
    for i in range(0, BINS, 7):
        begin, end = run.end_ps * i / BINS, run.end_ps * (i + 1) / BINS
        instants = [at for at in requests.arrival_ps if begin <= at <= end]
        counted = max([waiting(run, round(begin)), *(waiting(run, at) for at in instants)])

        assert points[i][1] == counted


def test_tokens_over_time_add_up_to_the_tokens_computed() -> None:
    import numpy as np

    run = served_run()
    assert run.steps is not None
    edges = np.linspace(0, run.end_ps, 50)
    area = sum(
        value * width
        for (_, value), width in zip(
            mean_over_time(run, edges, "prefill_tokens", replica=None), np.diff(edges), strict=True
        )
    )
    lengths = zip(run.steps.start_ps, run.steps.end_ps, run.steps.prefill_tokens, strict=True)
    exact = sum((end - start) * tokens for start, end, tokens in lengths) / len(run.replicas)

    assert area == pytest.approx(exact, rel=1e-9)


def test_memory_is_full_when_the_pool_is() -> None:
    run = served_run()
    assert run.steps is not None
    for replica in run.replicas:
        replica.pages_total = 100
    half = memory_figure(run)
    for i in range(len(run.steps)):
        run.steps.pages_used[i] = 100

    assert "100% full" in memory_figure(run).title
    assert half.title != memory_figure(run).title


def test_the_life_names_what_took_longest_and_who_ran_beside() -> None:
    run = served_run(watched=119)
    picture = life_figure(run, 119)

    assert picture.title.startswith("Request 119 spent ")
    assert [row[0] for row in picture.rows] == ["queued", "prefill", "decode"]
    for other in beside_its_wait(run, 119):
        assert run.requests.replica[other] == run.requests.replica[119]
        assert run.requests.admitted_ps[other] < run.requests.first_ps[119]
        assert run.requests.finish_ps[other] > run.requests.arrival_ps[119]
    assert 119 not in beside_its_wait(run, 119)


# --- policies -------------------------------------------------------------------------------


def test_a_better_policy_is_better_beyond_doubt_and_an_equal_one_is_not() -> None:
    fcfs, urgent = served_run(), served_run(policy="urgent-first")
    gain, none = good_difference(urgent, fcfs), good_difference(fcfs, served_run())

    assert gain is not None
    assert none is not None
    assert gain.low > 0
    assert gain.mean == pytest.approx(summary(urgent).all.good_share - summary(fcfs).all.good_share)
    assert (none.mean, none.low, none.high) == (0, 0, 0)


def test_other_requests_are_not_compared() -> None:
    assert good_difference(served_run(), served_run(seed=8)) is None
    assert good_difference(served_run(count=30), served_run(count=30)) is None


def test_who_leaves_as_another_comes_does_not_wait_beside_it() -> None:
    run = run_of([finished(at, at + 2, at + 3, 4) for at in (0, 1, 2)], end_ps=10 * PS_PER_S)

    assert max(v for _, v in queue_points(run, run.end_ps)) == 1
