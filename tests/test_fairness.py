"""Tenants that wait receive tokens by their weights, a debt is bounded, and nobody saves up."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tierline.scheduling.fairness import FairShare

WEIGHTS = {"a": 1, "b": 2, "c": 3}
DEBT_MAX = 50


# --- against the simplest thing that could be right -----------------------------------------


class FairShareMachine(RuleBasedStateMachine):
    """Fractions, and a minimum over everybody at every question."""

    def __init__(self) -> None:
        super().__init__()
        self.fair = FairShare(WEIGHTS, debt_max_tokens=DEBT_MAX)
        self.level = Fraction(0)
        self.received = dict.fromkeys("abcd", Fraction(0))
        self.queued = dict.fromkeys("abcd", Fraction(0))

    def rise(self) -> None:
        waiting = [self.received[t] for t, q in self.queued.items() if q]
        assert not waiting or min(waiting) >= self.level
        self.level = min(waiting, default=self.level)

    def take(self, tenant: str, virtual: Fraction) -> None:
        self.queued[tenant] = max(self.queued[tenant] - virtual, Fraction(0))
        if not any(self.queued.values()):
            self.level = max(self.level, *self.received.values())
            self.received = dict.fromkeys("abcd", self.level)
        self.rise()

    @rule(tenant=st.sampled_from("abcd"), tokens=st.integers(0, 60))
    def charge(self, tenant: str, tokens: int) -> None:
        self.fair.charge(tenant, tokens)
        if tokens:
            received = max(self.received[tenant], self.level)
            self.received[tenant] = min(received, self.level + DEBT_MAX)
            self.queued[tenant] += Fraction(tokens, WEIGHTS.get(tenant, 1))
            self.rise()

    @precondition(lambda self: any(self.queued.values()))
    @rule(data=st.data(), tokens=st.integers(0, 40))
    def serve(self, data: st.DataObject, tokens: int) -> None:
        tenant = data.draw(st.sampled_from([t for t, q in self.queued.items() if q]))
        self.fair.serve(tenant, tokens)
        virtual = Fraction(tokens, WEIGHTS.get(tenant, 1))
        self.received[tenant] += virtual
        self.take(tenant, virtual)

    @precondition(lambda self: any(self.queued.values()))
    @rule(data=st.data(), tokens=st.integers(1, 40))
    def refund(self, data: st.DataObject, tokens: int) -> None:
        tenant = data.draw(st.sampled_from([t for t, q in self.queued.items() if q]))
        self.fair.refund(tenant, tokens)
        self.take(tenant, Fraction(tokens, WEIGHTS.get(tenant, 1)))

    @invariant()
    def agree(self) -> None:
        self.fair.check()
        assert self.fair.level_tokens == int(self.level)
        for tenant, received in self.received.items():
            lag = max(received - self.level, Fraction(0)) + self.queued[tenant]
            assert self.fair.lag_tokens(tenant) == int(min(lag, Fraction(DEBT_MAX)))


TestFairShare = FairShareMachine.TestCase


def test_the_checker_can_fail() -> None:
    """Negative control: a level above somebody who waits is found."""
    fair = FairShare(WEIGHTS, debt_max_tokens=DEBT_MAX)
    fair.charge("a", 10)
    fair._level = 11 * 6

    with pytest.raises(AssertionError, match="passed one who waits"):
        fair.check()


# --- what a reader would ask ----------------------------------------------------------------


def test_a_queue_of_ones_own_stands_back_by_weight() -> None:
    fair = FairShare({"gold": 4}, debt_max_tokens=10_000)
    for tenant in ("gold", "plain"):
        fair.charge(tenant, 1000)

    assert fair.lag_tokens("gold") == 250
    assert fair.lag_tokens("plain") == 1000
    assert fair.lag_tokens("newcomer") == 0


def test_an_idle_tenant_saves_nothing_up() -> None:
    fair = FairShare({}, debt_max_tokens=10_000)
    fair.charge("busy", 9000)
    fair.serve("busy", 8000)  # alone all that time
    fair.charge("back", 500)  # as if it had been there

    assert fair.lag_tokens("back") == 500
    assert fair.lag_tokens("busy") == 1000  # and not 9,000: nobody was wronged


def test_what_was_received_before_others_is_a_debt_and_bounded() -> None:
    fair = FairShare({}, debt_max_tokens=700)
    fair.charge("a", 5000)
    fair.charge("b", 5000)
    fair.serve("a", 600)  # its class was more urgent
    fair.refund("a", 4400)  # it leaves in debt

    assert fair.lag_tokens("a") == 600
    fair.serve("b", 400)
    assert fair.lag_tokens("a") == 200  # b has caught up by so much
    fair.serve("b", 400)
    assert fair.lag_tokens("a") == 0
    fair.charge("a", 5000)
    assert fair.lag_tokens("a") == 700  # never more


def test_forgotten_tenants_take_no_memory() -> None:
    fair = FairShare({}, debt_max_tokens=700)
    fair.charge("always", 10**9)
    for i in range(5000):
        fair.charge(f"user-{i}", 10)
        fair.serve(f"user-{i}", 10)
        fair.serve("always", 10)
        fair.lag_tokens("always")

    assert len(fair._received) < 10
    assert len(fair._least) < 10


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), max_size=20))
def test_many_small_servings_are_one_large(servings: list[tuple[str, int]]) -> None:
    """So that repeated steps may be accounted at once."""
    one, many = (FairShare(WEIGHTS, debt_max_tokens=DEBT_MAX) for _ in range(2))
    for fair in (one, many):
        for tenant in "abc":
            fair.charge(tenant, 10_000)
    for tenant, tokens in servings:
        for _ in range(tokens):
            many.serve(tenant, 1)
    for tenant in "abc":
        one.serve(tenant, sum(tokens for t, tokens in servings if t == tenant))

    for tenant in "abcd":
        assert one.lag_tokens(tenant) == many.lag_tokens(tenant)
    assert one.level_tokens == many.level_tokens


# --- the bound ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Load:
    """Each tenant keeps `waiting` requests in the queue, of the sizes in turn."""

    waiting: dict[str, int]
    sizes: dict[str, list[int]]


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=5)
loads = st.builds(
    Load,
    waiting=st.fixed_dictionaries({t: st.integers(1, 5) for t in "abc"}),
    sizes=st.fixed_dictionaries(dict.fromkeys("abc", sizes)),
)
DEBT_ENOUGH = 5 * 40  # more than anybody has waiting


def served(load: Load, fair: FairShare, *, rounds: int = 200) -> list[dict[str, int]]:
    """What each tenant has received after each request, served in order of level + lag.

    Every tenant always waits: it sends another request whenever one of its own begins.
    """
    sent = dict.fromkeys(load.sizes, 0)
    queue: list[tuple[int, int, str, int]] = []
    received = dict.fromkeys(load.sizes, 0)
    history = [dict(received)]

    def send(tenant: str) -> None:
        tokens = load.sizes[tenant][sent[tenant] % len(load.sizes[tenant])]
        sent[tenant] += 1
        place = fair.level_tokens + fair.lag_tokens(tenant)
        fair.charge(tenant, tokens)
        heapq.heappush(queue, (place, sum(sent.values()), tenant, tokens))

    for tenant, count in load.waiting.items():
        for _ in range(count):
            send(tenant)
    for _ in range(rounds):
        _, _, tenant, tokens = heapq.heappop(queue)
        send(tenant)
        fair.serve(tenant, tokens)
        received[tenant] += tokens
        history.append(dict(received))
    return history


def widest(history: list[dict[str, int]], one: str, other: str) -> Fraction:
    """The largest difference in weighted tokens between two tenants, over any interval."""
    gaps = [Fraction(r[one], WEIGHTS[one]) - Fraction(r[other], WEIGHTS[other]) for r in history]
    return max(gaps) - min(gaps)


def bound(load: Load, one: str, other: str) -> Fraction:
    """One largest request of each, over its weight; places are whole tokens, hence the two."""
    return sum((Fraction(max(load.sizes[t]), WEIGHTS[t]) for t in (one, other)), Fraction(2))


@given(loads)
def test_two_tenants_that_wait_receive_by_weight(load: Load) -> None:
    history = served(load, FairShare(WEIGHTS, debt_max_tokens=DEBT_ENOUGH))

    for one, other in ("ab", "ac", "bc"):
        assert widest(history, one, other) <= bound(load, one, other)


class Uncharged(FairShare):
    """Does not know who asks for how much."""

    def charge(self, tenant: str, tokens: int) -> None:
        """Nothing."""

    def serve(self, tenant: str, tokens: int) -> None:
        """Nothing."""


class Forgetful(FairShare):
    """Charges what waits and forgets what was received."""

    def serve(self, tenant: str, tokens: int) -> None:
        self.refund(tenant, tokens)


GREEDY = Load(waiting={"a": 5, "b": 1, "c": 1}, sizes={"a": [40], "b": [20], "c": [20]})


@pytest.mark.parametrize(
    ("share", "holds"), [(FairShare, True), (Uncharged, False), (Forgetful, False)]
)
def test_the_bound_needs_charging(share: Callable[..., FairShare], holds: bool) -> None:
    """Negative control: one tenant sends more and larger requests than its share."""
    history = served(GREEDY, share(WEIGHTS, debt_max_tokens=DEBT_ENOUGH))
    kept = all(widest(history, x, y) <= bound(GREEDY, x, y) for x, y in ("ab", "ac", "bc"))

    assert kept == holds


@pytest.mark.parametrize("debt_max_tokens", [100, 1000])
def test_a_flood_delays_its_owner_by_the_debt_and_no_longer(debt_max_tokens: int) -> None:
    """The starvation bound of whoever floods: its place is never further back than its debt."""
    fair = FairShare({}, debt_max_tokens=debt_max_tokens)
    lags = []
    for _ in range(500):
        lags.append(fair.lag_tokens("flood"))
        fair.charge("flood", 10)

    assert lags == [min(10 * i, debt_max_tokens) for i in range(500)]
