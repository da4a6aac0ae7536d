"""A machine that measured itself is planned with like any accelerator, at the times it measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from tierline import cli
from tierline.base.errors import SpecError
from tierline.catalog import gpus
from tierline.catalog.formats import WEIGHT_FORMATS
from tierline.catalog.gpu import GpuSpec, Reached
from tierline.catalog.gpus import gpu_names, load_gpu, own_files, own_folder, parse_gpu, supports
from tierline.catalog.models import load_model, model_from_config
from tierline.engine import calibrate as module
from tierline.engine import machine
from tierline.engine.calibrate import Calibration, Figure, figure, fit, predicted, sample, to_toml
from tierline.engine.calibrate import entry as make_entry
from tierline.engine.probes import CPU_SIZES, Probe, Sizes, Step, llama
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
    monkeypatch.setattr(gpus, "own_folder", own_folder)  # that of this home
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


# --- from samples to an entry: arithmetic ---------------------------------------------------

TRUE = Reached(
    memory=0.85,
    cache=0.4,
    dense={"bf16": 0.75, "fp32": 0.25},
    attention=0.3,
    layer_us=25.0,
    step_us=400.0,
    sequence_us=45.0,
    prompt_us=50.0,
    prompt_layer_us=3.0,
    low=1.0,
    high=1.0,
    source="planted",
)


def planted_steps() -> list[Step]:
    """The steps that a machine is measured with."""
    steps = []
    for name, config in CPU_SIZES.networks.items():
        model = model_from_config(config, name=name, source="test")
        for decodes, cached, prompt, past in CPU_SIZES.steps:
            shape = {"decodes": decodes, "context_tokens": cached}
            steps.append(Step(model=model, prompt_tokens=prompt, past_tokens=past, **shape))
    for name, config, kept in (
        ("host", CPU_SIZES.host, False),
        ("smollm2", CPU_SIZES.compared, True),
    ):
        model = model_from_config(config, name=name, source="test")
        whole = {"model": model, "whole": True, "compared": kept}
        steps += [Step(decodes=n, context_tokens=64, **whole) for n in (1, 16)]
        steps += [Step(prompt_tokens=n, **whole) for n in (128, 512) if kept]
    return steps


def machine_of(reached: Reached) -> GpuSpec:
    tables = entry(memory_gb_per_s=34.0, tflops={"bf16": 0.7})
    gpu = parse_gpu(tomli_w.dumps(tables), where="mine.toml")
    return replace(gpu, reached=reached)


START = replace(
    machine.CPU_REACHED,
    memory=1.0,
    cache=0.6,
    attention=0.5,
    layer_us=10.0,
    step_us=200.0,
    prompt_us=1.0,
    prompt_layer_us=1.0,
)


def test_the_fit_finds_what_was_planted() -> None:
    gpu = machine_of(TRUE)
    steps = planted_steps()
    found = fit(list(zip(steps, predicted(steps, gpu), strict=True)), gpu, START)
    again = predicted(steps, machine_of(found))

    assert again == pytest.approx(predicted(steps, gpu), rel=0.03)
    for name in ("memory", "cache", "attention", "sequence_us", "step_us", "layer_us"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=0.15), name
    assert found.dense["bf16"] == pytest.approx(0.75, rel=0.05)


def test_without_the_fit_the_law_does_not_give_the_steps_back() -> None:
    """Negative control for the test above."""
    steps = planted_steps()
    before, true = (predicted(steps, machine_of(r)) for r in (START, TRUE))

    assert max(abs(b / t - 1) for b, t in zip(before, true, strict=True)) > 0.2


def test_one_disturbed_step_does_not_move_the_others() -> None:
    gpu, steps = machine_of(TRUE), planted_steps()
    true = predicted(steps, gpu)
    disturbed = [2 * s if i == 3 else s for i, s in enumerate(true)]
    found = fit(list(zip(steps, disturbed, strict=True)), gpu, START)
    again = predicted(steps, machine_of(found))
    ratios = sorted(a / t for a, t in zip(again, true, strict=True))

    assert ratios[2] > 0.85
    assert ratios[-3] < 1.25


@pytest.mark.parametrize(("spread", "busy"), [(0.05, False), (1.2, True)])
def test_who_measures_beside_others_is_told(spread: float, busy: bool) -> None:
    figures = {str(i): Figure(seconds=1.0, spread=spread, samples=9) for i in range(5)}
    figures["0"] = replace(figures["0"], spread=1.25 - spread)  # one alone says nothing
    gpu = make_entry(*planted(), **FACTS)[0]
    found = Calibration(
        gpu=gpu, figures=figures, works={}, compared=(), kernels="torch", seconds=60.0
    )

    assert found.busy is found.as_dict()["busy"] is busy
    assert ("others computed here" in str(found)) is busy


def planted(step_factor: float = 1.0) -> tuple[list[Probe], dict[str, Figure]]:
    """Probes of a machine that reads 34 GB/s and multiplies at 0.7 TFLOPS, and what they took;
    steps of the network that is compared take `step_factor` times what the law says."""
    rates = {"read": 34e9, "read, one thread": 20e9, "copy": 16e9, "attention, decode": 14e9}
    rates |= {"bf16 x 1": 30e9, "bf16 x 1024": 0.7e12, "fp32 x 1": 15e9, "fp32 x 1024": 0.2e12}
    rates |= {"attention, prompt": 0.2e12, "disk, write": 1e9, "disk, read": 2e9}
    found = [Probe(name=name, run=int, work=rate / 100) for name, rate in rates.items()]
    took = dict.fromkeys(rates, Figure(seconds=0.01, spread=0.05, samples=20))
    found.append(Probe(name="disk, one page", run=int))
    took["disk, one page"] = Figure(seconds=1e-4, spread=0.1, samples=20)
    steps = planted_steps()
    for step, seconds in zip(steps, predicted(steps, machine_of(TRUE)), strict=True):
        name = f"{step}{step.whole}"
        found.append(Probe(name=name, run=int, step=step))
        factor = step_factor if step.compared else 1.0
        took[name] = Figure(seconds=seconds * factor, spread=0.1, samples=9)
    return found, took


FACTS: dict[str, Any] = {
    "name": "this-machine",
    "title": "a laptop, 2 cores",
    "vendor": "AMD",
    "memory_bytes": 16_000_000_000,
    "disk_bytes": 100_000_000_000,
    "host_bytes": 0,
    "disk_how": "page cache dropped",
    "today": "2026-11-21",
    "threads": 2,
}


def test_an_entry_says_what_was_measured_and_how() -> None:
    gpu, compared = make_entry(*planted(), **FACTS)

    assert gpu.memory_bytes_per_s == pytest.approx(34e9, rel=1e-3)
    assert gpu.reached is not None
    assert set(gpu.reached.dense) == {"bf16", "fp32"}
    assert gpu.reached.dense["fp32"] / gpu.reached.dense["bf16"] == pytest.approx(2 / 7, rel=0.01)
    assert gpu.flops_per_s["bf16"] == pytest.approx(0.7e12, rel=1e-3)
    assert (gpu.nvme.read_bytes_per_s, gpu.nvme.write_bytes_per_s) == (2e9, 1e9)
    assert gpu.nvme.capacity_bytes == 50_000_000_000
    for source in (gpu.sources["memory_gb_per_s"], gpu.sources["tflops"], gpu.host.source):
        assert "measured 2026-11-21 by tierline calibrate" in source
        assert "20 samples, spread 5 %" in source
    assert gpu.price.typical_usd is None
    assert [c.ratio for c in compared] == pytest.approx([1.0] * 4, abs=0.05)


def test_products_may_read_faster_than_a_sum() -> None:
    found, took = planted()
    took = {**took, "bf16 x 1": replace(took["bf16 x 1"], seconds=0.005)}
    gpu, _ = make_entry(found, took, **FACTS)

    assert gpu.memory_bytes_per_s == pytest.approx(60e9, rel=1e-3)
    assert "bf16 x 1, 2 threads" in gpu.sources["memory_gb_per_s"]


def test_blocks_of_gguf_have_prices_where_they_were_timed() -> None:
    found, took = planted()
    found += [Probe(name=f"Q4_1 x {rows}", run=int, work=1e9) for rows in (1, 1024)]
    took = {"Q4_1 x 1": took["read"], "Q4_1 x 1024": replace(took["read"], seconds=1 / 350), **took}
    gpu, _ = make_entry(found, took, **FACTS)

    assert gpu.reached is not None
    dense = gpu.reached.dense
    assert dense["int4-g32"] / dense["bf16"] == pytest.approx(0.5, rel=0.01)
    assert supports(gpu, WEIGHT_FORMATS["int4-g32"]) is None
    assert supports(gpu, WEIGHT_FORMATS["int8-g128"]) is not None


def test_a_law_that_is_wrong_here_shows_it() -> None:
    """Negative control: what is compared is not what was fitted."""
    gpu, compared = make_entry(*planted(step_factor=1.5), **FACTS)

    assert gpu.reached is not None
    assert [c.ratio for c in compared] == pytest.approx([1.5] * 4, abs=0.08)
    assert gpu.reached.high > 1.3


def test_equal_samples_equal_entry() -> None:
    """INV-ENG-70"""
    one, other = (to_toml(make_entry(*planted(), **FACTS)[0]) for _ in range(2))

    assert one == other
    assert one != to_toml(make_entry(*planted(1.1), **FACTS)[0])
    assert to_toml(parse_gpu(one, where="mine.toml")) == one


# --- sampling -------------------------------------------------------------------------------


class Clock:
    """A timer that moves when a probe runs."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def probe(self, name: str, seconds: float) -> Probe:
        def run() -> None:
            self.now_s += seconds

        return Probe(name=name, run=run)


