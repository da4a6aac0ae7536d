"""What goes wrong, as data: where, when, for how long, and what it does to a fleet.

`tierline sim --fault TEXT` and tests read faults with `parse_fault`; `simulate(faults=...)`
lets bursts change the workload (`with_bursts`) and has the rest strike a fleet (`inject`).
A fault knows nothing of the workload, so any go together with any trace.

    dies           it loses its step, its memory and its links.  Its requests are routed again
                   and begin anew: a gateway that retries has to send the whole prompt.  Such
                   a request's first token is that of the attempt that finished, and its time
                   counts from the arrival.  The replica comes back empty, or never
    slow           every step takes `factor` times as long
    link           the way to a tier and back carries `factor` of its rate
    disk-full      its drive takes no more than lies there now
    disk-fails     what lies on its drive is gone, and so is what moves to or from it
    lost-transfer  the cache that is on its way there at that instant, or next, never arrives
    burst          `factor` times as many arrivals, drawn from the trace's own requests

Another machine takes the place of a dead one: what else was wrong with it ends then.  A
fault that finds nothing to break (a dead replica, an idle link) is told, and does nothing.

Invariants
    INV-SIM-40  after any fault every request ends once, or is still in exactly one place,
                and no memory is lost (`sim.audit`)
"""

from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from math import prod
from random import Random

