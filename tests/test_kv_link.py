"""A link carries the most urgent bytes first, and every byte exactly once.

The reference is a link that is looked at every picosecond.
"""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tierline.base.clock import FOREVER_PS, PS_PER_S
from tierline.kv.link import Link
from tierline.kv.transfer import BACKGROUND, DEMAND, DEVICE, DRAM, PREFETCH, Transfer


def moving(size: int, urgency: tuple[int, int] = (DEMAND, 0), serial: int = 0) -> Transfer:
    return Transfer("load", source=DRAM, target=DEVICE, bytes=size, urgency=urgency, serial=serial)


class EveryPicosecond:
    """The same link, without an idea: at each tick the most urgent transfer gets the tick."""

    def __init__(self, rate: Fraction, latency: int) -> None:
        self.full = self.rate = rate  # bytes per picosecond
        self.latency = latency
        self.waiting: list[dict[str, Any]] = []
        self.current: dict[str, Any] | None = None
        self.ended: list[tuple[Transfer, int]] = []
        self.now = 0

    def submit(self, transfer: Transfer) -> None:
        self.waiting.append({"t": transfer, "wait": self.latency, "left": Fraction(transfer.bytes)})

    def at_end(self, load: dict[str, Any]) -> bool:
        return not load["wait"] and not load["left"]

    def choose(self) -> dict[str, Any] | None:
        if self.current in self.waiting and self.at_end(self.current):
            return self.current
        key = [(*w["t"].urgency, w["t"].serial, i) for i, w in enumerate(self.waiting)]
        return self.waiting[key.index(min(key))] if key else None

    def settle(self) -> None:
        """What has nothing left ends now, and the next may end at once, too."""
        while (load := self.choose()) and self.at_end(load):
            self.waiting.remove(load)
            self.ended.append((load["t"], self.now))

    def tick(self) -> None:
        self.settle()
        self.current = load = self.choose()
        self.now += 1
        if load and load["wait"]:
            load["wait"] -= 1
        elif load:
            load["left"] = max(load["left"] - self.rate, Fraction(0))
        if load and self.at_end(load):
            self.waiting.remove(load)
            self.ended.append((load["t"], self.now))


class LinkMachine(RuleBasedStateMachine):
    """Submit, hasten, cancel, change the rate and let time pass; both links must agree."""

    @initialize(per_ps=st.sampled_from([(1, 1), (3, 2), (1, 4), (7, 5)]), wait=st.integers(0, 3))
    def begin(self, per_ps: tuple[int, int], wait: int) -> None:
        rate, shared = per_ps
        self.link = Link("test", bytes_per_s=rate * PS_PER_S, latency_ps=wait, shared_by=shared)
        self.reference = EveryPicosecond(Fraction(rate, shared), wait)
        self.sent: list[Transfer] = []
        self.ended: list[tuple[Transfer, int]] = []
        self.expected: list[tuple[Transfer, int]] = []

    @rule(size=st.integers(1, 12), kind=st.sampled_from([0, 1, 2]), key=st.integers(0, 3))
    def submit(self, size: int, kind: int, key: int) -> None:
        transfer = moving(size, (kind, key), serial=len(self.sent))
        self.sent.append(transfer)
        self.link.submit(transfer, self.reference.now)
        self.reference.submit(transfer)

    @precondition(lambda self: self.link.transfers)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        transfer = data.draw(st.sampled_from(self.link.transfers))
        self.link.cancel(transfer, self.reference.now)
        self.reference.waiting = [w for w in self.reference.waiting if w["t"] is not transfer]
        self.expected.append((transfer, -1))
        self.ended.append((transfer, -1))

    @precondition(lambda self: self.link.transfers)
    @rule(data=st.data(), key=st.integers(0, 3))
    def hasten(self, data: st.DataObject, key: int) -> None:
        transfer = data.draw(st.sampled_from(self.link.transfers))
        self.link.hasten(transfer, (DEMAND, key), self.reference.now)

    @rule(factor=st.sampled_from([0, 0.25, 0.5, 1]))
    def clog(self, factor: float) -> None:
        self.link.set_rate(factor, self.reference.now)
        self.reference.rate = self.reference.full * Fraction(factor)

    @rule(picoseconds=st.integers(0, 40))
    def wait(self, picoseconds: int) -> None:
        end = self.reference.now + picoseconds
        while self.reference.now < end:
            self.reference.tick()
        self.reference.settle()
        while (due := self.link.next_done_ps()) <= end:  # as an event loop does
            done = self.link.advance(due)
            assert done
            self.ended += [(transfer, due) for transfer in done]
        assert self.link.advance(end) == []
        self.expected += self.reference.ended
        self.reference.ended = []
        assert self.ended == self.expected

    @invariant()
    def accounted(self) -> None:
        self.link.check()
        over = [transfer for transfer, _ in self.ended]
        assert len(over) == len(set(over))
        assert set(over) | set(self.link.transfers) == set(self.sent)  # INV-KV-6
        for transfer, instant in self.ended:
            assert transfer.state == ("cancelled" if instant < 0 else "done")
        done = sum(t.bytes for t in over if t.state == "done")
        assert self.link.bytes_done == done  # INV-KV-7

    def teardown(self) -> None:
        if hasattr(self, "link"):
            self.clog(1)
            self.wait(5 * sum(t.bytes for t in self.sent) + 4 * len(self.sent))
            assert not self.link.transfers


SETTINGS = settings(max_examples=80, stateful_step_count=30, deadline=None)


class TestLink(LinkMachine.TestCase):
    settings = SETTINGS


