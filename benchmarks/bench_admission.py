"""May every newcomer be told when its first token would come?

Question   how long does one answer take with 10,000 waiting?
Budget     50 us at the median, 0.25 % of a 20 ms step.
Baseline   a walk over all that wait, which adds up who goes first, in the same run.
Method     2,000 answers for newcomers of three classes, between two steps of the standing queue
           of `bench_schedule`: a 70B on four H100 with some 200 streams. How near answers are
           to what happens is tested in tests/test_admission.py.
"""

import json
import platform
import statistics
import time
from random import Random

from bench_schedule import Standing
from tierline.base.clock import PS_PER_S
from tierline.scheduling.admission import Admission
from tierline.scheduling.policy import TIERLINE
from tierline.scheduling.sequence import Sequence

BUDGET_US, ANSWERS, STEPS = 50.0, 2000, 300
TTFT_S = (1, 5, 600)


def newcomer(number: int, now_ps: int, rng: Random) -> Sequence:
    return Sequence(
        10**6 + number,
        arrival_ps=now_ps,
        prompt_tokens=rng.randrange(200, 1800),
        output_max_tokens=200,
        due_ps=now_ps + rng.choice(TTFT_S) * PS_PER_S,
    )


def main() -> None:
    standing, rng = Standing(TIERLINE), Random(5)
    scheduler = standing.scheduler
    for _ in range(STEPS):
        step = scheduler.next_step(standing.now_ps, 1)
        ended = standing.ended(step)
        scheduler.complete(step, 1, ended, standing.now_ps)
    admission = Admission(scheduler)
    asked_us, walked_us = [], []
    for number in range(ANSWERS):
        s = newcomer(number, standing.now_ps, rng)
        start_ns = time.perf_counter_ns()
        admission.answer(s, standing.now_ps)
        asked_us.append((time.perf_counter_ns() - start_ns) / 1e3)
        admission.forget(s)
        if number % 20 == 0:
            start_ns = time.perf_counter_ns()
            place = s.band, s.key
            sum(w.prompt_tokens for w in scheduler.queue.everybody() if (w.band, w.key) <= place)
            walked_us.append((time.perf_counter_ns() - start_ns) / 1e3)
    median_us = statistics.median(asked_us)
    print(
        json.dumps(
            {
                "benchmark": "admission",
                "waiting": scheduler.queue.waiting,
                "decoding": len(scheduler.decoding),
                "median_us": round(median_us, 1),
                "p99_us": round(statistics.quantiles(asked_us, n=100)[98], 1),
                "walk_us": round(statistics.median(walked_us), 1),
                "budget_us": BUDGET_US,
                "within_budget": median_us <= BUDGET_US,
                "python": platform.python_version(),
            }
        )
    )


if __name__ == "__main__":
    main()
