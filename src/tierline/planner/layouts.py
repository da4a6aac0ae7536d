"""Which ways of cutting a model over an accelerator are legal, fit, and may be recommended.

Quantise before choosing TP: precision moves the memory floor, so formats are the outer
loop and the lowest legal TP that fits comes after. What is turned down is kept with the
number that turned it down. Prices and latencies play no part here; `candidates` asks those.
"""

from collections.abc import Iterator

from tierline.base.units import format_bytes
from tierline.catalog.formats import KV_FORMATS, WEIGHT_FORMATS, Format
from tierline.catalog.gpu import GpuSpec
from tierline.catalog.gpus import supports, supports_kv
from tierline.catalog.model import ModelSpec
from tierline.perf.memory import computed_activation_bytes, overhead_bytes
from tierline.perf.parallel import PCIE_KINDS
from tierline.perf.step import Layout, StepCost
from tierline.planner.finding import MeasuredCurve, MemoryUse, Question, Rejected

QUALITIES = ("none", "negligible", "mild", "moderate")
STEP_TOKENS_MAX = 8192  # the widest step an engine is let take
SEQUENCES_MAX = 1024
PCIE_TP_MAX = 4  # all-reduce takes over 38 % of a step at 8 ranks on PCIe
NODES_MAX = 4  # that one instance may span
PP_MAX = 8  # stages, where a node has one accelerator


def layouts(
    model: ModelSpec, gpu: GpuSpec, measured: MeasuredCurve | None, rejected: list[Rejected]
) -> Iterator[tuple[Layout, StepCost]]:
    """Legal layouts of the model on `gpu`: formats first, then the lowest TP and some above."""
    if measured is not None:
        if measured.gpu == gpu.name:
            yield measured.layout, StepCost(model, gpu, measured.layout)
        return
    for weights in weight_choices(model):
        reason = supports(gpu, weights) or outdone(gpu, weights)
        if reason is not None:
            rejected.append(Rejected(what=f"{gpu.name} {weights.name}", why=reason))
            continue
        for kv in kv_choices(gpu):
            yield from shapes_that_fit(model, gpu, weights.name, kv.name, rejected)


def outdone(gpu: GpuSpec, weights: Format) -> str | None:
    """Why another format of the same size is better on `gpu`; None when nothing is."""
    if weights.name.startswith("int8") and "fp8" in gpu.flops_per_s:
        return "FP8 has the same size and rate here and loses less"
    return None


def weight_choices(model: ModelSpec) -> list[Format]:
    """Formats that make sense for published weights of this kind: never wider than native."""
    native = WEIGHT_FORMATS[model.native_format]
    if native.bits < 8:
        return [native]
    names = ["fp8", "int8", "int8-g128", "int4-g128", "nvfp4"]
    return [native, *(WEIGHT_FORMATS[n] for n in names if WEIGHT_FORMATS[n].bits < native.bits - 1)]


def kv_choices(gpu: GpuSpec) -> list[Format]:
    """KV formats that `gpu` can store; NVFP4 KV costs too much quality to be planned with."""
    return [f for f in (KV_FORMATS["bf16"], KV_FORMATS["fp8"]) if supports_kv(gpu, f) is None]


def shapes_that_fit(
    model: ModelSpec,
    gpu: GpuSpec,
    weights: str,
    kv: str,
    rejected: list[Rejected],
) -> Iterator[tuple[Layout, StepCost]]:
    """Ways to cut one instance that leave room for KV; TP inside a node before PP across."""
    fits_in_node = False
    for layout in _cuts(model, gpu, weights, kv):
        if layout.pp > 1 and fits_in_node:
            continue
        if layout.tp > PCIE_TP_MAX and is_slow_fabric(gpu):
            why = f"no fast link: collectives over {PCIE_TP_MAX} ranks on PCIe dominate the step"
            rejected.append(Rejected(what=f"{gpu.name} {layout}", why=why))
            continue
        cost = StepCost(model, gpu, layout)
        room = memory_use(cost).kv_bytes
        if room <= 0:
            rejected.append(
                Rejected(
                    what=f"{gpu.name} {layout}",
                    why=f"weights and overheads exceed {format_bytes(gpu.memory_bytes)} "
                    f"by {format_bytes(-room)} on each GPU",
                    missing_bytes=-room,
                )
            )
            continue
        fits_in_node = fits_in_node or layout.pp == 1
        yield layout, cost


def _cuts(model: ModelSpec, gpu: GpuSpec, weights: str, kv: str) -> Iterator[Layout]:
    node = min(gpu.gpus_per_node, 16)
    degrees = [tp for tp in model.legal_tp(node) if tp & (tp - 1) == 0]
    for tp in degrees:
        yield Layout(weights=weights, kv=kv, tp=tp)
    if model.is_moe and model.attention[0].latent:
        for dp in (d for d in (4, 8, 16) if d <= node):
            yield Layout(weights=weights, kv=kv, dp=dp, ep=dp)
    widest = max(tp for tp in degrees if tp <= (PCIE_TP_MAX if is_slow_fabric(gpu) else node))
    for pp in (2, 4, 8):
        if widest * pp <= max(node * NODES_MAX, PP_MAX):
            yield Layout(weights=weights, kv=kv, tp=widest, pp=pp)


def is_slow_fabric(gpu: GpuSpec) -> bool:
    """Whether accelerators of one node talk over PCIe only."""
    return gpu.scale_up.kind in PCIE_KINDS


def memory_use(cost: StepCost) -> MemoryUse:
    """Bytes on one accelerator by component; the KV pool is what is left, perhaps negative.

    Activations are those of the widest step that the engine may take, whole on every rank.
    """
    gpu = cost.gpu
    weights = cost.weights_bytes_per_gpu
    activations = computed_activation_bytes(
        cost.model, batch_tokens=STEP_TOKENS_MAX, sequences=SEQUENCES_MAX
    )
    overhead = overhead_bytes(gpu.memory_bytes)
    return MemoryUse(
        weights_bytes=weights,
        activations_bytes=activations,
        overhead_bytes=overhead,
        kv_bytes=gpu.memory_bytes - weights - activations - overhead,
        total_bytes=gpu.memory_bytes,
    )


def quality_gate(question: Question, layout: Layout) -> str:
    """What must be tested before this layout may be recommended; empty when nothing."""
    limit = QUALITIES.index(question.quality)
    native = WEIGHT_FORMATS[question.model.native_format]
    gates = []
    weights, kv = WEIGHT_FORMATS[layout.weights], KV_FORMATS[layout.kv]
    if weights.bits < native.bits and QUALITIES.index(weights.quality) > limit:
        gates.append(f"{weights.name} weights: {weights.quality} loss")
    if QUALITIES.index(kv.quality) > limit:
        gates.append(f"{kv.name} KV: {kv.quality} loss")
    return "; ".join(gates)
