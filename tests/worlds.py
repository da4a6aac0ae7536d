"""Small random worlds: a workload, an instance, a policy, all from one seed.

They are biased towards trouble: pools that hardly hold one request, prompts that share
documents, deadlines that cannot be met, tiers that are too small.
"""

from array import array
from dataclasses import dataclass, field, replace
from random import Random

from tierline.base.clock import FOREVER_PS, PS_PER_MS, PS_PER_S
from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.catalog.tier import TierSpec
from tierline.kv.groups import CacheGroup, CacheLayout
from tierline.kv.transfer import DRAM, NVME
from tierline.perf.line import StepLine
from tierline.perf.step import Layout, StepCost
from tierline.scheduling.policy import Policy
from tierline.scheduling.profiles import POLICIES
from tierline.scheduling.scheduler import Limits
from tierline.scheduling.sequence import Sequence
from tierline.scheduling.step import Step
from tierline.sim.fleet import Fleet
from tierline.sim.instance import Instance
from tierline.sim.record import Requests
from tierline.sim.replica import Replica

PROMPTS = (1, 3, 17, 64, 100, 300, 900, 2000)
OUTPUTS = (1, 2, 5, 40, 150)
COST = StepCost(
    load_model("llama-3.1-70b"), load_gpu("h100-sxm"), Layout(weights="bf16", kv="bf16", tp=4)
)
WINDOWED = StepCost(
    load_model("gemma-3-27b"), load_gpu("h100-sxm"), Layout(weights="bf16", kv="bf16")
)
LINES = {id(cost): StepLine(cost, tokens_max=2000) for cost in (COST, WINDOWED)}


@dataclass
class Recorder:
    """Every step as it was decided, one entry a step, however many were done at once."""

    steps: list[tuple[object, ...]] = field(default_factory=list)
    number: dict[int, int] = field(default_factory=dict)

    def stepped(
        self, replica: Replica, step: Step, *, repeats: int, start_ps: int, now_ps: int
    ) -> None:
        chunks = tuple((s.id, tokens) for s, tokens in step.chunks)
        for j in range(repeats):
            n = self.number[replica.number] = self.number.get(replica.number, 0) + 1
            preempted = tuple(s.id for s in step.preempted) if j == 0 else ()
            self.steps.append((replica.number, n, step.decodes, chunks, preempted))

    def routed(self, replica: Replica, sequence: Sequence, now_ps: int) -> None:
        """Not of interest here."""


@dataclass
class World:
    """One seed's workload, instance and policy."""

    instance: Instance
    policy: Policy
    requests: list[Sequence]
    outputs: "array[int]"
    replicas: int
    tenants: bool

    def fleet(self, repeats_max: int = FOREVER_PS) -> tuple[Fleet, Recorder]:
        """The same world again, with steps repeated at most so often."""
        line = LINES[id(self.instance.cost)]
        weights = {} if self.tenants else None
        members = [
            self.instance.replica(n, self.policy, line=line, tenant_weights=weights)
            for n in range(self.replicas)
        ]
        fleet = Fleet(
            members,
            arrivals=iter([s.anew() for s in self.requests]),
            outputs=self.outputs,
            requests=Requests(len(self.requests)),
            route=lambda s, _now: s.id % self.replicas,
            repeats_max=repeats_max,
        )
        recorder = Recorder()
        fleet.watch = recorder  # type: ignore[assignment]
        return fleet, recorder


def world(seed: int, *, policies: tuple[str, ...] = ()) -> World:
    """The world of a seed."""
    rng = Random(seed)
    block = rng.choice((1, 4, 16, 64))
    policy = POLICIES[rng.choice(policies or tuple(POLICIES))]
    windowed = rng.random() < 0.25
    tiered = rng.random() < 0.5
    chunk, slots = rng.choice((64, 128, 512)), rng.choice((3, 8, 64))
    layout = _layout(block, windowed=windowed)
    sizes = (0, 0, 0)
    if tiered:
        dram = rng.choice((500, 3000, 20_000)) // block
        sizes = (dram, rng.choice((0, 8000, 50_000)) // block, 0)
    pool_blocks = max(rng.choice((2600, 4000, 9000, 30_000)) // block, 4)
    instance = Instance(
        name="small",
        cost=WINDOWED if windowed else COST,
        layout=layout,
        pages_total=pool_blocks * layout.pages_per_block,
        limits=Limits(
            batch_tokens=chunk,
            sequences_max=min(slots, chunk // 2),
            chunk_tokens=chunk,
            chunk_tokens_min=32,
        ),
        tier_blocks=sizes,
        tier_specs={DRAM: _spec("dram", 20e9), NVME: _spec("nvme", 3e9)},
        placement=rng.choice(("lru", "cost-aware")),
    )
    requests = _requests(rng, block, shared=rng.random() < 0.7, paced=seed % 2 == 1)
    outputs = array("q")
    for s in requests:
        early = rng.randrange(s.output_max_tokens) if rng.random() < 0.3 else 0
        outputs.append(max(1, s.output_max_tokens - early))
    return World(
        instance=instance,
        policy=policy,
        requests=requests,
        outputs=outputs,
        replicas=1 + (seed % 5 == 0),
        tenants=rng.random() < 0.4,
    )


def _layout(block: int, *, windowed: bool) -> CacheLayout:
    groups = [CacheGroup(pages_per_block=1)]
    if windowed:
        groups.append(CacheGroup(pages_per_block=3, window_tokens=150))
    return CacheLayout(groups=tuple(groups), block_tokens=block, page_bytes=block * 80_000)


def _spec(name: str, rate: float) -> TierSpec:
    return TierSpec(
        name=name,
        capacity_bytes=0,
        read_bytes_per_s=rate,
        write_bytes_per_s=rate,
        latency_s=2e-5,
        shared_by_gpus=1,
        source="made up",
    )


def _requests(rng: Random, block: int, *, shared: bool, paced: bool) -> list[Sequence]:
    """Bursty arrivals of three classes, whose prompts continue each other's documents.

    `paced`: they have targets for the mean of their gaps instead of for every gap.
    """
    rate = rng.choice((0.5, 2, 8, 50))
    now_ps, documents, requests = 0, [], []
    for i in range(rng.choice((5, 20, 60, 120))):
        if rng.random() < 0.8:
            now_ps += int(rng.expovariate(rate) * PS_PER_S)
        prompt = rng.choice(PROMPTS) + rng.randrange(3)
        chain: list[int] = []
        if documents and rng.random() < 0.7:
            base = rng.choice(documents)
            chain = base[: rng.randrange(len(base) + 1)][: prompt // block]
        chain = chain + [i * 1_000_000 + j for j in range(prompt // block - len(chain))]
        documents.append(chain)
        rank = rng.randrange(3)
        target_ps = (30 * PS_PER_MS, 60 * PS_PER_MS, FOREVER_PS)[rank]
        requests.append(
            Sequence(
                i,
                arrival_ps=now_ps,
                prompt_tokens=prompt,
                output_max_tokens=rng.choice(OUTPUTS),
                rank=rank,
                due_ps=now_ps + (1, 3, 100)[rank] * PS_PER_S,
                itl_ps=FOREVER_PS if paced else target_ps,
                tpot_ps=target_ps if paced else FOREVER_PS,
                tenant=str(rng.randrange(3)),
                chain=chain if shared and chain else None,
            )
        )
    return requests


def with_policy(base: World, **changes: object) -> World:
    """The same world under a policy with some fields changed."""
    return replace(base, policy=replace(base.policy, **changes))  # type: ignore[arg-type]
