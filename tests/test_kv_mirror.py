"""What the scheduler counts is what the executor names, and every token is read back as written.

The executor here holds a real memory of small numbers instead of tensors.  It does what an
engine must do around a step, in this order: carry out what must leave, start what must come,
bind blocks, read all that a step attends to, write what it computes, and let windows slide.
"""

from random import Random
from typing import Any

import pytest

from tierline.base.clock import PS_PER_MS
from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.kv.chain import chain_of, salt
from tierline.kv.groups import CacheGroup, CacheLayout
from tierline.kv.names import BlockNames
from tierline.kv.pages import Pages
from tierline.kv.pool import BlockPool
from tierline.kv.prefix import PrefixIndex
from tierline.kv.transfer import DEVICE, Transfer
from tierline.perf.line import StepLine
from tierline.perf.step import Layout, StepCost
from tierline.scheduling.policy import FCFS, TIERLINE, Policy
from tierline.scheduling.scheduler import Limits, Scheduler
from tierline.scheduling.sequence import DONE, LOADING, Sequence
from tierline.scheduling.step import Step

B = 4


def layout(*groups: tuple[int, int | None], state_pages: int = 0) -> CacheLayout:
    return CacheLayout(
        groups=tuple(CacheGroup(pages_per_block=p, window_tokens=w) for p, w in groups),
        block_tokens=B,
        page_bytes=1,
        state_pages=state_pages,
    )


LAYOUTS = {
    "full": layout((1, None)),
    "alternating": layout((1, None), (2, 10)),
    "window": layout((1, 7)),
    "state": layout((1, None), state_pages=3),
}


def line() -> StepLine:
    cost = StepCost(
        load_model("llama-3.1-8b"), load_gpu("h100-sxm"), Layout(weights="bf16", kv="bf16", tp=1)
    )
    return StepLine(cost, tokens_max=64)


LINE = line()


class NamingScheduler(Scheduler):
    """Says whose blocks are given back just before they are free for others to write."""

    machine: "NamingExecutor"

    def _give_back(self, s: Sequence) -> None:
        self.machine.given_back(s)
        super()._give_back(s)


