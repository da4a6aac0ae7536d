"""Published measurements from files: four formats, told apart by their columns.

    InferenceX        CSV  mean TTFT and TPOT of closed-loop clients (`Row`)
    TensorRT-LLM      CSV  offline throughput, and time to first token of static batches (`Row`)
    MLPerf Inference  CSV  tokens a second of a system, offline or under a server's load (`Row`)
    per request       JSON lines  a settings line for each run, then its requests (`Run`)

Every row of a file becomes a `Row`, or a `Problem` that says why the laws cannot be asked
about it, or it is counted under `left_out` because it is another kind of thing (prefill and
decode pools apart). Nothing is dropped in silence and nothing in a file raises, apart from a
file that cannot be read or that is in none of the formats.

Labels are cleaned by the rules here and by nothing else; docs/reference/accuracy.md says
what each rule is worth.
"""

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tierline.base.errors import InputError, TierlineError
from tierline.catalog.gpu import GpuSpec
from tierline.catalog.model import ModelSpec
from tierline.perf.step import EngineProfile, Layout, load_engine
from tierline.planner.measured import Row
from tierline.planner.measured_names import (
    engine_named,
    gpu_named,
    model_named,
    runs_as,
    weights_of,
)
from tierline.planner.recipes import Labels, Launch, launch_of

Record = Mapping[str, str]

COLUMNS = {  # what tells a format; more columns are welcome
    "InferenceX": ("model", "gpu_system", "engine", "isl", "osl", "concurrency"),
    "TensorRT-LLM": ("model", "gpu", "precision", "isl", "osl", "metric", "value"),
    "MLPerf Inference": ("model", "scenario", "accelerator", "n_accel", "metric", "value"),
}
TRTLLM_BUDGET = 8192
WHOLE_MAX = 1_000_000  # tokens, clients, degrees: more is a slip of the pen
APART = "prefill and decode pools apart"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A row that cannot be predicted, and why."""

    where: str
    model: str  # the catalogue's name where it is known, else as the file spells it
    gpu: str
    engine: str
    reason: str

    @property
    def name(self) -> str:
        """Model, accelerator and engine, as far as the row says them."""
        return ", ".join(part for part in (self.model, self.gpu, self.engine) if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRequest:
    """One request of a measured run, times in seconds since its start."""

    arrival_s: float
    scheduled_s: float | None
    first_s: float
    last_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]  # identities of its prompt's full blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run measured request by request, with the settings of its engine."""

    where: str
    name: str
    model: ModelSpec
    gpu: GpuSpec
    engine: EngineProfile
    version: str
    layout: Layout
    sequences_max: int
    batch_tokens: int
    block_tokens: int
    requests: tuple[MeasuredRequest, ...]


@dataclass(slots=True, kw_only=True)
class Reading:
    """What a file holds."""

    format: str = ""
    rows: list[Row] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        """Rows and runs that a prediction is asked for, possible or not."""
        return len(self.rows) + len(self.runs) + len(self.problems)


def read_measured(path: Path) -> Reading:
    """The measurements in `path`, gzip or not."""
    text = _text(path)
    if text.lstrip().startswith("{"):
        return _read_runs(path, text)
    table = csv.DictReader(io.StringIO(text))
    columns = [column.strip() for column in table.fieldnames or ()]
    table.fieldnames = columns
    for name, needed in COLUMNS.items():
        if set(needed) <= set(columns):
            return _read_rows(path, name, table)
    raise InputError(
        f"{str(path)!r} is in no format of measurements that is known"
        f" (its columns: {', '.join(columns[:12]) or 'none'})",
        hint="known by their columns: "
        + "; ".join(f"{name}: {', '.join(needed)}" for name, needed in COLUMNS.items())
        + '; or JSON lines of per-request runs, the first of type "run"',
    )


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or "damaged gzip file"
        raise InputError(f"cannot read measurements {str(path)!r}: {reason}") from None
    except (EOFError, zlib.error):
        raise InputError(f"measurements {str(path)!r} are a damaged gzip file") from None
    except UnicodeDecodeError:
        raise InputError(f"measurements {str(path)!r} are not UTF-8 text") from None


