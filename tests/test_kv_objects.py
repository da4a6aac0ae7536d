"""Adapters and models move between tiers without ever overfilling one or leaving who uses them."""

from random import Random
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
from tierline.base.errors import DoesNotFitError, SpecError
from tierline.kv import objects
from tierline.kv.link import Link
from tierline.kv.objects import (
    ObjectStore,
    Resident,
    StoredObject,
    least_expected_loss,
    least_recently_used,
)
from tierline.kv.transfer import DEMAND, DEVICE, DRAM, NVME, REMOTE, Transfer

RATES = {DRAM: 50e9, NVME: 5e9, REMOTE: 0.5e9}


def reload_s(tier: int, size_bytes: int) -> float:
    return size_bytes / RATES[tier]


def adapter(name: str, size: int = 10, digest: str = "1") -> StoredObject:
    return StoredObject(name=name, digest=digest, kind="adapter", bytes=size)


class Machine:
    """A store with its movers: one link for each pair of tiers, and an event loop."""

    def __init__(self, capacities: tuple[int, int, int], **options: Any) -> None:
        self.store = ObjectStore(capacities, reload_s=reload_s, **options)
        self.links: dict[tuple[int, int], Link] = {}
        self.sent: list[Transfer] = []
        self.now_ps = 0

    def submit(self) -> None:
        for transfer in self.store.outbox:
            way = transfer.source, transfer.target
            slow = max(way) if min(way) == DEVICE or REMOTE in way else NVME
            link = self.links.setdefault(way, Link(str(way), bytes_per_s=int(RATES[slow])))
            link.advance(self.now_ps)
            link.submit(transfer, self.now_ps)
            self.sent.append(transfer)
        self.store.outbox.clear()

    def next_ps(self) -> int:
        return min((link.next_done_ps() for link in self.links.values()), default=FOREVER_PS)

    def advance(self, until_ps: int) -> None:
        self.submit()
        while (at := self.next_ps()) <= until_ps:
            self.now_ps = at
            for link in self.links.values():
                for transfer in link.advance(at):
                    self.store.landed(transfer)
            self.submit()
        if until_ps < FOREVER_PS:
            self.now_ps = max(self.now_ps, until_ps)

    def drain(self) -> None:
        self.submit()
        while (at := self.next_ps()) < FOREVER_PS:
            self.advance(at)

    def cancel(self, transfer: Transfer) -> None:
        self.submit()
        self.links[transfer.source, transfer.target].cancel(transfer, self.now_ps)
        self.store.cancelled(transfer)

    def bring(self, item: StoredObject) -> bool:
        """Wait until it is on the device; False when pins forbid."""
        for _ in range(20):
            waits = self.store.want(item, (DEMAND, 0))
            if not waits:
                return waits == []
            self.advance(self.next_ps_of(waits))
        raise AssertionError("asked twenty times in vain")

    def next_ps_of(self, waits: list[Transfer]) -> int:
        self.submit()
        assert all(transfer.state in ("queued", "moving") for transfer in waits)
        return self.next_ps()

    def use(self, item: StoredObject) -> None:
        assert self.bring(item)
        self.store.pin(item, self.now_ps)
        self.store.unpin(item)


SIZES = (3, 3, 4, 5, 5, 7, 9, 12)
ITEMS = [adapter(f"a{i}", size) for i, size in enumerate(SIZES)]


