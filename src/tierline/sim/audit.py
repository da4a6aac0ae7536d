"""Everything that must hold in a fleet between two instants, collected.

Tests and `simulate(check=True)` call it.  An invariant that its owner asserts (`check`) is
reported here with the replica it failed on; what no owner can see alone is looked up: that
each request is in exactly one place, and that whatever waits for bytes waits for bytes that
somebody carries.

Invariants
    INV-SIM-41  a request is still to come, homeless, at one replica, or has ended: one of these
    INV-SIM-42  a transfer that is waited for is on a link, and the other way round
    INV-SIM-43  what a replica tells routers is what its sequences add up to
"""

from collections.abc import Callable, Iterator

from tierline.base.clock import FOREVER_PS
from tierline.scheduling.sequence import LOADING, Sequence
from tierline.sim.fleet import Fleet
from tierline.sim.record import OUTCOMES, UNFINISHED
from tierline.sim.replica import Replica


def audit(fleet: Fleet) -> list[str]:
    """What is broken, one sentence each; empty when all is well."""
    broken = list(_places(fleet))
    for replica in fleet.replicas:
        broken += [f"replica {replica.number}: {problem}" for problem in _of_replica(replica)]
    return broken


def run_checked(fleet: Fleet) -> int:
    """`Fleet.run` that asserts every invariant after every instant."""
    last_ps = 0
    while (at_ps := fleet.next_ps()) < FOREVER_PS:
        last_ps = fleet.run(at_ps)
        broken = audit(fleet)
        assert not broken, (fleet.now_ps, broken)
    return last_ps


def _places(fleet: Fleet) -> Iterator[str]:
    """INV-SIM-41."""
    requests = fleet.requests
    found: dict[int, list[str]] = {}
    for sequence in fleet.homeless:
        found.setdefault(sequence.id, []).append("homeless")
    for replica in fleet.replicas:
        for i in replica.sequences:
            found.setdefault(i, []).append(f"at replica {replica.number}")
    for i, outcome in enumerate(requests.outcome):
        places = found.get(i, [])
        if outcome != UNFINISHED:
            places = [*places, OUTCOMES[outcome]]
        if len(places) > 1:
            yield f"request {i} is {' and '.join(places)}"
        if not places and requests.arrival_ps[i] < fleet.now_ps:
            yield f"request {i} is lost"
    ended = len(requests) - requests.outcome.count(UNFINISHED)
    if fleet.left != len(requests) - ended:
        yield f"{fleet.left} requests are left, {ended} of {len(requests)} have ended"


def _of_replica(replica: Replica) -> Iterator[str]:
    checks: list[Callable[[], None]] = [replica.scheduler.check]
    checks += [link.check for link in dict.fromkeys(replica.links.values())]
    for check in checks:
        try:
            check()
        except AssertionError as error:
            yield f"{getattr(check, '__self__', check).__class__.__name__}: {_told(error)}"
    yield from _members(replica)
    yield from _waits(replica)
    pools = replica.fleet.pools
    for s in replica.scheduler.held_back.values():
        if pools is None or not pools.expects(replica, s):
            yield f"request {s.id} was handed over, and its memory is not given back"
    if not replica.alive and (replica.sequences or replica.step is not None):
        yield "it is down and has work"


def _told(error: AssertionError) -> str:
    """What an assertion says, or where it stands."""
    if error.args:
        return str(error.args[0])
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_code.co_name if trace is not None else "?"
    return f"{where}, line {trace.tb_lineno if trace is not None else 0}"


def _members(replica: Replica) -> Iterator[str]:
    """INV-SIM-43: who is here is in the scheduler, once, and the counters say so."""
    scheduler = replica.scheduler
    inside: dict[int, Sequence] = {s.id: s for s in scheduler.queue.everybody()}
    for group in (scheduler.loading, scheduler.prefilling, scheduler.decoding):
        inside |= group
    for i, s in inside.items():
        if replica.sequences.get(i) is not s:
            yield f"request {i} is in the scheduler and not here"
    unseen = set(replica.sequences) - set(inside)
    if unseen and not replica.wait_steps:  # with it, a newcomer is seen a little later
        yield f"requests {sorted(unseen)} are here and not in the scheduler"
    if replica.requests_outstanding != len(replica.sequences):
        yield f"{replica.requests_outstanding} requests counted, {len(replica.sequences)} here"
    queued = sum(s.prompt_tokens for s in replica.sequences.values() if s.first_ps < 0)
    if replica.prompt_tokens_queued != queued:
        yield f"{replica.prompt_tokens_queued} prompt tokens counted, {queued} here"


def _waits(replica: Replica) -> Iterator[str]:
    """INV-SIM-42."""
    index = replica.scheduler.index
    carried = [t for link in dict.fromkeys(replica.links.values()) for t in link.transfers]
    carried += index.outbox
    expected = []
    for run in index.heads.values():
        for transfer, wanted in ((run.arriving, "arrives"), (run.leaving, "leaves")):
            if transfer is not None:
                expected.append(transfer)
                if run not in transfer.runs:
                    yield f"{run} {wanted} by {transfer}, which does not carry it"
    for transfer in expected:
        if not any(transfer is other for other in carried):
            yield f"{transfer} is waited for and nobody carries it"
    waiters = [w for t in carried for w in t.waiters if w.state == LOADING]
    for s in replica.scheduler.loading.values():
        count = sum(w is s for w in waiters)
        if count != s.pending:
            yield f"request {s.id} waits for {s.pending} transfers, {count} are on their way"
