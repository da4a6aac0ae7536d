"""An export says everything the deployment says, or names what it leaves out.

That the real engines, Ray and Kubernetes accept the files is tests/test_export_proof.py.
"""

import shlex
import subprocess
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from strategies import deployments, words
from test_deployment import CHAT
from tierline.base.errors import InputError
from tierline.catalog.deployment import (
    Deployment,
    Disaggregation,
    ModelRef,
    Parallel,
    Speculation,
    Tier,
)
from tierline.catalog.gpus import load_gpu
from tierline.planner.export import TARGETS, export
from tierline.planner.yaml_text import scalar, to_yaml

# Flags of vLLM 0.32 that an export may use, with whether a value follows. The proof that its
# parser takes them needs vLLM; this list keeps a typing mistake from waiting for that.
VLLM_FLAGS = {
    "--tensor-parallel-size": True,
    "--pipeline-parallel-size": True,
    "--data-parallel-size": True,
    "--enable-expert-parallel": False,
    "--max-model-len": True,
    "--max-num-seqs": True,
    "--max-num-batched-tokens": True,
    "--gpu-memory-utilization": True,
    "--block-size": True,
    "--kv-cache-dtype": True,
    "--enable-prefix-caching": False,
    "--no-enable-prefix-caching": False,
    "--enable-chunked-prefill": False,
    "--no-enable-chunked-prefill": False,
    "--scheduling-policy": True,
    "--long-prefill-token-threshold": True,
    "--quantization": True,
    "--dtype": True,
    "--revision": True,
    "--kv-offloading-size": True,
    "--kv-offloading-backend": True,
    "--speculative-config": True,
}


def command(deployment: Deployment, target: str = "vllm") -> list[str]:
    """The words that the shell hands to the engine."""
    script = export(deployment, target).files[f"{target}.sh"]
    lines = [line for line in script.splitlines() if not line.startswith("#")]
    return shlex.split("\n".join(lines[1:]).replace("\\\n", ""))[1:]


def options(deployment: Deployment, target: str = "vllm") -> dict[str, str]:
    """Value of every option; '' where none follows."""
    found: dict[str, str] = {}
    last = ""
    for word in command(deployment, target):
        if word.startswith("--"):
            last = word
            found[last] = ""
        elif last:
            found[last] = word
    return found


def unknown_flags(deployment: Deployment) -> set[str]:
    given_options = options(deployment)
    return {
        flag
        for flag, value in given_options.items()
        if flag not in VLLM_FLAGS or VLLM_FLAGS[flag] != bool(value)
    }


@given(deployments())
def test_vllm_flags_are_known_ones(deployment: Deployment) -> None:
    model = replace(deployment.model, hf_id="org/model", revision="main")
    speculation = deployment.policies.speculation and replace(
        deployment.policies.speculation, draft_model="org/draft"
    )
    policies = replace(deployment.policies, speculation=speculation)

    assert unknown_flags(replace(deployment, model=model, policies=policies)) == set()


