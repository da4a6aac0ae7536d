"""The published end-to-end measurements as rows that the laws can be asked about.

`accuracy.py` compares with them and `fit_rates.py` fits to them. Labels are cleaned by the
rules below and by nothing else; a row that a rule calls unreliable stays in the list and
carries the rule's name in `doubt`, so that results can be shown with and without it.
"""

import csv
import gzip
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from tierline.base.errors import TierlineError
from tierline.catalog.formats import weight_format
from tierline.catalog.gpu import GpuSpec
from tierline.catalog.gpus import load_gpu, supports
from tierline.catalog.model import ModelSpec
from tierline.catalog.models import load_model
from tierline.perf.step import EngineProfile, Layout, Rates, StepCost, load_engine
from tierline.planner.load import Demand, Instance, OperatingPoint, at_concurrency

LENGTH_QUANTILES = 8
MEMORY_USABLE = 0.95
MEMORY_RESERVED_BYTES = 2e9  # activations, graphs, communication buffers
OFFLINE_BATCH_MAX = 2048

MODELS = {
    "DeepSeek-R1": "deepseek-r1",
    "DeepSeek-V3": "deepseek-r1",
    "DeepSeek-R1-NVFP4": "deepseek-r1",
    "DeepSeek-V3.1-NVFP4": "deepseek-r1",
    "Kimi-K2.5": "kimi-k2.5",
    "GLM-5": "glm-5",
    "gpt-oss-120b": "gpt-oss-120b",
    "Qwen3-32B": "qwen3-32b",
    "Qwen3-32B-NVFP4": "qwen3-32b",
    "Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "Qwen3.5-397B-A17B": "qwen3.5-397b-a17b",
    "MiniMax-M2.5": "minimax-m2.5",
    "Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "Llama-3.1-70B": "llama-3.1-70b",
    "llama-3.1-70b": "llama-3.1-70b",
    "llama-3.3-70b": "llama-3.3-70b",
    "llama-3.1-8b": "llama-3.1-8b",
    "llama-3.1-405b": "llama-3.1-405b",
    "mixtral-8x7b": "mixtral-8x7b",
    "mixtral-8x22b": "mixtral-8x22b",
    "qwen3-30b-a3b": "qwen3-30b-a3b",
    "qwen3-235b-a22b": "qwen3-235b-a22b",
    "llama-4-scout": "llama-4-scout",
    "llama-4-maverick": "llama-4-maverick",
    "mistral-7b": "mistral-7b-v0.1",
    "llama-7b": "llama-2-7b",
    "llama-70b": "llama-2-70b",
    "gpt-j-6b": "gpt-j-6b",
    "falcon-180b": "falcon-180b",
    "llama2-70b-99": "llama-2-70b",
    "llama2-70b-99.9": "llama-2-70b",
}
GPUS = {
    "h100_sxm": "h100-sxm",
    "h200_sxm": "h200",
    "b200_sxm": "b200",
    "b300_sxm": "b300",
    "gb200": "gb200",
    "gb300": "gb300",
    "H100-80GB-SXM": "h100-sxm",
    "H200-141GB-SXM": "h200",
    "A100-80GB-SXM": "a100-80",
    "A100-80GB-PCIe": "a100-pcie",
    "L40S": "l40s",
    "RTX-PRO-6000-SE": "rtxpro6000se",
    "B200-180GB": "b200",
    "GB200-192GB": "gb200",
}
MLPERF_GPUS = {  # by what the accelerator's name contains; first match wins
    "MI300X": "mi300x",
    "GH200": "gh200",
    "B200": "b200",
    "H200": "h200",
    "H100-PCIe": "h100-pcie",
    "H100-SXM": "h100-sxm",
    "L40S": "l40s",
}
FORMATS = {"fp8": "fp8", "bf16": "bf16", "fp16": "bf16", "fp4": "nvfp4", "int4": "int4-g128"}
BF16_BY_NAME = ("Qwen3-32B", "Llama-3.1-8B-Instruct")  # checkpoints whose name says no precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement: what ran, under which load, and what came out (None: not measured)."""

    source: str  # inferencex, trtllm, mlperf
    model: ModelSpec
    gpu: GpuSpec
    engine: EngineProfile
    version: str
    layout: Layout
    input_tokens: int
    output_tokens: int
    uniform: bool  # lengths spread over [0.8 L, L]; otherwise all alike
    clients: int  # closed loop; 0: as many as the KV cache holds
    batch_tokens: int
    ttft_s: float | None = None
    tpot_s: float | None = None
    output_tokens_per_s: float | None = None
    replicas: int = 1
    scenario: str = ""
    doubt: str = ""

    @property
    def group(self) -> str:
        """What a held-out fold holds out whole."""
        return f"{self.model.name} | {self.gpu.name} | {self.engine.name}"

    @property
    def stack(self) -> str:
        """What one random speed factor stands for."""
        return f"{self.group} | {self.version} | {self.layout.weights}"

    @property
    def config(self) -> str:
        """Rows of one configuration are repeats and stay in one fold."""
        load = f"{self.input_tokens}/{self.output_tokens}@{self.clients}"
        return f"{self.stack} | {self.layout} | {load}"

    @property
    def demand(self) -> Demand:
        """The lengths that the benchmark's client sent."""
        return Demand(
            input_tokens=_lengths(self.input_tokens, spread=self.uniform),
            output_tokens=_lengths(self.output_tokens, spread=self.uniform),
        )

    def instance(self, rates: Rates | None = None, engine: EngineProfile | None = None) -> Instance:
        """The instance that was measured; `rates` and `engine` replace the shipped ones."""
        cost = StepCost(self.model, self.gpu, self.layout, rates=rates)
        context = self.input_tokens + self.output_tokens // 2
        pool = self.gpu.memory_bytes * MEMORY_USABLE - MEMORY_RESERVED_BYTES
        pool -= cost.weights_bytes_per_gpu
        tokens = pool / cost.kv_bytes_per_gpu(context) * context
        return Instance(
            cost=cost,
            engine=engine or self.engine,
            # A pool with no room contradicts a run that took place: the label's memory is wrong.
            kv_tokens=tokens if tokens > 2 * context else 1e9,
            sequences_max=4096,
            chunk_tokens=self.batch_tokens,
        )

    def offline_point(
        self, rates: Rates | None = None, engine: EngineProfile | None = None
    ) -> OperatingPoint | None:
        """The state of an offline run: as many sequences as the KV cache holds, always full."""
        instance = self.instance(rates, engine)
        need = self.input_tokens + self.output_tokens / 2
        clients = self.clients or max(min(int(instance.kv_tokens / need), OFFLINE_BATCH_MAX), 1)
        return at_concurrency(replace(instance, kv_tokens=math.inf), self.demand, clients)


