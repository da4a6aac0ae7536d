"""The engines' own parsers, Ray and Kubernetes accept what we export.

These tests need big packages, so they build an environment of their own, outside the project:
tools/export_proof_venv.sh, in the folder TIERLINE_EXPORT_PROOF or the user's cache.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from test_deployment import CHAT
from test_export import DRAM, EAGLE, NVME, command
from tierline.catalog.deployment import (
    ROUTINGS,
    SCHEDULERS,
    SPECULATION_METHODS,
    Deployment,
    Disaggregation,
    Limits,
    Parallel,
)
from tierline.catalog.formats import KV_FORMATS, WEIGHT_FORMATS
from tierline.planner.export import export

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TOOLS = Path(__file__).resolve().parents[1] / "tools"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


@pytest.fixture(scope="module")
def proof_python() -> Path:
    """The interpreter of the environment, built on first use; in CI it must build."""
    folder = Path(os.environ.get("TIERLINE_EXPORT_PROOF", CACHE / "tierline" / "export-proof"))
    build = subprocess.run(
        ["sh", str(TOOLS / "export_proof_venv.sh"), str(folder)], capture_output=True, text=True
    )
    if build.returncode:
        message = f"cannot build {folder} (needs a package registry): {build.stderr[-500:]}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder / "bin" / "python"


def verdicts(proof_python: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One verdict for each case, from the real readers."""
    run = subprocess.run(
        [str(proof_python), str(TOOLS / "check_exports.py")],
        input="".join(json.dumps(case) + "\n" for case in cases),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def refused(proof_python: Path, cases: list[dict[str, Any]]) -> list[str]:
    found = verdicts(proof_python, cases)

    assert len(found) == len(cases)
    return [
        f"{c['input']}: {v['message']}" for c, v in zip(cases, found, strict=True) if not v["ok"]
    ]


def policies(**changes: object) -> Deployment:
    return replace(CHAT, policies=replace(CHAT.policies, **changes))


# Every value of every setting once, and the combinations that touch one another.
FLEETS = [
    CHAT,
    *(replace(CHAT, weight_format=name) for name in WEIGHT_FORMATS),
    *(replace(CHAT, kv_format=name) for name in KV_FORMATS),
    *(policies(scheduler=name) for name in SCHEDULERS),
    *(policies(routing=name) for name in ROUTINGS),
    *(policies(speculation=replace(EAGLE, method=m)) for m in SPECULATION_METHODS),
    policies(prefix_cache=False),
    policies(disaggregation=Disaggregation(prefill_instances=3, decode_instances=10)),
    replace(
        CHAT,
        policies=replace(CHAT.policies, chunked_prefill=False),
        limits=Limits(batch_tokens_max=32768, sequences_max=64, context_tokens_max=32768),
    ),
    replace(CHAT, tiers=(*CHAT.tiers, DRAM, NVME)),
    replace(CHAT, parallel=Parallel(tp=2, dp=4, ep=8)),
    replace(CHAT, model=replace(CHAT.model, revision="main")),
    replace(CHAT, gpu="mi300x", replicas=1),
]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_engine_accepts_its_command(proof_python: Path, engine: str) -> None:
    cases = [{"reader": engine, "input": command(fleet, engine)} for fleet in FLEETS]

    assert refused(proof_python, cases) == []


@pytest.mark.parametrize(
    ("target", "file"), [("ray-serve", "serve.yaml"), ("kubernetes", "kubernetes.yaml")]
)
def test_the_platform_accepts_its_file(proof_python: Path, target: str, file: str) -> None:
    cases = [{"reader": target, "input": export(f, target).files[file]} for f in FLEETS]

    assert refused(proof_python, cases) == []


def test_the_readers_can_refuse(proof_python: Path) -> None:
    """Negative control: one wrong word in each export is refused."""
    serve = export(CHAT, "ray-serve").files["serve.yaml"]
    manifests = export(CHAT, "kubernetes").files["kubernetes.yaml"]
    cases = [
        {"reader": "vllm", "input": [*command(CHAT), "--max-sequences", "9"]},
        {"reader": "vllm", "input": [*command(CHAT), "--kv-cache-dtype", "fp7"]},
        {"reader": "sglang", "input": [*command(CHAT, "sglang"), "--max-sequences", "9"]},
        {"reader": "ray-serve", "input": serve.replace("import_path", "import_paths")},
        {"reader": "ray-serve", "input": serve.replace("max_num_seqs", "max_sequences")},
        {"reader": "ray-serve", "input": serve.replace("type: H100", "type: H1000")},
        {"reader": "kubernetes", "input": manifests.replace("replicas: 13", "replicas: many")},
        {"reader": "kubernetes", "input": manifests.replace("containerPort", "containersPort")},
    ]

    assert [v["ok"] for v in verdicts(proof_python, cases)] == [False] * len(cases)
