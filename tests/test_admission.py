"""A newcomer is told what then happens: when its first token comes, or when to come back."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from deciding import drive, line, request, scheduler_of
from test_worth import LEVELS, drawn, instance, parts
from tierline.base.clock import FOREVER_PS, PS_PER_S
from tierline.scheduling.admission import Accept, Admission, Queue, Refuse
from tierline.scheduling.policy import FCFS, TIERLINE, Policy
from tierline.scheduling.scheduler import Scheduler
from tierline.scheduling.sequence import Sequence
from tierline.sim.api import simulate
from tierline.sim.columns import column
from tierline.sim.measure import good_requests
from tierline.sim.record import FINISHED, REFUSED, Run
from tierline.sim.replica import Replica

FIELDS = ("first_ps", "finish_ps", "outcome", "cached_tokens", "preemptions")


def crowd(count: int, *, prompt: int = 1000, ttft_ps: int = FOREVER_PS) -> Scheduler:
    """A scheduler before which so many prompts wait, and nothing has been computed yet."""
    scheduler = scheduler_of(TIERLINE, blocks=10_000, slots=64)
    for i in range(count):
        scheduler.add(request(i, prompt, 10, ttft_ps=ttft_ps))
    return scheduler


def test_an_empty_instance_accepts():
    answer = Admission(crowd(0)).answer(request(1, 1000, 10, ttft_ps=PS_PER_S), 0)

    assert isinstance(answer, Accept)
    assert answer.ttft_ps == pytest.approx(line().prefill_ps(1000, chunk=256), rel=0.1)


def test_who_goes_first_is_waited_for():
    admission = Admission(crowd(20, ttft_ps=20 * PS_PER_S))
    behind = admission.answer(request(50, 1000, 10, ttft_ps=30 * PS_PER_S), 0)
    before = admission.answer(request(51, 1000, 10, ttft_ps=10 * PS_PER_S), 0)

    assert isinstance(behind, Queue)
    assert isinstance(before, Accept), "an earlier deadline overtakes them all"
    assert behind.ttft_ps == pytest.approx(21 * before.ttft_ps, rel=0.1)


def test_a_refusal_names_the_time_after_which_it_is_not_repeated():
    """Everybody waits until then and nobody else comes."""
    hurry = {"prompt": 1000, "output": 10, "ttft_ps": 2 * PS_PER_S}
    scheduler = crowd(20, ttft_ps=PS_PER_S + PS_PER_S // 2)
    scheduler.policy = replace(TIERLINE, sheds=False)
    admission = Admission(scheduler)
    refusal = admission.answer(request(50, **hurry), 0)
    assert isinstance(refusal, Refuse)
    later_ps = refusal.retry_after_ps

    again: list[object] = []

    def ask(_step, now_ps: int) -> None:
        if now_ps >= later_ps * 11 // 10 and not again:
            again.append(admission.answer(request(60, at_ps=now_ps, **hurry), now_ps))
        elif now_ps < later_ps // 2:
            early = admission.answer(request(61, at_ps=now_ps, **hurry), now_ps)
            assert isinstance(early, Refuse), "control: half of that is too early"

    drive(scheduler, [], each=ask)

    assert isinstance(again[0], Accept | Queue)


def test_who_could_never_be_on_time_is_not_told_to_come_back():
    answer = Admission(crowd(0)).answer(request(1, 50_000, 10, ttft_ps=PS_PER_S), 0)

    assert isinstance(answer, Refuse)
    assert answer.retry_after_ps == FOREVER_PS


def test_an_answer_changes_nothing():
    asked, silent = crowd(30), crowd(30)
    admission = Admission(asked)

    def ask(_step, now_ps: int) -> None:
        admission.answer(request(99, 500, 10, at_ps=now_ps, ttft_ps=PS_PER_S), now_ps)

    assert drive(asked, [], each=ask) == drive(silent, [])


def test_a_long_queue_is_sampled():
    """Three thousand that wait, in no order: a sample is a few percent off, not more."""
    rng = Random(2)
    scheduler = scheduler_of(replace(TIERLINE, sheds=False), blocks=10_000)
    for i in range(3000):
        patience = rng.randrange(1, 50) * PS_PER_S
        scheduler.add(request(i, rng.randrange(100, 3000), 10, ttft_ps=patience))
    newcomer = request(9999, 100, 10, ttft_ps=25 * PS_PER_S)
    scheduler.place(newcomer)
    tokens, _ = scheduler.queue.before(newcomer.band, newcomer.key)
    waiting = scheduler.queue.everybody()
    exact = sum(s.prompt_tokens for s in waiting if s.key <= newcomer.key)

    assert tokens == pytest.approx(exact, rel=0.15)


# --- on real lengths -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def busy(data_dir):
    return drawn(parts(data_dir), rate_rps=1.8, span_s=300, seed=5)


def predicted_s(requests, policy: Policy, monkeypatch) -> tuple[Run, np.ndarray]:
    """A run in which everybody is let in, and what each would have been told."""
    told: dict[int, float] = {}

    def ask(self: Replica, s: Sequence, now_ps: int) -> bool:
        if self.admission is None:
            self.admission = Admission(self.scheduler)
        done = self._ended(now_ps) if self.step is not None else 0
        told[s.id] = self.admission.answer(s, now_ps, step=self.step, done=done).ttft_ps / PS_PER_S
        return False

    monkeypatch.setattr(Replica, "refuses", ask)
    run = simulate(instance(), requests, levels=LEVELS, policy=policy)
    return run, np.array([told[i] for i in range(len(requests))])


@pytest.mark.parametrize(("policy", "median"), [(FCFS, 0.1), (TIERLINE, 0.4)])
def test_predictions_are_near_what_happens(busy, policy, median, monkeypatch):
    run, told_s = predicted_s(busy, policy, monkeypatch)
    ttft_s = (column(run.requests, "first_ps") - column(run.requests, "arrival_ps")) / PS_PER_S
    error = np.abs(told_s - ttft_s) / ttft_s

    assert np.median(error) < median
    assert np.median(np.abs(ttft_s.mean() - ttft_s) / ttft_s) > 2 * median, (
        "control: the mean says little"
    )


def test_who_is_let_in_keeps_its_promise(busy):
    everybody = simulate(instance(), busy * 1, levels=LEVELS, policy=TIERLINE)
    policy = replace(TIERLINE, refuses=True)
    run = simulate(instance(), busy, levels=LEVELS, policy=policy)
    outcome = column(run.requests, "outcome")

    assert set(outcome.tolist()) == {FINISHED, REFUSED}
    kept = good_requests(run)[outcome == FINISHED].mean()
    assert kept > 0.96
    assert kept > good_requests(everybody).mean() + 0.02
    assert (outcome == REFUSED).mean() < 0.15


@pytest.mark.parametrize("repeats_max", [1, 3])
def test_answers_are_the_same_with_and_without_repeats(busy, repeats_max):
    policy = replace(TIERLINE, refuses=True)
    whole = simulate(instance(), busy[:200], levels=LEVELS, policy=policy)
    single = simulate(instance(), busy[:200], levels=LEVELS, policy=policy, repeats_max=repeats_max)

    assert all(getattr(whole.requests, n) == getattr(single.requests, n) for n in FIELDS)
