"""The accelerator catalogue says what its sources say, and refuses what it does not know."""

import csv
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tierline.base.errors import SpecError
from tierline.catalog.formats import KV_FORMATS, WEIGHT_FORMATS
from tierline.catalog.gpu import GpuSpec
from tierline.catalog.gpus import (
    gpu_names,
    load_gpu,
    load_gpus,
    math_flops_per_s,
    parse_gpu,
    supports,
    supports_kv,
    with_price,
)

SHIPPED = resources.files("tierline.catalog") / "data" / "gpus"


def shipped(name: str) -> dict[str, Any]:
    """The tables of a shipped file, to be bent by a test."""
    return tomllib.loads((SHIPPED / f"{name}.toml").read_text(encoding="utf-8"))


def differences(gpu: GpuSpec, row: Mapping[str, str]) -> list[str]:
    """Columns of the reference table that the catalogue does not repeat."""
    flops, up, price = gpu.flops_per_s, gpu.scale_up, gpu.price
    pcie_only = not row["scaleup_gbps_unidir"]
    ours = {
        "name": gpu.title,
        "arch": gpu.generation,
        "mem_gb": gpu.memory_bytes / 1e9,
        "mem_bw_tbs": gpu.memory_bytes_per_s / 1e12,
        "bf16_dense_tflops": flops["bf16"] / 1e12,
        "fp8_dense_tflops": flops["fp8"] / 1e12 if "fp8" in flops else None,
        "fp4_dense_tflops": flops["fp4"] / 1e12 if "fp4" in flops else None,
        "int8_dense_tops": flops["int8"] / 1e12 if "int8" in flops else None,
        "scaleup_gbps_unidir": None if pcie_only else up.bytes_per_s / 1e9,
        "scaleup_domain": 1 if pcie_only else up.domain_gpus,
        "tdp_w": gpu.tdp_w,
        "allin_kw_per_gpu": None if gpu.allin_w is None else gpu.allin_w / 1e3,
        "price_low_usd_h": price.low_usd,
        "price_typ_usd_h": price.typical_usd,
        "price_high_usd_h": price.high_usd,
        "tco_neocloud_usd_h": price.owner_usd,
    }
    if row["host_link_gbps_unidir"]:
        ours["host_link_gbps_unidir"] = gpu.host.read_bytes_per_s / 1e9
    return [column for column, value in ours.items() if not same(value, row[column])]


def same(value: float | str | None, cell: str) -> bool:
    if value is None or isinstance(value, str):
        return cell == (value or "")
    return cell != "" and float(cell) == pytest.approx(value, rel=1e-9)


@pytest.fixture(scope="module")
def rows(data_dir: Path) -> dict[str, dict[str, str]]:
    with (data_dir / "gpus.csv").open(encoding="utf-8", newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def test_every_accelerator_repeats_the_reference_table(rows: dict[str, dict[str, str]]) -> None:
    wrong = {name: differences(load_gpu(name), row) for name, row in rows.items()}

    assert {name: columns for name, columns in wrong.items() if columns} == {}
    assert set(rows) == {*gpu_names(), "grace-cpu"}


def test_the_comparison_can_fail(rows: dict[str, dict[str, str]]) -> None:
    """Negative control: one digit off in one column is seen."""
    row = rows["h100-sxm"] | {"mem_bw_tbs": "3.36", "price_high_usd_h": ""}

    assert differences(load_gpu("h100-sxm"), row) == ["mem_bw_tbs", "price_high_usd_h"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("h100", "h100-sxm"), ("H100-SXM", "h100-sxm"), ("a100", "a100-80"), ("trillium", "tpu-v6e")],
)
def test_aliases(typed: str, meant: str) -> None:
    assert load_gpu(typed).name == meant


def test_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(SpecError, match="unknown gpu 'h100-smx'") as caught:
        load_gpu("h100-smx")

    assert "h100-sxm" in caught.value.hint
    assert ".toml" in caught.value.hint


def test_all_means_every_accelerator_and_no_host() -> None:
    names = [gpu.name for gpu in load_gpus(None)]

    assert len(names) == 25
    assert "grace-cpu" not in names
    assert [g.name for g in load_gpus(["h200", "h100", "h100-sxm"])] == ["h200", "h100-sxm"]


def test_two_of_a_mesh_see_one_link() -> None:
    assert load_gpu("mi300x").scale_up.pair_bytes_per_s == 64e9
    assert load_gpu("mi355x").scale_up.pair_bytes_per_s == 76.8e9
    assert load_gpu("h100").scale_up.pair_bytes_per_s == 450e9


def test_a_price_nobody_quoted_is_unknown() -> None:
    assert load_gpu("gaudi3").price.typical_usd is None
    assert load_gpu("l4").price.low_usd is None

    own = with_price(load_gpu("gaudi3"), 2.5).price
    assert (own.typical_usd, own.source) == (2.5, "user")
    with pytest.raises(SpecError, match="price of 'gaudi3'"):
        with_price(load_gpu("gaudi3"), 0)


