"""The deployment file: everything that decides how a fleet behaves, on one page.

The planner writes it, the simulator predicts it, the exports and the server run it, and
`diff` compares two of them. So it is frozen, it is canonical (equal deployments are equal
bytes), and reading it is strict: a key nobody knows is an error, never ignored.

Service levels are kept as the text a person types ('ttft_p99=2s'): the catalogue knows
what is deployed, `workload` knows what a latency target means.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from tierline.base.errors import SpecError
from tierline.base.files import read_text
from tierline.catalog.formats import KV_FORMATS, WEIGHT_FORMATS
from tierline.catalog.table import Table, parse_toml

SCHEMA = 1
TIERS = ("device", "dram", "nvme", "remote")
SCHEDULERS = ("tierline", "fcfs", "shortest", "priority", "edf")  # as `scheduling` names them
RENAMED_SCHEDULERS = {"slo-aware": "tierline"}
ROUTINGS = (
    *("round-robin", "least-outstanding", "power-of-two"),
    *("prefix-hash", "prefix-aware", "adapter-aware", "slo-aware"),
)
SPECULATION_METHODS = ("ngram", "suffix", "draft-model", "eagle", "eagle3", "medusa", "mtp")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Which model, and where an engine finds its weights."""

    name: str
    hf_id: str | None = None  # the name an engine loads; the model's own name when absent
    config: str | None = None  # path of a config.json, for a model outside the catalogue
    revision: str | None = None

    @property
    def served_name(self) -> str:
        """The name that an engine loads."""
        return self.hf_id or self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How one instance is cut over accelerators."""

    tp: int = 1
    pp: int = 1
    dp: int = 1  # attention data parallelism inside the instance; experts stay shared
    ep: int = 1  # ranks over which whole experts are spread; 1: experts are cut by TP


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """Memory that one instance may fill with KV cache or weights."""

    name: str
    capacity_bytes: int
    enabled: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one instance accepts at once."""

    batch_tokens_max: int  # tokens of one step
    sequences_max: int
    context_tokens_max: int  # prompt and output of one sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """Drafted tokens that the model verifies."""

    method: str
    draft_tokens: int
    acceptance: float  # share of drafted tokens accepted, as planned
    draft_model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Disaggregation:
    """Instances that only prefill and instances that only decode; they add up to `replicas`."""

    prefill_instances: int
    decode_instances: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """Who goes first, where a request goes, and what is reused."""

    scheduler: str = "tierline"
    chunked_prefill: bool = True
    chunk_tokens: int = 2048  # of one prompt in one step
    prefix_cache: bool = True
    routing: str = "least-outstanding"
    speculation: Speculation | None = None
    disaggregation: Disaggregation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SloClass:
    """The promises to one class of requests, as text; a larger priority is more urgent."""

    name: str = "default"
    priority: int = 0
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What the plan reckoned with: facts for a reader and for `diagnose`, not settings."""

    offered_rps: float
    usable_rps_per_instance: float
    growth: float = 1.0  # demand was multiplied by this
    safety: float = 1.0  # and the number of instances by this
    created_by: str  # tool and version
    created: str | None = None  # a date, when the caller gave one


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A fleet of equal instances of one model on one kind of accelerator."""

    schema: int = SCHEMA
    model: ModelRef
    gpu: str  # name in the catalogue, or the path of a .toml file
    replicas: int
    weight_format: str
    kv_format: str
    kv_block_tokens: int = 16
    gpu_memory_utilization: float = 0.9
    parallel: Parallel
    limits: Limits
    policies: Policies
    tiers: tuple[Tier, ...]
    slo: tuple[SloClass, ...] = ()
    planned: Planned | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def gpus_per_instance(self) -> int:
        """Accelerators of one instance."""
        return self.parallel.tp * self.parallel.dp * self.parallel.pp

    @property
    def gpus(self) -> int:
        """Accelerators of the fleet."""
        return self.replicas * self.gpus_per_instance

    def to_toml(self) -> str:
        """The one text of this deployment: fixed order, defaults written out, no timestamps."""
        return _write(self)


def load_deployment(path: Path) -> Deployment:
    """The deployment in the file at `path`."""
    return parse_deployment(read_text(path, what="deployment file"), where=str(path))


# --- reading ------------------------------------------------------------------------------

