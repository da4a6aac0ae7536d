"""A link between two tiers: one queue, the most urgent transfer moves.

Placement decides transfers; whoever executes (a mover that copies bytes, or the simulator)
submits them here, asks `next_done_ps`, and calls `advance` when that instant comes.  A link
has no clock: every verb takes the instant, and instants do not go back.

Order: by class of urgency (somebody waits, somebody will, tidying), in a class by the key
of whoever waits (a deadline), then by decision.  A newcomer that is more urgent overtakes
what waits and pauses what moves.  The paused transfer keeps what it has carried and does
not pay its latency again: copies are made in pieces, so a pause loses nothing.

Work is counted in integers of which one byte is a whole number at every rate, so pauses
and changes of rate lose no part of a byte.  A transfer ends at a whole picosecond, the
first by which its last byte has arrived.

Invariants
    INV-KV-6  every transfer ends exactly once, done or cancelled, in the order of urgency
    INV-KV-7  what moved equals what arrived plus what was under way: no byte twice, none lost
"""

from heapq import heappop, heappush

from tierline.base.clock import FOREVER_PS, PS_PER_S
from tierline.kv.transfer import Transfer

FULL_RATE_PPM = 10**6  # a factor of 1, in parts per million

Order = tuple[int, int, int, int]  # class of urgency, key, serial of the decision, submission


class _Load:
    """One transfer on this link, and what is left of it."""

    __slots__ = ("latency_left_ps", "order", "transfer", "work_left")

    def __init__(self, transfer: Transfer, order: Order, latency_ps: int, work: int) -> None:
        self.transfer = transfer
        self.order = order
        self.latency_left_ps = latency_ps
        self.work_left = work


