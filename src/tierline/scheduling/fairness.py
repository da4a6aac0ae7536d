"""Tenants share a replica by weighted tokens, and a debt is bounded.

The scheduler charges a request when it enters the queue, reports what was computed for whom,
and refunds what never will be.  In return it learns how far the tenant's next request must
stand back, `lag_tokens`, and turns that into a delay of its virtual deadline, fixed at once:
a heap stays sorted while time passes.

    received    tokens computed for a tenant, over its weight
    level       what the least served of those who wait has received
    lag         received - level + own queue over weight: how much the level must rise
                before a fair server would begin this request

That is start-time fair queueing, with the level taken from what was really computed, because
classes and deadlines may have ordered otherwise.  A tenant without requests saves nothing up:
it comes back at the level.  What was received above the level is a debt; it is remembered up
to `debt_max_tokens`, and a lag is never more, so a flood delays its owner by a known amount
and no longer.  Whole numbers throughout: a virtual token is cut into as many units as the
least common multiple of the weights.

Invariants
    INV-SCHED-43  a lag lies in [0, debt_max_tokens], and the level never falls
    INV-SCHED-44  serving in order of level + lag, two tenants that both always wait receive,
                  over their weights, amounts that differ by no more than one largest request
                  of each, as long as neither has more than debt_max_tokens waiting
"""

import heapq
from collections.abc import Mapping
from math import lcm


class FairShare:
    """The only owner of "who has received how much"."""

    __slots__ = (
        "_debt_max",
        "_entered",
        "_least",
        "_level",
        "_queued",
        "_received",
        "_unit",
        "_weights",
    )

    def __init__(self, weights: Mapping[str, int], *, debt_max_tokens: int) -> None:
        assert debt_max_tokens > 0
        assert all(weight > 0 for weight in weights.values())
        self._weights = dict(weights)  # a tenant that is not listed weighs 1
        self._unit = lcm(*weights.values())  # units of a virtual token
        self._debt_max = debt_max_tokens * self._unit
        self._level = 0
        self._queued: dict[str, int] = {}  # charged and not yet computed; only who waits
        self._received: dict[str, int] = {}  # who waits, and who left in debt
        # A heap with one entry for each of those, never above what it has received, so that
        # it needs no care when that grows; an entry that is not in `_entered` is void.
        self._least: list[tuple[int, str]] = []
        self._entered: dict[str, int] = {}

    def charge(self, tenant: str, tokens: int) -> None:
        """A request entered the queue that will take about this many tokens."""
        assert tokens >= 0
        if not tokens:
            return
        level = self._rise()
        received = max(self._received.get(tenant, 0), level)
        self._set_received(tenant, min(received, level + self._debt_max))
        self._queued[tenant] = self._queued.get(tenant, 0) + tokens * self._units_of(tenant)

    def serve(self, tenant: str, tokens: int) -> None:
        """So many of its tokens were computed.

        A request may take more than it was charged; the excess counts as received.
        """
        assert tokens >= 0
        units = tokens * self._units_of(tenant)
        self._set_received(tenant, max(self._received.get(tenant, 0), self._level) + units)
        self._take(tenant, units)

    def refund(self, tenant: str, tokens: int) -> None:
        """So many of the charged tokens will not be computed: it ended early, or left."""
        assert tokens >= 0
        self._take(tenant, tokens * self._units_of(tenant))

    def lag_tokens(self, tenant: str) -> int:
        """How far its next request stands back, in tokens of a tenant that weighs 1."""
        level = self._rise()
        debt = max(self._received.get(tenant, 0) - level, 0)
        return min(debt + self._queued.get(tenant, 0), self._debt_max) // self._unit

    @property
    def level_tokens(self) -> int:
        """What the least served of those who wait has received, over its weight."""
        return self._rise() // self._unit

    @property
    def tenants_waiting(self) -> int:
        """Tenants that have something charged and not yet computed."""
        return len(self._queued)

    def check(self) -> None:
        """INV-SCHED-43, the part that is state."""
        assert all(units > 0 for units in self._queued.values())
        assert self._queued.keys() <= self._received.keys() == self._entered.keys()
        for tenant, received in self._received.items():
            assert self._entered[tenant] <= received
            assert (self._entered[tenant], tenant) in self._least
        for tenant in self._queued:
            assert self._received[tenant] >= self._level, "the level passed one who waits"

    def _units_of(self, tenant: str) -> int:
        """Virtual units of one token."""
        return self._unit // self._weights.get(tenant, 1)

    def _set_received(self, tenant: str, units: int) -> None:
        self._received[tenant] = units
        if units < self._entered.get(tenant, units + 1):
            self._entered[tenant] = units
            heapq.heappush(self._least, (units, tenant))

    def _take(self, tenant: str, units: int) -> None:
        """Take from its queue; whoever has nothing left waits no longer."""
        left = self._queued.get(tenant, 0) - units
        if left > 0:
            self._queued[tenant] = left
            return
        self._queued.pop(tenant, None)
        if not self._queued:  # nobody waited, so nobody was wronged: all begin anew
            self._level = max(self._received.values(), default=self._level)
            for facts in (self._received, self._entered, self._least):
                facts.clear()

    def _rise(self) -> int:
        """The level now.  Entries lie low until asked, because what is received only grows."""
        least = self._least
        while least:
            entered, tenant = least[0]
            if entered != self._entered.get(tenant):
                heapq.heappop(least)
            elif (received := self._received[tenant]) > entered:
                self._entered[tenant] = received
                heapq.heapreplace(least, (received, tenant))
            elif tenant in self._queued:
                self._level = received
                break
            else:  # it left, and the level has caught up with its debt
                heapq.heappop(least)
                del self._entered[tenant], self._received[tenant]
        return self._level