class StoreMachine(RuleBasedStateMachine):
    """Random wants, pins, forecasts, landings and failures."""

    @initialize(
        device=st.sampled_from([12, 20]),
        dram=st.sampled_from([0, 5, 15, 30]),
        nvme=st.sampled_from([0, 12, 40]),
        order=st.sampled_from([least_expected_loss, least_recently_used]),
    )
    def begin(self, device: int, dram: int, nvme: int, order: objects.Order) -> None:
        self.machine = Machine((device, dram, nvme), order=order)
        self.store = self.machine.store
        self.pins: dict[StoredObject, int] = {}
        self.best: dict[StoredObject, int] = {}  # the best tier of what is pinned

    def snapshot(self) -> Any:
        residents = self.store._residents.values()
        return (
            list(self.store.used_bytes),
            [(r.item, r.mask, r.pins, r.leaving, r.flight) for r in residents if r.mask],
            list(self.store._flights),
        )

    def movable_bytes(self) -> int:
        """Of the device: free, or could be once everything under way has ended."""
        held = [r for r in self.store._residents.values() if r.pins and r.mask & 1]
        held += [r for t, r in self.store._flights.items() if t.target == DEVICE and r.pins]
        return self.store.capacities_bytes[DEVICE] - sum(r.item.bytes for r in held)

    @rule(item=st.sampled_from(ITEMS), key=st.integers(0, 3))
    def want(self, item: StoredObject, key: int) -> None:
        self.machine.submit()
        before = self.snapshot()
        waits = self.store.want(item, (DEMAND, key))
        if waits is None:
            assert self.snapshot() == before
            assert not self.store.outbox
            # a copy that is being carried down cannot go, either
            going = [r for r in self.store._flights.values() if r.mask & 1 and not r.pins]
            assert self.movable_bytes() - sum(r.item.bytes for r in going) < item.bytes
        elif waits:
            assert all(t.state in ("queued", "moving") for t in waits)
        else:
            assert self.store.tier_of(item) == DEVICE

    @rule(item=st.sampled_from(ITEMS))
    def pin(self, item: StoredObject) -> None:
        self.store.pin(item, self.machine.now_ps)
        self.pins[item] = self.pins.get(item, 0) + 1
        self.best.setdefault(item, self.store.tier_of(item))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(sorted(self.pins, key=lambda i: i.name)))
        self.store.unpin(item)
        self.pins[item] -= 1
        if not self.pins[item]:
            del self.pins[item], self.best[item]

    @rule(rates=st.dictionaries(st.sampled_from(ITEMS), st.floats(0, 10), max_size=4))
    def expect(self, rates: dict[StoredObject, float]) -> None:
        begun = self.store.expect(rates, self.machine.now_ps)
        assert all(transfer.state == "queued" for transfer in begun)

    @rule(seconds=st.sampled_from([0, 1e-10, 1e-9, 1e-8, 100]))
    def wait(self, seconds: float) -> None:
        self.machine.advance(self.machine.now_ps + round(seconds * PS_PER_S))

    @precondition(lambda self: self.store._flights)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.machine.cancel(data.draw(st.sampled_from(list(self.store._flights))))

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check()  # INV-KV-8
        for item in self.best:
            now = self.store.tier_of(item)
            assert now <= self.best[item]  # INV-KV-9
            self.best[item] = now

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        while self.pins:
            item = next(iter(self.pins))
            self.store.unpin(item)
            self.pins[item] -= 1
            if not self.pins[item]:
                del self.pins[item]
        self.machine.drain()
        assert not self.store._flights
        assert {t.state for t in self.machine.sent} <= {"done", "cancelled"}
        for item in ITEMS:  # nothing is stuck: everything can still be had
            assert self.machine.bring(item)
        self.machine.drain()
        self.store.check()


SETTINGS = settings(max_examples=80, stateful_step_count=40, deadline=None)


class TestStore(StoreMachine.TestCase):
    settings = SETTINGS


# Controls


def pins_do_not_matter(store: ObjectStore, resident: Resident, tier: int) -> bool:
    return bool(resident.mask >> tier & 1) and resident.flight is None


def what_is_carried_may_go(store: ObjectStore, resident: Resident, tier: int) -> bool:
    return bool(resident.mask >> tier & 1) and not resident.pins


def there_is_always_room(store: ObjectStore, tier: int, size: int, **_: Any) -> list[Transfer]:
    return []


def cancelled_but_not_given_back(store: ObjectStore, transfer: Transfer) -> None:
    store._flights.pop(transfer).flight = None