class NamingExecutor:
    """One instance with names: a scheduler, a memory, and transfers that take some steps."""

    def __init__(
        self, layout: CacheLayout, policy: Policy, *, pages: int, capacities: tuple[int, ...]
    ) -> None:
        self.names = BlockNames(BlockPool(pages), layout)
        self.pages = Pages(pages)
        self.index = PrefixIndex(
            self.pages,
            block_tokens=B,
            pages_per_block=layout.pages_per_block,
            block_bytes=1,
            capacities=capacities,
            names=self.names,
        )
        self.scheduler = NamingScheduler(
            pages=self.pages,
            index=self.index,
            layout=layout,
            line=LINE,
            policy=policy,
            limits=Limits(batch_tokens=24, sequences_max=6, chunk_tokens=10, chunk_tokens_min=4),
            reload_ps=lambda tier, size_bytes, now_ps: tier * size_bytes,
        )
        self.scheduler.machine = self
        self.chains: dict[int, Any] = {}  # what each prompt says, whatever is shared of it
        self.content: dict[tuple[int, int], Any] = {}
        self.flying: list[Transfer] = []
        self.bound: dict[int, Sequence] = {}  # sequences with names
        self.now_ps = 0
        self.seen: dict[str, int] = {"reads": 0, "adopts": 0, "parked": 0}

    # Contents: what each slot must hold

    def token(self, s: Sequence, position: int) -> Any:
        chain = self.chains[s.id]
        if chain is not None and position < len(chain) * B:
            return (chain[position // B], position % B)
        return (s.id, position)

    def write(self, s: Sequence, first: int, last: int) -> None:
        for group, table in enumerate(self.names.tables(s.id)):
            for position in range(max(first, table.first_token), last):
                block, offset = divmod(position, B)
                for part, page in enumerate(table.block(block)):
                    assert self.names.pool.references(page) == 1  # INV-KV-2
                    self.content[page, offset] = (group, part, self.token(s, position))

    def read(self, s: Sequence, tokens: int) -> None:
        """All that the next token of `s` attends to, given `tokens` cached."""
        groups = self.names.layout.groups
        for number, (table, group) in enumerate(zip(self.names.tables(s.id), groups, strict=True)):
            window = group.window_tokens or tokens + 1
            for position in range(max(0, tokens - window + 1), tokens):
                block, offset = divmod(position, B)
                for part, page in enumerate(table.block(block)):
                    assert self.content[page, offset] == (number, part, self.token(s, position))
                self.seen["reads"] += 1

    def run_slots(self, run: Any) -> dict[tuple[int, int], Any]:
        """What the pages of a run must hold."""
        slots = {}
        for number, pages in enumerate(self.names.run_pages(run)):
            width = self.names.layout.groups[number].pages_per_block
            assert len(pages) == run.blocks * width
            for at, page in enumerate(pages):
                block, part = divmod(at, width)
                for offset in range(B):
                    token = (run.chain[run.start + block], offset)
                    slots[page, offset] = (number, part, token)
        return slots

    # What an executor does

    def given_back(self, s: Sequence) -> None:
        if s.id not in self.bound:
            return
        if s.parked_tokens and s.state not in (LOADING, DONE):  # copied out, then overwritten
            self.read(s, s.parked_tokens)
            self.seen["parked"] += 1
        del self.bound[s.id]

    def bind(self, s: Sequence, tokens: int) -> None:
        if s.id not in self.bound:
            self.bound[s.id] = s
            self.seen["adopts"] += s.run is not None
        assert self.names.grow(s.id, tokens) == []  # nobody forks here

    def start(self, transfers: list[Transfer]) -> None:
        for transfer in transfers:
            if transfer.kind == "swap-out":
                transfer.state = "done"
                continue
            if transfer.kind == "swap-in":
                (s,) = transfer.waiters
                self.bound[s.id] = s
            self.flying.append(transfer)

    def land(self, transfer: Transfer, *, lost: bool = False) -> None:
        self.flying.remove(transfer)
        transfer.state = "cancelled" if lost else "done"
        if transfer.source == DEVICE:
            for run in transfer.runs:  # still there, for as long as it is being read
                for slot, content in self.run_slots(run).items():
                    assert self.content[slot] == content
        elif transfer.kind == "swap-in" and not lost:
            (s,) = transfer.waiters
            if s.state != DONE:
                self.write(s, 0, s.parked_tokens)
        elif transfer.target == DEVICE and not lost:
            for run in transfer.runs:
                self.content.update(self.run_slots(run))
        if lost:
            self.scheduler.lost(transfer, self.now_ps)
        else:
            self.scheduler.landed(transfer)

    def compute(self, step: Step) -> None:
        advancing = list(step.chunks)
        if step.decodes:
            advancing += [(s, 1) for s in step.decoding.values()]
        for s, tokens in advancing:
            done = self.length(s)
            self.bind(s, done + tokens)
            self.read(s, done)
            self.write(s, done, done + tokens)

    def length(self, s: Sequence) -> int:
        ticks = self.scheduler.tick - s.joined_tick if s.id in self.scheduler.decoding else 0
        return s.cached_tokens + ticks

    def step(self, outputs: dict[int, int]) -> bool:
        """One step; whether there was something to do."""
        step = self.scheduler.next_step(self.now_ps, 1)
        self.start(step.transfers)
        if step.empty:
            return False
        self.compute(step)
        self.now_ps += PS_PER_MS
        finished = [
            s for s in step.decoding.values() if step.decodes and self.made(s) + 1 == outputs[s.id]
        ]
        finished += [
            s
            for s, tokens in step.chunks
            if s.cached_tokens + tokens == s.target_tokens
            and s.generated_tokens + 1 == outputs[s.id]
        ]
        self.scheduler.complete(step, 1, finished, self.now_ps)
        for i in self.bound:
            self.names.slide(i)
        return True

    def made(self, s: Sequence) -> int:
        return s.generated_tokens + self.scheduler.tick - s.joined_tick

    def check(self) -> None:
        self.names.check()
        self.scheduler.check()
        free, counted = self.names.pool.blocks_free, self.pages.free
        twice = any(s.duplicate_pages for s in self.bound.values())
        windowed = self.names.layout.windowed
        assert free == counted or (free > counted and twice and windowed)  # INV-KV-4


def requests(rng: Random, count: int, *, shared: bool) -> list[tuple[Sequence, int]]:
    """Prompts that continue a few documents, and how much each will say."""
    start = salt(model_revision="m")
    documents = [[rng.randrange(1000) for _ in range(60)] for _ in range(3)]
    drawn = []
    for number in range(count):
        prefix = rng.choice(documents)[: rng.randrange(0, 50)]
        tokens = prefix + [rng.randrange(1000) for _ in range(rng.randrange(1, 20))]
        sequence = Sequence(
            number,
            arrival_ps=0,
            prompt_tokens=len(tokens),
            output_max_tokens=20,
            due_ps=rng.randrange(1, 400) * PS_PER_MS,
            chain=chain_of(tokens, block_tokens=B, start=start) if shared else None,
        )
        drawn.append((sequence, rng.randrange(1, 20)))
    return drawn


def serve(
    seed: int, layout: CacheLayout, policy: Policy, *, capacities: tuple[int, ...]
) -> NamingExecutor:
    """A random run to its end, with landings, losses and cancellations in between."""
    rng = Random(seed)
    pages = 45 * layout.pages_per_block + 6 * layout.state_pages
    machine = NamingExecutor(layout, policy, pages=pages, capacities=capacities)
    drawn = requests(rng, 40, shared=layout.shares_prefixes)
    outputs = {s.id: output for s, output in drawn}
    coming, here = [s for s, _ in drawn], []
    for _ in range(3000):
        while coming and rng.random() < 0.3:
            here.append(coming.pop())
            here[-1].arrival_ps = machine.now_ps
            machine.chains[here[-1].id] = here[-1].chain
            machine.scheduler.add(here[-1])
        busy = machine.step(outputs)
        machine.start(machine.index.outbox)
        machine.index.outbox = []
        for transfer in list(machine.flying):
            if rng.random() < 0.4:
                machine.land(transfer, lost=rng.random() < 0.1)
        if here and rng.random() < 0.02 and (s := rng.choice(here)).state != DONE:
            machine.scheduler.cancel(s)
        machine.check()
        if not busy and not coming and machine.scheduler.idle and not machine.flying:
            break
        machine.now_ps += PS_PER_MS
    assert machine.scheduler.idle
    assert not machine.bound
    return machine


DEVICE_ONLY: tuple[int, ...] = ()
CASES = [(name, DEVICE_ONLY) for name in sorted(LAYOUTS)]
CASES += [(name, tiers) for name in ("full", "state") for tiers in ((20,), (10, 40))]


@pytest.mark.parametrize("policy", [FCFS, TIERLINE], ids=lambda p: p.name)
@pytest.mark.parametrize(("name", "capacities"), CASES)
def test_counts_are_names_and_tokens_are_read_back(name, capacities, policy):
    seen: dict[str, int] = {}
    for seed in range(6):
        machine = serve(seed, LAYOUTS[name], policy, capacities=capacities)
        for what, count in machine.seen.items():
            seen[what] = seen.get(what, 0) + count

    assert seen["reads"] > 1000
    assert seen["adopts"] > 0 or not LAYOUTS[name].shares_prefixes
    assert seen["parked"] > 0 or not (policy.swaps and capacities)


def never_slide(names: BlockNames, sequence_id: int) -> None:
    """Windows keep everything."""


def keep_the_names(names: BlockNames, sequence_id: int) -> None:
    """What is counted as free stays bound."""


def publish_the_first_blocks(names: BlockNames, i: int, run: Any, first: int, blocks: int) -> None:
    PUBLISH(names, i, run, 0, blocks)


PUBLISH = BlockNames.publish


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (BlockNames, "slide", never_slide),
        (BlockNames, "release", keep_the_names),
        (BlockNames, "publish", publish_the_first_blocks),
    ],
)
def test_a_mirror_that_is_bent_is_seen(monkeypatch, owner, name, broken):
    """Negative control: a call that is forgotten or wrong does not go unnoticed."""
    monkeypatch.setattr(owner, name, broken)

    with pytest.raises((AssertionError, KeyError)):
        serve(0, LAYOUTS["alternating"], FCFS, capacities=())