def test_the_flag_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a flag that vLLM does not know is seen."""
    monkeypatch.delitem(VLLM_FLAGS, "--max-num-seqs")

    assert unknown_flags(CHAT) == {"--max-num-seqs"}


DRAM = Tier(name="dram", capacity_bytes=2**40)
NVME = Tier(name="nvme", capacity_bytes=7 * 10**12)
EAGLE = Speculation(method="eagle3", draft_tokens=3, acceptance=0.7, draft_model="org/eagle")


def with_policies(**changes: object) -> Deployment:
    return replace(CHAT, policies=replace(CHAT.policies, **changes))


VLLM_SAYS: list[tuple[Deployment, dict[str, str]]] = [
    (
        CHAT,
        {
            "--tensor-parallel-size": "4",
            "--max-model-len": "32768",
            "--max-num-seqs": "256",
            "--max-num-batched-tokens": "8192",
            "--kv-cache-dtype": "fp8",
            "--quantization": "fp8",
            "--gpu-memory-utilization": "0.9",
            "--enable-prefix-caching": "",
            "--scheduling-policy": "priority",
            "--long-prefill-token-threshold": "2048",
        },
    ),
    (replace(CHAT, kv_format="bf16"), {"--kv-cache-dtype": "auto"}),
    (with_policies(prefix_cache=False), {"--no-enable-prefix-caching": ""}),
    (with_policies(scheduler="fcfs"), {"--scheduling-policy": "fcfs"}),
    (replace(CHAT, tiers=(*CHAT.tiers, DRAM)), {"--kv-offloading-size": "1024.0"}),
    (
        replace(CHAT, parallel=Parallel(dp=8, ep=8), tiers=(*CHAT.tiers, DRAM)),
        {  # every rank is an engine of its own: an eighth of the limits and of the memory
            "--data-parallel-size": "8",
            "--enable-expert-parallel": "",
            "--max-num-seqs": "32",
            "--max-num-batched-tokens": "1024",
            "--kv-offloading-size": "128.0",
        },
    ),
    (
        with_policies(speculation=EAGLE),
        {
            "--speculative-config": '{"method": "eagle3", "num_speculative_tokens": 3,'
            ' "model": "org/eagle"}'
        },
    ),
]


@pytest.mark.parametrize(("deployment", "said"), VLLM_SAYS)
def test_what_vllm_is_told(deployment: Deployment, said: dict[str, str]) -> None:
    assert said.items() <= options(deployment).items()


def test_what_sglang_is_told() -> None:
    told = options(
        replace(
            with_policies(speculation=EAGLE),
            parallel=Parallel(tp=2, dp=4, ep=8),
            tiers=(*CHAT.tiers, Tier(name="dram", capacity_bytes=800 * 10**9)),
        ),
        "sglang",
    )

    assert told["--tensor-parallel-size"] == "8"  # SGLang counts all attention ranks
    assert told["--attn-dp-size"] == "4"
    assert told["--expert-parallel-size"] == "8"
    assert told["--hicache-size"] == "100"  # GB of each rank
    assert told["--speculative-num-draft-tokens"] == "4"
    assert told["--enable-priority-scheduling"] == ""


def test_what_tensorrt_llm_is_told() -> None:
    files = export(replace(CHAT, tiers=(*CHAT.tiers, DRAM)), "trtllm").files
    tables = yaml.safe_load(files["trtllm.yaml"])

    assert options(CHAT, "trtllm")["--tp_size"] == "4"
    assert tables["kv_cache_config"]["host_cache_size"] == 2**38
    assert tables["kv_cache_config"]["dtype"] == "fp8"
    assert tables["enable_chunked_prefill"] is True


def test_what_ray_is_told() -> None:
    document = yaml.safe_load(export(CHAT, "ray-serve").files["serve.yaml"])
    (application,) = document["applications"]
    (config,) = application["args"]["llm_configs"]

    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    assert config["engine_kwargs"]["tensor_parallel_size"] == 4
    assert config["deployment_config"]["autoscaling_config"]["min_replicas"] == 13
    assert config["accelerator_type"] == "H100"


def test_ray_splits_prefill_from_decode() -> None:
    split = with_policies(disaggregation=Disaggregation(prefill_instances=3, decode_instances=10))
    document = yaml.safe_load(export(split, "ray-serve").files["serve.yaml"])
    arguments = document["applications"][0]["args"]
    scaling = [
        arguments[role]["deployment_config"]["autoscaling_config"]["min_replicas"]
        for role in ("prefill_config", "decode_config")
    ]

    assert scaling == [3, 10]
    assert not [g for g in export(split, "ray-serve").not_expressed if "disaggregation" in g]


@pytest.mark.parametrize(
    ("gpu", "resource", "image"),
    [
        ("h100-sxm", "nvidia.com/gpu", "vllm/vllm-openai:v0.32.0"),
        ("mi300x", "amd.com/gpu", "vllm/vllm-openai-rocm:v0.32.0"),
    ],
)
def test_what_kubernetes_is_told(gpu: str, resource: str, image: str) -> None:
    text = export(replace(CHAT, gpu=gpu), "kubernetes").files["kubernetes.yaml"]
    deployment, service, budget = yaml.safe_load_all(text)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]

    assert deployment["spec"]["replicas"] == 13
    assert container["resources"]["limits"] == {resource: 4}
    assert container["image"] == image
    assert container["args"][:3] == [CHAT.model.hf_id, "--tensor-parallel-size", "4"]
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    assert budget["spec"]["maxUnavailable"] == 1


# What a deployment may ask for, and the targets that cannot say it.
NOT_EXPRESSED: list[tuple[Deployment, str, set[str]]] = [
    (CHAT, "ttft_p99=2s", set(TARGETS)),
    (CHAT, "tierline scheduling", set(TARGETS)),
    (with_policies(scheduler="fcfs"), "scheduling", set()),
    (replace(CHAT, tiers=(*CHAT.tiers, NVME)), "tier nvme, 7000 GB", set(TARGETS)),
    (replace(CHAT, tiers=(*CHAT.tiers, DRAM)), "tier dram", set()),
    (CHAT, "13 replicas", {"vllm", "sglang", "trtllm"}),
    (with_policies(routing="round-robin"), "routing", set(TARGETS) - {"ray-serve"}),
    (replace(CHAT, weight_format="int4-g128"), "weights in int4-g128", set(TARGETS)),
    (replace(CHAT, weight_format="bf16"), "weights in", set()),
    (CHAT, "weights in fp8: made from", set(TARGETS) - {"trtllm"}),
    (replace(CHAT, kv_format="int8"), "KV format int8", {"sglang", "trtllm"}),
    (
        with_policies(speculation=replace(EAGLE, method="suffix")),
        "speculation suffix",
        {"sglang", "trtllm"},
    ),
    (
        with_policies(speculation=replace(EAGLE, draft_model=None)),
        "name its draft model",
        set(TARGETS),
    ),
    (
        replace(CHAT, parallel=Parallel(tp=4, ep=2)),
        "expert parallelism 2",
        set(TARGETS) - {"sglang", "trtllm"},
    ),
    (
        with_policies(disaggregation=Disaggregation(prefill_instances=3, decode_instances=10)),
        "disaggregation, 3 prefill",
        set(TARGETS) - {"ray-serve"},
    ),
]


@pytest.mark.parametrize(("deployment", "gap", "targets"), NOT_EXPRESSED)
def test_gaps_are_listed_and_written_down(
    deployment: Deployment, gap: str, targets: set[str]
) -> None:
    exports = {target: export(deployment, target) for target in TARGETS}
    listed = {t for t, e in exports.items() if any(gap in line for line in e.not_expressed)}

    assert listed == targets
    for each in exports.values():
        for text in each.files.values():
            assert all(f"# - {line}" in text.splitlines() for line in each.not_expressed)


@given(deployments(), st.sampled_from(sorted(TARGETS)), words)
def test_comments_never_end_early(deployment: Deployment, target: str, name: str) -> None:
    """Every line of a file is a comment of ours or part of the command, whatever the names."""
    nasty = ModelRef(name=f"{name}\nrm -rf / #", hf_id=f'--{name}\'; echo "$HOME" \\')
    try:
        files = export(replace(deployment, model=nasty), target).files
    except InputError:
        return  # what is refused has its own test
    for file, text in files.items():
        body = [line for line in text.splitlines() if not line.startswith("#")]
        assert not [line for line in body if line.startswith("rm")]
        if file.endswith(".sh"):
            assert nasty.hf_id in shlex.split("\n".join(body).replace("\\\n", ""))
        else:
            assert list(yaml.safe_load_all(text))


def test_the_shell_reads_what_was_meant() -> None:
    """The script run by a shell, with the engine replaced by one that prints its words."""
    model = ModelRef(name="m", hf_id='org/it\'s $HOME `x` \\ "q"')
    script = export(replace(CHAT, model=model), "vllm").files["vllm.sh"]
    run = subprocess.run(
        ["sh", "-c", script.replace("exec vllm", "printf '%s\\n'")],
        capture_output=True,
        text=True,
        check=True,
    )

    assert run.stdout.splitlines()[:3] == ["serve", model.hf_id, "--tensor-parallel-size"]


@pytest.mark.parametrize(
    ("deployment", "target", "message"),
    [
        (CHAT, "tgi", "unknown export target 'tgi'"),
        (replace(CHAT, gpu="mi300x"), "trtllm", "TensorRT-LLM does not run on AMD MI300X"),
        (replace(CHAT, gpu="tpu-v6e"), "kubernetes", "no vLLM image is known"),
        (replace(CHAT, parallel=Parallel(tp=8, pp=2)), "kubernetes", "16 h100-sxm does not fit"),
        (replace(CHAT, gpu="gb200", parallel=Parallel(tp=8)), "kubernetes", "a machine has 4"),
        (replace(CHAT, gpu="h100-smx"), "vllm", "unknown gpu 'h100-smx'"),
        (replace(CHAT, model=ModelRef(name="--port")), "vllm", "begins with a dash"),
    ],
)
def test_what_cannot_run_is_refused(deployment: Deployment, target: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        export(deployment, target)

    assert message in str(caught.value)
    assert caught.value.hint


def test_an_accelerator_outside_the_catalogue() -> None:
    own = replace(load_gpu("h100"), name="h100-lab")
    exported = export(replace(CHAT, gpu="h100-lab"), "ray-serve", gpu=own)

    assert any("accelerator h100-lab" in gap for gap in exported.not_expressed)


yaml_values = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(st.text() | st.integers(), max_size=3)
        | st.lists(st.dictionaries(st.text(), inner, max_size=3), max_size=3)
        | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), yaml_values, min_size=1, max_size=4))
def test_yaml_reads_back(value: dict[str, object]) -> None:
    assert yaml.safe_load(to_yaml(value)) == value


@pytest.mark.parametrize("text", ["yes", "1e5", "8000", "a: b", "null", "", "é\u2028", "#", "-"])
def test_text_stays_text(text: str) -> None:
    assert yaml.safe_load(f"k: {scalar(text)}") == {"k": text}


def test_an_export_is_the_same_every_time() -> None:
    for target in TARGETS:
        assert export(CHAT, target) == export(CHAT, target)
