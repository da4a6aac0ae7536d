"""What published tables call models, accelerators, engines and precisions, and what those are here.

A name that nothing here knows is an `InputError`: the row that carries it cannot be
predicted, counts against coverage, and is named. Nothing is guessed beyond spelling.
"""

import functools
import json
import re

from tierline.base.errors import InputError, SpecError
from tierline.base.files import read_text
from tierline.base.names import lookup
from tierline.catalog.formats import WEIGHT_FORMATS, weight_format
from tierline.catalog.gpu import GpuSpec
from tierline.catalog.gpus import gpu_names, load_gpu, supports
from tierline.catalog.model import ModelSpec
from tierline.catalog.models import ALIASES, known_models, load_model
from tierline.perf.step import EngineProfile, engine_names, load_engine

TABLE_MODELS = {  # names of offline tables that are not the catalogue's
    "llama-7b": "llama-2-7b",
    "llama-70b": "llama-2-70b",
    "mistral-7b": "mistral-7b-v0.1",
    "llama2-70b-99": "llama-2-70b",
    "llama2-70b-99.9": "llama-2-70b",
    "mixtral-8x7b-99": "mixtral-8x7b",
}
# Endings that name a checkpoint of a model and leave its shape alone.
CHECKPOINT = re.compile(
    r"-(instruct|chat|base|it|hf|thinking|terminus|fp8|fp4|nvfp4|mxfp4|bf16|int4|int8|awq|gptq"
    r"|w4a16|w8a8|kv|dynamic|quantized|maas|v\d|\d{4})$"
)
GPU_PARTS = {  # by what a name holds, in capitals; the first match wins
    "MI355X": "mi355x",
    "MI325X": "mi325x",
    "MI300X": "mi300x",
    "GH200": "gh200",
    "GB300": "gb300",
    "GB200": "gb200",
    "B300": "b300",
    "B200": "b200",
    "H200": "h200",
    "H100-NVL": "",  # not in the catalogue, and not an H100 of another form
    "H100-PCIE": "h100-pcie",
    "H100": "h100-sxm",
    "A100-80GB-PCIE": "a100-pcie",
    "A100-PCIE": "a100-pcie",
    "A100-40GB": "a100-40",
    "A100": "a100-80",
    "RTX-PRO-6000": "rtxpro6000se",
    "RTXPRO6000": "rtxpro6000se",
    "L40S": "l40s",
}
ENGINES = {"trt": "trtllm", "tensorrt-llm": "trtllm", "tensorrtllm": "trtllm", "trt-llm": "trtllm"}
PRECISIONS = {
    "fp16": "bf16",
    "float16": "bf16",
    "bfloat16": "bf16",
    "fp8_block": "fp8",
    "fp4": "nvfp4",
    "int4": "int4-g128",
    "int4_wo": "int4-g128",
    "awq": "int4-g128",
    "gptq": "int4-g128",
}
# How engines run what an accelerator has no math for: the same bits, computed in 16.
WEIGHT_ONLY = {"fp8": "int8-g128", "fp8-block": "int8-g128", "nvfp4": "int4-g128"}
PRECISION_IN_NAME = re.compile(r"(nvfp4|mxfp4|fp8|fp4|int4|int8|awq|gptq|bf16)")


@functools.cache
def model_named(name: str) -> ModelSpec:
    """The catalogue's model of a published name; its checkpoint's endings do not matter."""
    folded = name.strip().casefold().replace("_", "-")
    tail = folded.rsplit("/", 1)[-1]
    for spelled in (folded, tail):
        rest = spelled
        while True:
            known = TABLE_MODELS.get(rest) or _names().get(rest)
            if known is not None:
                return load_model(known)
            shorter = CHECKPOINT.sub("", rest)
            if shorter == rest:
                break
            rest = shorter
    if name.endswith(".json"):
        return load_model(name)
    return lookup(
        "model",
        tail,
        known_models(),
        error=SpecError,
        way_out="or put the path of its config.json in that column",
    )


@functools.cache
def _names() -> dict[str, str]:
    """Catalogue names and published ids, with and without the publisher."""
    aliases: dict[str, str] = json.loads(read_text(ALIASES, what="model aliases"))
    names = {alias.rsplit("/", 1)[-1]: model for alias, model in aliases.items()}
    return names | aliases | {name: name for name in known_models()}


@functools.cache
def gpu_named(name: str) -> GpuSpec:
    """The catalogue's accelerator of a published name."""
    folded = re.sub(r"[\s_]+", "-", name.strip())
    if folded.casefold() in gpu_names():
        return load_gpu(folded.casefold())
    for part, known in GPU_PARTS.items():
        if part in folded.upper() and known:
            return load_gpu(known)
        if part in folded.upper():
            break
    return load_gpu(folded.casefold())


def engine_named(name: str) -> EngineProfile:
    """The profile of an engine."""
    folded = name.strip().casefold().replace("_", "-")
    folded = ENGINES.get(folded, folded)
    return load_engine(lookup("engine", folded, {known: known for known in engine_names()}))


def weights_of(precision: str, name: str, model: ModelSpec, *, blocks: bool = False) -> str:
    """The weight format: as the row says, else as the checkpoint's name says, else its own.

    With `blocks`, FP8 experts are in 128 x 128 blocks, as in the vendors' own checkpoints.
    """
    said = precision.strip().casefold()
    if not said:
        found = PRECISION_IN_NAME.search(name.casefold())
        said = found.group(1) if found else model.native_format
    said = PRECISIONS.get(said, said)
    if said == "nvfp4" and model.native_format == "mxfp4":
        return "mxfp4"
    if said == "fp8" and model.is_moe and (blocks or model.native_format == "fp8-block"):
        return "fp8-block"
    return lookup("precision", said, {f: f for f in WEIGHT_FORMATS}, error=InputError)


def runs_as(weights: str, gpu: GpuSpec) -> str:
    """The format that `weights` run in on `gpu`: itself, or its bits without its math."""
    if supports(gpu, weight_format(weights)) is None:
        return weights
    stand_in = WEIGHT_ONLY.get(weights, weights)
    problem = supports(gpu, weight_format(stand_in))
    if problem is not None:
        raise InputError(problem)
    return stand_in
