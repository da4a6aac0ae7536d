"""Blocks in tiers: residency and index agree whatever happens, no tier holds more than it can,
every transfer ends, nothing that is needed is forgotten, no salt finds another's blocks, and
a first token is never later for having tiers."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cache_driver import Cache, Prompt
from test_repeats import run as run_world
from tierline.base.clock import FOREVER_PS, PS_PER_S
from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.kv.chain import chain_of, salt
from tierline.kv.placement import Arc, CostAware, Lfu, Lru
from tierline.kv.prefix import PrefixIndex, Run
from tierline.kv.transfer import DEVICE, DRAM, REMOTE, Transfer
from tierline.perf.step import Layout, StepCost
from tierline.scheduling.scheduler import Limits, Scheduler
from tierline.sim.api import simulate
from tierline.sim.fleet import Fleet
from tierline.sim.instance import Instance, build_instance, with_adapters
from tierline.sim.record import FINISHED
from tierline.sim.replica import Replica
from tierline.workload.request import Request
from tierline.workload.trace import read_trace
from worlds import world

PAGES, CAPACITIES = 24, (10, 20, 16)


# --- the owner of residency, step by step ---------------------------------------------------


class Tiers(RuleBasedStateMachine):
    """Prompts come, compute, and go; transfers land or are lost; tiers shrink and are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: Any = None
        self.sent: dict[int, Transfer] = {}

    @precondition(lambda self: self.cache is None)
    @rule(
        capacities=st.sampled_from([(), CAPACITIES[:1], CAPACITIES[:2], CAPACITIES, (0, 20)]),
        placement=st.sampled_from([Lru, Lfu, Arc, CostAware]),
    )
    def begin(self, capacities, placement):
        self.cache = Cache(
            PAGES, capacities=capacities, placement=placement(), penalties_s=(1.0, 0.1)
        )

    @precondition(lambda self: self.cache is not None)
    @rule(document=st.integers(0, 3), shared=st.integers(0, 12), own=st.integers(1, 6))
    def come(self, document, shared, own):
        self.cache.made += 1
        chain = [document * 100 + i for i in range(shared)]
        chain += [1000 * self.cache.made + i for i in range(own)]
        self.cache.come(chain)

    @precondition(lambda self: self.cache and self.cache.here)
    @rule(which=st.integers(0, 99), blocks=st.integers(1, 8))
    def compute(self, which, blocks):
        self.cache.compute(self.cache.here[which % len(self.cache.here)], blocks)

    @precondition(lambda self: self.cache and self.cache.here)
    @rule(which=st.integers(0, 99))
    def go(self, which):
        prompt = self.cache.here[which % len(self.cache.here)]
        if not prompt.waits:
            self.cache.go(prompt)

    @precondition(lambda self: self.cache is not None)
    @rule(blocks=st.integers(1, 10))
    def write_back(self, blocks):
        self.cache.index.evict(DEVICE, blocks)
        self.cache.take_off()

    @precondition(lambda self: self.cache and self.cache.flying)
    @rule(which=st.integers(0, 99), lost=st.booleans())
    def end(self, which, lost):
        transfer = self.cache.flying[which % len(self.cache.flying)]
        held = [run for run in transfer.runs if run.holds]
        self.cache.land(transfer, lost=lost and not held)

    @invariant()
    def sound(self):
        if self.cache is None:
            return
        cache = self.cache
        cache.check()
        for transfer in cache.flying:
            self.sent[transfer.serial] = transfer
        for prompt in cache.here:  # nothing is forgotten that a sequence needs
            found = cache.index.found(prompt.chain, prompt.published_blocks)
            assert prompt.run is None or found == prompt.published_blocks

    def teardown(self):
        if self.cache is not None:
            self.cache.land_all()
            for prompt in list(self.cache.here):
                self.cache.go(prompt)
            self.sound()
            assert all(
                transfer.state == "done" or transfer.state == "cancelled"
                for transfer in self.sent.values()
            )


TestTiers = Tiers.TestCase
TestTiers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def keep_the_count(index: PrefixIndex, run: Run, tier: int) -> None:
    run.mask |= 1 << tier


def forget_the_held(index: PrefixIndex, run: Run | None) -> None:
    """Holding holds nothing."""


CONTROLS: list[tuple[str, Callable[..., Any]]] = [
    ("_set", keep_the_count),  # INV-KV-23: children by tier
    ("hold", forget_the_held),  # INV-KV-24
    ("make_room", lambda index, tier, blocks: True),  # INV-KV-22
    ("_left", lambda index, run: setattr(run, "leaving", None)),  # INV-KV-21
]