_TOP = ("schema", "gpu", "replicas", "weight_format", "kv_format", "kv_block_tokens")
_KEYS = (*_TOP, "gpu_memory_utilization", "model", "parallel", "limits", "policies")
_POLICY_KEYS = ("scheduler", "chunked_prefill", "chunk_tokens", "prefix_cache", "routing")


def parse_deployment(text: str, *, where: str) -> Deployment:
    """The deployment that TOML text describes; `where` is its file, for messages.

    Raises `SpecError` that names the file, the dotted key, and what to write instead.
    """
    values = parse_toml(text, where=where)
    _require_schema(values, where=where)
    top = Table(values, where=where, keys=(*_KEYS, "tiers", "slo", "planned"))
    try:
        return Deployment(
            model=_model(top.table("model", ("name", "hf_id", "config", "revision"))),
            gpu=top.text("gpu"),
            replicas=top.whole("replicas"),
            weight_format=top.text("weight_format", choices=list(WEIGHT_FORMATS)),
            kv_format=top.text("kv_format", choices=list(KV_FORMATS)),
            kv_block_tokens=top.whole("kv_block_tokens"),
            gpu_memory_utilization=top.number("gpu_memory_utilization", high=1.0),
            parallel=_parallel(top.table("parallel", ("tp", "pp", "dp", "ep"))),
            limits=_limits(top),
            policies=_policies(top),
            tiers=tuple(
                Tier(
                    name=t.text("name", choices=TIERS),
                    capacity_bytes=t.whole("capacity_bytes", low=0),
                    enabled=t.boolean("enabled"),
                )
                for t in top.tables("tiers", ("name", "capacity_bytes", "enabled"))
            ),
            slo=tuple(
                SloClass(
                    name=s.text("name"),
                    priority=s.whole("priority", low=-(2**31)),
                    targets=s.texts("targets"),
                )
                for s in top.tables("slo", ("name", "priority", "targets"))
            ),
            planned=_planned(top) if "planned" in top else None,
        )
    except _CheckError as error:
        raise SpecError(f"{where}: {error}", hint=error.hint) from None


def _require_schema(values: dict[str, Any], *, where: str) -> None:
    schema = values.get("schema")
    if schema == SCHEMA and type(schema) is int:
        return
    hint = f"write schema = {SCHEMA}"
    if type(schema) is int and schema > SCHEMA:
        hint = f"a newer tierline wrote it: update tierline, or plan again for schema {SCHEMA}"
    said = "is missing" if schema is None else f"is {schema!r}"
    raise SpecError(f"{where}: schema {said}; this version reads {SCHEMA}", hint=hint)


def _optional_text(table: Table, key: str) -> str | None:
    return table.text(key) if key in table else None


def _model(table: Table) -> ModelRef:
    return ModelRef(
        name=table.text("name"),
        hf_id=_optional_text(table, "hf_id"),
        config=_optional_text(table, "config"),
        revision=_optional_text(table, "revision"),
    )


def _parallel(table: Table) -> Parallel:
    return Parallel(
        tp=table.whole("tp"), pp=table.whole("pp"), dp=table.whole("dp"), ep=table.whole("ep")
    )


def _limits(top: Table) -> Limits:
    table = top.table("limits", ("batch_tokens_max", "sequences_max", "context_tokens_max"))
    return Limits(
        batch_tokens_max=table.whole("batch_tokens_max"),
        sequences_max=table.whole("sequences_max"),
        context_tokens_max=table.whole("context_tokens_max"),
    )


def _policies(top: Table) -> Policies:
    table = top.table("policies", (*_POLICY_KEYS, "speculation", "disaggregation"))
    speculation, disaggregation = None, None
    if "speculation" in table:
        spec = table.table("speculation", ("method", "draft_tokens", "acceptance", "draft_model"))
        speculation = Speculation(
            method=spec.text("method", choices=SPECULATION_METHODS),
            draft_tokens=spec.whole("draft_tokens"),
            acceptance=spec.number_from("acceptance", high=1.0),
            draft_model=_optional_text(spec, "draft_model"),
        )
    if "disaggregation" in table:
        split = table.table("disaggregation", ("prefill_instances", "decode_instances"))
        disaggregation = Disaggregation(
            prefill_instances=split.whole("prefill_instances"),
            decode_instances=split.whole("decode_instances"),
        )
    return Policies(
        scheduler=_scheduler(table),
        chunked_prefill=table.boolean("chunked_prefill"),
        chunk_tokens=table.whole("chunk_tokens"),
        prefix_cache=table.boolean("prefix_cache"),
        routing=table.text("routing", choices=ROUTINGS),
        speculation=speculation,
        disaggregation=disaggregation,
    )


