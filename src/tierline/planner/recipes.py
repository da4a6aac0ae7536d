"""Launch settings that published benchmarks ran with and that their rows do not mention.

Without them a row is ambiguous: the same labels cover runs with and without speculative
decoding, a step of 1,000 or of 30,000 tokens, a scheduler that looks for new requests after
every step or after every thirtieth. The benchmark publishes its launch scripts with their
history, so the settings of a row follow from its model, engine, version and date; they are
read here, none is fitted. A row that states a setting itself overrides the recipe, and a
stack that no recipe covers gets its engine's defaults.

Source: InferenceX (formerly InferenceMAX), `benchmarks/` and `nvidia-master.yaml` as of the
rows' dates, 2025-11 to 2026-04. Defaults: `vllm serve`, `sglang.launch_server` and
`trtllm-serve` of the same months.
"""

from dataclasses import dataclass, replace

from tierline.catalog.gpu import GpuSpec
from tierline.catalog.model import ModelSpec
from tierline.perf.step import EngineProfile, Layout

POLL_BUSY, POLL_QUIET = 30, 10  # --scheduler-recv-interval from POLL_CLIENTS clients on, below
POLL_CLIENTS = 16
LARGE_MEMORY_BYTES = 160e9  # SGLang chunks by 16,384 from here on, by 8,192 below
BALANCE_STEPS = 60  # attention_dp_config.timeout_iters
MTP_DRAFTS, MTP_DRAFTS_DP, MTP_DRAFTS_SGLANG = 3, 1, 2
DEEPSEEK = ("deepseek-r1", "deepseek-v3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What a row says about its run."""

    model: ModelSpec
    gpu: GpuSpec
    engine: EngineProfile
    version: str
    date: str  # ISO, or empty
    layout: Layout
    input_tokens: int
    output_tokens: int
    clients: int
    published: bool = True  # by the benchmark whose recipes these are
    speculative: bool | None = None  # None: not stated


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How an engine was told to run."""

    batch_tokens: int  # of one step, of one attention rank
    whole_prompts: bool = False  # a prompt is computed in one step or not yet
    poll_steps: int = 1  # decode steps between two looks for new requests
    balance_steps: int = 0  # how long attention ranks wait until each has a prompt
    gather_steps: int = 0  # how long prompts wait for others, until a step has gather_tokens
    gather_tokens: int = 0
    draft_tokens: int = 0  # proposed in a step and checked in the next
    fused_experts: bool = False  # routing and products of the experts in few kernels


def launch_of(labels: Labels) -> Launch:
    """The settings of a run: its recipe's, else its engine's defaults."""
    return {"sglang": _sglang, "trtllm": _trtllm}.get(labels.engine.name, _vllm)(labels)


def _vllm(labels: Labels) -> Launch:
    if labels.published and (labels.model.name, labels.gpu.name) == ("minimax-m2.5", "b200"):
        return Launch(batch_tokens=2 * labels.input_tokens)
    return Launch(batch_tokens=labels.engine.batch_tokens)


def _sglang(labels: Labels) -> Launch:
    launch = _sglang_steps(labels)
    on = labels.speculative
    if on is None and labels.published and labels.version == "0.5.9":
        on = _sglang_speculates(labels)
    drafts = MTP_DRAFTS if labels.model.name.startswith("qwen") else MTP_DRAFTS_SGLANG
    return replace(launch, draft_tokens=drafts if on else 0)


def _sglang_speculates(labels: Labels) -> bool:
    """Whether only the recipe with drafts has such a run; where both have, none is assumed."""
    layout, quick = labels.layout, labels.clients <= (4 if labels.input_tokens > 4096 else 64)
    if labels.model.name == "qwen3.5-397b-a17b":
        return layout.weights == "fp8-block" and (layout.tp, layout.ep) == (4, 1)
    whole_node = layout.weights == "fp8-block" and (layout.tp, layout.ep) == (8, 1)
    return (labels.model.name, labels.gpu.name) == ("deepseek-r1", "b200") and (
        whole_node and not quick
    )


def _sglang_steps(labels: Labels) -> Launch:
    model, gpu = labels.model.name, labels.gpu
    chunk = 16_384 if gpu.memory_bytes >= LARGE_MEMORY_BYTES else 8_192
    if not labels.published:
        return Launch(batch_tokens=chunk)
    blackwell = gpu.generation.casefold().startswith("blackwell")
    busy = POLL_BUSY if labels.clients >= POLL_CLIENTS else POLL_QUIET
    if model in DEEPSEEK and blackwell:
        if labels.layout.weights == "nvfp4":
            return Launch(batch_tokens=16_384, poll_steps=busy)
        if labels.layout.tp == 4:
            return Launch(batch_tokens=8_192, poll_steps=POLL_QUIET)
        return Launch(batch_tokens=32_768, poll_steps=busy)
    if model == "qwen3.5-397b-a17b" and blackwell:
        if gpu.name == "b300" and labels.layout.weights == "fp8-block":
            return Launch(batch_tokens=16_384, poll_steps=POLL_QUIET)
        return Launch(batch_tokens=32_768, poll_steps=busy)
    if model in (*DEEPSEEK, "glm-5"):
        return Launch(batch_tokens=32_768)
    return Launch(batch_tokens=chunk)


def _trtllm(labels: Labels) -> Launch:
    layout = labels.layout
    balance = BALANCE_STEPS if layout.dp > 1 else 0
    drafts = _drafts(labels)
    if labels.model.name == "gpt-oss-120b" and labels.published:
        budget, balance = 20_000, 0
    elif labels.model.name in DEEPSEEK and labels.published:
        batch = labels.clients if layout.dp == 1 or not drafts else labels.clients // layout.dp
        budget = ((drafts + 1) * batch + labels.input_tokens + 127) // 64 * 64
        if labels.version == "1.2.0rc6.post2":
            budget = max(budget, 8_192)
    elif labels.model.name == "llama-3.1-70b" and labels.published:
        return _llama_trtllm(labels)
    else:
        budget = labels.engine.batch_tokens
    triton = labels.model.name == "gpt-oss-120b" and labels.gpu.generation == "Hopper"
    return Launch(
        batch_tokens=budget,
        whole_prompts=True,
        balance_steps=balance,
        draft_tokens=drafts,
        fused_experts=not (triton and labels.published),
    )


def _llama_trtllm(labels: Labels) -> Launch:
    """16,384 tokens a step; short prompts wait for each other, up to twenty steps."""
    gathers = labels.input_tokens == labels.output_tokens == 1024 and labels.layout.tp < 8
    return Launch(
        batch_tokens=16_384,
        whole_prompts=True,
        gather_steps=20 if gathers else 0,
        gather_tokens=int(0.9 * 16_384) if gathers else 0,
    )


def _drafts(labels: Labels) -> int:
    """Draft tokens of DeepSeek's multi-token prediction, under TensorRT-LLM."""
    on = labels.speculative
    if on is None and labels.published and labels.model.name in DEEPSEEK:
        on = labels.version == "1.2.0rc6.post3"
        if labels.version == "1.1.0rc2.post2":  # both kinds ran on this image; these by date
            on = labels.date == "2026-01-14" or (labels.date > "2026-01" and labels.layout.dp > 1)
    if not on:
        return 0
    return MTP_DRAFTS_DP if labels.layout.dp > 1 else MTP_DRAFTS