def trouble(seed: int) -> None:
    """A random life of a cache, with everything checked."""
    rng = Random(seed)
    cache = Cache(PAGES, capacities=CAPACITIES[:2], placement=CostAware())
    for number in range(150):
        document = rng.randrange(4) * 100
        shared = [document + i for i in range(rng.randrange(12))]
        cache.come([*shared, *(1000 * (number + 1) + i for i in range(rng.randrange(1, 6)))])
        for prompt in list(cache.here):
            cache.compute(prompt, rng.randrange(1, 9))
            if not prompt.waits and rng.random() < 0.5:
                cache.go(prompt)
        cache.index.evict(DEVICE, rng.randrange(6))
        cache.take_off()
        if cache.flying and rng.random() < 0.7:
            cache.land(cache.flying[0])
        cache.check()
        needs_are_met(cache.here, cache)


def needs_are_met(here: list[Prompt], cache: Cache) -> None:
    for prompt in here:
        if prompt.run is not None:
            found = cache.index.found(prompt.chain, prompt.published_blocks)
            assert found == prompt.published_blocks, "INV-KV-24"


def test_a_random_life_is_sound():
    for seed in range(10):
        trouble(seed)


@pytest.mark.parametrize(
    ("name", "broken"), CONTROLS, ids=lambda c: c if isinstance(c, str) else ""
)
def test_the_checks_notice_a_mechanism_that_is_off(name, broken, monkeypatch):
    monkeypatch.setattr(PrefixIndex, name, broken)

    with pytest.raises((AssertionError, KeyError, ValueError, AttributeError)):
        test_a_random_life_is_sound()


# --- salts ----------------------------------------------------------------------------------

SALTS = st.builds(
    salt,
    model_revision=st.sampled_from(["m", "m2"]),
    tenant=st.sampled_from(["", "a", "ab"]),
    adapter=st.sampled_from(["", "b@1", "b@2"]),
)
TOKENS = st.lists(st.integers(0, 3), min_size=2, max_size=12)


def found_across(first: tuple[bytes, list[int]], second: tuple[bytes, list[int]]) -> int:
    cache = Cache(40)
    for start, tokens in (first, second):
        cached = cache.serve(chain_of(tokens, block_tokens=1, start=start))
    return cached


@given(first=SALTS, second=SALTS, tokens=TOKENS, others=TOKENS)
def test_no_salt_finds_another_s_blocks(first, second, tokens, others):
    shared = next((i for i, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), None)
    shared = min(len(tokens), len(others)) if shared is None else shared

    assert found_across((first, tokens), (second, others)) == (shared if first == second else 0)


def test_without_a_salt_tenants_would_share():
    nothing = salt(model_revision="m")

    assert found_across((nothing, [1, 2]), (nothing, [1, 2])) == 2
    assert found_across((nothing, [1, 2]), (salt(model_revision="m", tenant="a"), [1, 2])) == 0


# --- first tokens ---------------------------------------------------------------------------

SIZES_TOKENS = ((200_000, 0), (800_000, 0), (400_000, 2_000_000))


