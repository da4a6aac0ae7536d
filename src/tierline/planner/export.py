"""A deployment as the files that other systems start from.

`tierline export` calls `export` with one of `TARGETS` and writes the files. What a target
cannot express is never dropped silently: it is listed in `Export.not_expressed`, and each
file carries the same list as comments.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tierline.base.errors import InputError
from tierline.base.names import lookup
from tierline.catalog.deployment import Deployment
from tierline.catalog.gpu import GpuSpec
from tierline.catalog.gpus import load_gpu
from tierline.planner.engines import (
    VLLM_VERSION,
    Settings,
    fleet_gaps,
    node_gaps,
    sglang_settings,
    trtllm_settings,
    vllm_settings,
)
from tierline.planner.yaml_text import to_yaml

_PORT = 8000
_IMAGES = {
    "NVIDIA": f"vllm/vllm-openai:v{VLLM_VERSION}",
    "AMD": f"vllm/vllm-openai-rocm:v{VLLM_VERSION}",
}
_RESOURCES = {"NVIDIA": "nvidia.com/gpu", "AMD": "amd.com/gpu"}
_RAY_ACCELERATORS = {
    "a10g": "A10G",
    "l4": "L4",
    "l40s": "L40S",
    "a100-40": "A100",
    "a100-80": "A100",
    "a100-pcie": "A100",
    "h100-sxm": "H100",
    "h100-pcie": "H100",
    "h200": "H200",
    "b200": "B200",
    "b300": "B300",
    "gb200": "GB200",
    "gb300": "GB300",
    "rtxpro6000se": "RTX-PRO-6000",
    "mi300x": "AMD-Instinct-MI300X-OAM",
    "mi325x": "AMD-Instinct-MI325X-OAM",
    "mi355x": "AMD-Instinct-MI355X-OAM",
}
_RAY_ROUTERS = {
    "prefix-aware": "ray.serve.llm.request_router.PrefixCacheAffinityRouter",
    "round-robin": "ray.serve.experimental.round_robin_router.RoundRobinRouter",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Files by name, and the parts of the deployment that they do not carry."""

    target: str
    files: Mapping[str, str]
    not_expressed: tuple[str, ...]


def export(deployment: Deployment, target: str, *, gpu: GpuSpec | None = None) -> Export:
    """The files of `target` (one of `TARGETS`); `gpu` when it is not in the catalogue.

    Raises `InputError` for an unknown target, and for one that cannot run this at all.
    """
    write = lookup("export target", target, TARGETS)
    _require_no_options(deployment)
    files, gaps = write(deployment, gpu or load_gpu(deployment.gpu))
    gaps = list(dict.fromkeys(_one_line(gap) for gap in gaps))
    remarks = _remarks(deployment, gaps)
    return Export(
        target=target,
        files={name: _with_remarks(text, remarks) for name, text in files.items()},
        not_expressed=tuple(gaps),
    )


def _require_no_options(d: Deployment) -> None:
    """Refuse a name that a command line would take for an option."""
    speculation = d.policies.speculation
    names = {"model": d.model.served_name, "model.revision": d.model.revision}
    names["draft_model"] = speculation.draft_model if speculation else None
    for key, name in names.items():
        if name and name.startswith("-"):
            raise InputError(f"{key} {name!r} begins with a dash", hint="give the name of a model")


def _vllm(d: Deployment, gpu: GpuSpec) -> tuple[dict[str, str], list[str]]:
    settings, gaps = vllm_settings(d)
    command = ["vllm", "serve", d.model.served_name, *flags(settings)]
    return {"vllm.sh": _script(command)}, gaps + node_gaps(d, gpu) + fleet_gaps(d)


def _sglang(d: Deployment, gpu: GpuSpec) -> tuple[dict[str, str], list[str]]:
    settings, gaps = sglang_settings(d)
    command = ["python", "-m", "sglang.launch_server", "--model-path", d.model.served_name]
    return {"sglang.sh": _script([*command, *_sglang_flags(settings)])}, (
        gaps + node_gaps(d, gpu) + fleet_gaps(d)
    )