class Link:
    """One direction between two tiers, at `bytes_per_s` divided by how many share it."""

    __slots__ = (
        "_ends_ps",
        "_heap",
        "_latency_ps",
        "_loads",
        "_moving",
        "_rate_ppm",
        "_serial",
        "_since_ps",
        "_work_lost",
        "_work_moved",
        "_work_per_byte",
        "_work_per_ps",
        "bytes_done",
        "bytes_per_s",
        "name",
    )

    def __init__(
        self, name: str, *, bytes_per_s: int, latency_ps: int = 0, shared_by: int = 1
    ) -> None:
        assert bytes_per_s > 0
        assert latency_ps >= 0
        assert shared_by > 0
        self.name = name
        self.bytes_per_s = bytes_per_s
        self.bytes_done = 0
        self._latency_ps = latency_ps
        self._work_per_byte = PS_PER_S * FULL_RATE_PPM * shared_by
        self._rate_ppm = FULL_RATE_PPM
        self._loads: dict[Transfer, _Load] = {}
        self._heap: list[tuple[Order, _Load]] = []  # also loads that have left or moved up
        self._moving: _Load | None = None
        self._ends_ps = FOREVER_PS  # when it has carried all, at the present rate
        self._since_ps = 0  # the instant up to which everything is accounted
        self._serial = 0
        self._work_moved = self._work_lost = 0  # lost: carried for what was then cancelled

    # What others ask

    @property
    def transfers(self) -> list[Transfer]:
        """Everything queued or moving, the next to end first."""
        loads = sorted(self._loads.values(), key=lambda load: load.order)
        return [load.transfer for load in loads]

    def next_done_ps(self) -> int:
        """When the moving transfer ends if nothing changes; FOREVER_PS if none does."""
        return self._ends_ps

    def backlog_ps(self, urgency: tuple[int, int]) -> int:
        """How long a transfer of that urgency would wait, as seen when last advanced."""
        ahead = (load for load in self._loads.values() if load.order[:2] <= urgency)
        return min(sum(map(self._left_ps, ahead)), FOREVER_PS)

    def duration_ps(self, size_bytes: int) -> int:
        """How long that many bytes take alone, at the present rate."""
        rate = self.bytes_per_s * self._rate_ppm
        if not rate:
            return FOREVER_PS
        return self._latency_ps - (-size_bytes * self._work_per_byte // rate)

    # What changes it

    def submit(self, transfer: Transfer, now_ps: int) -> None:
        """Queue a transfer; it moves at once if nothing more urgent does."""
        assert transfer.state == "queued", transfer
        assert transfer.bytes > 0, transfer
        assert transfer not in self._loads, transfer
        self._account(now_ps)
        work = transfer.bytes * self._work_per_byte
        self._enter(_Load(transfer, self._order(transfer), self._latency_ps, work))

    def hasten(self, transfer: Transfer, urgency: tuple[int, int], now_ps: int) -> None:
        """Somebody more urgent waits for it now: a prefetch that has become a demand."""
        if urgency >= transfer.urgency:
            return
        self._account(now_ps)
        load = self._loads[transfer]
        transfer.urgency = urgency
        load.order = self._order(transfer)
        if self._moving is not load:
            self._enter(load)

    def cancel(self, transfer: Transfer, now_ps: int) -> None:
        """Nobody needs it, or a fault has ended it; what was carried is lost."""
        self._account(now_ps)
        load = self._loads.pop(transfer)
        transfer.state = "cancelled"
        self._work_lost += transfer.bytes * self._work_per_byte - load.work_left
        if self._moving is load:
            self._moving = None
            self._start()

    def set_rate(self, factor: float, now_ps: int) -> None:
        """From now on the link carries `factor` of its rate: clogged, dead (0), or well (1)."""
        assert factor >= 0
        self._account(now_ps)
        self._rate_ppm = round(factor * FULL_RATE_PPM)
        self._expect()

    def catch_up(self, now_ps: int) -> None:
        """Account for what has moved until now, for whoever asks next; nothing may have ended."""
        self._account(now_ps)

    def advance(self, now_ps: int) -> list[Transfer]:
        """Carry bytes up to `now_ps`; returns what has ended, in order."""
        done: list[Transfer] = []
        while self._ends_ps <= now_ps:
            self._account(self._ends_ps)
            load = self._moving
            assert load is not None
            assert not load.work_left
            del self._loads[load.transfer]
            load.transfer.state = "done"
            self.bytes_done += load.transfer.bytes
            done.append(load.transfer)
            self._start()
        self._account(now_ps)
        return done

    def check(self) -> None:
        """INV-KV-7, and that the moving transfer is the most urgent of what is here."""
        arrived = self.bytes_done * self._work_per_byte
        under_way = sum(
            load.transfer.bytes * self._work_per_byte - load.work_left
            for load in self._loads.values()
        )
        assert self._work_moved == arrived + under_way + self._work_lost
        assert (self._moving is None) == (not self._loads)
        for transfer, load in self._loads.items():
            assert load.transfer is transfer
            assert 0 <= load.work_left <= transfer.bytes * self._work_per_byte
            assert transfer.state == ("moving" if load is self._moving else "queued")
            assert self._moving is not None
            assert self._moving.order <= load.order or self._ends_ps == self._since_ps

    def _order(self, transfer: Transfer) -> Order:
        self._serial += 1
        return (*transfer.urgency, transfer.serial, self._serial)

    def _left_ps(self, load: _Load) -> int:
        """Time that a load needs alone."""
        rate = self.bytes_per_s * self._rate_ppm
        if not load.work_left:
            return load.latency_left_ps
        return load.latency_left_ps - (-load.work_left // rate) if rate else FOREVER_PS

    def _enter(self, load: _Load) -> None:
        """Queue it; it pauses what moves if that is less urgent and not at its end."""
        self._loads[load.transfer] = load
        heappush(self._heap, (load.order, load))
        moving = self._moving
        if moving is None or (load.order < moving.order and self._ends_ps > self._since_ps):
            if moving is not None:
                moving.transfer.state = "queued"
                heappush(self._heap, (moving.order, moving))
            self._start()
        else:
            load.transfer.state = "queued"

    def _start(self) -> None:
        """The most urgent of what waits begins to move."""
        self._moving = None
        while self._heap:
            order, load = heappop(self._heap)
            if load.order == order and self._loads.get(load.transfer) is load:
                load.transfer.state = "moving"
                self._moving = load
                break
        self._expect()

    def _expect(self) -> None:
        """Foresee the end of what moves; it stays where it is while time passes."""
        self._ends_ps = FOREVER_PS
        if self._moving is not None:
            self._ends_ps = min(self._since_ps + self._left_ps(self._moving), FOREVER_PS)

    def _account(self, now_ps: int) -> None:
        """The moving transfer carries what it can until `now_ps`."""
        elapsed_ps = now_ps - self._since_ps
        assert elapsed_ps >= 0, "time does not run backwards"
        assert now_ps <= self._ends_ps, "advance first: a transfer has ended"
        load = self._moving
        if load is not None and elapsed_ps:
            waited_ps = min(elapsed_ps, load.latency_left_ps)
            load.latency_left_ps -= waited_ps
            rate = self.bytes_per_s * self._rate_ppm
            carried = min((elapsed_ps - waited_ps) * rate, load.work_left)
            load.work_left -= carried
            self._work_moved += carried
        self._since_ps = now_ps
