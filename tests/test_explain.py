"""An explanation adds up to the request's time, names who was served meanwhile, and says what
the scheduler said."""

import json

import pytest

from runs import finished, run_of, served_run
from tierline.base.clock import PS_PER_S
from tierline.base.errors import InputError
from tierline.sim.explain import explain, render_explanation
from tierline.sim.record import REFUSED, Moment, Run


@pytest.fixture(scope="module")
def run() -> Run:
    return served_run(policy="urgent-first", watched=119)


def test_the_parts_add_up_to_the_time_it_took(run: Run) -> None:
    requests = run.requests
    for request in (0, 40, 119, 250):
        told = explain(run, request)
        total = requests.finish_ps[request] - requests.arrival_ps[request]

        assert told.total_s == pytest.approx(total / PS_PER_S, abs=1e-12)
        assert sum(part.for_s for part in told.parts) == pytest.approx(told.total_s)
        assert sum(told.seconds.values()) == pytest.approx(told.total_s)


def test_a_wait_names_who_was_served_and_who_made_room(run: Run) -> None:
    requests = run.requests
    (wait,) = explain(run, 119).waits
    begin, end = requests.arrival_ps[119], requests.admitted_ps[119]
    served = {
        i
        for i in range(len(requests))
        if requests.replica[i] == requests.replica[119]
        and 0 <= requests.admitted_ps[i] < end
        and requests.first_ps[i] <= end
        and requests.finish_ps[i] > begin
        and i != 119
    }

    assert wait.kind == "queued"
    assert set(wait.ahead) == served
    assert wait.ended_by
    assert all(requests.finish_ps[i] == end for i in wait.ended_by)


def test_who_never_waited_has_no_wait() -> None:
    """Negative control: admitted at once, behind nobody."""
    run = run_of([finished(0, 1, 2, 5, admitted_ps=0)])

    assert explain(run, 0).waits == ()
    assert [part.kind for part in explain(run, 0).parts] == ["prefill", "decode"]


def test_the_text_says_all_of_it(run: Run) -> None:
    told = explain(run, 119)
    text = render_explanation(told)

    assert text.startswith("Request 119 (batch, acme; ")
    for words in ("queued 5.43 s", "it ended when request", "chunk", "chunk ×8", "kept", "[...."):
        assert words in text, words
    loaded = json.loads(told.to_json())
    assert loaded["waits"][0]["ahead"] == list(told.waits[0].ahead)
    assert [h["what"] for h in loaded["happenings"]][-1] == "finished"


def test_a_broken_promise_is_called_broken() -> None:
    run = run_of([finished(0, 0.5, 2, 5), finished(0, 1.5, 2, 5)])

    assert [v.kept for v in explain(run, 0).verdicts] == [True, True]
    assert [v.kept for v in explain(run, 1).verdicts] == [False, True]
    assert "BROKEN" in render_explanation(explain(run, 1))
    assert "BROKEN" not in render_explanation(explain(run, 0))


def test_preempted_and_loaded_work_is_told_in_its_order() -> None:
    run = run_of([finished(0, 4, 9, 5)])
    turns = (
        *((0, "arrived"), (1, "blocked"), (2, "loading"), (3, "chunk"), (4, "first token")),
        *((5, "preempted"), (7, "admitted"), (8, "decoding"), (9, "finished")),
    )
    run.moments[0] = [Moment(at * PS_PER_S, what, f"why {what}") for at, what in turns]
    told = explain(run, 0)

    assert [(p.kind, p.for_s) for p in told.parts] == [
        ("queued", 2),
        ("loading", 1),
        ("prefill", 1),
        ("decode", 1),
        ("preempted", 2),
        ("prefill", 1),
        ("decode", 1),
    ]
    assert [w.kind for w in told.waits] == ["queued", "loading", "preempted"]
    assert told.seconds["prefill"] == 2
    assert "why preempted" in render_explanation(told)


def test_a_refused_request_is_told_and_an_unknown_one_is_an_error() -> None:
    run = run_of([{"outcome": REFUSED}], end_ps=0)

    assert "refused" in render_explanation(explain(run, 0))
    with pytest.raises(InputError, match="no request 1") as caught:
        explain(run, 1)
    assert "0 to 0" in caught.value.hint


def test_many_waits_are_told_by_the_longest() -> None:
    run = run_of([finished(0, 20, 30, 5)])
    moments = [Moment(0, "arrived", "")]
    for i in range(8):
        moments.append(Moment((2 * i + 1) * PS_PER_S, "chunk", ""))
        moments.append(Moment((2 * i + 2) * PS_PER_S - i * PS_PER_S // 10, "overtaken", ""))
    moments += [Moment(20 * PS_PER_S, "chunk", ""), Moment(20 * PS_PER_S, "first token", "")]
    run.moments[0] = moments
    told = explain(run, 0)
    text = render_explanation(told)

    assert len(told.waits) == 9
    assert "and 4 shorter ones, 4.30 s in all" in text
    assert text.count("  queued ") == 5
