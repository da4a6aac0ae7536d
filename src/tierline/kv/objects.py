"""Adapters and models as residents of memory tiers: what is where, and who makes room.

A scheduler that is about to run a sequence wants its adapter on the device; a fleet wants a
model's weights close before a burst.  Both are whole objects that never change, and whose
origin (a registry, an object store) can always give them again.  So forgetting one costs
time, never data, and a copy that exists further down makes an eviction free.

    want()    [] it is on the device; transfers: ask again when one has ended; None: all the
              room is taken by what is pinned.  A refusal changes nothing.
    pin()     a sequence uses it: counts as a use, and keeps it where it is until `unpin`
    expect()  a forecast: what is worth it moves up before it is asked for

Who goes first: the smallest expected loss, uses per second x seconds to have it again /
bytes.  Uses are a count that decays as exp(-age / tau), so the order of two objects does not
change while nothing happens, and a key made at the last use stays true:
`instant + tau ln(count x penalty / bytes)`.  A copy under a copy is worth nothing.

An object is known by name@digest: a new version under an old name is another object.

Invariants
    INV-KV-8   bytes settled in, arriving at and leaving a tier never exceed its capacity
    INV-KV-9   nothing pinned leaves the tier it is in, but for a better one
    INV-KV-10  an object is found under its own digest only
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import exp, log

from tierline.base.clock import FOREVER_PS, PS_PER_S
from tierline.base.errors import DoesNotFitError, SpecError
from tierline.kv.transfer import BACKGROUND, DEVICE, PREFETCH, REMOTE, Transfer

KEY_GRAIN_PS = 10**6  # keys are whole microseconds: no rounding of a logarithm decides


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """One version of an adapter or a model."""

    name: str
    digest: str
    kind: str  # adapter, model
    bytes: int

    def __post_init__(self) -> None:
        if not self.digest:
            raise SpecError(
                f"{self.kind} {self.name!r} has no digest",
                hint="name it name@digest, so that a new version is not taken for an old one",
            )
        if self.bytes <= 0:
            raise SpecError(f"{self.kind} {self.name!r} has a size that is not positive")

    @property
    def key(self) -> str:
        """What it is known by."""
        return f"{self.name}@{self.digest}"


class Resident:
    """What the store knows of one object."""

    __slots__ = (
        "birth",
        "count",
        "flight",
        "item",
        "leaving",
        "mask",
        "offered",
        "pins",
        "touched_ps",
        "used_ps",
    )

    def __init__(self, item: StoredObject, birth: int) -> None:
        self.item = item
        self.birth = birth
        self.mask = 0  # bit t: settled in tier t
        self.offered = 0  # bit t: in that tier's order of forgetting
        self.pins = 0
        self.flight: Transfer | None = None  # at most one at a time
        self.leaving = False  # the flight's source is given up when it has landed
        self.count = 0.0  # of uses, decayed, at `touched_ps`
        self.touched_ps = self.used_ps = 0

    @property
    def tier(self) -> int:
        """The best tier it is settled in; the origin if none."""
        return (self.mask & -self.mask).bit_length() - 1 if self.mask else REMOTE


Order = Callable[[Resident, float, int], int]  # (who, penalty in seconds, tau) -> key


def least_expected_loss(resident: Resident, penalty_s: float, tau_ps: int) -> int:
    """Expected uses x penalty / bytes, as a key that stays true while nothing happens."""
    value = max(resident.count, 1e-9) * max(penalty_s, 1e-12) / resident.item.bytes
    return resident.touched_ps // KEY_GRAIN_PS + round(tau_ps / KEY_GRAIN_PS * log(value))


def least_recently_used(resident: Resident, penalty_s: float, tau_ps: int) -> int:  # noqa: ARG001
    """The baseline: the instant of the last use."""
    return resident.used_ps // KEY_GRAIN_PS


class ObjectStore:
    """Where every object is, on the device and in the tiers below it."""

    def __init__(
        self,
        capacities_bytes: Sequence[int],
        *,
        reload_s: Callable[[int, int], float],
        order: Order = least_expected_loss,
        tau_s: float = 600.0,
    ) -> None:
        """`capacities_bytes` of device, DRAM and NVMe; the origin holds everything.

        `reload_s(tier, size_bytes)` is how long it takes from a tier to the device.
        """
        assert len(capacities_bytes) == REMOTE
        self.capacities_bytes = tuple(capacities_bytes)
        self.used_bytes = [0] * REMOTE  # settled, arriving and leaving
        self.evicted_bytes = [0] * REMOTE
        self.fetched_bytes = [0] * (REMOTE + 1)  # by the tier they came from
        self.outbox: list[Transfer] = []  # to be submitted by whoever drives this
        self._reload_s = reload_s
        self._order = order
        self._tau_ps = round(tau_s * PS_PER_S)
        self._residents: dict[str, Resident] = {}
        self._heaps: list[list[tuple[int, int, int, Resident]]] = [[] for _ in range(REMOTE)]
        self._offers = 0  # keeps the comparison of two equal offers from going further
        self._flights: dict[Transfer, Resident] = {}

    # What others ask

    def tier_of(self, item: StoredObject) -> int:
        """The best tier where it is settled; REMOTE when only the origin has it."""
        resident = self._residents.get(item.key)
        return REMOTE if resident is None else resident.tier

    def reload_s(self, item: StoredObject) -> float:
        """Seconds until it could be on the device, if its transfer began now."""
        tier = self.tier_of(item)
        return 0.0 if tier == DEVICE else self._reload_s(tier, item.bytes)

    def could_have(self, item: StoredObject) -> bool:
        """Whether `want` would bring it to the device, now or after what is leaving has left."""
        resident = self._residents.get(item.key)
        if resident is not None and (resident.mask & 1 or self.arriving(item) is not None):
            return True
        free = self.capacities_bytes[DEVICE] - self.used_bytes[DEVICE]
        loose = sum(
            r.item.bytes
            for r in self._residents.values()
            if r.mask & 1 and (self._may_go(r, DEVICE) or self._leaves(r, DEVICE))
        )
        return item.bytes <= free + loose

    def arriving(self, item: StoredObject) -> Transfer | None:
        """What brings it to the device, if it is on its way."""
        resident = self._residents.get(item.key)
        flight = resident.flight if resident is not None else None
        return flight if flight is not None and flight.target == DEVICE else None

    def carries(self, transfer: Transfer) -> bool:
        """Whether the transfer is one of this store's."""
        return transfer in self._flights

    def pins(self) -> dict[str, int]:
        """What is pinned, and how often."""
        return {key: r.pins for key, r in self._residents.items() if r.pins}

    def require_fit(self, item: StoredObject) -> None:
        """Raise `DoesNotFitError` for what the device could never hold."""
        if item.bytes > self.capacities_bytes[DEVICE]:
            raise DoesNotFitError(
                f"{item.kind} {item.key!r} on the device",
                needed_bytes=item.bytes,
                available_bytes=self.capacities_bytes[DEVICE],
                hint="give adapters and models more device memory, or use a smaller one",
            )

    # What sequences need

    def want(self, item: StoredObject, urgency: tuple[int, int]) -> list[Transfer] | None:
        """Bring it to the device.  What to wait for; [] if it is there; None if pins forbid.

        Ask again when what was returned has ended, done or cancelled.
        """
        self.require_fit(item)
        resident = self._resident(item)
        if resident.mask & 1:
            resident.leaving = False  # its bytes are still here: what was leaving stays
            return []
        if resident.flight is not None:
            return [resident.flight]
        waits = self._room(DEVICE, item.bytes, worth=None, urgency=urgency)
        if waits == []:
            return [self._send(resident, DEVICE, urgency)]
        return waits

    def pin(self, item: StoredObject, now_ps: int) -> None:
        """A sequence uses it from now on, or waits for it with everything else ready."""
        resident = self._resident(item)
        resident.pins += 1
        resident.leaving = False
        resident.count = self._count(resident, now_ps) + 1
        resident.touched_ps = resident.used_ps = now_ps

    def unpin(self, item: StoredObject) -> None:
        """The sequence has ended or stepped back."""
        resident = self._residents[item.key]
        assert resident.pins > 0, f"{item.key} unpinned twice"
        resident.pins -= 1
        self._offer(resident, moved=False)

    # What a forecast needs

    def expect(self, uses_per_s: Mapping[StoredObject, float], now_ps: int) -> list[Transfer]:
        """Move up what a forecast makes worth it; returns the prefetches it has begun.

        Each goes to the best tier where it displaces only what is worth less.  A forecast is
        credited like uses that have happened, so it fades unless it is renewed.
        """
        expected = []
        for item, rate in uses_per_s.items():
            resident = self._resident(item)
            credit = rate * self._tau_ps / PS_PER_S
            resident.count = max(self._count(resident, now_ps), credit)
            resident.touched_ps = now_ps
            if rate > 0:
                expected.append(resident)
        expected.sort(key=lambda resident: (-self._worth(resident, DEVICE), resident.birth))
        return [t for resident in expected if (t := self._promote(resident)) is not None]

    def _promote(self, resident: Resident) -> Transfer | None:
        urgency = (PREFETCH, 0)
        if resident.flight is not None:
            return None
        for tier in range(resident.tier):
            worth = self._worth(resident, tier)
            if self._room(tier, resident.item.bytes, worth=worth, urgency=urgency) == []:
                return self._send(resident, tier, urgency)
        return None

    # What movers report

    def landed(self, transfer: Transfer) -> None:
        """All bytes have arrived: the object is settled there."""
        assert transfer.state == "done", transfer
        resident = self._flights.pop(transfer)
        resident.flight = None
        resident.mask |= 1 << transfer.target
        if resident.leaving:
            self._drop(resident, transfer.source)
        resident.leaving = False
        self._offer(resident, moved=True)

    def cancelled(self, transfer: Transfer) -> None:
        """It will not arrive: the room is free again, and the source keeps its copy."""
        assert transfer.state == "cancelled", transfer
        resident = self._flights.pop(transfer)
        resident.flight = None
        resident.leaving = False
        self.used_bytes[transfer.target] -= resident.item.bytes
        self._offer(resident, moved=True)

    def check(self) -> None:
        """INV-KV-8, and that masks, flights and bytes agree."""
        settled = [0] * REMOTE
        for key, resident in self._residents.items():
            assert key == resident.item.key
            for tier in range(REMOTE):
                settled[tier] += resident.item.bytes * (resident.mask >> tier & 1)
            flight = resident.flight
            assert not resident.leaving or flight is not None
            if flight is not None:
                assert self._flights[flight] is resident
                assert not resident.mask >> flight.target & 1
                assert flight.source == REMOTE or resident.mask >> flight.source & 1
                settled[flight.target] += resident.item.bytes
        assert settled == self.used_bytes
        for used, capacity in zip(self.used_bytes, self.capacities_bytes, strict=True):
            assert used <= capacity
        assert len(self._flights) == sum(r.flight is not None for r in self._residents.values())

    # Making room

    def _room(
        self, tier: int, size: int, *, worth: int | None, urgency: tuple[int, int]
    ) -> list[Transfer] | None:
        """[] if `size` bytes are free now, after evicting what is worth less than `worth`.

        Transfers if they will be free when those have ended; None if they cannot be.
        """
        capacity = self.capacities_bytes[tier]
        short = size - (capacity - self.used_bytes[tier])
        if size > capacity:
            return None
        if short <= 0:
            return []
        leaving = sum(r.item.bytes for r in self._flights.values() if self._leaves(r, tier))
        victims = self._victims(tier, short - leaving, worth)
        if victims is None:
            return None if worth is not None else self._arriving(tier) or None
        for victim in victims:
            self._evict(victim, tier, urgency)
        if capacity - self.used_bytes[tier] >= size:
            return []
        return [t for t, resident in self._flights.items() if self._leaves(resident, tier)]

    def _victims(self, tier: int, short: int, worth: int | None) -> list[Resident] | None:
        """Who goes so that `short` bytes come free, least valuable first; None if too few may."""
        heap, found = self._heaps[tier], []
        while short > 0 and heap:
            key, _, _, resident = heappop(heap)
            resident.offered &= ~(1 << tier)
            if resident in found or not self._may_go(resident, tier):
                continue  # offered again when that changes
            if self._key(resident, tier) > key:
                self._push(resident, tier)
                continue
            if worth is not None and self._key(resident, tier) >= worth:
                self._push(resident, tier)
                break
            found.append(resident)
            short -= resident.item.bytes
        if short > 0:
            for resident in found:
                self._push(resident, tier)
            return None
        return found

    def _may_go(self, resident: Resident, tier: int) -> bool:
        if not resident.mask >> tier & 1 or resident.flight is not None:
            return False
        return not resident.pins or resident.tier != tier  # INV-KV-9

    def _evict(self, resident: Resident, tier: int, urgency: tuple[int, int]) -> None:
        """It leaves the tier: at once where there is another copy, else after a demotion."""
        if resident.mask == 1 << tier:  # its only copy
            for below in range(tier + 1, REMOTE):
                worth = self._worth(resident, below)
                room = self._room(below, resident.item.bytes, worth=worth, urgency=(BACKGROUND, 0))
                if room == []:
                    self._send(resident, below, urgency)
                    resident.leaving = True
                    return
        self._drop(resident, tier)

    def _drop(self, resident: Resident, tier: int) -> None:
        resident.mask &= ~(1 << tier)
        self.used_bytes[tier] -= resident.item.bytes
        self.evicted_bytes[tier] += resident.item.bytes
        self._offer(resident, moved=True)

    def _send(self, resident: Resident, target: int, urgency: tuple[int, int]) -> Transfer:
        source = resident.tier
        kind = resident.item.kind if target < source else "demote"
        transfer = Transfer(
            kind, source=source, target=target, bytes=resident.item.bytes, urgency=urgency
        )
        resident.flight = transfer
        self.used_bytes[target] += resident.item.bytes
        self._flights[transfer] = resident
        self.outbox.append(transfer)
        if target < source:
            self.fetched_bytes[source] += resident.item.bytes
        return transfer

    def _leaves(self, resident: Resident, tier: int) -> bool:
        flight = resident.flight
        return resident.leaving and flight is not None and flight.source == tier

    def _arriving(self, tier: int) -> list[Transfer]:
        """What lands here unpinned, and may then make room."""
        return [t for t, r in self._flights.items() if t.target == tier and not r.pins]

    # The order of forgetting

    def _key(self, resident: Resident, tier: int) -> int:
        """Its place in the order of a tier it is in; the smallest goes first."""
        if resident.mask & ((1 << tier) - 1):  # under a copy
            return (resident.used_ps - FOREVER_PS) // KEY_GRAIN_PS
        return self._worth(resident, tier)

    def _worth(self, resident: Resident, tier: int) -> int:
        """The key that it has, or would have, as the best copy."""
        size = resident.item.bytes
        fallback = self._fallback(resident, tier)
        here_s = 0.0 if tier == DEVICE else self._reload_s(tier, size)
        return self._order(resident, self._reload_s(fallback, size) - here_s, self._tau_ps)

    def _fallback(self, resident: Resident, tier: int) -> int:
        """Where it would be found after leaving `tier`."""
        lower = resident.mask >> (tier + 1)
        if lower:
            return tier + (lower & -lower).bit_length()
        for below in range(tier + 1, REMOTE):
            if self.capacities_bytes[below] >= resident.item.bytes:
                return below
        return REMOTE

    def _offer(self, resident: Resident, *, moved: bool) -> None:
        """Put it up for forgetting; `moved` says that its keys may have become smaller."""
        for tier in range(REMOTE):
            if self._may_go(resident, tier) and (moved or not resident.offered >> tier & 1):
                self._push(resident, tier)

    def _push(self, resident: Resident, tier: int) -> None:
        resident.offered |= 1 << tier
        self._offers += 1
        offer = (self._key(resident, tier), resident.birth, self._offers, resident)
        heappush(self._heaps[tier], offer)

    def _count(self, resident: Resident, now_ps: int) -> float:
        """Its decayed uses at `now_ps`."""
        return resident.count * exp((resident.touched_ps - now_ps) / self._tau_ps)

    def _resident(self, item: StoredObject) -> Resident:
        """What is known of the object; it becomes known on the way."""
        resident = self._residents.get(item.key)
        if resident is None:
            resident = self._residents[item.key] = Resident(item, len(self._residents))
        assert resident.item == item, f"{item.key} is two objects"
        return resident