# Controls


def start_the_first_submitted(link: Link) -> None:
    link._moving = next(iter(link._loads.values()), None)
    if link._moving:
        link._moving.transfer.state = "moving"
    link._expect()


def never_pause(link: Link, load: Any) -> None:
    link._loads[load.transfer] = load
    link._heap.append((load.order, load))
    if link._moving is None:
        link._start()


ENTER = Link._enter


def start_again_after_a_pause(link: Link, load: Any) -> None:
    paused = link._moving
    ENTER(link, load)
    if paused is not None and link._moving is not paused:
        link._work_lost += paused.transfer.bytes * link._work_per_byte - paused.work_left
        paused.work_left = paused.transfer.bytes * link._work_per_byte


def pay_latency_again(link: Link, load: Any) -> None:
    paused = link._moving
    ENTER(link, load)
    if paused is not None and link._moving is not paused:
        paused.latency_left_ps = link._latency_ps


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("_start", start_the_first_submitted),
        ("_enter", never_pause),
        ("_enter", start_again_after_a_pause),
        ("_enter", pay_latency_again),
    ],
)
def test_the_reference_notices_a_mechanism_that_is_off(monkeypatch, name, broken):
    monkeypatch.setattr(Link, name, broken)

    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            LinkMachine,
            settings=settings(
                SETTINGS,
                max_examples=300,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
            ),
        )


# The cases that a reader would ask about

MS = PS_PER_S // 1000
R70_4K_BYTES = 4000 * 327_680


@pytest.mark.parametrize(
    ("bytes_per_s", "milliseconds"),
    [
        (1_250_000_000, 1048.6),
        (3_125_000_000, 419.4),
        (12_500_000_000, 104.9),
        (50_000_000_000, 26.2),
        (450_000_000_000, 2.9),
    ],
)
def test_a_transfer_alone_takes_bytes_over_rate(bytes_per_s, milliseconds):
    link = Link("wire", bytes_per_s=bytes_per_s)
    link.submit(moving(R70_4K_BYTES), 0)

    assert link.next_done_ps() == -(-R70_4K_BYTES * PS_PER_S // bytes_per_s)
    assert link.next_done_ps() / MS == pytest.approx(milliseconds, abs=0.05)
    assert link.duration_ps(R70_4K_BYTES) == link.next_done_ps()


def test_a_demand_pauses_a_prefetch_which_goes_on_where_it_was():
    link = Link("pcie", bytes_per_s=PS_PER_S, latency_ps=5)
    prefetch, demand = moving(100, (PREFETCH, 0)), moving(10, (DEMAND, 0))
    link.submit(prefetch, 0)
    link.submit(demand, 45)

    assert (prefetch.state, demand.state) == ("queued", "moving")
    assert link.next_done_ps() == 45 + 5 + 10
    assert link.advance(60) == [demand]
    assert link.next_done_ps() == 105 + 15  # it lost the demand's 15 and nothing else
    assert link.advance(120) == [prefetch]


def test_the_earlier_deadline_goes_first_and_write_back_last():
    link = Link("nvme", bytes_per_s=PS_PER_S)
    back, late, soon = (
        moving(10, (BACKGROUND, 0)),
        moving(10, (DEMAND, 900)),
        moving(10, (DEMAND, 100)),
    )
    for transfer in (back, late, soon):
        link.submit(transfer, 0)

    assert link.transfers == [soon, late, back]
    assert link.backlog_ps((DEMAND, 50)) == 0
    assert link.backlog_ps((DEMAND, 100)) == 10
    assert link.backlog_ps((PREFETCH, 0)) == 20
    assert link.backlog_ps((BACKGROUND, 9)) == 30
    assert link.advance(100) == [soon, late, back]


def test_a_prefetch_that_somebody_now_waits_for_moves_up():
    link = Link("nvme", bytes_per_s=PS_PER_S)
    first, second = moving(50, (PREFETCH, 0)), moving(10, (PREFETCH, 1))
    link.submit(first, 0)
    link.submit(second, 0)
    link.hasten(second, (DEMAND, 7), 20)
    link.hasten(second, (BACKGROUND, 0), 20)  # never down

    assert second.urgency == (DEMAND, 7)
    assert link.advance(60) == [second, first]


def test_a_dead_link_ends_nothing_and_goes_on_when_it_is_well():
    link = Link("disk", bytes_per_s=PS_PER_S)
    transfer = moving(10)
    link.submit(transfer, 0)
    link.set_rate(0, 4)

    assert link.next_done_ps() == FOREVER_PS
    assert link.duration_ps(1) == link.backlog_ps((DEMAND, 0)) == FOREVER_PS
    assert link.advance(1000) == []
    link.set_rate(0.5, 1000)
    assert link.next_done_ps() == 1012
    assert link.advance(1012) == [transfer]


def test_what_ends_at_this_instant_is_not_paused_any_more():
    link = Link("pcie", bytes_per_s=PS_PER_S)
    prefetch, demand = moving(10, (PREFETCH, 0)), moving(10, (DEMAND, 0))
    link.submit(prefetch, 0)
    link.submit(demand, 10)

    assert link.advance(10) == [prefetch]
    assert link.advance(20) == [demand]


def test_time_does_not_run_backwards_and_ends_are_not_skipped():
    link = Link("pcie", bytes_per_s=PS_PER_S)
    link.submit(moving(10), 5)

    with pytest.raises(AssertionError, match="backwards"):
        link.submit(moving(1), 4)
    with pytest.raises(AssertionError, match="advance first"):
        link.submit(moving(1), 16)
