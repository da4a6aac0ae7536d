"""What `tierline serve TARGET` means: a model's path or name, or a deployment file.

`serve` calls `serving_of` before anything is loaded.  A deployment describes a fleet; this
process is one instance of it, on the device that is here.  What it says and this engine does not
do is refused by name where the answer would be wrong or could not be computed at all (another
number format, a model cut over accelerators), and said by name in `warnings` where only speed or
capacity differ.  Nothing is ignored in silence.

Invariants
    INV-SRV-61  every setting of a deployment is served, warned about by name, or refused by name
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tierline.base.errors import DoesNotFitError, InputError, SpecError
from tierline.base.names import reject_unknown_keys
from tierline.base.units import format_bytes, significant
from tierline.catalog.deployment import Deployment, ModelRef, load_deployment
from tierline.catalog.gpu import GpuSpec
from tierline.catalog.gpus import load_gpu
from tierline.catalog.models import load_model
from tierline.engine import demo, machine
from tierline.engine.build import EngineOptions, device_named
from tierline.engine.engine import Engine
from tierline.server.running import Running, running_of
from tierline.sim.instance import Instance, instance_of
from tierline.workload.slo import ServiceLevel, parse_target

# Weight formats of a plan -> the engine's dtype; blocks of integers come as they are in a file.
DTYPES = {"bf16": "auto", "fp32": "fp32"}
BLOCKS = ("int8-g128", "int4-g32")
PARAMS_APART = 0.02  # beyond this share two parameter counts are two models


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What to open, and under which promises."""

    path: Path  # of the checkpoint
    options: EngineOptions
    levels: tuple[ServiceLevel, ...] = ()  # (): those that this machine can keep
    deployment: Deployment | None = None
    elsewhere: bool = False  # the deployment is for another machine than this one
    warnings: tuple[str, ...] = ()


def serving_of(
    target: str, *, model: str | None = None, given: Mapping[str, Any] | None = None
) -> Serving:
    """What `target` asks to serve; `model` and `given` (fields of `EngineOptions`) win over it.

    Raises `InputError` for what cannot be found, and `SpecError` for a deployment that this
    engine cannot serve.
    """
    options = dict(given or {})
    reject_unknown_keys("engine options", options, [f.name for f in fields(EngineOptions)])
    if not target.endswith(".toml"):
        if model is not None:
            raise InputError(
                f"two models: {target!r} and {model!r}",
                hint="give one; a second one replaces the model of a deployment file",
            )
        return Serving(path=demo.resolve_model(target), options=EngineOptions(**options))
    return _deployed(load_deployment(Path(target)), model, options, where=target)


def running_of_serving(serving: Serving, engine: Engine) -> Running:
    """The engine that was opened for `serving`, with what was planned beside what is here."""
    deployment, warnings = serving.deployment, list(serving.warnings)
    planned: Instance | None = None
    if deployment is not None:
        warnings += _another_model(deployment, engine)
        if serving.elsewhere:
            planned = _planned(deployment, engine, warnings)
    return running_of(
        engine,
        levels=serving.levels,
        prefix_cache=serving.options.prefix_cache,
        plan=plan_words(deployment) if deployment is not None else "",
        planned=planned,
        warnings=warnings,
    )


# --- from a deployment ----------------------------------------------------------------------


def _deployed(
    deployment: Deployment, model: str | None, given: dict[str, Any], *, where: str
) -> Serving:
    path = demo.resolve_model(model) if model is not None else _checkpoint(deployment.model, where)
    _refuse(deployment, path, where=where)
    device = device_named(given.get("device", "auto"))
    gpu = load_gpu(deployment.gpu)
    own = machine.measured(device)
    here = own is not None and own.name == gpu.name
    here = here or is_named(gpu, machine.title(device), entry=machine.entry_name(device))
    limits, policies = deployment.limits, deployment.policies
    asked: dict[str, Any] = {
        "dtype": DTYPES.get(deployment.weight_format, "auto"),
        "positions_max": limits.context_tokens_max,
        "sequences_max": limits.sequences_max,
        "block_tokens": deployment.kv_block_tokens,
        "policy": policies.scheduler,
        "prefix_cache": policies.prefix_cache,
    }
    if here:
        asked["batch_tokens"] = limits.batch_tokens_max
        asked["kv_bytes"] = next(t.capacity_bytes for t in deployment.tiers if t.name == "device")
        asked["machine"] = own or gpu
    warnings = _differences(deployment)
    if not here:
        warnings.insert(
            0,
            f"the deployment is for {gpu.title}, and this is {machine.title(device)}: its device"
            " memory and tokens of a step are left to the engine, and what it predicts for that"
            " machine is told beside what is predicted for this one",
        )
    return Serving(
        path=path,
        options=EngineOptions(**(asked | given)),
        levels=_levels(deployment),
        deployment=deployment,
        elsewhere=not here,
        warnings=tuple(warnings),
    )


def _checkpoint(model: ModelRef, where: str) -> Path:
    """The checkpoint that a deployment means: beside its config, at a path, or by a name."""
    if model.config is not None:
        folder = Path(model.config).expanduser()
        folder = folder.parent if folder.name == "config.json" else folder
        if any(folder.glob("*.safetensors")):
            return folder
    for name in filter(None, (model.hf_id, model.name)):
        if Path(name).expanduser().exists():
            return Path(name).expanduser()
        short = name.rpartition("/")[2].casefold()
        if short in demo.NAMES:
            return demo.resolve_model(short)
    raise SpecError(
        f"{where}: no checkpoint of {model.served_name!r} is on this machine",
        hint="give its folder or .gguf file: --model PATH",
    )


