"""One serving instance as a simulation needs it: its law, its memory, its links.

Built from a `Deployment`, or from parts by the planner while it searches.  A `Replica` is an
instance that lives: many may share one `Instance`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from tierline.base.clock import PS_PER_S
from tierline.base.errors import DoesNotFitError
from tierline.base.names import lookup
from tierline.catalog.deployment import Deployment
from tierline.catalog.formats import kv_format
from tierline.catalog.gpu import GpuSpec
from tierline.catalog.gpus import load_gpu
from tierline.catalog.model import ModelSpec
from tierline.catalog.models import load_model
from tierline.catalog.tier import TierSpec
from tierline.kv.groups import CacheLayout, cache_layout
from tierline.kv.link import Link
from tierline.kv.objects import (
    ObjectStore,
    Order,
    StoredObject,
    least_expected_loss,
    least_recently_used,
)
from tierline.kv.transfer import DEVICE, DRAM, NVME, REMOTE, TIER_NAMES
from tierline.perf.line import LAW, Calibration, Cost, StepLine
from tierline.perf.step import TOKENS_MAX, Layout, StepCost, load_engine
from tierline.scheduling.adapters import Adapters
from tierline.scheduling.assembly import assemble
from tierline.scheduling.policy import Policy
from tierline.scheduling.scheduler import Limits
from tierline.sim.record import ReplicaTotals
from tierline.sim.replica import Replica, Speculation

ADAPTER_ORDERS: dict[str, Order] = {"value": least_expected_loss, "lru": least_recently_used}


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """Everything about an instance that does not change while it serves."""

    name: str
    cost: Cost
    layout: CacheLayout
    pages_total: int
    limits: Limits
    tier_blocks: tuple[int, int, int] = (0, 0, 0)  # DRAM, NVMe, remote
    tier_specs: Mapping[int, TierSpec] = field(default_factory=dict)
    prefix_cache: bool = True
    placement: str = "cost-aware"
    usd_per_hour: float = 0.0
    calibration: Calibration = LAW
    host_s: float = 0.0
    wait_steps: float = 0.0
    acceptance: float = 0.0  # of drafted tokens, when limits.draft_tokens
    draft_s: float = 0.0  # time to draft for one step
    adapters: Mapping[str, int] = field(default_factory=dict)  # bytes by name@digest
    adapter_bytes: tuple[int, int, int] = (0, 0, 0)  # for them on the device, in DRAM, on NVMe
    adapter_order: str = "value"  # who makes room: see ADAPTER_ORDERS
    shared_by: int = 1  # instances on one node that share its DRAM and drives

    @property
    def gpus(self) -> int:
        """Accelerators of one instance."""
        return self.cost.layout.gpus

    @property
    def block_bytes(self) -> int:
        """What a block weighs on all accelerators together: what a transfer carries."""
        per_rank = self.layout.pages_per_block * self.layout.page_bytes
        return per_rank * self.cost.layout.tp

    def line(self, slow: float = 1.0) -> StepLine:
        """Prices of its steps."""
        most = self.limits.batch_tokens + self.limits.sequences_max
        most += self.limits.sequences_max * self.limits.draft_tokens
        return StepLine(
            self.cost,
            tokens_max=min(most, TOKENS_MAX),
            calibration=self.calibration,
            slow=slow,
        )

    def links(self) -> dict[tuple[int, int], Link]:
        """One link each way between the device and every tier, and from tier to tier below.

        Rates are those of the share of a node that the instance has; DRAM lies on the way of
        everything below it, but its rate is several times theirs.
        """
        links: dict[tuple[int, int], Link] = {}
        for tier, spec in self.tier_specs.items():
            share = self.gpus / spec.shared_by_gpus
            latency_ps = round(spec.latency_s * PS_PER_S)
            read = max(int(spec.read_bytes_per_s * share), 1)
            write = max(int(spec.write_bytes_per_s * share), 1)
            name = TIER_NAMES[tier]
            links[(tier, DEVICE)] = Link(f"{name} read", bytes_per_s=read, latency_ps=latency_ps)
            wrote = Link(f"{name} write", bytes_per_s=write, latency_ps=latency_ps)
            for above in range(tier):
                links[(above, tier)] = wrote
        return links

    def replica(
        self,
        number: int,
        policy: Policy,
        *,
        seed: int = 0,
        tenant_weights: Mapping[str, int] | None = None,
        line: StepLine | None = None,
    ) -> Replica:
        """A replica of this instance, empty."""
        line, links = line or self.line(), self.links()
        scheduler = assemble(
            layout=self.layout,
            pages_total=self.pages_total,
            line=line,
            policy=policy,
            limits=self.limits,
            block_bytes=self.block_bytes,
            tier_blocks=self.tier_blocks,
            links=links,
            placement=self.placement,
            tenant_weights=tenant_weights,
            adapters=self._adapters(links),
        )
        totals = ReplicaTotals(
            number=number,
            name=self.name,
            gpus=self.gpus,
            usd_per_hour=self.usd_per_hour,
            pages_total=self.pages_total,
        )
        speculation = None
        if self.limits.draft_tokens:
            speculation = Speculation(
                acceptance=self.acceptance,
                draft_ps=round(self.draft_s * PS_PER_S),
                seed=seed * 1_000_003 + number,
            )
        replica = Replica(
            number,
            scheduler,
            line,
            links=links,
            totals=totals,
            host_ps=round(self.host_s * PS_PER_S),
            wait_steps=self.wait_steps,
            speculation=speculation,
        )
        if any(self.tier_blocks):
            scheduler.reload_ps = replica.reload_ps
        replica.line_at = self.line
        replica.twin = partial(
            self.replica, policy=policy, seed=seed, tenant_weights=tenant_weights, line=line
        )
        return replica

    def _adapters(self, links: Mapping[tuple[int, int], Link]) -> Adapters | None:
        if not self.adapters:
            return None
        items = {}
        for key, size in self.adapters.items():
            name, _, digest = key.rpartition("@")
            items[key] = StoredObject(name=name, digest=digest, kind="adapter", bytes=size)

        def reload_s(tier: int, size: int) -> float:
            return links[(tier, DEVICE)].duration_ps(size) / PS_PER_S

        order = lookup("adapter order", self.adapter_order, ADAPTER_ORDERS)
        return Adapters(ObjectStore(self.adapter_bytes, reload_s=reload_s, order=order), items)


def with_adapters(
    instance: Instance,
    sizes: Mapping[str, int],
    *,
    device_bytes: int,
    dram_bytes: int = 0,
    nvme_bytes: int = 0,
) -> Instance:
    """The same instance serving adapters: their memory is taken from its KV pool.

    `sizes` are bytes by name@digest, on all accelerators together.
    """
    page_bytes = instance.block_bytes // instance.layout.pages_per_block
    pages = instance.pages_total - -(-device_bytes // page_bytes)
    if pages < instance.layout.pages_per_block + instance.layout.state_pages:
        raise DoesNotFitError(
            f"adapters beside the KV cache of {instance.name}",
            needed_bytes=device_bytes,
            available_bytes=instance.pages_total * page_bytes,
            hint="give adapters less device memory",
        )
    return replace(
        instance,
        pages_total=pages,
        adapters=dict(sizes),
        adapter_bytes=(device_bytes, dram_bytes, nvme_bytes),
    )


def instance_of(
    deployment: Deployment, *, model: ModelSpec | None = None, gpu: GpuSpec | None = None
) -> Instance:
    """The instance that a deployment file describes; raises the catalogue's errors."""
    model = model or _model(deployment)
    gpu = gpu or load_gpu(deployment.gpu)
    cut = deployment.parallel
    cost = StepCost(
        model,
        gpu,
        Layout(
            weights=deployment.weight_format,
            kv=deployment.kv_format,
            tp=cut.tp,
            pp=cut.pp,
            dp=cut.dp,
            ep=cut.ep,
        ),
    )
    tiers = {t.name: t.capacity_bytes for t in deployment.tiers if t.enabled}
    speculation = deployment.policies.speculation
    limits, policies = deployment.limits, deployment.policies
    chunk = policies.chunk_tokens if policies.chunked_prefill else limits.batch_tokens_max
    built = build_instance(
        cost,
        name=f"{gpu.name} x{cost.layout.gpus}",
        block_tokens=deployment.kv_block_tokens,
        device_bytes=tiers.get("device"),
        tier_bytes={t: tiers.get(TIER_NAMES[t], 0) for t in (DRAM, NVME, REMOTE)},
        limits=Limits(
            batch_tokens=min(max(limits.batch_tokens_max, chunk), TOKENS_MAX // 2),
            sequences_max=limits.sequences_max,
            chunk_tokens=min(chunk, TOKENS_MAX // 2),
            draft_tokens=speculation.draft_tokens if speculation else 0,
        ),
        memory_utilization=deployment.gpu_memory_utilization,
    )
    return replace(
        built,
        prefix_cache=policies.prefix_cache and built.layout.shares_prefixes,
        acceptance=speculation.acceptance if speculation else 0.0,
    )


def build_instance(
    cost: Cost,
    *,
    name: str,
    block_tokens: int,
    limits: Limits,
    device_bytes: int | None = None,
    tier_bytes: Mapping[int, int] | None = None,
    memory_utilization: float = 0.9,
) -> Instance:
    """An instance from its law and the bytes that its tiers have.

    `device_bytes` is the KV pool of all its accelerators; None: what weights leave of
    `memory_utilization`.  Raises `DoesNotFitError` when the weights leave nothing.
    """
    cut, gpu = cost.layout, cost.gpu
    layout = cache_layout(cost.model, kv_format(cut.kv), tp=cut.tp, block_tokens=block_tokens)
    if device_bytes is None:
        usable = gpu.memory_bytes * memory_utilization
        if usable <= cost.weights_bytes_per_gpu:
            raise DoesNotFitError(
                f"{cost.model.name} in {cut.weights} on {cut.gpus} x {gpu.name}",
                needed_bytes=cost.weights_bytes_per_gpu,
                available_bytes=usable,
            )
        device_bytes = int((usable - cost.weights_bytes_per_gpu) * cut.gpus)
    # Data-parallel ranks hold different sequences and pipeline stages different layers.
    pages_total = int(device_bytes / cut.gpus * cut.dp * cut.pp) // layout.page_bytes
    if pages_total < layout.pages_per_block + layout.state_pages:
        raise DoesNotFitError(
            f"one KV block of {cost.model.name}",
            needed_bytes=(layout.pages_per_block + layout.state_pages) * layout.page_bytes,
            available_bytes=pages_total * layout.page_bytes,
        )
    block_bytes = layout.pages_per_block * layout.page_bytes * cut.tp
    sizes = tier_bytes or {}
    specs = {DRAM: gpu.host, NVME: gpu.nvme, REMOTE: gpu.network}
    blocks = [sizes.get(tier, 0) // block_bytes for tier in (DRAM, NVME, REMOTE)]
    return Instance(
        name=name,
        cost=cost,
        layout=layout,
        pages_total=pages_total,
        limits=limits,
        tier_blocks=(blocks[0], blocks[1], blocks[2]),
        tier_specs=specs,
        usd_per_hour=(gpu.price.typical_usd or 0.0) * cut.gpus,
    )


def imitating(instance: Instance, engine: str) -> Instance:
    """The same instance under another engine: its time outside steps and its batch."""
    profile = load_engine(engine)
    return replace(
        instance,
        host_s=profile.host_s,
        wait_steps=profile.wait_steps,
    )


def _model(deployment: Deployment) -> ModelSpec:
    return load_model(deployment.model.config or deployment.model.name)
