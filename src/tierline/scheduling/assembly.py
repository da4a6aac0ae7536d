"""One instance's scheduler with its KV memory, put together once for whoever carries out steps.

The simulator's replicas and the engine both come here, so that equal limits, memory and prices
mean equal decisions.  Whoever really holds memory asks for block names.

Invariants
    INV-ENG-4  engine and simulator, given the same requests and one clock, take the same steps
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from tierline.base.clock import PS_PER_S
from tierline.kv.groups import CacheLayout
from tierline.kv.link import Link
from tierline.kv.names import BlockNames
from tierline.kv.pages import Pages
from tierline.kv.placement import PLACEMENTS
from tierline.kv.pool import BlockPool
from tierline.kv.prefix import PrefixIndex
from tierline.kv.transfer import DEVICE, DRAM, NVME, REMOTE
from tierline.perf.line import StepLine
from tierline.scheduling.adapters import Adapters
from tierline.scheduling.policy import Policy
from tierline.scheduling.scheduler import Limits, Scheduler

DEEP_TOKENS = 1 << 16  # where the price of recomputing is taken a second time
Links = Mapping[tuple[int, int], Link]


def assemble(
    *,
    layout: CacheLayout,
    pages_total: int,
    line: StepLine,
    policy: Policy,
    limits: Limits,
    block_bytes: int,
    tier_blocks: Seq[int] = (0, 0, 0),
    links: Links | None = None,
    placement: str = "cost-aware",
    tenant_weights: Mapping[str, int] | None = None,
    adapters: Adapters | None = None,
    named: bool = False,
) -> Scheduler:
    """A scheduler over empty memory.

    `block_bytes` is a block on all accelerators together: what a transfer carries.
    `tier_blocks` are blocks of DRAM, NVMe and remote memory, and `links` reach them.  With
    `named` every page has a name besides being counted.
    """
    pages = Pages(pages_total)
    shallow_s, deep_s = _recompute_s(layout, line, limits)
    reloads_s = _reloads_s(layout, limits, links or {}, tier_blocks, block_bytes)
    # A tier from which nothing comes faster than it is computed would only take memory.
    capacities = [
        capacity if reload_s < deep_s else 0
        for capacity, reload_s in zip(tier_blocks, reloads_s, strict=True)
    ]
    index = PrefixIndex(
        pages,
        block_tokens=layout.block_tokens,
        pages_per_block=layout.pages_per_block,
        block_bytes=block_bytes,
        capacities=capacities,
        placement=PLACEMENTS[placement](),
        penalties_s=(shallow_s, (deep_s - shallow_s) / (DEEP_TOKENS // layout.block_tokens)),
        reloads_s=reloads_s,
        names=BlockNames(BlockPool(pages_total), layout) if named else None,
    )
    return Scheduler(
        pages=pages,
        index=index,
        layout=layout,
        line=line,
        policy=policy,
        limits=limits,
        tenant_weights=dict(tenant_weights) if tenant_weights is not None else None,
        adapters=adapters,
    )


def _blocks_at_once(layout: CacheLayout, limits: Limits) -> int:
    return max(limits.chunk_tokens // layout.block_tokens, 1)


def _recompute_s(layout: CacheLayout, line: StepLine, limits: Limits) -> tuple[float, float]:
    """Seconds to compute a block at the start of a prompt, and deep in one.

    The price of a whole chunk, shared by its blocks.
    """
    blocks = _blocks_at_once(layout, limits)
    shallow_s, deep_s = (
        line.prefill_ps(blocks * layout.block_tokens, past=past, chunk=limits.chunk_tokens)
        / blocks
        / PS_PER_S
        for past in (0, DEEP_TOKENS)
    )
    return shallow_s, deep_s


def _reloads_s(
    layout: CacheLayout, limits: Limits, links: Links, tier_blocks: Seq[int], block_bytes: int
) -> list[float]:
    """Seconds to bring a block up again from each tier, as one of a whole chunk's."""
    blocks = _blocks_at_once(layout, limits)
    return [
        links[(tier, DEVICE)].duration_ps(blocks * block_bytes) / blocks / PS_PER_S
        if capacity
        else 0.0
        for tier, capacity in zip((DRAM, NVME, REMOTE), tier_blocks, strict=True)
    ]
