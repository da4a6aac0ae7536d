"""Where bytes can live, and how fast they move from there towards the device.

Device memory, host DRAM, NVMe, and other nodes are one type. Rates are decimal,
one direction, and shared by `shared_by_gpus` accelerators that pull at once.
"""

from dataclasses import dataclass

from tierline.base.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSpec:
    """One tier of memory as an accelerator sees it."""

    name: str  # device, dram, nvme, remote
    capacity_bytes: int
    read_bytes_per_s: float  # from this tier towards the device
    write_bytes_per_s: float  # from the device towards this tier
    latency_s: float
    shared_by_gpus: int  # how many accelerators share capacity and rate
    source: str
    usd_per_hour: float = 0.0  # what renting the tier adds per node; 0 when part of the node

    def __post_init__(self) -> None:
        if min(self.read_bytes_per_s, self.write_bytes_per_s) <= 0:
            raise SpecError(f"tier {self.name!r} has a rate that is not positive")
        if self.capacity_bytes < 0 or self.latency_s < 0 or self.shared_by_gpus < 1:
            raise SpecError(f"tier {self.name!r} has a negative size or latency")
        if not self.source:
            raise SpecError(f"tier {self.name!r} does not say where its numbers come from")
