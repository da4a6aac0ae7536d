"""A machine measures itself, and what it learns becomes a catalogue entry.

`tierline calibrate` calls `calibrate`: it times the probes in turn, round after round, until
the time is spent, so that a machine that drifts or is shared drifts under all of them alike.
What follows is arithmetic on the samples.  A figure is their lower quartile, because whatever
else runs on the machine only ever adds time; the spread beside it is that of the samples.

The entry's rates are those of single pieces of work: memory read by every thread, the fastest
products.  What real steps reach of them, and what a step costs beside them, is fitted through
the step law itself (`perf.step`), so that the law gives measured steps back; steps of one more
network are kept from the fit, and compared.

Invariants
    INV-ENG-70  the entry is a function of the samples: equal samples, equal entry
    INV-ENG-71  an entry is whole or absent, and nothing else is left behind
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray

from tierline.base.errors import DependencyError, DoesNotFitError, InputError
from tierline.base.files import whole_file, write_text
from tierline.base.progress import progress_bar
from tierline.base.units import significant
from tierline.catalog.gpu import GpuSpec, Reached
from tierline.catalog.gpus import parse_gpu
from tierline.catalog.tier import TierSpec
from tierline.engine import machine, native
from tierline.engine.native import Kernels
from tierline.engine.probes import (
    CPU_SIZES,
    DEVICE_SIZES,
    FORMATS,
    Disk,
    EngineSteps,
    Probe,
    Sizes,
    Step,
    attention_probes,
    memory_probes,
    network_probes,
    open_probed,
    product_probes,
    write_random,
)
from tierline.perf.step import Layout, StepCost

Timer = Callable[[], float]  # seconds since some start
Floats = NDArray[np.float64]

VISIT_S, VISIT_SAMPLES = 0.02, 8  # a short probe is sampled more than once in a round
STEP_SIGMA = 0.05  # of a step's time, relative
SHARE_SIGMA, FIXED_SIGMA = 0.7, 2.0  # of what the fit starts from, in natural logarithms
FIT_STEPS = 40
DISK_FREE_SHARE = 0.5  # of a disk's free room, that a tier may take
MEMORY_BYTES = 3_000_000_000  # that the measurement itself needs
DECODE_CACHED_TOKENS = 64
BUSY_SPREAD = 0.5  # of the median piece; where nobody else computes it is a tenth of that


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What one probe took."""

    seconds: float  # the lower quartile
    spread: float  # from there to the upper one, relative
    samples: int

    def __str__(self) -> str:
        return f"{self.samples} samples, spread {100 * self.spread:.0f} %"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A step of the real engine, as it was and as the law says."""

    step: str
    measured_s: float
    predicted_s: float
    samples: int

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured_s / self.predicted_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What `calibrate` found."""

    gpu: GpuSpec
    figures: Mapping[str, Figure]
    works: Mapping[str, tuple[float, str]]  # of each probe that has one, and its unit
    compared: tuple[Compared, ...]
    kernels: str
    seconds: float

    @property
    def busy(self) -> bool:
        """Whether others computed here meanwhile: what was found is then worth little."""
        return median(f.spread for f in self.figures.values()) > BUSY_SPREAD

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.gpu.name,
            "title": self.gpu.title,
            "kernels": self.kernels,
            "seconds": round(self.seconds, 1),
            "busy": self.busy,
            "figures": {
                name: {
                    "seconds": f.seconds,
                    "rate": self.works[name][0] / f.seconds if name in self.works else None,
                    "unit": f"{self.works[name][1]}/s" if name in self.works else None,
                    "spread": round(f.spread, 3),
                    "samples": f.samples,
                }
                for name, f in self.figures.items()
            },
            "compared": [
                {
                    "step": c.step,
                    "measured_s": c.measured_s,
                    "predicted_s": c.predicted_s,
                    "ratio": round(c.ratio, 3),
                    "samples": c.samples,
                }
                for c in self.compared
            ],
        }

    def __str__(self) -> str:
        """For a terminal: the pieces with their rates, then whole steps beside the law's."""
        lines = [f"{self.gpu.name}: {self.gpu.title}; kernels: {self.kernels}", ""]
        lines.append(f"{'piece':<22}{'rate':>16}{'samples':>9}{'spread':>8}")
        for name, (work, unit) in self.works.items():
            f = self.figures[name]
            rate = f"{significant(work / f.seconds / 1e9)} G{unit}/s"
            lines.append(f"{name:<22}{rate:>16}{f.samples:>9}{100 * f.spread:>6.0f} %")
        lines += ["", f"{'step':<44}{'measured':>12}{'predicted':>12}{'ratio':>7}"]
        for c in self.compared:
            times = f"{1e3 * c.measured_s:>9.2f} ms{1e3 * c.predicted_s:>9.2f} ms"
            lines.append(f"{c.step:<44}{times}{c.ratio:>7.2f}")
        if self.busy:
            lines += [
                "",
                "others computed here meanwhile: calibrate again when the machine is quiet",
            ]
        return "\n".join(lines)


