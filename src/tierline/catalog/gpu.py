"""Accelerators as their datasheets describe them, links and prices included.

Rates are peak, dense and decimal: 1 GB/s is 1e9 bytes per second, one direction. Derating
is `perf`'s business, so that a spec can be checked against its source.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tierline.base.errors import SpecError
from tierline.catalog.tier import TierSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleUp:
    """The fast fabric between accelerators of one domain."""

    kind: str  # nvlink, mesh, torus, ethernet, pcie, none
    bytes_per_s: float  # one direction, one accelerator, all its links together
    pair_bytes_per_s: float  # what two accelerators alone can use (a mesh: one link)
    domain_gpus: int  # how many accelerators reach each other this way


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Dollars per accelerator and hour, with the day they were seen."""

    low_usd: float | None
    typical_usd: float | None
    high_usd: float | None
    owner_usd: float | None  # total cost of owning one, per hour
    as_of: str  # ISO date or month
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What the steps of one machine reached of its rates when it measured itself.

    `tierline calibrate` writes it; `perf` prices with it in place of what others measured.
    """

    memory: float  # of the memory rate, reading weights
    cache: float  # of the memory rate, reading KV
    dense: Mapping[str, float]  # of the bf16 rate, by weight format
    attention: float  # of the bf16 rate, scoring prompt tokens
    layer_us: float  # fixed time of one layer
    step_us: float  # of one step
    sequence_us: float  # of one decoding sequence: scheduled, sampled, turned to text
    prompt_us: float  # more in a step with prompt tokens
    prompt_layer_us: float  # and in each of its layers
    low: float  # p10 and p90 of measured / predicted step time
    high: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One accelerator."""

    name: str
    title: str
    vendor: str
    generation: str  # Ampere, Ada, Hopper, Blackwell, CDNA3, ...
    memory_bytes: int
    memory_bytes_per_s: float
    flops_per_s: Mapping[str, float]  # dense, by math format: bf16, fp8, fp4, int8
    scale_up: ScaleUp
    gpus_per_node: int
    host: TierSpec  # DRAM over the host link
    nvme: TierSpec
    network: TierSpec  # another node's memory over the network
    tdp_w: float | None
    allin_w: float | None  # with its share of host, network, cooling
    price: Price
    sources: Mapping[str, str]  # key of its file -> where the number comes from
    notes: str = ""
    aliases: tuple[str, ...] = ()  # other names people type
    role: str = "accelerator"  # or "host": a memory tier that serves no model by itself
    reached: Reached | None = None  # measured on it; None: `perf` knows from elsewhere

    def __post_init__(self) -> None:
        if "bf16" not in self.flops_per_s:
            raise SpecError(f"gpu {self.name!r} has no bf16 rate")
        if min(self.memory_bytes, self.memory_bytes_per_s, *self.flops_per_s.values()) <= 0:
            raise SpecError(f"gpu {self.name!r} has a rate or size that is not positive")

    @property
    def ridge_bf16(self) -> float:
        """FLOP per byte at which bf16 math and memory take equally long."""
        return self.flops_per_s["bf16"] / self.memory_bytes_per_s