def never_offered(store: ObjectStore, resident: Resident, *, moved: bool) -> None:
    """Nothing is put up for forgetting any more."""


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("_may_go", pins_do_not_matter),
        ("_may_go", what_is_carried_may_go),
        ("_room", there_is_always_room),
        ("cancelled", cancelled_but_not_given_back),
        ("_offer", never_offered),
    ],
)
def test_the_model_notices_a_mechanism_that_is_off(monkeypatch, name, broken):
    monkeypatch.setattr(ObjectStore, name, broken)

    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(
            StoreMachine,
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


def test_a_new_version_under_an_old_name_is_another_object():
    machine = Machine((100, 0, 0))
    old, new = adapter("a", digest="1"), adapter("a", digest="2")
    machine.bring(old)

    assert machine.store.tier_of(old) == DEVICE
    assert machine.store.tier_of(new) == REMOTE  # INV-KV-10
    assert machine.store.want(new, (DEMAND, 0)) != []
    with pytest.raises(SpecError, match="has no digest"):
        adapter("a", digest="")


def test_keyed_by_name_alone_a_new_version_would_be_the_old_one(monkeypatch):
    """Control of the test above: the store finds the wrong bytes, and says that it is a bug."""
    monkeypatch.setattr(StoredObject, "key", property(lambda item: item.name))
    machine = Machine((100, 0, 0))
    machine.bring(adapter("a", digest="1"))

    assert machine.store.tier_of(adapter("a", digest="2")) == DEVICE
    with pytest.raises(AssertionError, match="two objects"):
        machine.store.want(adapter("a", digest="2"), (DEMAND, 0))


def test_what_is_larger_than_the_device_is_refused_with_both_numbers():
    machine = Machine((100, 1000, 0))

    with pytest.raises(DoesNotFitError) as caught:
        machine.store.want(adapter("whale", 101), (DEMAND, 0))
    assert (caught.value.needed_bytes, caught.value.available_bytes) == (101, 100)


def test_what_leaves_sinks_a_tier_at_a_time_and_is_then_forgotten():
    machine = Machine((10, 10, 10))
    items = [adapter(name) for name in "abcd"]
    tiers = []
    for item in items:
        machine.use(item)
        machine.drain()
        machine.now_ps += PS_PER_S
        tiers.append([machine.store.tier_of(each) for each in items])

    assert tiers[1][:2] == [DRAM, DEVICE]
    assert tiers[2][2] == DEVICE
    assert tiers[3][3] == DEVICE
    assert sorted(tiers[3]) == [DEVICE, DRAM, NVME, REMOTE]


def test_a_copy_further_down_makes_room_at_once():
    machine = Machine((10, 50, 0))
    first, second = adapter("a"), adapter("b")
    machine.use(first)
    machine.use(second)  # first is carried down
    machine.use(first)  # second, too
    machine.drain()
    (load,) = machine.store.want(second, (DEMAND, 0)) or []

    assert (load.source, load.target) == (DRAM, DEVICE)
    assert machine.store.tier_of(first) == DRAM
    assert machine.store.outbox == [load]


def test_what_is_wanted_while_it_leaves_stays():
    machine = Machine((10, 50, 0))
    first, second = adapter("a"), adapter("b")
    machine.use(first)
    (demotion,) = machine.store.want(second, (DEMAND, 0)) or []

    assert demotion.kind == "demote"
    assert machine.store.want(first, (DEMAND, 0)) == []
    machine.drain()
    assert machine.store.tier_of(first) == DEVICE
    assert machine.store.want(second, (DEMAND, 0)) == machine.store.outbox  # now at once


def test_pinned_objects_fill_the_device_until_one_is_let_go():
    machine = Machine((20, 0, 0))
    a, b, c = (adapter(name) for name in "abc")
    for item in (a, b):
        machine.bring(item)
        machine.store.pin(item, machine.now_ps)

    assert machine.store.want(c, (DEMAND, 0)) is None
    machine.store.unpin(a)
    assert machine.bring(c)
    assert machine.store.tier_of(a) == REMOTE
    assert machine.store.tier_of(b) == DEVICE


def test_the_object_with_the_smallest_expected_loss_goes():
    """Small and often used stays, though it was not used for longest."""
    machine = Machine((30, 0, 0))
    often, once = adapter("often"), adapter("once", 20)
    for _ in range(5):
        machine.use(often)
        machine.now_ps += PS_PER_S
    machine.use(once)
    machine.bring(adapter("new"))

    assert machine.store.tier_of(often) == DEVICE
    assert machine.store.tier_of(once) == REMOTE

    lru = Machine((30, 0, 0), order=least_recently_used)
    for item in (often, once):
        lru.use(item)
        lru.now_ps += PS_PER_S
    lru.bring(adapter("new"))

    assert lru.store.tier_of(often) == REMOTE
    assert lru.store.tier_of(once) == DEVICE


def test_a_use_long_ago_counts_less():
    machine = Machine((20, 0, 0), tau_s=10)
    old, young = adapter("old"), adapter("young")
    for _ in range(3):
        machine.use(old)
    machine.now_ps += 100 * PS_PER_S
    machine.use(young)
    machine.bring(adapter("new"))

    assert machine.store.tier_of(old) == REMOTE
    assert machine.store.tier_of(young) == DEVICE


def test_a_forecast_warms_what_will_be_hot_and_leaves_the_cold():
    machine = Machine((10, 20, 100))
    hot, warm, cold = (adapter(name) for name in ("hot", "warm", "cold"))
    machine.use(cold)
    for _ in range(3):  # what makes room must have left before another may come
        machine.store.expect({cold: 0.0, warm: 0.1, hot: 5.0}, machine.now_ps)
        machine.drain()

    assert machine.store.tier_of(hot) == DEVICE
    assert machine.store.tier_of(warm) == DRAM
    assert machine.store.tier_of(cold) == NVME
    assert machine.store.want(hot, (DEMAND, 0)) == []


def test_a_forecast_does_not_displace_what_is_worth_more():
    machine = Machine((10, 0, 0))
    busy, rumour = adapter("busy"), adapter("rumour")
    for _ in range(20):
        machine.use(busy)
    begun = machine.store.expect({rumour: 1e-6}, machine.now_ps)

    assert begun == []
    assert machine.store.tier_of(busy) == DEVICE


def seconds_to_load(order: objects.Order, rng: Random) -> float:
    """Adapters of three sizes, popular as 1/rank and drifting; seconds that requests wait."""
    items = [adapter(f"a{i}", (40, 100, 300)[i % 3] * 10**6) for i in range(120)]
    weights = [1 / (1 + i) for i in range(120)]
    capacities = 2 * 10**9, 3 * 10**9, 5 * 10**9
    machine = Machine(capacities, order=order, tau_s=300)
    waited_s = 0.0
    for number in range(3000):
        if number == 1500:
            rng.shuffle(items)
        (item,) = rng.choices(items, weights)
        waited_s += machine.store.reload_s(item)
        machine.use(item)
        machine.drain()
        machine.now_ps += round(rng.expovariate(1.0) * PS_PER_S)
    machine.store.check()
    return waited_s


def test_expected_loss_waits_less_than_least_recently_used():
    loss_s, lru_s = (
        sum(seconds_to_load(order, Random(seed)) for seed in range(3))
        for order in (least_expected_loss, least_recently_used)
    )

    assert loss_s < 0.95 * lru_s


def test_an_estimate_without_penalties_loses_that_advantage(monkeypatch):
    """Control: with every object worth the same, the order is no better than the baseline."""
    lru_s = seconds_to_load(least_recently_used, Random(0))
    monkeypatch.setattr(ObjectStore, "_worth", lambda *_: 0)

    assert seconds_to_load(least_expected_loss, Random(0)) > lru_s
