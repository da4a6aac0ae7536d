"""What `tierline serve` says of itself is what its engine does: the same law, the memory that is
there, promises that can be kept, and every setting of a deployment served, warned of or refused."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines import finish, greedy, tiny_engine
from tierline.base.clock import PS_PER_S
from tierline.base.errors import InputError, SpecError
from tierline.catalog.deployment import (
    Deployment,
    Disaggregation,
    Limits,
    ModelRef,
    Parallel,
    Planned,
    Policies,
    SloClass,
    Speculation,
    Tier,
)
from tierline.catalog.gpus import load_gpu
from tierline.engine.build import EngineOptions
from tierline.engine.engine import Engine
from tierline.engine.machine import GUESS
from tierline.server.deployed import (
    is_named,
    plan_words,
    running_of_serving,
    serving_of,
)
from tierline.server.running import (
    default_levels,
    default_of,
    headline,
    instance_of_engine,
    render_running,
    running_of,
)
from tierline.sim.instance import instance_of
from tierline.workload.slo import parse_service_levels
from tiny_checkpoints import tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def engine(checkpoint: Path) -> Engine:
    return tiny_engine(checkpoint, sequences_max=8, batch_tokens=128)


def deployment_of(**changes: Any) -> Deployment:
    """A deployment that this engine can serve, but for `changes`."""
    values: dict[str, Any] = {
        "model": ModelRef(name="tiny-llama"),
        "gpu": "h100-sxm",
        "replicas": 1,
        "weight_format": "bf16",
        "kv_format": "bf16",
        "parallel": Parallel(),
        "limits": Limits(batch_tokens_max=2048, sequences_max=32, context_tokens_max=256),
        "policies": Policies(chunk_tokens=2048),
        "tiers": (Tier(name="device", capacity_bytes=40_000_000_000),),
        "slo": (SloClass(name="chat", priority=3, targets=("ttft_p99=2s", "itl_p99=80ms")),),
    }
    return Deployment(**(values | changes))


def written(deployment: Deployment, folder: Path) -> str:
    path = folder / "deployment.toml"
    path.write_text(deployment.to_toml(), encoding="utf-8")
    return str(path)


# --- what is told of an engine --------------------------------------------------------------


def test_it_prices_a_step_as_the_scheduler_does(engine: Engine) -> None:
    """INV-SRV-60."""
    mine, own = instance_of_engine(engine).line(), engine.scheduler.line

    for step in [(1, 40, ()), (8, 900, ()), (3, 500, ((0, 64),)), (0, 0, ((32, 17), (0, 100)))]:
        assert mine.line(*step) == own.line(*step)
    assert mine.line(2, 80) != own.line(1, 40)


def test_what_it_says_fits_does_fit(engine: Engine) -> None:
    """As many sequences as are told of run at once, none preempted; so does the longest prompt."""
    told = running_of(engine)
    prompt, output = told.here.prompt_tokens, told.here.output_tokens
    for i in range(told.sequences_fit):
        engine.add([1 + i] * prompt, greedy(output))
    while len(engine.scheduler.decoding) < told.sequences_fit:
        engine.step()
        assert not engine.scheduler.preemptions
    finish(engine)
    engine.add([7] * told.prompt_longest_tokens, greedy(1))

    assert told.sequences_fit == 8
    assert len(finish(engine)) == 1
    with pytest.raises(Exception, match="prompt"):
        engine.add([7] * (told.prompt_longest_tokens + 1), greedy(1))


def test_memory_bounds_what_fits(checkpoint: Path) -> None:
    """The counterpart: with little memory it is not the sequences that bound."""
    told = running_of(tiny_engine(checkpoint, sequences_max=8, kv_bytes=350_000))

    assert told.sequences_fit < 8
    assert told.prompt_longest_tokens == told.rooms[0].tokens - 1 < told.positions_max - 1


def test_its_forecast_is_the_laws(engine: Engine) -> None:
    told, line = running_of(engine), engine.scheduler.line
    context = told.here.prompt_tokens + told.here.output_tokens // 2

    assert told.here.ttft_s == line.prefill_ps(256, chunk=128) / PS_PER_S
    assert dict(told.here.itl_s)[8] == line.line(8, 8 * context)[0] / PS_PER_S
    assert [n for n, _ in told.here.itl_s] == [1, 8]


def test_a_load_curve_rises_and_a_usable_rate_lies_on_it(engine: Engine) -> None:
    told = running_of(engine).here

    assert [p.rps for p in told.curve] == sorted(p.rps for p in told.curve)
    assert told.curve[-1].ttft_p50_s > told.curve[0].ttft_p50_s
    assert told.usable_rps in {p.rps for p in told.curve}


def test_tighter_promises_give_a_lower_rate(engine: Engine) -> None:
    loose = running_of(engine).here
    assert loose.usable_rps is not None
    p50_s = loose.curve[3].ttft_p99_s
    tight = running_of(
        engine, levels=parse_service_levels([f"chat:ttft_p99={p50_s * 1e6:.0f}us"])
    ).here
    never = running_of(engine, levels=parse_service_levels(["chat:ttft_p99=1ns"])).here

    assert tight.usable_rps is not None
    assert tight.usable_rps < loose.usable_rps
    assert never.usable_rps is None
    assert "broken" in headline(never)


def test_the_classes_of_a_bare_model_are_promised_what_the_machine_keeps(engine: Engine) -> None:
    told = running_of(engine)
    interactive, standard, batch = told.levels

    assert [(x.name, x.priority) for x in told.levels] == [
        ("interactive", 10),
        ("standard", 0),
        ("batch", -10),
    ]
    assert told.default_level == "standard"
    assert not batch.targets
    high = told.here.high
    assert told.here.ttft_s * high < interactive.limit_s("ttft") < standard.limit_s("ttft")
    assert dict(told.here.itl_s)[8] * high < interactive.limit_s("itl")
    assert told.here.usable_rps is not None  # with a margin: the first load already keeps them


def test_a_slower_machine_promises_less(engine: Engine) -> None:
    instance = instance_of_engine(engine)
    slow = replace(instance, cost=instance.cost.scaled(50.0))  # type: ignore[attr-defined]

    for mine, theirs in zip(default_levels(instance)[:2], default_levels(slow)[:2], strict=True):
        assert theirs.limit_s("ttft") > 5 * mine.limit_s("ttft")
        assert theirs.limit_s("ttft") <= 60


@pytest.mark.parametrize(
    ("texts", "default"),
    [
        (["a@5:ttft_p99=1s", "standard@2:ttft_p99=1s", "b@0:ttft_p99=1s"], "standard"),
        (["a@5:ttft_p99=1s", "b@1:ttft_p99=1s"], "b"),
        (["a@5:ttft_p99=1s", "b@-5:ttft_p99=1s"], "b"),
        (["only@7:ttft_p99=1s"], "only"),
    ],
)
def test_who_names_no_class_gets_one(texts: list[str], default: str) -> None:
    assert default_of(parse_service_levels(texts)).name == default


def test_a_guess_is_called_one_and_a_measured_machine_is_not(
    engine: Engine, checkpoint: Path
) -> None:
    gpu = engine.scheduler.line.cost.gpu
    sources = {key: text.replace(GUESS, "measured") for key, text in gpu.sources.items()}
    measured = tiny_engine(checkpoint, machine=replace(gpu, sources=sources))

    assert running_of(engine).guessed == (GUESS in gpu.sources.values())
    assert not running_of(measured).guessed
    assert not running_of(measured).warnings


def test_it_is_told_in_words_and_in_plain_numbers(engine: Engine) -> None:
    told = running_of(engine, warnings=["a thing to know"], plan="two of them")
    text, plain = render_running(told), told.to_dict()

    assert text.splitlines()[0] == headline(told.here)
    for words in (
        "tiny-llama",
        "for 2,592 tokens",
        "8 sequences",
        "a thing to know",
        "two of them",
    ):
        assert words in text, words
    assert json.loads(json.dumps(plain)) == plain
    assert plain["levels"][0]["ttft_limit_s"] == told.levels[0].limit_s("ttft")
    assert max(len(line) for line in text.splitlines()) < 200


def test_a_worker_reads_it_without_torch(engine: Engine) -> None:
    told = pickle.dumps(running_of(engine))
    code = "import pickle, sys; r = pickle.load(sys.stdin.buffer);"
    code += "print(r.model, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], input=told, capture_output=True, check=True)

    assert done.stdout.decode().split() == ["tiny-llama", "False"]


# --- from a deployment ----------------------------------------------------------------------


def test_a_path_alone_is_a_model(checkpoint: Path) -> None:
    serving = serving_of(str(checkpoint), given={"sequences_max": 5})

    assert serving.path == checkpoint
    assert serving.options == EngineOptions(sequences_max=5)
    assert serving.deployment is None


def test_a_deployment_for_this_machine_is_served_as_it_says(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierline.engine.machine.title", lambda _: "NVIDIA H100 80GB HBM3")
    deployment = deployment_of(
        weight_format="fp32",
        tiers=(Tier(name="device", capacity_bytes=1_500_000),),
        policies=Policies(scheduler="edf", chunk_tokens=2048, prefix_cache=False),
    )
    serving = serving_of(written(deployment, tmp_path), model=str(checkpoint))
    engine = tiny_engine(
        serving.path,
        **{
            name: getattr(serving.options, name)
            for name in ("kv_bytes", "batch_tokens", "sequences_max", "positions_max", "policy")
        },
    )
    told = running_of_serving(serving, engine)

    assert serving.options.dtype == "fp32"
    assert serving.options.machine == load_gpu("h100-sxm")
    assert not serving.options.prefix_cache
    assert not serving.elsewhere
    assert not serving.warnings
    assert (told.policy, told.limits.batch_tokens, told.limits.sequences_max) == ("edf", 2048, 32)
    assert told.positions_max == 256
    assert [level.name for level in told.levels] == ["chat"]
    assert told.planned is None
    assert not told.instance.prefix_cache


def test_a_deployment_for_another_machine_is_served_and_says_so(
    checkpoint: Path, tmp_path: Path
) -> None:
    serving = serving_of(
        written(deployment_of(), tmp_path), model=str(checkpoint), given={"sequences_max": 4}
    )
    told = running_of_serving(serving, tiny_engine(serving.path, sequences_max=4))

    assert serving.elsewhere
    assert "NVIDIA H100 SXM5" in serving.warnings[0]
    assert serving.options.kv_bytes is serving.options.batch_tokens is None
    assert serving.options.sequences_max == 4  # what is given wins
    assert serving.options.positions_max == 256
    assert told.planned is not None
    assert told.planned.machine == "NVIDIA H100 SXM5"
    own = instance_of(deployment_of(), model=told.instance.cost.model).line()
    assert told.planned.ttft_s == own.prefill_ps(256, chunk=2048) / PS_PER_S
    assert any("does not know 'tiny-llama'" in words for words in told.warnings)
    assert "there" in render_running(told)


SERVED = {"chat": "ttft_p99=1s"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"replicas": 3}, "replicas = 3"),
        (
            {
                "tiers": (
                    Tier(name="device", capacity_bytes=1_000_000),
                    Tier(name="dram", capacity_bytes=8_000_000_000),
                )
            },
            "dram 8.00 GB",
        ),
        (
            {
                "policies": Policies(
                    chunk_tokens=2048,
                    speculation=Speculation(method="ngram", draft_tokens=3, acceptance=0.6),
                )
            },
            "policies.speculation (ngram)",
        ),
        (
            {
                "replicas": 2,
                "policies": Policies(
                    chunk_tokens=2048,
                    disaggregation=Disaggregation(prefill_instances=1, decode_instances=1),
                ),
            },
            "policies.disaggregation",
        ),
        ({"policies": Policies(chunk_tokens=512)}, "policies.chunk_tokens = 512"),
        ({"model": ModelRef(name="tiny-llama", revision="abc")}, "model.revision = 'abc'"),
        ({"slo": (SloClass(targets=("tpot_p50=1s", "e2e_p50=9s")),)}, "promises on e2e and tpot"),
    ],
)
def test_what_is_done_otherwise_is_said_by_name(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """INV-SRV-61; a deployment without any of it has but the machine's warning."""
    with_it = serving_of(written(deployment_of(**changes), tmp_path), model=str(checkpoint))
    without = serving_of(written(deployment_of(), tmp_path), model=str(checkpoint))

    assert any(words in warning for warning in with_it.warnings), with_it.warnings
    assert len(without.warnings) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel": Parallel(tp=2)}, "tp 2"),
        ({"parallel": Parallel(pp=2)}, "pp 2"),
        ({"weight_format": "fp8"}, "weight_format 'fp8'"),
        ({"weight_format": "int4-g32"}, "weight_format 'int4-g32'"),  # of no .gguf
        ({"kv_format": "fp8"}, "kv_format 'fp8'"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError, match=words) as refused:
        serving_of(written(deployment_of(**changes), tmp_path), model=str(checkpoint))

    assert refused.value.hint
    assert "deployment.toml" in str(refused.value)


