"""Parallel samples share their prompt's blocks, copy the last one, and leak nothing."""

import pytest

from test_kv_mirror import LAYOUTS, B, NamingExecutor
from tierline.base.clock import PS_PER_MS
from tierline.kv.chain import chain_of, salt
from tierline.kv.pool import BlockPool
from tierline.scheduling.policy import FCFS
from tierline.scheduling.sequence import DECODE, DONE, Sequence


def sample_of(number: int, prompt: list[int]) -> Sequence:
    chain = chain_of(prompt, block_tokens=B, start=salt(model_revision="m"))
    return Sequence(
        number, arrival_ps=0, prompt_tokens=len(prompt), output_max_tokens=30, chain=chain
    )


def prefilled(prompt_tokens: int, *, pages: int = 100) -> tuple[NamingExecutor, Sequence]:
    """A machine on which one prompt has just been computed."""
    machine = NamingExecutor(LAYOUTS["full"], FCFS, pages=pages, capacities=())
    parent = sample_of(0, list(range(prompt_tokens)))
    machine.chains[parent.id] = parent.chain
    machine.scheduler.add(parent)
    while parent.state != DECODE:
        machine.step({0: 30})
    return machine, parent


def forked(machine: NamingExecutor, parent: Sequence, count: int) -> list[Sequence]:
    children = [sample_of(n, list(range(parent.prompt_tokens))) for n in range(1, count + 1)]
    for child in children:
        assert machine.scheduler.fork(parent, child)
        machine.bound[child.id] = child
    return children


@pytest.mark.parametrize(("prompt_tokens", "full", "partial"), [(10, 2, 1), (12, 3, 0)])
def test_five_samples_share_the_full_blocks(prompt_tokens, full, partial):
    machine, parent = prefilled(prompt_tokens)
    forked(machine, parent, 4)

    used = machine.pages.total - machine.pages.free
    assert used == full + 5 * partial  # the prompt once, and the last block of each


@pytest.mark.parametrize("prompt_tokens", [10, 12])
def test_samples_go_on_and_leave_nothing(prompt_tokens):
    machine, parent = prefilled(prompt_tokens)
    family = [parent, *forked(machine, parent, 3)]
    lengths = {s.id: 3 + 4 * s.id for s in family}
    copied = 0
    while any(s.state != DONE for s in family):
        step = machine.scheduler.next_step(machine.now_ps, 1)
        for s in step.decoding.values():
            copies = machine.names.grow(s.id, machine.length(s) + 1)
            assert copies is not None
            copied += len(copies)
        machine.now_ps += PS_PER_MS
        finished = [s for s in step.decoding.values() if machine.made(s) + 1 == lengths[s.id]]
        machine.scheduler.complete(step, 1, finished, machine.now_ps)
        machine.scheduler.check()
        machine.names.check()

    assert copied == (3 if prompt_tokens % B else 0)  # the last to write keeps the original
    assert machine.scheduler.idle
    assert machine.names.pool.blocks_free == machine.pages.free


def test_a_fork_without_room_is_refused_and_changes_nothing():
    machine, parent = prefilled(10, pages=10)
    forked(machine, parent, 5)  # two shared blocks, six last ones, and six to grow into: full
    free, holds = machine.pages.free, parent.run.holds
    child = sample_of(9, list(range(10)))

    assert not machine.scheduler.fork(parent, child)
    assert (machine.pages.free, parent.run.holds) == (free, holds)


def test_sharing_a_block_that_is_written_is_noticed(monkeypatch):
    """Negative control: forks that never copy let two sequences write one block."""
    machine, parent = prefilled(10)
    (child,) = forked(machine, parent, 1)
    monkeypatch.setattr(BlockPool, "references", lambda *_: 1)  # "nobody else holds it"

    assert machine.names.grow(parent.id, 11) == []
    assert machine.names.grow(child.id, 11) == []
    monkeypatch.undo()
    block = machine.names.tables(child.id)[0].block(2)
    assert [machine.names.pool.references(page) for page in block] == [2]


@pytest.mark.parametrize("state", ["waiting", "prefill", "decode"])
def test_whoever_is_cancelled_gives_all_back(state):
    machine = NamingExecutor(LAYOUTS["full"], FCFS, pages=100, capacities=())
    s = sample_of(0, list(range(22)))
    machine.chains[s.id] = s.chain
    machine.scheduler.add(s)
    if state != "waiting":
        machine.step({0: 30})
    if state == "decode":
        while s.state != DECODE:
            machine.step({0: 30})
    machine.scheduler.cancel(s)
    machine.scheduler.check()

    assert machine.scheduler.idle
    assert machine.pages.free + machine.index.device_blocks == machine.pages.total
    assert machine.scheduler.next_step(machine.now_ps, 1).empty
