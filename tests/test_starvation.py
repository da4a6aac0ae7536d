"""Nobody starves: who waits in a lane with a floor enters within a bound of tokens admitted.

INV-SCHED-1 and -2, on lanes alone under any sequence of arrivals and admissions, and on a
scheduler under a flood of requests that can be on time.
"""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deciding import drive, request, scheduler_of
from tierline.base.clock import PS_PER_S
from tierline.scheduling.policy import TIERLINE, Policy
from tierline.scheduling.queue import WaitingLine
from tierline.scheduling.sequence import BACKGROUND, LATE, ON_TIME, Sequence

FLOORS = (0, 5, 2)
LARGEST = 1000


class Watched:
    """A waiting line, and how far each lane is behind its floor since it began to wait."""

    def __init__(self, policy: Policy, floors: tuple[int, int, int]) -> None:
        self.line, self.floors = WaitingLine(policy), floors
        self.waiting = {ON_TIME: 0, BACKGROUND: 0, LATE: 0}
        self.lead: dict[int, list[int]] = {}  # lane -> [100 S - f T, the most it was]
        self.behind = 0.0  # the most that a lane fell behind its floor, in tokens

    def push(self, sequence: Sequence) -> None:
        lane = sequence.band
        if not self.waiting[lane]:
            self.lead[lane] = [0, 0]
        self.waiting[lane] += 1
        self.line.push(sequence)

    def take(self, tokens: int) -> None:
        head = self.line.head()
        if head is None:
            return
        lane = next(i for i, heap in enumerate(self.line._lanes) if heap is self.line._from)
        self.line.take(head, tokens)
        self.waiting[lane] -= 1
        for other, floor in enumerate(self.floors):
            if floor and self.waiting[other] + (other == lane):
                lead = self.lead[other]
                lead[0] += 100 * tokens * (other == lane) - floor * tokens
                self.behind = max(self.behind, (lead[1] - lead[0]) / 100)
                lead[1] = max(lead[1], lead[0])


moves = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from((ON_TIME, BACKGROUND, LATE))),
        st.tuples(st.just("take"), st.integers(1, LARGEST)),
        st.tuples(st.just("flood"), st.integers(1, 60)),
    ),
    max_size=120,
)


def furthest_behind(
    moves: list[tuple[str, int]], policy: Policy, floors: tuple[int, int, int] = FLOORS
) -> float:
    watched = Watched(policy, floors)
    number = 0
    for what, value in moves:
        if what == "take":
            watched.take(value)
            continue
        for _ in range(value if what == "flood" else 1):
            sequence = request(number, 10, 10, at_ps=number)
            sequence.band = ON_TIME if what == "flood" else value
            sequence.key = number
            watched.push(sequence)
            number += 1
            if what == "flood":
                watched.take(LARGEST)
    return watched.behind


@given(moves, st.sampled_from((FLOORS, (0, 20, 10), (0, 1, 33), (0, 33, 33))))
def test_a_lane_that_waits_has_its_floor_less_two_requests(moves, floors):
    policy = replace(TIERLINE, floors_percent=floors)

    assert furthest_behind(moves, policy, floors) <= 2 * LARGEST


def test_without_floors_a_lane_falls_behind_without_end():
    """Control: late work waits while a thousand others come and go."""
    moves = [("push", LATE), *[("push", ON_TIME)] * 3, *[("flood", 60)] * 40]

    off = replace(TIERLINE, floors_percent=(0, 0, 0))
    assert furthest_behind(moves, off) > 10 * LARGEST
    assert furthest_behind(moves, replace(TIERLINE, floors_percent=FLOORS)) <= 2 * LARGEST


def test_what_a_lane_was_served_beyond_its_floor_is_not_held_against_it():
    """A long quiet time serves the background alone; then a flood begins."""
    quiet = [move for _ in range(300) for move in (("push", BACKGROUND), ("take", LARGEST))]
    flood = [("push", BACKGROUND), *[("push", ON_TIME)] * 3, *[("flood", 60)] * 3]

    assert furthest_behind(quiet + flood, replace(TIERLINE, floors_percent=FLOORS)) <= 2 * LARGEST


# --- the scheduler ---------------------------------------------------------------------------


class Noting(WaitingLine):
    """Remembers what was admitted while somebody waited."""

    def __init__(self, policy: Policy, patient: Sequence) -> None:
        super().__init__(policy)
        self.patient = patient
        self.tokens = self.ahead = self.largest = 0

    def take(self, head, tokens):
        self.largest = max(self.largest, tokens)
        band = self.patient.band
        waits = band >= 0 and any(e[3] is self.patient for e in self._lanes[band].heap)
        if waits and head[3] is not self.patient:
            self.tokens += tokens
            self.ahead += tokens if self._from is self._lanes[band] else 0
        super().take(head, tokens)


def admitted_before(policy: Policy, patient: Sequence) -> Noting:
    """What was admitted before `patient` under twice the load that can be on time."""
    rng, requests, at_ps = Random(7), [patient], 0
    while at_ps < 40 * PS_PER_S:
        at_ps += int(rng.expovariate(60) * PS_PER_S)
        prompt = rng.randrange(50, 400)
        requests.append(request(len(requests), prompt, 5, at_ps=at_ps, ttft_ps=PS_PER_S))
    scheduler = scheduler_of(policy, slots=32, blocks=4000)
    queue = scheduler.queue = Noting(policy, patient)
    drive(scheduler, sorted(requests, key=lambda s: s.arrival_ps), steps_max=600)
    return queue


@pytest.mark.parametrize(
    ("lane", "patient"),
    [
        (BACKGROUND, request(0, 400, 20, at_ps=3 * PS_PER_S, ttft_ps=3600 * PS_PER_S)),
        (LATE, request(0, 3000, 5, at_ps=3 * PS_PER_S, ttft_ps=PS_PER_S // 100)),
    ],
    ids=["background", "late"],
)
def test_who_waits_enters_within_the_bound(lane, patient):
    floors = (0, 20, 20)  # so that forty seconds are enough
    served = admitted_before(replace(TIERLINE, floors_percent=floors), waits := patient.anew())
    bound = (served.ahead + 2 * served.largest) * 100 / floors[lane]

    assert waits.admitted_ps >= 0, "it entered"
    assert 0 < served.tokens <= bound
    off = replace(TIERLINE, floors_percent=(0, 0, 0))
    control = admitted_before(off, starves := patient.anew())
    assert starves.admitted_ps < 0, "it still waits when the flood has not ended"
    assert control.tokens > (control.ahead + 2 * control.largest) * 100 / floors[lane]