def data_folder() -> Path:
    """Where the published measurements lie; `TIERLINE_DATA` overrides it."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("TIERLINE_DATA", beside))


def _lengths(tokens: int, *, spread: bool) -> tuple[float, ...]:
    if not spread:
        return (float(tokens),)
    shares = ((i + 0.5) / LENGTH_QUANTILES for i in range(LENGTH_QUANTILES))
    return tuple(tokens * (0.8 + 0.2 * share) for share in shares)


def _model(name: str) -> ModelSpec | None:
    """The catalogue's model of a published name, or None when it has none."""
    try:
        return load_model(MODELS[name])
    except (KeyError, TierlineError):
        return None


def _kv_format(weights: str, gpu: GpuSpec, engine: str, model: ModelSpec) -> str:
    """What the launch recipes choose: FP8 on Blackwell and under TensorRT-LLM, bf16 else."""
    if weights == "bf16" or "fp8" not in gpu.flops_per_s:
        return "bf16"
    hopper_default = gpu.generation == "Hopper" and engine != "trtllm"
    return "bf16" if hopper_default and model.name != "minimax-m2.5" else "fp8"


# --- InferenceX -------------------------------------------------------------------------


def inferencex_rows(folder: Path) -> tuple[list[Row], int]:
    """All aggregated rows whose model the catalogue knows, and how many rows there are."""
    with gzip.open(folder / "measured_inferencex.csv.gz", "rt", encoding="utf-8") as file:
        records = [r for r in csv.DictReader(file) if r["mode"] == "agg"]
    rows = [row for record in records if (row := _inferencex(record)) is not None]
    return rows, len(records)


def _inferencex(record: dict[str, str]) -> Row | None:
    name = record["model"].rsplit("/", 1)[-1]
    model = _model(name)
    if model is None:
        return None
    gpu = load_gpu(GPUS[record["gpu_system"]])
    engine = load_engine(record["engine"])
    weights = _precision(record, name, model)
    tp, dp, ep = _ranks(record)
    isl, osl, clients = (int(float(record[k])) for k in ("isl", "osl", "concurrency"))
    newer = model.name in ("kimi-k2.5", "qwen3.5-397b-a17b", "minimax-m2.5", "glm-5")
    uniform = record["origin"] == "inferencex-dump" or newer
    uniform = uniform or (model.name == "gpt-oss-120b" and isl % 1024 == 0)
    return Row(
        source="inferencex",
        model=model,
        gpu=gpu,
        engine=engine,
        version=record["engine_version"] or "-",
        layout=Layout(
            weights=weights,
            kv=_kv_format(weights, gpu, engine.name, model),
            tp=tp,
            dp=dp,
            ep=ep,
        ),
        input_tokens=isl,
        output_tokens=osl,
        uniform=uniform,
        clients=clients,
        batch_tokens=_budget(engine, model, gpu, isl=isl, clients=clients, uniform=uniform),
        ttft_s=float(record["ttft_ms"]) / 1e3,
        tpot_s=float(record["tpot_ms"]) / 1e3,
        doubt=_doubt(record, model, tp * dp),
    )