def _read_rows(path: Path, name: str, table: Iterable[Mapping[str, str | None]]) -> Reading:
    reading = Reading(format=name)
    for number, raw in enumerate(table, start=2):
        record = {k: (v or "").strip() for k, v in raw.items() if isinstance(v, str | None) and k}
        where = f"{path.name}:{number}"
        if record.get("mode", "agg") not in ("agg", ""):
            reading.left_out[APART] += 1
            continue
        try:
            reading.rows.append(READERS[name](record, where))
        except TierlineError as error:
            reading.problems.append(_problem(record, where, error))
    return reading


def _problem(record: Record, where: str, error: TierlineError) -> Problem:
    """The row under the names that the rest of the report uses, as far as they are known."""

    def known(name: Callable[[str], Any], *columns: str) -> str:
        said = next((record[column] for column in columns if record.get(column)), "")
        try:
            return str(name(said).name) if said else ""
        except TierlineError:
            return said

    return Problem(
        where=where,
        model=known(model_named, "model"),
        gpu=known(gpu_named, "gpu_system", "gpu", "accelerator"),
        engine=known(engine_named, "engine"),
        reason=str(error),
    )


def _whole(record: Record, key: str, *, least: int, default: int | None = None) -> int:
    text = record.get(key, "")
    if not text and default is not None:
        return default
    try:
        value = int(float(text))
    except (ValueError, OverflowError):
        raise InputError(f"{key} {text!r} is not a number") from None
    if not least <= value <= WHOLE_MAX:
        bound = f"below {least}" if value < least else f"above {WHOLE_MAX:,}"
        raise InputError(f"{key} {text!r} is {bound}")
    return value