@pytest.mark.parametrize(
    ("gpu", "weights", "tflops_or_reason"),
    [
        ("h100", "fp8", 1979),
        ("h100", "int4-g128", 989),  # weight-only: bf16 math
        ("a100", "int4-g128", 312),
        ("a100", "fp8", "no FP8 math; use int8"),
        ("a100", "int8", 624),
        ("a100", "mxfp4", 312),  # unpacked to bf16
        ("h100", "mxfp4", 989),
        ("mi300x", "mxfp4", 1307),
        ("mi355x", "mxfp4", 10066),
        ("b200", "mxfp4", 9000),
        ("b200", "nvfp4", 9000),
        ("h100", "nvfp4", "Blackwell's; use fp8"),
        ("a100", "nvfp4", "Blackwell's; use int4-g128"),
        ("mi355x", "nvfp4", "Blackwell's"),
        ("b300", "int8", "below its BF16 rate"),
        ("gaudi3", "int8", "no INT8 math; use fp8"),
        ("tpu-v5e", "mxfp4", "no kernels"),
    ],
)
def test_what_a_format_runs_at(gpu: str, weights: str, tflops_or_reason: float | str) -> None:
    spec, weight_format = load_gpu(gpu), WEIGHT_FORMATS[weights]
    reason = supports(spec, weight_format)

    if isinstance(tflops_or_reason, str):
        assert reason is not None
        assert tflops_or_reason in reason
    else:
        assert reason is None
        assert math_flops_per_s(spec, weight_format) == pytest.approx(tflops_or_reason * 1e12)


def test_asking_the_rate_of_a_refused_format_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        math_flops_per_s(load_gpu("a100"), WEIGHT_FORMATS["fp8"])


@pytest.mark.parametrize(
    ("kv", "names"),
    [
        ("nvfp4", {"b200", "b300", "gb200", "gb300", "rtx5090", "rtxpro6000se"}),
        ("fp8", {g for g in gpu_names() if not g.startswith("tpu")}),
        ("bf16", set(gpu_names())),
    ],
)
def test_where_a_kv_format_can_be_kept(kv: str, names: set[str]) -> None:
    assert {g.name for g in load_gpus(None) if supports_kv(g, KV_FORMATS[kv]) is None} == names


def test_fp4_math_only_on_blackwell_and_cdna4() -> None:
    generations = {g.generation for g in load_gpus(None) if "fp4" in g.flops_per_s}

    assert generations == {"Blackwell", "Blackwell Ultra", "CDNA4"}


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    tables = shipped("h100-sxm") | {"name": "h100-lab", "memory_gb": 94}
    path = tmp_path / "h100-lab.toml"
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")

    assert load_gpu(str(path)).memory_bytes == 94_000_000_000


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"memory_gbs": 80}, "unknown key 'memory_gbs'"),
    ({"memory_gb": -80}, "memory_gb must be a number above 0, not -80"),
    ({"memory_gb": "80"}, "memory_gb must be a number"),
    ({"memory_gb": True}, "memory_gb must be a number"),
    ({"memory_gb_per_s": float("nan")}, "memory_gb_per_s must be a number"),
    ({"gpus_per_node": 0}, "gpus_per_node must be a whole number of at least 1"),
    ({"role": "gpu"}, "role is 'gpu'"),
    ({"tflops": {"fp8": 1979}}, "tflops.bf16 is missing"),
    ({"tflops": {"bf16": 989, "fp6": 1979}}, "unknown key 'fp6'"),
    ({"nvme": {"capacity_gb": 1}}, "nvme.read_gb_per_s is missing"),
    ({"sources": {"memory_gb": "datasheet"}}, "sources.memory_gb_per_s is missing"),
    ({"price": {"low_usd": 3, "typical_usd": 2, "as_of": "2026-11", "source": "x"}}, "typical_usd"),
    ({"scale_up": {"kind": "mesh", "gb_per_s": 4, "pair_gb_per_s": 5, "domain_gpus": 8}}, "pair"),
    ({"aliases": "h100"}, "aliases must be a list of text"),
    ({"host": 64}, "host must be a table"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_file_is_named_with_its_key(change: dict[str, Any], message: str) -> None:
    text = tomli_w.dumps(shipped("h100-sxm") | change)

    with pytest.raises(SpecError, match=r"^mine\.toml") as caught:
        parse_gpu(text, where="mine.toml")
    assert message in str(caught.value)


@pytest.mark.parametrize("key", sorted({*shipped("h100-sxm")} - {"aliases", "tdp_w", "allin_w"}))
def test_nothing_is_filled_in(key: str) -> None:
    tables = shipped("h100-sxm")
    del tables[key]

    with pytest.raises(SpecError, match=f"{key}.* is missing"):
        parse_gpu(tomli_w.dumps(tables), where="mine.toml")


def test_the_files_are_the_unbent_ones() -> None:
    """Negative control for the two tests above: what they bend is accepted as it is."""
    assert parse_gpu(tomli_w.dumps(shipped("h100-sxm")), where="mine.toml") == load_gpu("h100-sxm")


def test_not_toml() -> None:
    with pytest.raises(SpecError, match="not valid TOML"):
        parse_gpu("memory = ", where="mine.toml")