def _scheduler(table: Table) -> str:
    """The policy's name; one that was renamed is told what to write."""
    name = table.text("scheduler")
    if name in RENAMED_SCHEDULERS:
        raise _CheckError(
            f"policies.scheduler is {name!r}, which is called {RENAMED_SCHEDULERS[name]!r} now",
            hint=f'write scheduler = "{RENAMED_SCHEDULERS[name]}"',
        )
    return table.text("scheduler", choices=SCHEDULERS)


def _planned(top: Table) -> Planned:
    keys = ("offered_rps", "usable_rps_per_instance", "growth", "safety", "created_by", "created")
    table = top.table("planned", keys)
    return Planned(
        offered_rps=table.number_from("offered_rps"),
        usable_rps_per_instance=table.number_from("usable_rps_per_instance"),
        growth=table.number("growth"),
        safety=table.number("safety"),
        created_by=table.text("created_by"),
        created=_optional_text(table, "created"),
    )


# --- what no single key can say -----------------------------------------------------------


class _CheckError(SpecError):
    """A deployment that contradicts itself; reading it adds the file."""


def _check(d: Deployment) -> None:
    """Refuse a deployment whose settings contradict each other."""
    ranks = d.parallel.tp * d.parallel.dp
    _require(
        ranks % d.parallel.ep == 0,
        f"parallel.ep is {d.parallel.ep}, which does not divide tp x dp = {ranks}",
        hint="experts are spread over ranks of one pipeline stage",
    )
    _require(
        0 < d.gpu_memory_utilization <= 1 and math.isfinite(d.gpu_memory_utilization),
        f"gpu_memory_utilization is {d.gpu_memory_utilization:g}",
        hint="the share of device memory that the engine may take: above 0, at most 1",
    )
    _require_once("tiers", [t.name for t in d.tiers])
    _require_once("slo", [s.name for s in d.slo])
    device = next((t for t in d.tiers if t.name == "device"), None)
    _require(
        device is not None and device.enabled,
        "tiers has no enabled tier named 'device'",
        hint="device memory always holds the weights and the running KV cache",
    )
    split = d.policies.disaggregation
    if split is not None:
        _require(
            split.prefill_instances + split.decode_instances == d.replicas,
            f"policies.disaggregation has {split.prefill_instances} prefill and"
            f" {split.decode_instances} decode instances, replicas is {d.replicas}",
            hint="the two add up to replicas",
        )
    _require(
        d.policies.chunked_prefill or d.limits.batch_tokens_max >= d.limits.context_tokens_max,
        "limits.batch_tokens_max is below limits.context_tokens_max without chunked prefill",
        hint="a whole prompt must fit one step: raise batch_tokens_max, or set chunked_prefill",
    )


def _require(holds: bool, problem: str, *, hint: str) -> None:
    if not holds:
        raise _CheckError(problem, hint=hint)


def _require_once(what: str, names: Sequence[str]) -> None:
    twice = sorted({n for n in names if names.count(n) > 1})
    _require(not twice, f"{what} has {twice[:1]} twice", hint="give each entry its own name")


# --- writing ------------------------------------------------------------------------------


def _write(d: Deployment) -> str:
    import tomli_w  # off the import path of `tierline --help`

    top = {
        "schema": d.schema,
        "gpu": d.gpu,
        "replicas": d.replicas,
        "weight_format": d.weight_format,
        "kv_format": d.kv_format,
        "kv_block_tokens": d.kv_block_tokens,
        "gpu_memory_utilization": float(d.gpu_memory_utilization),
        "model": _fields(d.model),
        "parallel": _fields(d.parallel),
        "limits": _fields(d.limits),
        "policies": _fields(d.policies),
        "tiers": [_fields(tier) for tier in d.tiers],
        "slo": [_fields(level) for level in d.slo],
        "planned": _fields(d.planned) if d.planned else None,
    }
    return tomli_w.dumps({key: value for key, value in top.items() if value not in (None, [])})


def _fields(part: Any) -> dict[str, Any]:
    """The fields of a part in the order of its class; absent ones are left out."""
    written: dict[str, Any] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, tuple):
            written[field.name] = list(value)
        elif is_dataclass(value):
            written[field.name] = _fields(value)
        elif value is not None:  # 20 and 20.0 are one rate, so they are one text
            written[field.name] = float(value) if field.type is float else value
    return written