def _refuse(deployment: Deployment, path: Path, *, where: str) -> None:
    """Raises `SpecError` for what this engine cannot compute."""
    cut, weights, kv = deployment.parallel, deployment.weight_format, deployment.kv_format
    if max(cut.tp, cut.pp, cut.dp, cut.ep) > 1:
        raise SpecError(
            f"{where}: an instance is cut over {deployment.gpus_per_instance} accelerators"
            f" (tp {cut.tp}, pp {cut.pp}, dp {cut.dp}, ep {cut.ep}); this server uses one",
            hint="plan with a model that fits one, or `tierline export` for an engine that cuts",
        )
    if weights not in DTYPES and not (weights in BLOCKS and path.suffix == ".gguf"):
        blocks = weights in BLOCKS
        raise SpecError(
            f"{where}: weight_format {weights!r} is not computed by this engine",
            hint="give --model a .gguf file, whose blocks are served as they are"
            if blocks
            else "plan with weight_format bf16, or `tierline export` for an engine that has it",
        )
    if kv != "bf16":
        raise SpecError(
            f"{where}: kv_format {kv!r} is not kept by this engine",
            hint="plan with kv_format bf16: the cache has the type of the activations",
        )


def _differences(deployment: Deployment) -> list[str]:
    """What the deployment says and this process does otherwise, by name."""
    policies, limits, said = deployment.policies, deployment.limits, []
    if deployment.replicas > 1:
        said.append(
            f"replicas = {deployment.replicas}: this process is one of them, and"
            f" policies.routing = {policies.routing!r} is for whoever stands before them"
        )
    lower = [t for t in deployment.tiers if t.name != "device" and t.enabled and t.capacity_bytes]
    if lower:
        names = ", ".join(f"{t.name} {format_bytes(t.capacity_bytes)}" for t in lower)
        said.append(
            f"tiers below the device are not served yet ({names}): a prefix that leaves the device"
            " is computed again"
        )
    if policies.speculation is not None:
        said.append(
            f"policies.speculation ({policies.speculation.method}) is not served yet: every token"
            " is computed by the model, and tokens come slower than planned"
        )
    if policies.disaggregation is not None:
        said.append("policies.disaggregation is not served yet: this instance prefills and decodes")
    chunk = min(policies.chunk_tokens, limits.batch_tokens_max)
    if policies.chunked_prefill and chunk != limits.batch_tokens_max:
        said.append(
            f"policies.chunk_tokens = {policies.chunk_tokens:,}: one prompt may take a whole step"
            f" of {limits.batch_tokens_max:,} tokens here"
        )
    if deployment.model.revision is not None:
        said.append(
            f"model.revision = {deployment.model.revision!r} is not checked: what lies at the path"
            " is served"
        )
    unscheduled = sorted(
        {t.metric for level in _levels(deployment) for t in level.targets} - {"ttft", "itl"}
    )
    if unscheduled:
        said.append(
            f"promises on {' and '.join(unscheduled)} are measured, and not scheduled by: the"
            " scheduler knows TTFT and ITL"
        )
    return said


def _levels(deployment: Deployment) -> tuple[ServiceLevel, ...]:
    return tuple(
        ServiceLevel(
            name=level.name,
            priority=level.priority,
            targets=tuple(parse_target(text) for text in level.targets),
        )
        for level in deployment.slo
    )


def is_named(gpu: GpuSpec, title: str, *, entry: str) -> bool:
    """Whether an entry is that of a device of this title: its own, under whatever name it was
    measured, or the catalogue's, whose name is in the title ('NVIDIA H100 80GB HBM3').

    An entry for several forms of one accelerator (SXM, PCIe) matches each of them.
    """
    if gpu.name == entry or gpu.title == title:
        return True
    words = re.findall(r"[a-z0-9]+", re.sub(r"rtx (pro )?", r"rtx", title.casefold()))
    return gpu.name.partition("-")[0] in words


def _another_model(deployment: Deployment, engine: Engine) -> list[str]:
    """Says when the checkpoint has not the size of the model that was planned for."""
    try:
        planned = load_model(deployment.model.config or deployment.model.name)
    except SpecError:
        return [f"the catalogue does not know {deployment.model.name!r}: its plan is not checked"]
    served = engine.scheduler.line.cost.model
    if abs(served.params / planned.params - 1) <= PARAMS_APART:
        return []
    sizes = f"{served.params / 1e9:.3g} billion parameters, and {planned.params / 1e9:.3g}"
    return [f"{engine.facts.model} is not the {planned.name} of the plan: it has {sizes}"]


def _planned(deployment: Deployment, engine: Engine, warnings: list[str]) -> Instance | None:
    """The instance that was planned, on its own machine."""
    try:
        return instance_of(deployment)
    except (SpecError, DoesNotFitError):
        pass
    try:
        return instance_of(deployment, model=engine.scheduler.line.cost.model)
    except DoesNotFitError as error:
        warnings.append(f"nothing is predicted for the machine of the plan: {error}")
        return None


def plan_words(deployment: Deployment) -> str:
    """A deployment in a line."""
    replicas = f"{deployment.replicas} x " if deployment.replicas > 1 else ""
    words = f"{deployment.model.name} in {deployment.weight_format} on {replicas}{deployment.gpu}"
    planned = deployment.planned
    if planned is None:
        return words
    usable = significant(planned.usable_rps_per_instance)
    return (
        f"{words}: {usable} requests/s an instance were planned, for"
        f" {significant(planned.offered_rps)} requests/s in all"
    )