def _precision(record: dict[str, str], name: str, model: ModelSpec) -> str:
    quants = {"nvfp4": "fp4", "int4_wo": "int4", "fp8": "fp8", "fp8_block": "fp8"}
    precision = record["precision"] or quants.get(record["moe_quant"], "")
    if not precision:
        precision = "bf16" if name in BF16_BY_NAME else "fp8"
    if precision == "fp4" and model.native_format == "mxfp4":
        return "mxfp4"
    if precision == "fp8" and model.is_moe:
        return "fp8-block"  # the FP8 checkpoints of these models have 128 x 128 blocks
    return FORMATS[precision]


def _ranks(record: dict[str, str]) -> tuple[int, int, int]:
    """TP, DP and EP as they ran. Some exports write a product where a degree belongs."""
    tp, dp, moe_tp, moe_ep = (
        max(int(float(record[k] or 0)), 0) for k in ("tp", "attn_dp", "moe_tp", "moe_ep")
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


def _budget(
    engine: EngineProfile, model: ModelSpec, gpu: GpuSpec, *, isl: int, clients: int, uniform: bool
) -> int:
    """Tokens of one step, as the published launch recipes set them."""
    if model.name == "minimax-m2.5" and gpu.name == "b200":
        return 2 * isl
    if engine.name == "trtllm" and model.name == "gpt-oss-120b":
        return 20_000
    if engine.name == "trtllm" and model.name == "deepseek-r1" and uniform:
        return (clients + isl + 127) // 64 * 64
    return engine.batch_tokens


def _doubt(record: dict[str, str], model: ModelSpec, gpus: int) -> str:
    origin, gpu = record["origin"], record["gpu_system"]
    if gpu in ("gb200", "gb300") and origin == "inferencex-dump" and gpus > 8:
        return "over 8 GPUs of a rack: looks disaggregated"
    if model.name == "qwen3-32b" and gpu == "gb200":
        return "TPOT falls and rises with load: concurrency is not what the row says"
    if model.name == "llama-3.1-8b" and record["engine"] == "vllm":
        return "would run near or above the FP8 peak end to end: prefix cache or another load"
    return ""


# --- offline tables -----------------------------------------------------------------------


def trtllm_rows(folder: Path) -> tuple[list[Row], int]:
    """Offline throughput that TensorRT-LLM published, and how many rows there are."""
    with (folder / "measured_trtllm_perf_overview.csv").open(encoding="utf-8") as file:
        records = [r for r in csv.DictReader(file) if r["metric"].startswith("output")]
    rows = [row for record in records if (row := _trtllm(record)) is not None]
    return rows, len(records)


def _trtllm(record: dict[str, str]) -> Row | None:
    model = _model(record["model"])
    if model is None:
        return None
    gpu, weights = load_gpu(GPUS[record["gpu"]]), FORMATS[record["precision"]]
    if supports(gpu, weight_format(weights)) is not None:
        return None
    per_gpu = "per_gpu" in record["metric"]
    layout = Layout(
        weights=weights,
        kv=_kv_format(weights, gpu, "trtllm", model),
        tp=int(record["tp"]),
        pp=int(record["pp"]),
    )
    return Row(
        source="trtllm",
        model=model,
        gpu=gpu,
        engine=load_engine("trtllm"),
        version=record["engine_version"],
        layout=layout,
        input_tokens=int(record["isl"]),
        output_tokens=max(int(record["osl"]), 2),
        uniform=False,
        clients=int(record["batch_or_conc"] or 0),
        batch_tokens=8192,
        output_tokens_per_s=float(record["value"]) * (int(record["n_gpus"]) if per_gpu else 1),
        scenario=record["load"],
    )


def mlperf_rows(folder: Path) -> tuple[list[Row], int]:
    """MLPerf Inference v4.1 results, closed division, and how many rows there are."""
    with (folder / "measured_mlperf_v41.csv").open(encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    return [row for record in records if (row := _mlperf(record)) is not None], len(records)


def _mlperf(record: dict[str, str]) -> Row | None:
    mixtral = "mixtral" in record["model"]
    model = _model("mixtral-8x7b" if mixtral else record["model"])
    names = [name for part, name in MLPERF_GPUS.items() if part in record["accelerator"]]
    if model is None or not names:
        return None
    gpu, accelerators = load_gpu(names[0]), int(record["n_accel"])
    # The least accelerators that hold the model in the submitted precision.
    least = {"h100-sxm": 2, "h100-pcie": 4, "l40s": 8}.get(gpu.name, 1)
    least = min({"l40s": 4}.get(gpu.name, 1) if mixtral else least, accelerators)
    weights = "nvfp4" if gpu.name == "b200" else "fp8"
    return Row(
        source="mlperf",
        model=model,
        gpu=gpu,
        engine=load_engine("vllm" if gpu.vendor == "AMD" else "trtllm"),
        version="v4.1",
        layout=Layout(weights=weights, kv="fp8", tp=least),
        input_tokens=294,
        output_tokens=145 if mixtral else 294,
        uniform=False,
        clients=0,
        batch_tokens=8192,
        output_tokens_per_s=float(record["value"]) / (accelerators // least),
        replicas=accelerators // least,
        scenario=record["scenario"],
    )
