"""The accelerators that ship with tierline, and the same reader for a user's own file.

One accelerator is one TOML file in `data/gpus/`, and every number in it names its source.
A price nobody quoted is absent and reads as None: unknown, never a guess. The planner asks
here which accelerators there are, what a format may run on, and at which rate.

A user's own files lie in `own_folder()`, where `tierline calibrate` writes this machine's;
`NAME.toml` is found by its name wherever a name is asked for. They are nobody else's, so they
are planned with only when they are named.
"""

import functools
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path

from tierline.base.errors import SpecError
from tierline.base.files import read_text
from tierline.base.names import lookup
from tierline.catalog.formats import Format
from tierline.catalog.gpu import GpuSpec, Price, Reached, ScaleUp
from tierline.catalog.table import Table, parse_toml
from tierline.catalog.tier import TierSpec

ROLES = ("accelerator", "host")
FABRICS = ("nvlink", "mesh", "torus", "ethernet", "pcie", "none")

_SOURCED = ("memory_gb", "memory_gb_per_s", "tflops", "scale_up", "gpus_per_node")
_SOURCED_IF_GIVEN = ("tdp_w", "allin_w")
_IDENTITY = ("name", "title", "aliases", "role", "vendor", "generation", "notes")
_TABLES = ("host", "nvme", "network", "price", "sources", "reached")
_KEYS = (*_IDENTITY, *_SOURCED, *_SOURCED_IF_GIVEN, *_TABLES)
_MATH = ("bf16", "fp8", "fp4", "int8")
_SCALE_UP_KEYS = ("kind", "gb_per_s", "pair_gb_per_s", "domain_gpus")
_TIER_RATES = ("capacity_gb", "read_gb_per_s", "write_gb_per_s", "latency_us", "shared_by_gpus")
_TIER_KEYS = (*_TIER_RATES, "usd_per_hour", "source")
_TIER_NAMES = {"host": "dram", "nvme": "nvme", "network": "remote"}
_SHARES = ("memory", "cache", "attention")
_REACHED_FORMATS = ("bf16", "fp32", "int8-g128", "int4-g32")
_FIXED_US = ("layer_us", "step_us", "sequence_us", "prompt_us", "prompt_layer_us")
_REACHED_KEYS = (*_SHARES, "dense", *_FIXED_US, "low", "high", "source")
_PRICE_KEYS = ("low_usd", "typical_usd", "high_usd", "owner_usd", "as_of", "source")


def load_gpu(name_or_path: str) -> GpuSpec:
    """An accelerator by name, by alias, or from a TOML file of one's own: its path, or its name
    when it lies in `own_folder()`. What ships keeps its name.

    Raises `SpecError` that names the nearest accelerators, or the key that is wrong.
    """
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        text = read_text(Path(name_or_path), what="gpu file")
        return parse_gpu(text, where=name_or_path)
    gpus, names = _catalogue()
    name = name_or_path.strip().casefold()
    own = own_files() if name not in names else {}
    if name in own:
        return _own(own[name])
    return gpus[
        lookup(
            "gpu",
            name,
            {**names, **dict.fromkeys(own, "")},
            error=SpecError,
            way_out="or give the path of your own .toml file",
        )
    ]


def _own(path: Path) -> GpuSpec:
    """An entry that is found by the name of its file, which must be the name it has inside:
    deployments say the one, and look for the other."""
    gpu = parse_gpu(read_text(path, what="gpu file"), where=str(path))
    if gpu.name.casefold() != path.stem.casefold():
        raise SpecError(
            f"{path} has the name {gpu.name!r}", hint="give the file and its entry the same name"
        )
    return gpu


def own_folder() -> Path:
    """Where a user's own entries lie, `NAME.toml` each."""
    return Path(os.path.expanduser("~/.config/tierline/gpus"))  # "~" stays where nobody has a home


def require_own_name(name: str) -> str:
    """`name`, if a user's entry may have it; raises `SpecError` when it is taken, or no name."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise SpecError(
            f"{name!r} is no name for a gpu", hint="small letters, digits, dots and dashes"
        )
    if name in _catalogue()[1]:
        raise SpecError(f"{name!r} is in the catalogue", hint="give your own another name")
    return name


def own_files() -> dict[str, Path]:
    """The user's own entries by name, in lower case."""
    return {path.stem.casefold(): path for path in sorted(own_folder().glob("*.toml"))}


