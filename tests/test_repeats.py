"""k repeats of a step leave exactly the state that k single steps leave, under every policy.

This is what lets one scheduler serve and be searched with.  The same small world is run with
repeats without limit, one step at a time, and three at a time: decisions step by step, all
times, evictions and bytes moved must be equal to the bit.
"""

import pytest

from tierline.base.clock import FOREVER_PS
from tierline.scheduling.chunking import ChunkSizer
from tierline.scheduling.scheduler import Scheduler
from tierline.sim.fleet import Fleet
from tierline.sim.record import FINISHED, REFUSED
from worlds import World, world

COLUMNS = ("first_ps", "finish_ps", "itl_max_ps", "cached_tokens", "loaded_tokens", "preemptions")
FAST, ALL, CONTROLS = 150, 3000, 400


def outcome(fleet: Fleet) -> dict[str, object]:
    """All that a run left behind, besides its steps."""
    facts: dict[str, object] = {name: getattr(fleet.requests, name) for name in COLUMNS}
    for replica in fleet.replicas:
        scheduler = replica.scheduler
        facts[f"memory {replica.number}"] = (
            scheduler.pages.free,
            [tier.evicted_blocks for tier in scheduler.index.tiers],
            [tier.stored_blocks for tier in scheduler.index.tiers],
            replica.totals.moved_bytes,
        )
    return facts


def run(subject: World, repeats_max: int, *, check: bool) -> tuple[list[object], dict[str, object]]:
    fleet, recorder = subject.fleet(repeats_max)
    if check:  # the invariants of every owner, whenever somebody is about to decide
        decide = fleet._decide

        def checked(now_ps: int) -> None:
            for replica in fleet.replicas:
                replica.scheduler.check()
            decide(now_ps)

        fleet._decide = checked  # type: ignore[method-assign]
    fleet.run()
    for replica in fleet.replicas:
        replica.scheduler.check()
        assert replica.scheduler.idle, "somebody was left"
        for link in replica.links.values():
            link.check()
    assert set(fleet.requests.outcome) <= {FINISHED, REFUSED}
    return sorted(recorder.steps, key=lambda entry: entry[:2]), outcome(fleet)


def difference(seed: int) -> str:
    """What differs between one world run in three ways; empty when nothing does."""
    subject = world(seed)
    whole = run(subject, FOREVER_PS, check=seed % 4 == 0)
    for repeats_max in (1, 3):
        single = run(subject, repeats_max, check=seed % 4 == 0)
        if whole[0] != single[0]:
            pairs = zip(whole[0], single[0], strict=False)
            return str(next(((a, b) for a, b in pairs if a != b), "one took more steps"))
        for name, fact in whole[1].items():
            if fact != single[1][name]:
                return name
    return ""


@pytest.mark.parametrize("first", range(0, FAST, 50))
def test_repeats_are_single_steps(first):
    differing = {seed: why for seed in range(first, first + 50) if (why := difference(seed))}

    assert differing == {}


FOUND = {
    335: "a prompt alone held twice what it had computed beside another, and never ended",
    2631: "prompt steps took pages that streams standing still were going to take",
}


@pytest.mark.parametrize("seed", FOUND)
def test_worlds_that_once_went_wrong(seed):
    assert difference(seed) == "", FOUND[seed]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FAST, ALL, 150))
def test_repeats_are_single_steps_in_thousands_of_worlds(first):
    differing = {seed: why for seed in range(first, first + 150) if (why := difference(seed))}

    assert differing == {}


def notices(seeds: range) -> bool:
    """Whether any of these worlds tells repeats from single steps, or breaks an invariant."""
    for seed in seeds:
        try:
            if difference(seed):
                return True
        except AssertionError:
            return True
    return False


def never(*_: object) -> bool:
    return False


def all_of_it(_: Scheduler, step: object, repeats: int) -> int:
    return repeats


GUARDS = {
    "an arrival ends repeats": (Scheduler, "add", lambda s, q: ADD(s, q) and False),
    "memory bounds repeats": (Scheduler, "_memory_horizon", all_of_it),
    "a landing ends repeats": (Scheduler, "_woken", lambda s, t: WOKEN(s, t) and False),
    "a chunk shrinks as its prompt grows": (ChunkSizer, "holds_for", lambda *_: FOREVER_PS),
    "only what is free may be grown into": (
        Scheduler,
        "_free_before_writing_back",
        lambda s: s.pages.free + s.pages.total,
    ),
    "what lands wakes who waits": (Scheduler, "landed", lambda s, t: LANDED(s, t) and False),
}
ADD, WOKEN, LANDED = Scheduler.add, Scheduler._woken, Scheduler.landed


@pytest.mark.parametrize("guard", GUARDS)
def test_a_guard_that_is_gone_is_noticed(guard, monkeypatch):
    """Negative controls: without the guard, some world must differ."""
    owner, name, broken = GUARDS[guard]
    monkeypatch.setattr(owner, name, broken)

    assert notices(range(CONTROLS))
