"""What this machine has: memory to give away, a name, and rates good enough to schedule by.

`build` asks how much fits and, before anything was measured, for a price list: the scheduler
sizes chunks and weighs promises by it.  `tierline calibrate` replaces the guesses; `measured`
is how its entry is found again.
"""

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from tierline.catalog.gpu import GpuSpec, Price, Reached, ScaleUp
from tierline.catalog.gpus import load_gpu, own_files
from tierline.catalog.tier import TierSpec

GUESS = "assumption before `tierline calibrate`"
CPU_CORE_FLOPS_PER_S = 100e9  # bf16
CPU_BYTES_PER_S = 30e9
DEVICE_BYTES_PER_S = 1e12
DEVICE_FLOPS_PER_S = 200e12
CPU_REACHED = Reached(  # of a CPU whose steps nobody timed
    memory=0.9,
    cache=0.7,
    dense={"bf16": 0.8, "fp32": 0.3},
    attention=0.3,
    layer_us=20.0,
    step_us=500.0,
    sequence_us=30.0,
    prompt_us=0.0,
    prompt_layer_us=0.0,
    low=0.3,
    high=3.0,
    source=GUESS,
)
CGROUPS = Path("/sys/fs/cgroup")
# Of each version of control groups: where they lie, a limit, what counts against it.
CGROUP_FILES = {
    "": (".", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def entry_name(device: torch.device) -> str:
    """What the entry of this machine is called unless its owner chose a name."""
    return "this-machine" if device.type == "cpu" else f"this-machine-{device.type}"


def measured(device: torch.device) -> GpuSpec | None:
    """The entry that `tierline calibrate` left for this machine, if it was run.

    Raises `SpecError` when the entry is there and wrong.
    """
    name = entry_name(device)
    return load_gpu(name) if name in own_files() else None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def title(device: torch.device) -> str:
    """The processor's own name for itself, on one line."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    names = _lines(Path("/proc/cpuinfo"), "model name")
    named = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{named or platform.machine()}, {cores()} cores"


def vendor(device: torch.device) -> str:
    """Who made the processor."""
    if device.type == "cuda":
        return "AMD" if torch.version.hip else "NVIDIA"
    names = _lines(Path("/proc/cpuinfo"), "vendor_id")
    known = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}
    named = names[0].partition(":")[2].strip() if names else ""
    return known.get(named, named or "unknown")


def disk_free_bytes(folder: Path) -> int:
    """Bytes that a user may still write on the disk of `folder`."""
    return shutil.disk_usage(folder).free


# --- memory ---------------------------------------------------------------------------------


def memory_total_bytes(device: torch.device) -> int:
    """Bytes of device memory, or of DRAM that this process may ever have."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return min([_dram_bytes("MemTotal"), *(limit for limit, _ in _control_groups())])


def memory_available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: device memory, or DRAM within the process's limits."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    room = [max(limit - used, 0) for limit, used in _control_groups()]
    return min([_dram_bytes("MemAvailable"), *room])


def _dram_bytes(key: str) -> int:
    """What the kernel says of DRAM; all that is built in where it does not say."""
    found = _lines(Path("/proc/meminfo"), f"{key}:")
    if found:
        return int(found[0].split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _control_groups() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of every control group around this process that has a limit.

    File pages that nobody has touched lately count as free: the kernel drops them first.
    """
    for line in _lines(Path("/proc/self/cgroup"), ""):
        _, kind, path = line.split(":", 2)
        if kind not in CGROUP_FILES:
            continue
        root, limit_file, used_file, cached_key = CGROUP_FILES[kind]
        top = CGROUPS / root
        inner = top / path.lstrip("/")
        for group in (g for g in (inner, *inner.parents) if g.is_relative_to(top)):
            limit, used = (_lines(group / name, "") for name in (limit_file, used_file))
            if limit and used and limit[0].isdigit():
                cached = _lines(group / "memory.stat", f"{cached_key} ")
                idle = int(cached[0].split()[1]) if cached else 0
                yield int(limit[0]), int(used[0]) - idle


def _lines(path: Path, start: str) -> list[str]:
    """The lines that begin so; none where there is no such file, or nobody may read it."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.startswith(start)]


# --- a guess --------------------------------------------------------------------------------


def guess(device: torch.device) -> GpuSpec:
    """A catalog entry for `device` that nobody has measured."""
    on_cpu = device.type == "cpu"
    memory_bytes_per_s = CPU_BYTES_PER_S if on_cpu else DEVICE_BYTES_PER_S
    flops_per_s = cores() * CPU_CORE_FLOPS_PER_S if on_cpu else DEVICE_FLOPS_PER_S
    return machine(
        name=entry_name(device),
        title="this machine",
        vendor="unknown",
        memory_bytes=memory_available_bytes(device),
        memory_bytes_per_s=memory_bytes_per_s,
        flops_per_s=flops_per_s,
        host=tier("dram", CPU_BYTES_PER_S / 2, latency_s=1e-5, source=GUESS),
        nvme=tier("nvme", 1e9, latency_s=1e-4, source=GUESS),
        reached=CPU_REACHED if on_cpu else None,
        sources=dict.fromkeys(("memory_gb", "memory_gb_per_s", "tflops"), GUESS),
        as_of="",
    )


def tier(
    name: str,
    bytes_per_s: float,
    *,
    latency_s: float,
    source: str,
    write_bytes_per_s: float | None = None,
    capacity_bytes: int = 0,
) -> TierSpec:
    """A tier that this machine has to itself."""
    return TierSpec(
        name=name,
        capacity_bytes=capacity_bytes,
        read_bytes_per_s=bytes_per_s,
        write_bytes_per_s=write_bytes_per_s or bytes_per_s,
        latency_s=latency_s,
        shared_by_gpus=1,
        source=source,
    )


def machine(
    *,
    name: str,
    title: str,
    vendor: str,
    memory_bytes: int,
    memory_bytes_per_s: float,
    flops_per_s: float,
    host: TierSpec,
    nvme: TierSpec,
    reached: Reached | None,
    sources: dict[str, str],
    as_of: str,
) -> GpuSpec:
    """An entry for one machine that stands alone: no fabric, no network tier, no price."""
    alone = "one machine by itself"
    rate = host.read_bytes_per_s
    return GpuSpec(
        name=name,
        title=title,
        vendor=vendor,
        generation="unknown",
        memory_bytes=memory_bytes,
        memory_bytes_per_s=memory_bytes_per_s,
        flops_per_s={"bf16": flops_per_s},
        scale_up=ScaleUp(kind="none", bytes_per_s=rate, pair_bytes_per_s=rate, domain_gpus=1),
        gpus_per_node=1,
        host=host,
        nvme=nvme,
        network=tier(
            "remote", 1e8, latency_s=1e-3, source="assumption: not measured, and not there"
        ),
        tdp_w=None,
        allin_w=None,
        price=Price(
            low_usd=None,
            typical_usd=None,
            high_usd=None,
            owner_usd=None,
            as_of=as_of,
            source="unknown: give your own, --price NAME=USD an hour",
        ),
        sources=sources | {"scale_up": alone, "gpus_per_node": alone},
        reached=reached,
    )