def gpu_names() -> list[str]:
    """Names of all accelerators in the catalogue, sorted; hosts and aliases are left out."""
    return sorted(g.name for g in _catalogue()[0].values() if g.role == "accelerator")


def load_gpus(names: Iterable[str] | None) -> list[GpuSpec]:
    """The accelerators of these names, in this order and each once; None: all of them."""
    loaded = [load_gpu(name) for name in (gpu_names() if names is None else names)]
    return list({gpu.name: gpu for gpu in loaded}.values())


def with_price(gpu: GpuSpec, usd_per_hour: float) -> GpuSpec:
    """The same accelerator at the caller's own price, which replaces every price of ours."""
    if not (math.isfinite(usd_per_hour) and usd_per_hour > 0):
        raise SpecError(
            f"price of {gpu.name!r} is {usd_per_hour:g} dollars an hour",
            hint="a price is above zero; leave it out when it is not known",
        )
    usd = float(usd_per_hour)
    price = Price(
        low_usd=usd, typical_usd=usd, high_usd=usd, owner_usd=None, as_of="given", source="user"
    )
    return replace(gpu, price=price)


def supports(gpu: GpuSpec, weight_format: Format) -> str | None:
    """None when `gpu` can run weights of this format to advantage, else the reason why not."""
    flops, math_format = gpu.flops_per_s, weight_format.math
    if gpu.reached is not None and weight_format.name not in gpu.reached.dense:
        known = " and ".join(gpu.reached.dense)
        return f"{gpu.title} measured itself with {known} weights only"
    if weight_format.name == "mxfp4" and "fp4" not in flops:
        if gpu.vendor in ("NVIDIA", "AMD"):
            return None  # kernels unpack it to bf16: how gpt-oss runs on Hopper, Ampere and MI300
        return f"{gpu.title} has no FP4 math, and no kernels that unpack mxfp4 are known"
    if weight_format.name == "nvfp4" and not ("fp4" in flops and gpu.vendor == "NVIDIA"):
        other = "fp8" if "fp8" in flops else "int4-g128"
        return f"{gpu.title} has no NVFP4 math, which is Blackwell's; use {other}"
    if math_format not in flops:
        other = "int8" if "int8" in flops else "int8-g128"
        other = "fp8" if math_format == "int8" and "fp8" in flops else other
        return f"{gpu.title} has no {math_format.upper()} math; use {other}"
    if flops[math_format] < flops["bf16"]:
        return (
            f"{gpu.title} runs {math_format.upper()} at {flops[math_format] / 1e12:g} TFLOPS,"
            f" below its BF16 rate of {flops['bf16'] / 1e12:g}; use fp8"
        )
    return None


def supports_kv(gpu: GpuSpec, kv_format: Format) -> str | None:
    """None when the KV cache can be kept in this format on `gpu`, else the reason why not.

    FP8 needs FP8 hardware, or Ampere, where vLLM stores FP8 and computes in 16 bits.
    """
    if kv_format.name == "nvfp4" and not ("fp4" in gpu.flops_per_s and gpu.vendor == "NVIDIA"):
        return f"{gpu.title} cannot keep an NVFP4 KV cache, which is Blackwell's; use fp8 or bf16"
    if kv_format.name == "fp8" and "fp8" not in gpu.flops_per_s and gpu.generation != "Ampere":
        return f"{gpu.title} has no FP8 hardware for the KV cache; use bf16"
    return None


def math_flops_per_s(gpu: GpuSpec, weight_format: Format) -> float:
    """The dense rate at which `gpu` multiplies weights of a format that it supports."""
    assert supports(gpu, weight_format) is None, (gpu.name, weight_format.name)
    if weight_format.math not in gpu.flops_per_s:
        return gpu.flops_per_s["bf16"]  # mxfp4 unpacked
    return gpu.flops_per_s[weight_format.math]


@functools.cache
def _catalogue() -> tuple[Mapping[str, GpuSpec], Mapping[str, str]]:
    """The shipped accelerators by name, and the name that every name and alias stands for."""
    gpus, names = {}, {}
    folder = resources.files("tierline.catalog") / "data" / "gpus"
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        gpu = parse_gpu(file.read_text(encoding="utf-8"), where=file.name)
        assert file.name == f"{gpu.name}.toml", file.name
        gpus[gpu.name] = gpu
        for name in (gpu.name, *gpu.aliases):
            assert name not in names, f"{name} stands for two accelerators"
            names[name] = gpu.name
    return gpus, names


