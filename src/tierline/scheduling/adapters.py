"""Which adapters the running sequences need, and who waits until one has come.

A sequence of a fine-tuned model computes with its adapter on the device.  The scheduler
asks here when it lets a sequence in, and says when one has given its memory back; where
adapters are, and which of them makes room, `kv.objects` decides.

    room()   whether the adapter is there, or could be; changes nothing, so a refusal does not
    take()   the sequence is let in: pin the adapter, and have it loaded if it is not there
    leave()  the sequence runs no more, or steps back

Room on the device may have to be made by moving another adapter down first.  Who waits for
that asks again when it has ended.
"""

from collections.abc import Mapping

from tierline.base.errors import InputError
from tierline.kv.objects import ObjectStore, StoredObject
from tierline.kv.transfer import DEVICE, Transfer
from tierline.scheduling.sequence import Sequence

Urgency = tuple[int, int]


class Adapters:
    """The adapters of one instance, over the store that holds them."""

    __slots__ = ("_asking", "_items", "_users", "store")

    def __init__(self, store: ObjectStore, items: Mapping[str, StoredObject]) -> None:
        """`items` are all adapters that there are, by name@digest."""
        self.store = store
        self._items = items
        self._users: dict[int, str] = {}  # sequences that pin one
        self._asking: dict[int, tuple[Sequence, Urgency]] = {}  # room for theirs is being made

    def require(self, name: str) -> None:
        """Raise for an adapter that this instance does not know, or could never hold."""
        if name not in self._items:
            raise InputError(
                f"no adapter {name!r} is served here",
                hint=f"known: {', '.join(sorted(self._items)) or 'none'}",
            )
        self.store.require_fit(self._items[name])

    def near(self, name: str) -> bool:
        """Whether it is on the device or on its way: nobody has to load it again."""
        item = self._items.get(name)
        if item is None:
            return False
        return self.store.tier_of(item) == DEVICE or self.store.arriving(item) is not None

    def room(self, sequence: Sequence) -> bool:
        """Whether its adapter is on the device, on its way, or could be brought."""
        return self.store.could_have(self._items[sequence.adapter])

    def take(self, sequence: Sequence, urgency: Urgency, now_ps: int) -> int:
        """Pin its adapter; returns for how many transfers the sequence has to wait."""
        self._users[sequence.id] = sequence.adapter
        self.store.pin(self._items[sequence.adapter], now_ps)
        return 0 if self._ask(sequence, urgency) else 1

    def _ask(self, sequence: Sequence, urgency: Urgency) -> bool:
        """Whether its adapter is there; else it waits, for the load or for room."""
        item = self._items[sequence.adapter]
        waits = self.store.want(item, urgency)
        if waits == []:
            return True
        own = self.store.arriving(item)
        if own is None:
            self._asking[sequence.id] = (sequence, urgency)
        else:
            self._asking.pop(sequence.id, None)
            own.waiters.append(sequence)
        return False

    def leave(self, sequence: Sequence) -> None:
        """It needs its adapter no more, or not now."""
        name = self._users.pop(sequence.id, None)
        if name is None:
            return
        item = self._items[name]
        self._asking.pop(sequence.id, None)
        own = self.store.arriving(item)
        if own is not None:
            own.waiters = [waiter for waiter in own.waiters if waiter is not sequence]
        self.store.unpin(item)
        self._ask_again()

    def ended(self, transfer: Transfer) -> None:
        """A transfer has landed or was given up; those of others are ignored."""
        if self.store.carries(transfer):
            if transfer.state == "done":
                self.store.landed(transfer)
            else:
                self.store.cancelled(transfer)
            self._ask_again()

    def _ask_again(self) -> None:
        for sequence, urgency in list(self._asking.values()):
            there = self._ask(sequence, urgency)
            assert not there, "it came, and nobody was told"

    def check(self) -> None:
        """INV-KV-8 and -9: bytes agree, and exactly the sequences that are here pin."""
        self.store.check()
        pins: dict[str, int] = {}
        for name in self._users.values():
            pins[name] = pins.get(name, 0) + 1
        assert pins == self.store.pins()
        assert all(i in self._users for i in self._asking)