def test_rounds_until_the_time_is_spent() -> None:
    clock = Clock()
    found = sample([clock.probe("a", 0.5), clock.probe("b", 0.25)], until_s=3.0, timer=clock)

    assert found == {"a": [0.5] * 5, "b": [0.25] * 4}
    assert clock.now_s == 3.5


def test_the_first_round_is_whole() -> None:
    clock = Clock()
    found = sample([clock.probe("a", 9.0), clock.probe("b", 1.0)], until_s=3.0, timer=clock)

    assert found == {"a": [9.0], "b": [1.0]}


def test_short_probes_are_sampled_more_often() -> None:
    clock = Clock()
    found = sample([clock.probe("a", 1e-3), clock.probe("b", 1.0)], until_s=0.5, timer=clock)

    assert (len(found["a"]), len(found["b"])) == (module.VISIT_SAMPLES, 1)


def test_a_figure_is_the_undisturbed_quarter() -> None:
    quiet = figure([5.0, *[1.0, 1.1, 1.0, 1.1] * 3])
    disturbed = figure([5.0, *[1.0, 1.1, 3.0, 4.0] * 3])

    assert quiet.seconds == pytest.approx(1.0)
    assert disturbed.seconds == pytest.approx(1.0, rel=0.05)
    assert disturbed.spread > 1 > quiet.spread
    assert figure([2.0]) == Figure(seconds=2.0, spread=0.0, samples=1)


