"""A machine that measured itself is planned with like any accelerator, at the times it measured."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tierline.base.errors import SpecError
from tierline.catalog.formats import WEIGHT_FORMATS
from tierline.catalog.gpus import gpu_names, load_gpu, own_files, own_folder, parse_gpu, supports
from tierline.catalog.models import load_model
from tierline.perf.step import Layout, StepCost, load_rates

REACHED: dict[str, Any] = {
    "memory": 0.9,
    "cache": 0.8,
    "dense": {"bf16": 0.7, "fp32": 0.2},
    "attention": 0.3,
    "layer_us": 12.0,
    "step_us": 150.0,
    "sequence_us": 20.0,
    "prompt_us": 0.0,
    "prompt_layer_us": 5.0,
    "low": 0.9,
    "high": 1.1,
    "source": "measured",
}


def entry(**change: Any) -> dict[str, Any]:
    """The tables of a small machine's file."""
    tier = {"capacity_gb": 0, "read_gb_per_s": 10, "write_gb_per_s": 10, "latency_us": 1}
    tier |= {"shared_by_gpus": 1, "source": "test"}
    names = ("memory_gb", "memory_gb_per_s", "tflops", "scale_up", "gpus_per_node")
    return {
        "name": "this-machine",
        "title": "a laptop",
        "role": "accelerator",
        "vendor": "AMD",
        "generation": "Zen 4",
        "memory_gb": 16,
        "memory_gb_per_s": 40,
        "gpus_per_node": 1,
        "tflops": {"bf16": 0.6},
        "scale_up": {"kind": "none", "gb_per_s": 1, "pair_gb_per_s": 1, "domain_gpus": 1},
        "host": tier,
        "nvme": tier,
        "network": tier,
        "price": {"as_of": "2026-11-21", "source": "test"},
        "sources": dict.fromkeys(names, "test"),
        "reached": REACHED,
    } | change


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with nothing of their own yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def put(text: str, name: str = "this-machine") -> Path:
    path = own_folder() / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# --- the entry, as the catalogue and the law read it ----------------------------------------


def test_the_law_prices_with_what_the_machine_reached() -> None:
    gpu = parse_gpu(tomli_w.dumps(entry()), where="mine.toml")
    without = parse_gpu(
        tomli_w.dumps({k: v for k, v in entry().items() if k != "reached"}), where="mine.toml"
    )
    rates = load_rates(gpu)
    cost = StepCost(load_model("smollm2-135m"), gpu, Layout(weights="bf16", kv="bf16"))
    read_s = cost.weights_bytes_per_gpu / (40e9 * 0.9)

    assert (rates.memory, rates.step_ms, rates.layer_dense_us) == (0.9, 0.15, 12.0)
    assert (rates.evidence.low, rates.evidence.high) == (0.9, 1.1)
    assert read_s < cost.step_s(1, 32) < 1.3 * read_s
    assert load_rates(without).layer_dense_us != 12.0


def test_only_formats_that_were_measured_run_there() -> None:
    gpu = parse_gpu(tomli_w.dumps(entry()), where="mine.toml")
    runs = {name for name, fmt in WEIGHT_FORMATS.items() if supports(gpu, fmt) is None}

    assert runs == {"bf16", "fp32"}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"memory": 0}, "reached.memory must be a number above 0"),
    ({"layer_us": -1}, "reached.layer_us must be a number of at least 0"),
    ({"dense": {"fp32": 0.5}}, "reached.dense.bf16 is missing"),
    ({"dense": {"bf16": 0.5, "fp8": 1}}, "unknown key 'fp8'"),
    ({"low": 1.2}, "reached.low"),
    ({"high": 0.9}, "reached.high"),
    ({"pace": 1}, "unknown key 'pace'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_share_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_gpu(tomli_w.dumps(entry(reached=REACHED | change)), where="mine.toml")
    assert message in str(caught.value)


def test_own_entries_are_found_by_name(home: Path) -> None:
    with pytest.raises(SpecError, match="unknown gpu 'this-machine'"):
        load_gpu("this-machine")
    path = put(tomli_w.dumps(entry()))

    assert load_gpu("This-Machine").title == "a laptop"
    assert own_files() == {"this-machine": path}
    assert "this-machine" not in gpu_names()


def test_a_shipped_name_stays_what_it_is(home: Path) -> None:
    put(tomli_w.dumps(entry(name="h100")), name="h100")

    assert load_gpu("h100").vendor == "NVIDIA"


def test_an_own_file_has_the_name_of_its_entry(home: Path) -> None:
    put(tomli_w.dumps(entry()), name="laptop")

    with pytest.raises(SpecError, match="has the name 'this-machine'"):
        load_gpu("laptop")