def instance(*, dram_tokens: int = 0, nvme_tokens: int = 0, rate: float | None = None) -> Instance:
    cost = StepCost(
        load_model("llama-3.1-70b"), load_gpu("h100-sxm"), Layout(weights="bf16", kv="bf16", tp=4)
    )
    built = build_instance(
        cost,
        name="tiered",
        block_tokens=512,
        limits=Limits(batch_tokens=512, sequences_max=128, chunk_tokens=512),
    )
    specs = built.tier_specs
    if rate is not None:
        specs = {
            tier: replace(spec, read_bytes_per_s=rate, write_bytes_per_s=rate)
            for tier, spec in specs.items()
        }
    return replace(
        built,
        pages_total=462_000 // 512 * built.layout.pages_per_block,
        tier_blocks=(dram_tokens // 512, nvme_tokens // 512, 0),
        tier_specs=specs,
    )


def ttft_s(kind: Instance, requests: list[Request], **options: Any) -> tuple[float, float, int]:
    """Mean and 99th percentile of the time to a first token, and tokens loaded."""
    run = simulate(kind, requests, levels=(), replicas=4, policy="fcfs", **options)
    columns = run.requests
    assert set(columns.outcome) == {FINISHED}
    waits = sorted(
        (first - arrival) / PS_PER_S
        for first, arrival in zip(columns.first_ps, columns.arrival_ps, strict=True)
    )
    mean_s = sum(waits) / len(waits)
    return mean_s, waits[len(waits) * 99 // 100], sum(columns.loaded_tokens)


@pytest.fixture(scope="module")
def conversation(data_dir: Path) -> list[Request]:
    path = data_dir / "traces" / "mooncake_conversation.jsonl.gz"
    return list(islice(read_trace(path), 0, 3000, 2))


def test_first_tokens_are_not_later_for_having_tiers(conversation):
    mean_s, p99_s, _ = ttft_s(instance(), conversation)
    for dram, nvme in SIZES_TOKENS:
        tiered = ttft_s(instance(dram_tokens=dram, nvme_tokens=nvme), conversation)

        assert tiered[2] > 0
        assert tiered[0] < 0.98 * mean_s
        assert tiered[1] <= p99_s


def test_a_tier_that_is_slower_than_computing_is_left_alone(conversation):
    alone = ttft_s(instance(), conversation)
    slow = ttft_s(instance(dram_tokens=800_000, rate=2.5e8), conversation)

    assert slow == alone


def test_behind_a_clogged_link_prompts_are_computed_again(conversation, monkeypatch):
    def clog(fleet: Fleet) -> None:
        for replica in fleet.replicas:
            for (source, target), link in replica.links.items():
                if target == DEVICE and source == DRAM:
                    link.set_rate(0.003, 0)

    kind = instance(dram_tokens=800_000)
    alone = ttft_s(instance(), conversation)
    clogged = ttft_s(kind, conversation, prepare=clog)
    monkeypatch.setattr(
        Scheduler, "_best_cut", lambda self, s, found, device, fetch, now_ps: (found, fetch)
    )
    forced = ttft_s(kind, conversation, prepare=clog)

    assert clogged[0] < 1.02 * alone[0]
    assert forced[0] > 1.1 * clogged[0]


# --- what is lost is computed again ---------------------------------------------------------


def test_a_lost_load_falls_back_to_computing(monkeypatch):
    lost = []

    def lose(replica: Any, transfer: Transfer, now_ps: int) -> None:
        if transfer.kind == "load" and not lost:
            lost.append(transfer)
            transfer.state = "cancelled"
            replica.scheduler.lost(transfer, now_ps)
            replica.cut(now_ps)
        else:
            landed(replica, transfer, now_ps)

    landed = Replica._landed
    monkeypatch.setattr(Replica, "_landed", lose)
    for seed in range(40):
        subject = world(seed)
        if any(subject.instance.tier_blocks):
            run_world(subject, 1, check=True)
            if lost:
                break

    assert lost
    assert all(sequence.preemptions for sequence in lost[0].waiters)


# --- adapters -------------------------------------------------------------------------------

ADAPTERS = {f"a{i}@1": 400_000_000 for i in range(12)}


def fine_tuned(count: int, *, seed: int = 3) -> list[Request]:
    """Requests of which a few adapters get most, and the rest each a little."""
    rng = Random(seed)
    names = sorted(ADAPTERS)
    weights = [1 / (i + 1) for i in range(len(names))]
    now_ns, requests = 0, []
    for _ in range(count):
        now_ns += int(rng.expovariate(8) * 1e9)
        (adapter,) = rng.choices(names, weights)
        requests.append(
            Request(arrival_ns=now_ns, input_tokens=600, output_tokens=60, adapter=adapter)
        )
    return requests


def adapter_gb(kind: Instance, requests: list[Request], *, replicas: int, routing: str) -> float:
    run = simulate(kind, requests, levels=(), replicas=replicas, policy="fcfs", routing=routing)
    assert set(run.requests.outcome) == {FINISHED}
    return sum(totals.moved_bytes.get("adapter", 0) for totals in run.replicas) / 1e9


def adapted(**options: Any) -> Instance:
    return with_adapters(instance(), ADAPTERS, device_bytes=6 * 400_000_000, **options)


def test_routers_that_know_adapters_load_fewer():
    requests = fine_tuned(600)
    blind = adapter_gb(adapted(), requests, replicas=4, routing="round-robin")
    aware = adapter_gb(adapted(), requests, replicas=4, routing="adapter-aware")

    assert aware < 0.7 * blind


def test_adapters_that_are_worth_most_stay():
    requests = fine_tuned(600)
    by_value = adapter_gb(adapted(), requests, replicas=1, routing="round-robin")
    by_recency = adapter_gb(
        replace(adapted(), adapter_order="lru"), requests, replicas=1, routing="round-robin"
    )

    assert by_value < by_recency


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_repeats_are_single_steps_with_adapters(first):
    moved = 0
    for seed in range(first, first + 20):
        rng = Random(seed)
        subject = world(seed)
        specs = subject.instance.tier_specs
        registry = replace(specs[DRAM], name="remote", read_bytes_per_s=1.0)
        subject.instance = replace(
            with_adapters(
                replace(subject.instance, pages_total=subject.instance.pages_total + 4),
                {f"a{i}@1": rng.choice((1, 2, 3)) for i in range(6)},
                device_bytes=rng.choice((3, 6)),
                dram_bytes=rng.choice((0, 4)),
            ),
            adapter_order=rng.choice(("lru", "value")),
            tier_specs={**specs, REMOTE: registry},
            placement=rng.choice(("lru", "lfu", "arc", "cost-aware")),
        )
        for s in subject.requests:
            s.adapter = rng.choice(("", *subject.instance.adapters))
            if s.chain is not None and s.adapter:
                s.chain = [name + (hash_of(s.adapter) << 80) for name in s.chain]
        whole = run_world(subject, FOREVER_PS, check=seed % 4 == 0)

        assert whole == run_world(subject, 1, check=False), seed
        moved += whole[1]["memory 0"][3].get("adapter", 0)

    assert moved > 100


def hash_of(adapter: str) -> int:
    return int(adapter[1]) + 1