def _positive(record: Record, key: str) -> float | None:
    """A measured number, or None when the cell is empty."""
    text = record.get(key, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{key} {text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise InputError(f"{key} {text!r} is not positive")
    return value


def _seconds(record: Record, key: str) -> float | None:
    value = _positive(record, key)
    return None if value is None else value / 1e3


def _kv_format(weights: str, gpu: GpuSpec, engine: str, model: ModelSpec) -> str:
    """What the launch recipes choose: FP8 on Blackwell and under TensorRT-LLM, bf16 else."""
    if weights == "bf16" or "fp8" not in gpu.flops_per_s:
        return "bf16"
    unquantized = engine != "trtllm" or model.name == "gpt-oss-120b"
    return "bf16" if gpu.generation == "Hopper" and unquantized else "fp8"


# --- InferenceX -------------------------------------------------------------------------

OTHER_CLIENT = "nvidia-gap-analysis"  # an origin whose client sends lengths all alike
SPREAD_LATER = ("kimi-k2.5", "qwen3.5-397b-a17b", "minimax-m2.5", "glm-5")  # there too


def _inferencex(record: Record, where: str) -> Row:
    model, gpu = model_named(record["model"]), gpu_named(record["gpu_system"])
    engine = engine_named(record["engine"])
    precision = record.get("precision") or record.get("moe_quant") or record.get("gemm_quant", "")
    weights = runs_as(weights_of(precision, record["model"], model, blocks=True), gpu)
    tp, dp, ep = _degrees(record)
    layout = Layout(
        weights=weights,
        kv=_kv_format(weights, gpu, engine.name, model),
        tp=tp,
        pp=_whole(record, "pp", least=1, default=1),
        dp=dp,
        ep=ep,
    )
    isl, clients = (_whole(record, key, least=1) for key in ("isl", "concurrency"))
    osl = _whole(record, "osl", least=2)
    uniform = record.get("origin") != OTHER_CLIENT or model.name in SPREAD_LATER
    uniform = uniform or (model.name == "gpt-oss-120b" and isl % 1024 == 0)
    ttft_s, tpot_s = _seconds(record, "ttft_ms"), _seconds(record, "tpot_ms")
    if ttft_s is None and tpot_s is None:
        raise InputError("neither ttft_ms nor tpot_ms is given")
    return Row(
        source="inferencex",
        where=where,
        model=model,
        gpu=gpu,
        engine=engine,
        version=record.get("engine_version") or "-",
        layout=layout,
        input_tokens=isl,
        output_tokens=osl,
        uniform=uniform,
        clients=clients,
        launch=launch_of(
            Labels(
                model=model,
                gpu=gpu,
                engine=engine,
                version=record.get("engine_version", ""),
                date=record.get("measured_date", ""),
                layout=layout,
                input_tokens=isl,
                output_tokens=osl,
                clients=clients,
                published=record.get("origin") != OTHER_CLIENT or uniform,
                speculative=_speculative(record),
            )
        ),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        doubt=_doubt(record, model, gpu, tp * dp),
    )


def _speculative(record: Record) -> bool | None:
    """Whether the row itself says that drafts were on."""
    said = record.get("spec_decoding", "").casefold()
    return None if not said else said not in ("none", "off", "false", "0")


def _degrees(record: Record) -> tuple[int, int, int]:
    """TP, DP and EP as they ran. Some exports write a product where a degree belongs."""
    tp, dp, moe_tp, moe_ep = (
        _whole(record, key, least=0, default=0) for key in ("tp", "attn_dp", "moe_tp", "moe_ep")
    )
    tp, dp = tp or 1, dp or 1
    gpus = max(tp, dp, moe_tp * moe_ep)
    ep = max(moe_ep, 1)
    if moe_tp == moe_ep > 1 and moe_tp * moe_ep in (tp, dp):  # 8 x 8 stands for 8 GPUs
        gpus = ep = moe_tp
        dp = moe_tp if dp > 1 else 1
    elif tp > 1 and dp == tp and moe_ep == tp * dp:  # and so does tp x dp
        gpus = ep = tp
        dp = 1
    dp = min(dp, gpus)
    return gpus // dp, dp, ep


def _doubt(record: Record, model: ModelSpec, gpu: GpuSpec, gpus: int) -> str:
    origin = record.get("origin", "")
    if gpu.name in ("gb200", "gb300") and origin == "inferencex-dump" and gpus > 8:
        return "over 8 GPUs of a rack: looks disaggregated"
    if model.name == "qwen3-32b" and gpu.name == "gb200" and origin == OTHER_CLIENT:
        return "TPOT falls and rises with load: concurrency is not what the row says"
    if model.name == "llama-3.1-8b" and record["engine"] == "vllm" and origin == OTHER_CLIENT:
        return "would run near or above the FP8 peak end to end: prefix cache or another load"
    return ""


# --- offline tables -----------------------------------------------------------------------


def _trtllm(record: Record, where: str) -> Row:
    """Offline throughput, or the time to first token of a static batch."""
    model, gpu = model_named(record["model"]), gpu_named(record["gpu"])
    engine = engine_named(record.get("engine") or "trtllm")
    weights = runs_as(weights_of(record["precision"], record["model"], model), gpu)
    metric, value = record["metric"], _positive(record, "value")
    if value is None:
        raise InputError("value is empty")
    first_token = metric == "first_token_latency_ms"
    if not first_token and not metric.startswith("output_tok_s"):
        raise InputError(f"metric {metric!r} is neither output_tok_s_… nor first_token_latency_ms")
    gpus = _whole(record, "n_gpus", least=1, default=1) if "per_gpu" in metric else 1
    return Row(
        source="trtllm",
        where=where,
        model=model,
        gpu=gpu,
        engine=engine,
        version=record.get("engine_version") or "-",
        layout=Layout(
            weights=weights,
            kv=_kv_format(weights, gpu, "trtllm", model),
            tp=_whole(record, "tp", least=1, default=1),
            pp=_whole(record, "pp", least=1, default=1),
        ),
        input_tokens=_whole(record, "isl", least=1),
        output_tokens=max(_whole(record, "osl", least=1), 2),
        uniform=False,
        clients=_whole(record, "batch_or_conc", least=0, default=0),
        launch=Launch(batch_tokens=TRTLLM_BUDGET, fused_experts=True),
        ttft_s=value / 1e3 if first_token else None,
        output_tokens_per_s=None if first_token else value * gpus,
        scenario=record.get("load", ""),
    )


def _mlperf(record: Record, where: str) -> Row:
    """One system's result, as equal replicas of the least accelerators that hold the model."""
    model, gpu = model_named(record["model"]), gpu_named(record["accelerator"])
    value, accelerators = _positive(record, "value"), _whole(record, "n_accel", least=1)
    if value is None or not record["metric"].startswith("tokens_per_s"):
        raise InputError(f"metric {record['metric']!r} is not tokens_per_s with a value")
    mixtral = model.name == "mixtral-8x7b"
    least = {"h100-sxm": 2, "h100-pcie": 4, "l40s": 8}.get(gpu.name, 1)
    least = min({"l40s": 4}.get(gpu.name, 1) if mixtral else least, accelerators)
    weights = runs_as("nvfp4" if gpu.name == "b200" else "fp8", gpu)
    return Row(
        source="mlperf",
        where=where,
        model=model,
        gpu=gpu,
        engine=load_engine("vllm" if gpu.vendor == "AMD" else "trtllm"),
        version=record.get("round") or "-",
        layout=Layout(weights=weights, kv="fp8", tp=least),
        input_tokens=294,
        output_tokens=145 if mixtral else 294,
        uniform=False,
        clients=0,
        launch=Launch(batch_tokens=TRTLLM_BUDGET, fused_experts=True),
        output_tokens_per_s=value / (accelerators // least),
        replicas=accelerators // least,
        scenario=record["scenario"],
    )


READERS: Mapping[str, Callable[[Record, str], Row]] = {
    "InferenceX": _inferencex,
    "TensorRT-LLM": _trtllm,
    "MLPerf Inference": _mlperf,
}


# --- per-request runs ---------------------------------------------------------------------


def _read_runs(path: Path, text: str) -> Reading:
    """Every run of a JSON-lines file: a line of type "run", then a line for each request."""
    reading = Reading(format="per request")
    settings: dict[str, tuple[str, Mapping[str, object]]] = {}
    requests: dict[str, list[MeasuredRequest]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{path.name}:{number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name = str(entry["run"])
            if entry.get("type") == "run":
                settings[name] = (where, entry)
                requests[name] = []
            else:
                requests[name].append(_request(entry))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"not a line of a per-request run ({type(error).__name__}: {error})"
            raise InputError(
                f"{where}: {reason}",
                hint='each run begins with {"type": "run", "run": NAME, "gpu", "model", ...},'
                ' then {"run": NAME, "arrival_s", "first_s", "last_s", "input", "output"}',
            ) from None
    for name, (where, entry) in settings.items():
        try:
            reading.runs.append(_run(name, where, entry, requests[name]))
        except TierlineError as error:
            record = {key: str(value) for key, value in entry.items()}
            reading.problems.append(_problem(record, where, error))
    return reading


def _request(entry: Mapping[str, object]) -> MeasuredRequest:
    def number(key: str) -> float:
        return float(str(entry[key]))

    return MeasuredRequest(
        arrival_s=number("arrival_s"),
        scheduled_s=number("sched_s") if entry.get("sched_s") is not None else None,
        first_s=number("first_s"),
        last_s=number("last_s"),
        input_tokens=int(number("input")),
        output_tokens=int(number("output")),
        blocks=tuple(entry.get("hash_ids") or ()),  # type: ignore[arg-type]
    )


def _run(
    name: str, where: str, entry: Mapping[str, object], requests: Sequence[MeasuredRequest]
) -> Run:
    record = {key: str(value) for key, value in entry.items() if value is not None}
    if not requests:
        raise InputError("the run has no requests")
    engine = next((key for key in ("vllm", "sglang", "trtllm") if key in record), None)
    if engine is None or "model" not in record or "gpu" not in record:
        raise InputError("the run names no model, gpu, or engine (vllm, sglang or trtllm)")
    model, gpu = model_named(record["model"]), gpu_named(record["gpu"])
    weights = runs_as(weights_of(record.get("dtype", ""), record["model"], model), gpu)
    kv = record.get("kv_cache", "auto").casefold()
    tp, dp = (_whole(record, key, least=1, default=1) for key in ("tp", "dp"))
    return Run(
        where=where,
        name=name,
        model=model,
        gpu=gpu,
        engine=engine_named(engine),
        version=record[engine],
        layout=Layout(
            weights=weights,
            kv="fp8" if kv.startswith("fp8") else "bf16",
            tp=tp,
            dp=dp,
            ep=tp * dp if record.get("ep") == "True" else 1,
        ),
        sequences_max=_whole(record, "max_num_seqs", least=1, default=256),
        batch_tokens=_whole(record, "max_num_batched_tokens", least=1, default=8192),
        block_tokens=_whole(record, "block_size_for_hashes", least=1, default=16),
        requests=tuple(requests),
    )