# --- this machine, for a moment -------------------------------------------------------------

SMALL = llama(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocabulary=256)
TINY = Sizes(
    read_bytes=1 << 20,
    streamed=(256, 128),
    streamed_rows=(1, 16),
    computed=(128, 128),
    computed_rows=(64,),
    attention=llama(hidden=64, intermediate=64, layers=1, heads=4, kv_heads=2, vocabulary=64),
    sequences=2,
    cached_tokens=64,
    chunk_tokens=32,
    networks={
        "deep": dict(SMALL, num_hidden_layers=4),
        "wide": dict(SMALL, hidden_size=128),
    },
    steps=((1, 32, 0, 0), (4, 32, 0, 0), (0, 0, 32, 0), (2, 32, 16, 16)),
    host=SMALL,
    compared=SMALL,
    compared_decodes=(1, 4),
    compared_prompts=(16, 64),
    disk_bytes=1 << 16,
)


@pytest.fixture
def tiny(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything small, so that a calibration takes a moment; gives the folder of entries."""
    monkeypatch.setattr(module, "CPU_SIZES", TINY)
    missing = module.native.Missing("in a hurry")
    monkeypatch.setattr(module.native, "load", lambda folder, **_: missing)
    return own_folder()


def left_behind(home: Path) -> list[str]:
    return [str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()]


def test_a_machine_measures_itself(
    home: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["calibrate", "--seconds", "0.5", "--device", "cpu"]) == 0

    said = capsys.readouterr().out
    gpu = load_gpu("this-machine")
    assert gpu.reached is not None
    assert gpu.memory_bytes == pytest.approx(
        machine.memory_total_bytes(torch.device("cpu")), rel=1e-3
    )
    assert "compared" in gpu.reached.source
    assert all(name in said for name in ("read", "bf16 x 64", "fp32 x 1", "prompt of 64"))
    assert machine.measured(torch.device("cpu")) == gpu
    assert left_behind(home) == [".config/tierline/gpus/this-machine.toml"]


def test_json_and_a_file_of_choice(
    home: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = home / "lab.toml"
    arguments = ["calibrate", "--seconds", "0.1", "--device", "cpu", "-o", str(path), "--json"]
    assert cli.main(arguments) == 0

    told = json.loads(capsys.readouterr().out)
    assert (told["name"], told["path"]) == ("lab", str(path))
    assert len(told["compared"]) == 4
    assert all(f["seconds"] > 0 and f["samples"] > 0 for f in told["figures"].values())
    assert load_gpu(str(path)).name == "lab"
    assert left_behind(home) == ["lab.toml"]


def test_interrupted_leaves_nothing(
    home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-ENG-71"""

    def interrupted(*_: object) -> None:
        assert list(home.rglob("disk"))
        raise KeyboardInterrupt

    original = module._visit
    visits = []

    def visit(probe: Probe, *rest: Any) -> None:
        visits.append(probe.name)
        original(probe, *rest) if len(visits) < 3 else interrupted()

    monkeypatch.setattr(module, "_visit", visit)

    assert cli.main(["calibrate", "--seconds", "0.1", "--device", "cpu"]) == 130
    assert len(visits) == 3
    assert left_behind(home) == []
    assert not list(home.rglob(".calibrate-*"))


@pytest.mark.parametrize("option", ["-o", "--scratch"])
def test_where_nobody_may_write(
    option: str, home: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "file").write_text("")
    arguments = ["calibrate", "--seconds", "0.1", "--device", "cpu", option]
    assert cli.main([*arguments, str(home / "file" / "mine.toml")]) == 2

    assert "error: cannot write" in capsys.readouterr().err
    assert left_behind(home) == ["file"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "h100"], "'h100' is in the catalogue"),
        (["--name", "my machine"], "is no name for a gpu"),
        (["--seconds", "0"], "0 seconds to measure"),
        (["--seconds", "nan"], "nan seconds"),
        (["--model", "nowhere.gguf"], "no checkpoint at"),
        (["--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, home: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["calibrate", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert left_behind(home) == []


def test_no_room_in_memory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_available_bytes", lambda device: 1_000_000_000)

    assert cli.main(["calibrate", "--device", "cpu"]) == 2
    assert left_behind(home) == []


def test_a_disk_that_is_full(
    home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)

    assert cli.main(["calibrate", "--seconds", "0.1", "--device", "cpu"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert left_behind(home) == []


# --- what the process may have --------------------------------------------------------------


def group(folder: Path, limit: str, used: int, idle: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {idle}\n")


def test_memory_ends_at_the_tightest_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group(tmp_path / "a", limit="3000000", used=2_500_000, idle=500_000)
    group(tmp_path / "a" / "b", limit="max", used=2_000_000, idle=0)
    original = machine._lines
    cgroup = Path("/proc/self/cgroup")

    def lines(path: Path, start: str) -> list[str]:
        return ["0::/a/b"] if path == cgroup else original(path, start)

    monkeypatch.setattr(machine, "_lines", lines)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    cpu = torch.device("cpu")

    assert machine.memory_total_bytes(cpu) == 3_000_000
    assert machine.memory_available_bytes(cpu) == 1_000_000
    (tmp_path / "a" / "memory.max").write_text("max\n")
    assert machine.memory_available_bytes(cpu) > 3_000_000
