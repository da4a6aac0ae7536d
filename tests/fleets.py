"""Small fleets and workloads for tests of the simulator: milliseconds each, every path used."""

from dataclasses import replace
from functools import cache
from random import Random

from tierline.base.clock import PS_PER_S
from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.kv.transfer import DRAM, NVME, REMOTE
from tierline.perf.step import Layout, StepCost
from tierline.scheduling.scheduler import Limits
from tierline.sim.instance import Instance, build_instance
from tierline.workload.request import Request

BLOCK_TOKENS = 64


@cache
def cost_of(model: str = "llama-3.1-8b", gpu: str = "h100-sxm") -> StepCost:
    return StepCost(load_model(model), load_gpu(gpu), Layout(weights="bf16", kv="bf16", tp=1))


def small_instance(
    *,
    blocks: int = 120,
    tiers: tuple[int, int, int] = (0, 0, 0),  # blocks of DRAM, NVMe, remote
    sequences_max: int = 8,
    batch_tokens: int = 512,
    chunk_tokens: int = 512,
    model: str = "llama-3.1-8b",
    gpu: str = "h100-sxm",
) -> Instance:
    """An instance with so many KV blocks that a handful of requests fill it."""
    sizes = dict(zip((DRAM, NVME, REMOTE), tiers, strict=True))
    built = build_instance(
        cost_of(model, gpu),
        name=f"small {gpu}",
        block_tokens=BLOCK_TOKENS,
        limits=Limits(
            batch_tokens=batch_tokens, sequences_max=sequences_max, chunk_tokens=chunk_tokens
        ),
    )
    return replace(
        built,
        pages_total=blocks * built.layout.pages_per_block,
        tier_blocks=(sizes[DRAM], sizes[NVME], sizes[REMOTE]),
    )


def small_workload(
    rng: Random, *, count: int = 40, rate_rps: float = 60.0, families: int = 6
) -> list[Request]:
    """Conversations that share prefixes, with three classes and two tenants."""
    at_ns, requests = 0, []
    for _ in range(count):
        at_ns += int(rng.expovariate(rate_rps) * 1e9)
        family, blocks = rng.randrange(families), rng.randint(1, 24)
        own = rng.randrange(1 << 30)
        shared = rng.randint(0, blocks)
        names = [family * 1000 + i for i in range(shared)]
        names += [(own << 20) + i for i in range(shared, blocks)]
        requests.append(
            Request(
                arrival_ns=at_ns,
                input_tokens=blocks * BLOCK_TOKENS + rng.randint(0, BLOCK_TOKENS - 1),
                output_tokens=rng.randint(1, 120),
                prefix_blocks=tuple(names),
                tenant=rng.choice(["a", "b"]),
                priority=rng.randrange(3),
            )
        )
    return requests


def seconds(at_ps: int) -> float:
    return at_ps / PS_PER_S