from tierline.base.clock import FOREVER_PS, PS_PER_NS, PS_PER_S
from tierline.base.errors import InputError
from tierline.base.names import lookup, reject_unknown_keys
from tierline.base.rng import stream_seed
from tierline.base.units import format_seconds, parse_duration_ns
from tierline.kv.transfer import NVME, REMOTE, TIER_NAMES
from tierline.perf.line import StepLine
from tierline.sim.fleet import Fleet
from tierline.sim.record import Moment
from tierline.sim.replica import Replica
from tierline.workload.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong."""

    kind: str
    at_ps: int  # since the first arrival
    until_ps: int = FOREVER_PS  # when it is over, or the replica is back
    replica: int = -1  # -1: the workload, not a replica
    tier: int = 0  # of the link
    factor: float = 1.0


# --- as text --------------------------------------------------------------------------------

_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # what it needs, what it may have
    "dies": (("replica", "at"), ("back",)),
    "slow": (("replica", "at", "factor"), ("for",)),
    "link": (("replica", "tier", "at", "factor"), ("for",)),
    "disk-full": (("replica", "at"), ("for",)),
    "disk-fails": (("replica", "at"), ()),
    "lost-transfer": (("replica", "at"), ()),
    "burst": (("at", "for", "factor"), ()),
}
_FACTORS = {  # smallest, largest, what to write instead
    "slow": (1.0, 1000.0, "2 is half the speed"),
    "link": (0.001, 1.0, "0.1 is a tenth of its rate"),
    "burst": (1.0, 100.0, "3 is three times the arrivals"),
}
_TIERS = {name: tier for tier, name in enumerate(TIER_NAMES) if tier}


def parse_fault(text: str) -> Fault:
    """The fault that a text such as 'dies:replica=2,at=120s,back=300s' describes.

    `at` and `back` are instants since the first arrival, `for` is a duration.  Raises
    `InputError` that says what to write instead.
    """
    where = f"fault {text!r}"
    kind, _, rest = text.partition(":")
    kind = kind.strip()
    needed, optional = lookup("fault", kind, _KEYS)
    values: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals or not value:
            raise InputError(f"{where}: {part!r} is not key=value", hint=_example(kind))
        if key in values:
            raise InputError(f"{where}: {key!r} is given twice", hint=_example(kind))
        values[key] = value
    reject_unknown_keys(where, values, (*needed, *optional))
    for key in needed:
        if key not in values:
            raise InputError(f"{where}: {key!r} is missing", hint=_example(kind))
    return _fault(where, kind, values)


def _fault(where: str, kind: str, values: dict[str, str]) -> Fault:
    at_ps = _instant_ps(where, "at", values["at"])
    until_ps = FOREVER_PS
    if "for" in values:
        until_ps = at_ps + parse_duration_ns(values["for"], what=f"{where}: for") * PS_PER_NS
    if "back" in values:
        until_ps = _instant_ps(where, "back", values["back"])
        if until_ps <= at_ps:
            raise InputError(
                f"{where}: it is back before it dies", hint="back is an instant, later than at"
            )
    return Fault(
        kind=kind,
        at_ps=at_ps,
        until_ps=until_ps,
        replica=_replica(where, values["replica"]) if "replica" in values else -1,
        tier=lookup("tier", values["tier"], _TIERS) if "tier" in values else 0,
        factor=_factor(where, kind, values["factor"]) if "factor" in values else 1.0,
    )


def _example(kind: str) -> str:
    needed, optional = _KEYS[kind]
    shown = {"replica": "0", "at": "60s", "for": "30s", "back": "300s", "tier": "dram"}
    shown["factor"] = "0.1" if kind == "link" else "3"
    return f"write {kind}:" + ",".join(f"{key}={shown[key]}" for key in (*needed, *optional))


def _instant_ps(where: str, key: str, value: str) -> int:
    if value.rstrip("nsumihd") in ("0", "0.0"):  # the only instant that is not a duration
        return 0
    return parse_duration_ns(value, what=f"{where}: {key}") * PS_PER_NS


def _replica(where: str, value: str) -> int:
    if not value.isascii() or not value.isdigit():
        raise InputError(
            f"{where}: replica {value!r} is not a number", hint="replicas are numbered from 0"
        )
    return int(value)


def _factor(where: str, kind: str, value: str) -> float:
    low, high, meaning = _FACTORS[kind]
    try:
        factor = float(value)
    except ValueError:
        factor = -1.0
    if not low <= factor <= high:
        raise InputError(
            f"{where}: factor {value!r} is not a number from {low:g} to {high:g}", hint=meaning
        )
    return factor


# --- in the workload ------------------------------------------------------------------------


def with_bursts(requests: Seq[Request], faults: Iterable[Fault], *, seed: int) -> Seq[Request]:
    """The requests with those that bursts add, in order of arrival.

    What comes on top is drawn from requests that arrive in the window, with their lengths,
    tenants and prefixes, at instants drawn evenly from it.
    """
    start_ns = requests[0].arrival_ns if requests else 0
    added: list[Request] = []
    for number, fault in enumerate(f for f in faults if f.kind == "burst"):
        rng = Random(stream_seed(seed, f"burst {number}"))
        first_ns = start_ns + fault.at_ps // PS_PER_NS
        last_ns = start_ns + fault.until_ps // PS_PER_NS
        inside = [
            requests[i]
            for i in range(
                bisect_left(requests, first_ns, key=_arrival_ns),
                bisect_left(requests, last_ns, key=_arrival_ns),
            )
        ]
        added += [
            _again(rng.choice(inside), rng.randrange(first_ns, last_ns))
            for _ in range(round(len(inside) * (fault.factor - 1)))
        ]
    return sorted([*requests, *added], key=_arrival_ns) if added else requests


def _arrival_ns(request: Request) -> int:
    return request.arrival_ns


def _again(request: Request, at_ns: int) -> Request:
    """The same request at another instant, from somebody else."""
    due_ns = request.deadline_ns
    if due_ns is not None:
        due_ns += at_ns - request.arrival_ns
    return replace(request, arrival_ns=at_ns, deadline_ns=due_ns, session="")


# --- in a fleet -----------------------------------------------------------------------------


def inject(fleet: Fleet, faults: Iterable[Fault]) -> list[Moment]:
    """Let faults strike while the fleet runs; what happened is in the list afterwards.

    Raises `InputError` for a replica or a tier that the fleet does not have.
    """
    troubles = _Troubles(fleet)
    for fault in faults:
        if fault.kind == "burst":
            fleet.later(fault.at_ps, troubles.tell, fault)
            continue
        _require_target(fleet, fault)
        fleet.later(fault.at_ps, troubles.strike, fault)
        if fault.until_ps < FOREVER_PS:
            fleet.later(fault.until_ps, troubles.mend, fault)
    return troubles.moments


def _require_target(fleet: Fleet, fault: Fault) -> None:
    count = len(fleet.replicas)
    if fault.replica >= count:
        raise InputError(
            f"fault {fault.kind!r} names replica {fault.replica}",
            hint=f"the fleet has replicas 0 to {count - 1}",
        )
    replica = fleet.replicas[fault.replica]
    tier = NVME if fault.kind.startswith("disk") else fault.tier
    handed_over = tier == REMOTE and fleet.pools is not None  # KV from other replicas
    if tier and not (replica.scheduler.index.tiers[tier].capacity_blocks or handed_over):
        raise InputError(
            f"fault {fault.kind!r} names a tier that replica {fault.replica} does not have:"
            f" {TIER_NAMES[tier]}",
            hint="enable the tier in the deployment, or leave the fault out",
        )


class _Troubles:
    """What is wrong with whom at the moment."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.moments: list[Moment] = []
        self._active: dict[int, list[Fault]] = {}  # by replica
        self._lines: dict[int, StepLine] = {}  # by replica: prices when nothing is wrong
        self._rooms: dict[int, int] = {}  # by replica: blocks on a drive that is well

    def tell(self, now_ps: int, fault: Fault, what: str = "") -> None:
        """Write down that it happened."""
        self.moments.append(Moment(now_ps, fault.kind, what or _sentence(fault)))

    def strike(self, now_ps: int, fault: Fault) -> None:
        """It happens now."""
        replica = self.fleet.replicas[fault.replica]
        if not replica.alive:
            self.tell(now_ps, fault, f"replica {fault.replica} was down already")
            return
        self.tell(now_ps, fault)
        active = self._active.setdefault(fault.replica, [])
        if fault.kind == "dies":
            active[:] = [fault]
            self.fleet.lose(replica, now_ps)
            return
        active.append(fault)
        if fault.kind == "disk-fails":
            self._disk_fails(replica, now_ps)
        elif fault.kind == "lost-transfer":
            replica.lose_next(now_ps)
        else:
            self._adjust(replica, fault, now_ps)

    def mend(self, now_ps: int, fault: Fault) -> None:
        """It is over, unless the replica has died since."""
        active = self._active.get(fault.replica, [])
        if fault not in active:
            return
        active.remove(fault)
        replica = self.fleet.replicas[fault.replica]
        if fault.kind == "dies":
            self.fleet.regain(replica, now_ps)
        else:
            self._adjust(replica, fault, now_ps)
        what = "is back, empty" if fault.kind == "dies" else f"{fault.kind} is over"
        self.tell(now_ps, fault, f"replica {fault.replica}: {what}")

    def _adjust(self, replica: Replica, fault: Fault, now_ps: int) -> None:
        """Let a replica have what is wrong with it now, no more and no less."""
        alike = [
            f for f in self._active[fault.replica] if (f.kind, f.tier) == (fault.kind, fault.tier)
        ]
        factor = prod(f.factor for f in alike)
        if fault.kind == "slow":
            well = self._lines.setdefault(replica.number, replica.line)
            replica.set_line(replica.line_at(factor) if factor > 1 else well, now_ps)
        elif fault.kind == "link":
            replica.set_rate(fault.tier, factor, now_ps)
        else:
            self._disk_fills(replica, bool(alike))

    def _disk_fills(self, replica: Replica, full: bool) -> None:
        index = replica.scheduler.index
        if any(f.kind == "disk-fails" for f in self._active[replica.number]):
            return  # there is no drive any more
        room = self._rooms.setdefault(replica.number, index.tiers[NVME].capacity_blocks)
        index.resize(NVME, index.tiers[NVME].stored_blocks if full else room)

    def _disk_fails(self, replica: Replica, now_ps: int) -> None:
        for transfer in replica.under_way(NVME):
            replica.lose(transfer, now_ps)
        replica.scheduler.index.lose_tier(NVME)
        replica.cut(now_ps)


def _sentence(fault: Fault) -> str:
    """What happened, for people."""
    who = f"replica {fault.replica}"
    span_s = (fault.until_ps - fault.at_ps) / PS_PER_S
    length = f"for {format_seconds(span_s)}" if fault.until_ps < FOREVER_PS else "from now on"
    tier = TIER_NAMES[fault.tier]
    return {
        "dies": f"{who} dies with all it holds, {length}",
        "slow": f"{who} takes {fault.factor:g} times as long for every step, {length}",
        "link": f"{who} reaches {tier} at {fault.factor:g} of the rate, {length}",
        "disk-full": f"the drive of {who} takes no more, {length}",
        "disk-fails": f"the drive of {who} is gone",
        "lost-transfer": f"what is on its way to {who} is lost",
        "burst": f"{fault.factor:g} times the arrivals, {length}",
    }[fault.kind]