def test_a_checkpoint_that_is_not_here_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no checkpoint of 'meta/nothing'") as refused:
        serving_of(written(deployment_of(model=ModelRef(name="n", hf_id="meta/nothing")), tmp_path))

    assert "--model" in refused.value.hint


@pytest.mark.parametrize("key", ["config", "hf_id", "name"])
def test_a_checkpoint_is_found_where_the_deployment_says(
    checkpoint: Path, tmp_path: Path, key: str
) -> None:
    place = str(checkpoint / "config.json") if key == "config" else str(checkpoint)
    model = ModelRef(**({"name": "tiny-llama"} | {key: place}))
    serving = serving_of(written(deployment_of(model=model), tmp_path))

    assert serving.path == checkpoint


def test_two_models_are_one_too_many(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="two models"):
        serving_of(str(checkpoint), model=str(checkpoint))


def test_an_option_nobody_knows_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="sequence_max"):
        serving_of(str(checkpoint), given={"sequence_max": 3})


@pytest.mark.parametrize(
    ("gpu", "title", "same"),
    [
        ("h100-sxm", "NVIDIA H100 80GB HBM3", True),
        ("h200", "NVIDIA H200", True),
        ("a100-80", "NVIDIA A100-SXM4-80GB", True),
        ("rtx4090", "NVIDIA GeForce RTX 4090", True),
        ("rtx5090", "NVIDIA GeForce RTX 4090", False),
        ("l4", "NVIDIA L40S", False),
        ("l40s", "NVIDIA L40S", True),
        ("mi300x", "AMD Instinct MI300X", True),
        ("h100-sxm", "AMD EPYC 9B14, 2 cores", False),
    ],
)
def test_a_device_is_known_by_its_title(gpu: str, title: str, same: bool) -> None:
    assert is_named(load_gpu(gpu), title, entry="this-machine") is same


def test_another_size_of_model_is_said(checkpoint: Path, tmp_path: Path) -> None:
    deployment = deployment_of(model=ModelRef(name="llama-3.1-8b"))
    serving = serving_of(written(deployment, tmp_path), model=str(checkpoint))
    told = running_of_serving(serving, tiny_engine(checkpoint))

    assert any("is not the llama-3.1-8b of the plan" in words for words in told.warnings)


def test_a_plan_is_told_in_a_line() -> None:
    planned = Planned(offered_rps=40.0, usable_rps_per_instance=21.5, created_by="tierline")
    words = plan_words(deployment_of(replicas=2, planned=planned))

    assert words.startswith("tiny-llama in bf16 on 2 x h100-sxm: 21.5 requests/s an instance")