def _trtllm(d: Deployment, gpu: GpuSpec) -> tuple[dict[str, str], list[str]]:
    if gpu.vendor != "NVIDIA":
        raise InputError(
            f"TensorRT-LLM does not run on {gpu.title}", hint="export to vllm or sglang"
        )
    options, tables, gaps = trtllm_settings(d)
    command = ["trtllm-serve", d.model.served_name]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    script = _script([*command, "--config", "trtllm.yaml"])
    files = {"trtllm.sh": script, "trtllm.yaml": to_yaml(tables)}
    return files, gaps + node_gaps(d, gpu) + fleet_gaps(d)


def _ray_serve(d: Deployment, gpu: GpuSpec) -> tuple[dict[str, str], list[str]]:
    """One Ray Serve application; the engine is vLLM, its arguments are `engine_kwargs`."""
    engine, gaps = vllm_settings(d)
    if d.parallel.dp > 1:
        gaps.append(
            f"attention data parallelism {d.parallel.dp}: build_openai_app passes it to the"
            " engine; for ranks on several nodes use build_dp_openai_app"
        )
    if gpu.name not in _RAY_ACCELERATORS:
        gaps.append(f"accelerator {gpu.name}: Ray has no name for it; restrict it by node labels")
    split = d.policies.disaggregation
    if split is None:
        arguments: Settings = {"llm_configs": [_llm_config(d, gpu, engine, d.replicas)]}
    else:
        engine = engine | {
            "kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
        }
        arguments = {
            "prefill_config": _llm_config(d, gpu, engine, split.prefill_instances),
            "decode_config": _llm_config(d, gpu, engine, split.decode_instances),
        }
    if d.replicas > 1 and d.policies.routing not in _RAY_ROUTERS:
        gaps.append(f"routing {d.policies.routing}: Ray takes the shorter queue of two replicas")
    builder = "build_openai_app" if split is None else "build_pd_openai_app"
    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": _PORT},
        "applications": [
            {
                "name": _slug(d.model.name),
                "route_prefix": "/",
                "import_path": f"ray.serve.llm:{builder}",
                "args": arguments,
            }
        ],
    }
    return {"serve.yaml": to_yaml(document)}, gaps


def _llm_config(d: Deployment, gpu: GpuSpec, engine: Settings, replicas: int) -> Settings:
    config: Settings = {
        "model_loading_config": {"model_id": d.model.name, "model_source": d.model.served_name}
    }
    if gpu.name in _RAY_ACCELERATORS:
        config["accelerator_type"] = _RAY_ACCELERATORS[gpu.name]
    config["engine_kwargs"] = engine
    deployment: Settings = {
        "autoscaling_config": {  # the plan sized the fleet: raise the maximum to let it grow
            "min_replicas": replicas,
            "max_replicas": replicas,
            "target_ongoing_requests": d.limits.sequences_max,
        },
        "max_ongoing_requests": d.limits.sequences_max,
    }
    if router := _RAY_ROUTERS.get(d.policies.routing):
        deployment["request_router_config"] = {"request_router_class": router}
    return config | {"deployment_config": deployment}


def _kubernetes(d: Deployment, gpu: GpuSpec) -> tuple[dict[str, str], list[str]]:
    """A Deployment of vLLM pods, one pod an instance, with a Service and a disruption budget."""
    _require_one_pod(d, gpu)
    engine, gaps = vllm_settings(d)
    name = f"{_slug(d.model.name)}-vllm"
    if d.replicas > 1:
        gaps.append(f"routing {d.policies.routing}: a Service picks pods at random")
    gaps.append(f"nodes with {gpu.name}: add your cluster's label to nodeSelector")
    if d.policies.disaggregation:
        gaps += [gap for gap in fleet_gaps(d) if gap.startswith("disaggregation")]
    labels = {"app.kubernetes.io/name": name}
    documents = [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "replicas": d.replicas,
                "selector": {"matchLabels": labels},
                # Accelerators are rarely idle enough for a surge: replace one pod at a time.
                "strategy": {
                    "type": "RollingUpdate",
                    "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
                },
                "template": {"metadata": {"labels": labels}, "spec": _pod(d, gpu, engine)},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "selector": labels,
                "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
            },
        },
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": name, "labels": labels},
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": labels}},
        },
    ]
    return {"kubernetes.yaml": "---\n".join(to_yaml(document) for document in documents)}, gaps


