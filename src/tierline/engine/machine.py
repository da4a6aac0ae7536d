"""What this machine has: memory to give away, and rates good enough to schedule by.

`build` asks before anything was measured.  The scheduler needs a price list to size chunks
and to weigh promises; `tierline calibrate` replaces these guesses by measurements.
"""

import os
from pathlib import Path

import torch

from tierline.catalog.gpu import GpuSpec, Price, ScaleUp
from tierline.catalog.tier import TierSpec

GUESS = "assumption before `tierline calibrate`"
CORE_FLOPS_PER_S = {"bf16": 100e9}
CPU_BYTES_PER_S = 40e9
DEVICE_BYTES_PER_S = 1e12
DEVICE_FLOPS_PER_S = 200e12


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: device memory, or what the kernel says of DRAM."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def guess(device: torch.device) -> GpuSpec:
    """A catalog entry for `device` that nobody has measured."""
    on_cpu = device.type == "cpu"
    memory = memory_available_bytes(device)
    tier = {"latency_s": 1e-4, "shared_by_gpus": 1, "source": GUESS}
    rate = CPU_BYTES_PER_S / 2
    return GpuSpec(
        name="this-machine",
        title="this machine",
        vendor="unknown",
        generation="unknown",
        memory_bytes=memory,
        memory_bytes_per_s=CPU_BYTES_PER_S if on_cpu else DEVICE_BYTES_PER_S,
        flops_per_s={"bf16": cores() * CORE_FLOPS_PER_S["bf16"] if on_cpu else DEVICE_FLOPS_PER_S},
        scale_up=ScaleUp(kind="none", bytes_per_s=rate, pair_bytes_per_s=rate, domain_gpus=1),
        gpus_per_node=1,
        host=TierSpec(
            name="dram", capacity_bytes=0, read_bytes_per_s=rate, write_bytes_per_s=rate, **tier
        ),
        nvme=TierSpec(
            name="nvme", capacity_bytes=0, read_bytes_per_s=1e9, write_bytes_per_s=1e9, **tier
        ),
        network=TierSpec(
            name="remote", capacity_bytes=0, read_bytes_per_s=1e8, write_bytes_per_s=1e8, **tier
        ),
        tdp_w=None,
        allin_w=None,
        price=Price(
            low_usd=None, typical_usd=None, high_usd=None, owner_usd=None, as_of="", source=GUESS
        ),
        sources={"memory_gb_per_s": GUESS, "tflops": GUESS},
    )