def parse_gpu(text: str, *, where: str) -> GpuSpec:
    """The accelerator that a TOML file describes; `where` is the file, for messages."""
    table = Table(parse_toml(text, where=where), where=where, keys=_KEYS)
    tflops = table.table("tflops", _MATH)
    tflops.number("bf16")  # every accelerator has it; the others are absent when there is no math
    return GpuSpec(
        name=table.text("name"),
        title=table.text("title"),
        aliases=table.texts("aliases") if "aliases" in table else (),
        role=table.text("role", choices=ROLES),
        vendor=table.text("vendor"),
        generation=table.text("generation"),
        memory_bytes=round(table.number("memory_gb") * 1e9),
        memory_bytes_per_s=table.number("memory_gb_per_s") * 1e9,
        flops_per_s={key: tflops.number(key) * 1e12 for key in _MATH if key in tflops},
        scale_up=_scale_up(table.table("scale_up", _SCALE_UP_KEYS)),
        gpus_per_node=table.whole("gpus_per_node"),
        host=_tier(table, "host"),
        nvme=_tier(table, "nvme"),
        network=_tier(table, "network"),
        tdp_w=table.optional_number("tdp_w"),
        allin_w=table.optional_number("allin_w"),
        price=_price(table.table("price", _PRICE_KEYS)),
        sources=_sources(table),
        notes=table.text("notes") if "notes" in table else "",
        reached=_reached(table) if "reached" in table else None,
    )


def _scale_up(table: Table) -> ScaleUp:
    scale_up = ScaleUp(
        kind=table.text("kind", choices=FABRICS),
        bytes_per_s=table.number("gb_per_s") * 1e9,
        pair_bytes_per_s=table.number("pair_gb_per_s") * 1e9,
        domain_gpus=table.whole("domain_gpus"),
    )
    if scale_up.pair_bytes_per_s > scale_up.bytes_per_s:
        raise table.error(
            "pair_gb_per_s",
            "is above gb_per_s",
            hint="gb_per_s is one accelerator's links together, pair_gb_per_s those to one peer",
        )
    return scale_up


def _tier(table: Table, key: str) -> TierSpec:
    tier = table.table(key, _TIER_KEYS)
    return TierSpec(
        name=_TIER_NAMES[key],
        capacity_bytes=round(tier.number_from("capacity_gb") * 1e9),
        read_bytes_per_s=tier.number("read_gb_per_s") * 1e9,
        write_bytes_per_s=tier.number("write_gb_per_s") * 1e9,
        latency_s=tier.number_from("latency_us") / 1e6,
        shared_by_gpus=tier.whole("shared_by_gpus"),
        usd_per_hour=tier.number_from("usd_per_hour") if "usd_per_hour" in tier else 0.0,
        source=tier.text("source"),
    )


def _price(table: Table) -> Price:
    price = Price(
        low_usd=table.optional_number("low_usd"),
        typical_usd=table.optional_number("typical_usd"),
        high_usd=table.optional_number("high_usd"),
        owner_usd=table.optional_number("owner_usd"),
        as_of=table.text("as_of"),
        source=table.text("source"),
    )
    known = [p for p in (price.low_usd, price.typical_usd, price.high_usd) if p is not None]
    if known != sorted(known):
        raise table.error("typical_usd", "is not between low_usd and high_usd")
    return price


def _reached(table: Table) -> Reached:
    reached = table.table("reached", _REACHED_KEYS)
    dense = reached.table("dense", _REACHED_FORMATS)
    return Reached(
        dense={"bf16": dense.number("bf16")}
        | {key: dense.number(key) for key in _REACHED_FORMATS if key in dense},
        **{key: reached.number(key) for key in _SHARES},
        **{key: reached.number_from(key) for key in _FIXED_US},
        low=reached.number("low", high=1.0),
        high=reached.number_from("high", low=1.0),
        source=reached.text("source"),
    )


def _sources(table: Table) -> Mapping[str, str]:
    """Where each number comes from; a number without a source is an error."""
    sources = table.table("sources", (*_SOURCED, *_SOURCED_IF_GIVEN))
    given = [key for key in _SOURCED_IF_GIVEN if key in table]
    return {key: sources.text(key) for key in (*_SOURCED, *given)}