def _require_one_pod(d: Deployment, gpu: GpuSpec) -> None:
    if gpu.vendor not in _IMAGES:
        raise InputError(
            f"no vLLM image is known for {gpu.title}", hint="export to vllm and build your own pod"
        )
    machine_gpus = gpu.gpus_per_node if gpu.gpus_per_node <= 8 else 4  # NVL72: a tray of 4
    if d.gpus_per_instance > machine_gpus:
        raise InputError(
            f"an instance of {d.gpus_per_instance} {gpu.name} does not fit one pod:"
            f" a machine has {machine_gpus}",
            hint="export to ray-serve, which places an instance over several machines",
        )


def _pod(d: Deployment, gpu: GpuSpec, engine: Settings) -> Settings:
    health: Settings = {"httpGet": {"path": "/health", "port": "http"}}
    resources: Settings = {"limits": {_RESOURCES[gpu.vendor]: d.gpus_per_instance}}
    if "kv_offloading_size" in engine:
        host_gib = round(engine["kv_offloading_size"] * d.parallel.dp) + 16  # and the engine itself
        resources["requests"] = {"memory": f"{host_gib}Gi"}
    container: Settings = {
        "name": "vllm",
        "image": _IMAGES[gpu.vendor],
        "command": ["vllm", "serve"],
        "args": [d.model.served_name, *flags(engine), "--port", str(_PORT)],
        "env": [
            {
                "name": "HF_TOKEN",
                "valueFrom": {
                    "secretKeyRef": {"name": "hf-token", "key": "token", "optional": True}
                },
            }
        ],
        "ports": [{"name": "http", "containerPort": _PORT}],
        "resources": resources,
        # Loading hundreds of GB takes minutes: up to an hour before the pod counts as failed.
        "startupProbe": health | {"periodSeconds": 10, "failureThreshold": 360},
        "readinessProbe": health | {"periodSeconds": 5, "failureThreshold": 2},
        "livenessProbe": health | {"periodSeconds": 15, "failureThreshold": 4},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    return {
        "terminationGracePeriodSeconds": 120,
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Command-line flags of vLLM for its engine arguments; tables become JSON."""
    words: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Mapping):
            words += [f"--{flag}", json.dumps(value, ensure_ascii=False)]
        else:
            words += [f"--{flag}", str(value)]
    return words


def _sglang_flags(settings: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in settings.items():
        words.append(f"--{name.replace('_', '-')}")
        if not isinstance(value, bool):
            words.append(str(value))
    return words


def _script(words: list[str]) -> str:
    """A shell script of one command, one option a line."""
    lines = [""]
    for word in words:
        if word.startswith("--"):
            lines.append(shlex.quote(word))
        else:
            lines[-1] = f"{lines[-1]} {shlex.quote(word)}".strip()
    return "#!/bin/sh\nset -eu\nexec " + " \\\n  ".join(lines) + "\n"


def _remarks(d: Deployment, gaps: list[str]) -> str:
    created = f", by {d.planned.created_by}" if d.planned else ""
    head = f"{d.model.name} on {d.replicas} x {d.gpus_per_instance} {d.gpu}{created}"
    lines = [head, *(["Not expressed here:"] if gaps else []), *(f"- {gap}" for gap in gaps)]
    return "".join(f"# {_one_line(line)}\n" for line in lines)


def _with_remarks(text: str, remarks: str) -> str:
    """The remarks first, or second when the first line names the shell."""
    first, newline, rest = text.partition("\n")
    return first + newline + remarks + rest if first.startswith("#!") else remarks + text


def _one_line(text: str) -> str:
    """Text that cannot break out of a comment."""
    return "".join(c if c.isprintable() else " " for c in text)


def _slug(name: str) -> str:
    """A name that Kubernetes and Ray take: lower case, digits and dashes, at most 50."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.casefold()).strip("-")[:50].strip("-")
    return slug if slug[:1].isalpha() else f"model-{slug}".strip("-")


TARGETS: Mapping[str, Callable[[Deployment, GpuSpec], tuple[dict[str, str], list[str]]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "trtllm": _trtllm,
    "ray-serve": _ray_serve,
    "kubernetes": _kubernetes,
}