def calibrate(
    *,
    name: str | None,
    device: torch.device,
    scratch: Path,
    kernels_folder: Path | None,
    today: str,
    timer: Timer,
    seconds: float = 60.0,
    model: Path | None = None,
    sizes: Sizes | None = None,
    progress: bool = False,
) -> Calibration:
    """Measure this machine for `seconds`, after getting ready (kernels are built once).

    `scratch` is a folder on the disk to measure; what is written there is gone at the end.
    `model` is a checkpoint to compare with; None: random weights of SmolLM2-135M's shape.
    Raises `DoesNotFitError` without room in memory, `DependencyError` without room on disk.
    """
    if not (0 < seconds < math.inf):
        raise InputError(f"{seconds:g} seconds to measure", hint="give it a minute: 60")
    on_cpu = device.type == "cpu"
    if sizes is None:
        sizes = CPU_SIZES if on_cpu else DEVICE_SIZES
        available = machine.memory_available_bytes(device)
        if available < MEMORY_BYTES:
            raise DoesNotFitError(
                "measuring",
                needed_bytes=MEMORY_BYTES,
                available_bytes=available,
                hint="end something else that runs here",
            )
    start_s = timer()
    with _scratch(scratch) as folder:
        loaded = native.load(kernels_folder) if on_cpu and kernels_folder else None
        kernels = loaded if isinstance(loaded, Kernels) else None
        disk = Disk(folder / "disk", sizes.disk_bytes)
        probes, facts = _probes(sizes, device, folder, kernels_folder, kernels, model)
        probes = [*disk.probes(), *probes]
        samples = sample(probes, until_s=timer() + seconds, timer=timer, progress=progress)
        room = machine.disk_free_bytes(folder)
    figures = {key: figure(values) for key, values in samples.items()}
    gpu, compared = entry(
        probes,
        figures,
        name=name or machine.entry_name(device),
        title=machine.title(device),
        vendor=machine.vendor(device),
        memory_bytes=machine.memory_total_bytes(device),
        disk_bytes=room,
        host_bytes=0 if on_cpu else machine.memory_available_bytes(torch.device("cpu")),
        disk_how=disk.how,
        today=today,
        threads=machine.cores(),
    )
    return Calibration(
        gpu=gpu,
        figures=figures,
        works={probe.name: (probe.work, probe.unit) for probe in probes if probe.work},
        compared=tuple(compared),
        kernels=facts,
        seconds=timer() - start_s,
    )


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` that is gone afterwards, whatever happens."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix=".calibrate-", dir=folder)
    except OSError as error:
        raise DependencyError(
            f"cannot write in {str(folder)!r}: {error.strerror}",
            hint="give --scratch a folder that you may write to",
        ) from None
    with made as inner:
        yield Path(inner)


def _probes(
    sizes: Sizes,
    device: torch.device,
    folder: Path,
    kernels_folder: Path | None,
    kernels: Kernels | None,
    model: Path | None,
) -> tuple[list[Probe], str]:
    """Everything to time but the disk, and which kernels the steps run on."""
    probes = memory_probes(sizes, device)
    probes += product_probes(sizes, device, kernels)
    probes += attention_probes(sizes, device, kernels)
    facts = ""
    for name, config in sizes.networks.items():
        path = write_random(config, folder / name)
        most = sum(s[0] * (s[1] + 16) + s[2] + s[3] for s in sizes.steps)
        engine, empty = open_probed(
            path, device=device, kernels_folder=kernels_folder, cached_tokens=most
        )
        shutil.rmtree(path)  # read: nothing is left for the kernel to write while the disk is timed
        probes += network_probes(engine, empty, sizes.steps)
        facts = engine.facts.kernels
    host = write_random(sizes.host, folder / "host")
    compared = model or write_random(sizes.compared, folder / "smollm2-135m")
    prompts = sizes.compared_prompts
    most = max(sizes.compared_decodes) * 2048 + sum(prompts)
    for path, wanted in ((host, ()), (compared, prompts)):
        engine, empty = open_probed(
            path, device=device, kernels_folder=kernels_folder, cached_tokens=most
        )
        if path is not model:
            shutil.rmtree(path)
        steps = EngineSteps(engine, empty, cached_tokens=DECODE_CACHED_TOKENS)
        probes += steps.probes(sizes.compared_decodes, wanted, compared=path is compared)
    return probes, facts


# --- sampling -------------------------------------------------------------------------------


def sample(
    probes: Sequence[Probe], *, until_s: float, timer: Timer, progress: bool = False
) -> dict[str, list[float]]:
    """Seconds of every probe, in rounds, until the timer says `until_s`; one round at least."""
    assert len({probe.name for probe in probes}) == len(probes), "two probes with one name"
    found: dict[str, list[float]] = {probe.name: [] for probe in probes}
    start_s = timer()
    total = max(round(until_s - start_s), 0)
    with progress_bar(total, what="calibrate", unit=" s", show=progress) as bar:
        shown = 0
        while True:
            for probe in probes:
                now_s = timer()
                if bar is not None:
                    passed = min(round(now_s - start_s), total)
                    bar(passed - shown)
                    shown = passed
                if now_s > until_s and found[probe.name]:
                    return found
                _visit(probe, found[probe.name], timer)


def _visit(probe: Probe, into: list[float], timer: Timer) -> None:
    """One sample, or a few of something short."""
    spent_s = 0.0
    for _ in range(VISIT_SAMPLES):
        probe.before()
        start_s = timer()
        probe.run()
        into.append(timer() - start_s)
        spent_s += into[-1]
        if spent_s > VISIT_S:
            return


def figure(seconds: Sequence[float]) -> Figure:
    """The lower quartile of what a probe took; its first run is left out when there are others.

    >>> figure([9.0, 1.0, 1.0, 2.0, 1.5])
    Figure(seconds=1.0, spread=0.875, samples=4)
    """
    kept = list(seconds[1:] or seconds)
    if len(kept) == 1:
        return Figure(seconds=max(kept[0], 1e-9), spread=0.0, samples=1)
    low, _, high = quantiles(kept, n=4, method="exclusive")
    low = max(min(low, median(kept)), min(kept), 1e-9)
    return Figure(seconds=low, spread=(high - low) / low, samples=len(kept))


# --- from figures to an entry ---------------------------------------------------------------


def entry(
    probes: Sequence[Probe],
    figures: Mapping[str, Figure],
    *,
    name: str,
    title: str,
    vendor: str,
    memory_bytes: int,
    disk_bytes: int,
    host_bytes: int,
    disk_how: str,
    today: str,
    threads: int,
) -> tuple[GpuSpec, list[Compared]]:
    """The entry that these figures make, and the steps that were kept to compare with."""
    rates = {p.name: p.work / figures[p.name].seconds for p in probes if p.work}
    by = f"measured {today} by tierline calibrate"
    products = [name for name in rates if name.split(" x ")[0] in FORMATS]
    fastest = max((n for n in products if n.startswith("bf16")), key=lambda n: rates[n])
    # A product of one row does a FLOP for every byte that it reads, and may well read faster.
    reader = max(("read", "bf16 x 1"), key=lambda n: rates[n])
    gpu = machine.machine(
        name=name,
        title=title,
        vendor=vendor,
        memory_bytes=memory_bytes,
        memory_bytes_per_s=rates[reader],
        flops_per_s=rates[fastest],
        host=_host_tier(rates, figures, host_bytes, by),
        nvme=_disk_tier(rates, figures, disk_bytes, f"{by}, {disk_how}"),
        reached=None,
        sources={
            "memory_gb": f"read {today} by tierline calibrate from the operating system",
            "memory_gb_per_s": f"{by}: {reader}, {threads} threads, {figures[reader]}"
            + _alone(rates, figures),
            "tflops": f"{by}: {fastest} rows, {figures[fastest]}; all in GFLOPS: "
            + ", ".join(f"{p} {_short(rates[p] / 1e9)}" for p in products),
        },
        as_of=today,
    )
    timed = [(p.step, figures[p.name].seconds) for p in probes if p.step is not None]
    fitted = [(step, s) for step, s in timed if not step.compared]
    reached = fit(fitted, gpu, _start(rates, gpu))
    gpu = replace(gpu, reached=reached)
    compared = [
        Compared(
            step=str(step),
            measured_s=seconds,
            predicted_s=predicted([step], gpu)[0],
            samples=figures[p.name].samples,
        )
        for p in probes
        if (step := p.step) is not None and step.compared
        for seconds in (figures[p.name].seconds,)
    ]
    reached = _with_band(reached, fitted, compared, gpu, by)
    return rounded(replace(gpu, reached=reached)), compared


def _alone(rates: Mapping[str, float], figures: Mapping[str, Figure]) -> str:
    name = "read, one thread"
    if name not in rates:
        return ""
    return f"; one thread {_short(rates[name] / 1e9)} GB/s, {figures[name]}"


def _host_tier(
    rates: Mapping[str, float], figures: Mapping[str, Figure], capacity_bytes: int, by: str
) -> TierSpec:
    """DRAM beside the device; on a CPU they are one memory, so the tier has no room of its own."""
    back = rates.get("copy back", rates["copy"])
    what = "copied between device and DRAM" if "copy back" in rates else "copied inside DRAM"
    return machine.tier(
        "dram",
        rates["copy"],
        write_bytes_per_s=back,
        latency_s=1e-5,
        capacity_bytes=capacity_bytes,
        source=f"{by}: {what}, {figures['copy']}; latency: assumption",
    )


def _disk_tier(
    rates: Mapping[str, float], figures: Mapping[str, Figure], free_bytes: int, by: str
) -> TierSpec:
    read, write, page = (figures[f"disk, {what}"] for what in ("read", "write", "one page"))
    return machine.tier(
        "nvme",
        rates["disk, read"],
        write_bytes_per_s=rates["disk, write"],
        latency_s=page.seconds,
        capacity_bytes=int(free_bytes * DISK_FREE_SHARE),
        source=f"{by}: read {read}; written and flushed {write}; one page {page}; "
        f"capacity: half of what is free",
    )


def _start(rates: Mapping[str, float], gpu: GpuSpec) -> Reached:
    """What the pieces say by themselves: where the fit begins."""
    peak = gpu.flops_per_s["bf16"]
    many = max(int(name.split(" x ")[1]) for name in rates if name.startswith("bf16 x "))
    dense = {
        fmt: 0.8 * rates[f"{kind} x {many}"] / rates[f"bf16 x {many}"]
        for kind, fmt in FORMATS.items()
        if f"{kind} x {many}" in rates
    }
    return replace(
        machine.CPU_REACHED,
        memory=rates["bf16 x 1"] / gpu.memory_bytes_per_s,
        cache=rates["attention, decode"] / gpu.memory_bytes_per_s,
        dense=dense,
        attention=rates["attention, prompt"] / peak,
        layer_us=10.0,
        step_us=200.0,
        sequence_us=20.0,
        prompt_us=1.0,
        prompt_layer_us=1.0,
    )


# --- the fit --------------------------------------------------------------------------------

SHARES = ("memory", "cache", "attention")
FIXED = ("layer_us", "step_us", "sequence_us", "prompt_us", "prompt_layer_us")


def predicted(steps: Sequence[Step], gpu: GpuSpec) -> list[float]:
    """What the step law says on `gpu`, in seconds."""
    assert gpu.reached is not None
    bare = replace(gpu.reached, step_us=0.0, sequence_us=0.0)
    seconds: list[float] = []
    for (model, weights), of_model in groupby(steps, key=lambda s: (s.model, s.weights)):
        layout = Layout(weights=weights, kv="bf16")
        whole = StepCost(model, gpu, layout)
        alone = StepCost(model, replace(gpu, reached=bare), layout)
        for step in of_model:
            cost = whole if step.whole else alone
            context = step.decodes * step.context_tokens
            seconds.append(cost.step_s(step.decodes, context, step.prompt_tokens, step.pairs))
    return seconds


def fit(timed: Sequence[tuple[Step, float]], gpu: GpuSpec, start: Reached) -> Reached:
    """The shares and fixed times with which the law gives these steps back, near `start`.

    Least squares of the logarithms (Levenberg and Marquardt): of measured over predicted, and,
    much weaker, of each number over the one it starts from, so that what no step tells stays.
    Logarithms keep everything above zero and weigh a step of a millisecond like one of a second;
    a step that lies far off was disturbed, and pulls no harder for lying farther (`_softened`).
    """
    steps = [step for step, _ in timed]
    measured = np.log([seconds for _, seconds in timed])
    beside = {fmt: share / start.dense["bf16"] for fmt, share in start.dense.items()}
    values = (*(getattr(start, key) for key in (*SHARES, *FIXED)), start.dense["bf16"])
    assert min(values) > 0
    first = np.log(np.array(values, dtype=np.float64))
    fixed = np.array([*(key in FIXED for key in (*SHARES, *FIXED)), False])
    sigma = np.where(fixed, FIXED_SIGMA, SHARE_SIGMA)

    def reached(x: Floats) -> Reached:
        *named, dense = np.exp(x).tolist()
        shares = dict(zip((*SHARES, *FIXED), named, strict=True))
        return replace(start, dense={fmt: dense * r for fmt, r in beside.items()}, **shares)

    def residual(x: Floats) -> Floats:
        law = np.log(predicted(steps, replace(gpu, reached=reached(x))))
        return np.concatenate([_softened((law - measured) / STEP_SIGMA), (x - first) / sigma])

    return reached(_least(residual, first))


def _softened(residual: Floats) -> Floats:
    """What squares to the pseudo-Huber loss: quadratic near zero, linear far from it."""
    loss: Floats = np.sign(residual) * np.sqrt(2 * (np.hypot(1, residual) - 1))
    return loss


def _least(residual: Callable[[Floats], Floats], x: Floats) -> Floats:
    """Where the sum of squares of `residual` is least, from `x` on downhill."""
    now, damping = residual(x), 1e-2
    for _ in range(FIT_STEPS):
        slopes = np.stack([(residual(x + d) - now) / 1e-4 for d in np.eye(len(x)) * 1e-4], axis=1)
        squares = slopes.T @ slopes
        towards = np.linalg.solve(squares + damping * np.diag(np.diag(squares)), -slopes.T @ now)
        there = residual(x + towards)
        if there @ there < now @ now:
            gain = 1 - (there @ there) / (now @ now)
            x, now, damping = x + towards, there, damping / 3
            if gain < 1e-4:
                break
        else:
            damping *= 4
    return x


def _with_band(
    reached: Reached,
    fitted: Sequence[tuple[Step, float]],
    compared: Sequence[Compared],
    gpu: GpuSpec,
    by: str,
) -> Reached:
    """How far measured steps lie from predicted ones, those of the fit and those kept from it."""
    law = predicted([step for step, _ in fitted], gpu)
    ratios = [seconds / s for (_, seconds), s in zip(fitted, law, strict=True)]
    ratios += [c.ratio for c in compared]
    low, high = np.quantile(ratios, [0.1, 0.9]).tolist()
    return replace(
        reached,
        low=min(low, 1.0),
        high=max(high, 1.0),
        source=f"{by}: {len(fitted)} kinds of steps fitted, {len(compared)} compared",
    )


# --- a file ---------------------------------------------------------------------------------


def rounded(gpu: GpuSpec) -> GpuSpec:
    """The entry as its file gives it back."""
    return parse_gpu(to_toml(gpu), where="the entry")


def to_toml(gpu: GpuSpec) -> str:
    """The file of an entry; `parse_gpu` reads it."""
    up, reached, price = gpu.scale_up, gpu.reached, gpu.price
    tables: dict[str, Any] = {
        "name": gpu.name,
        "title": gpu.title,
        "role": gpu.role,
        "vendor": gpu.vendor,
        "generation": gpu.generation,
        "memory_gb": _short(gpu.memory_bytes / 1e9),
        "memory_gb_per_s": _short(gpu.memory_bytes_per_s / 1e9),
        "gpus_per_node": gpu.gpus_per_node,
        "tflops": {key: _short(rate / 1e12) for key, rate in gpu.flops_per_s.items()},
        "scale_up": {
            "kind": up.kind,
            "gb_per_s": _short(up.bytes_per_s / 1e9),
            "pair_gb_per_s": _short(up.pair_bytes_per_s / 1e9),
            "domain_gpus": up.domain_gpus,
        },
        "host": _tier_table(gpu.host),
        "nvme": _tier_table(gpu.nvme),
        "network": _tier_table(gpu.network),
        "price": {"as_of": price.as_of, "source": price.source},
        "sources": dict(gpu.sources),
    }
    if reached is not None:
        tables["reached"] = {
            **{key: _short(getattr(reached, key)) for key in (*SHARES, *FIXED)},
            "dense": {key: _short(share) for key, share in reached.dense.items()},
            "low": _short(reached.low),
            "high": _short(reached.high),
            "source": reached.source,
        }
    return tomli_w.dumps(tables)


def _tier_table(tier: TierSpec) -> dict[str, Any]:
    return {
        "capacity_gb": _short(tier.capacity_bytes / 1e9),
        "read_gb_per_s": _short(tier.read_bytes_per_s / 1e9),
        "write_gb_per_s": _short(tier.write_bytes_per_s / 1e9),
        "latency_us": _short(tier.latency_s * 1e6),
        "shared_by_gpus": tier.shared_by_gpus,
        "source": tier.source,
    }


def _short(value: float) -> float:
    """Four significant digits: more are noise."""
    return float(f"{value:.4g}")


def require_writable(path: Path) -> None:
    """Raises `DependencyError` when no entry can be written there: before a minute is spent."""
    with suppress(_TriedError), whole_file(path):
        raise _TriedError


class _TriedError(Exception):
    """The file could be written, and was not."""


def write_entry(gpu: GpuSpec, path: Path) -> None:
    """The file of an entry, whole or not at all; raises `DependencyError` when it cannot be."""
    write_text(path, to_toml(gpu))
