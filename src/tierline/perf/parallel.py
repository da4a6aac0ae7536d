"""How to cut one instance over accelerators, and what the cut costs.

The planner asks for the lowest legal tensor-parallel degree that fits in a node; the
report asks what higher degrees and pipeline stages would have cost. The order of resort:
one accelerator, TP inside the node, PP across nodes, and replicas, which are not cut at
all. Experts spread over ranks (EP) instead of being cut.

Seconds of a collective come from `perf.step`, the one cost model. Left out: overlap of
communication with math, which would only lower the shares given here.
"""

import math

from tierline.catalog.gpu import GpuSpec
from tierline.catalog.model import ModelSpec
from tierline.perf.step import collective_s, expert_skew

REDUCES_PER_LAYER = 2  # after attention and after the feed-forward part
ACTIVATION_BYTES = 2
PCIE_KINDS = ("pcie", "none")


# --- legal cuts -----------------------------------------------------------------------------


def kv_copies(query_heads: int, kv_heads: int, tp: int) -> int | None:
    """How many ranks hold one KV head: 1 is clean, more is replicated, None is illegal.

    >>> [kv_copies(64, 8, tp) for tp in (2, 8, 16, 6)]
    [1, 1, 2, None]
    """
    if query_heads % tp:
        return None
    if kv_heads % tp == 0:
        return 1
    return tp // kv_heads if tp % kv_heads == 0 else None


def round_up_tp(gpus: int, model: ModelSpec, *, gpus_max: int) -> int | None:
    """The lowest legal degree of at least `gpus`, or None when the node ends first.

    A count of accelerators is not yet a degree: six hold a 70B model and none of its
    layers splits by six.
    """
    return next((tp for tp in model.legal_tp(gpus_max) if tp >= gpus), None)


def lowest_tp(
    model: ModelSpec, *, total_bytes: float, gpu_memory_bytes: float, gpus_per_node: int
) -> int | None:
    """The lowest legal degree in one node that holds `total_bytes`, or None: go to PP."""
    gpus = math.ceil(total_bytes / gpu_memory_bytes)
    return round_up_tp(gpus, model, gpus_max=gpus_per_node)


def weights_bytes_per_gpu(weights_bytes: float, *, tp: int, pp: int = 1) -> float:
    """An even share of the weights.

    >>> weights_bytes_per_gpu(140e9, tp=4) / 1e9
    35.0
    """
    return weights_bytes / (tp * pp)


def replicas_per_node(gpus_per_node: int, *, tp: int) -> int:
    """Whole instances in one node."""
    return gpus_per_node // tp


# --- replicas and the prefixes they cache ---------------------------------------------------


def prefixes_moved_share(replicas: int, *, ring: bool) -> float:
    """Share of prefixes that change replica, and so miss once, when one more is added.

    Hash modulo count keeps 1 / (N + 1) in place; a consistent-hashing ring moves just that.

    >>> [prefixes_moved_share(4, ring=ring) for ring in (False, True)]
    [0.8, 0.2]
    """
    share = 1 / (replicas + 1)
    return share if ring else 1 - share


def round_robin_hit_share(
    replicas: int, *, requests_per_prefix: int, caches_hold_all: bool
) -> float:
    """Prefix hits behind a balancer that knows no prefixes.

    Caches that hold every prefix miss each once a replica; the usual 1 / N is for caches
    that hold only their own share of the prefixes.

    >>> round_robin_hit_share(4, requests_per_prefix=100, caches_hold_all=True)
    0.96
    """
    if not caches_hold_all:
        return 1 / replicas
    return 1 - min(replicas, requests_per_prefix) / requests_per_prefix


# --- pipelines ------------------------------------------------------------------------------


def bubble_share(pp: int, microbatches: int) -> float:
    """Share of the time that a pipeline stage idles: (PP - 1) / (m + PP - 1).

    >>> [round(bubble_share(4, m), 4) for m in (1, 4)]
    [0.75, 0.4286]
    """
    return (pp - 1) / (microbatches + pp - 1)


def microbatches_to_halve(pp: int, microbatches: int) -> int:
    """Microbatches that halve the bubble: 2 m + PP - 1, more than twice as many.

    >>> microbatches_to_halve(4, 4)
    11
    """
    return 2 * microbatches + pp - 1


# --- experts --------------------------------------------------------------------------------


def expert_throughput_share(*, load_max: float, load_mean: float) -> float:
    """Throughput over a balanced one: every rank waits for the fullest."""
    return load_mean / load_max


def expert_load_max(assignments: float, ranks: int) -> float:
    """Expected fullest of `ranks` when `assignments` fall on them at random."""
    return assignments / ranks * float(expert_skew(assignments, ranks=ranks))


# --- collectives ----------------------------------------------------------------------------


def all_reduce_wire_bytes(payload_bytes: float, *, gpus: int) -> float:
    """What one accelerator sends in a ring all-reduce: 2 (n - 1) / n of the payload."""
    return 2 * (gpus - 1) / gpus * payload_bytes


def step_reduce_bytes(model: ModelSpec, *, tokens: int, tp: int) -> float:
    """What one accelerator sends in one step: two all-reduces of the hidden state a layer."""
    payload = tokens * model.hidden * ACTIVATION_BYTES
    return REDUCES_PER_LAYER * model.layers * all_reduce_wire_bytes(payload, gpus=tp)


def step_reduce_s(model: ModelSpec, gpu: GpuSpec, *, tokens: int, tp: int) -> float:
    """Seconds of all-reduces in one step; a mesh pair sees its one link."""
    payload = tokens * model.hidden * ACTIVATION_BYTES
    return REDUCES_PER_LAYER * model.layers * collective_s(gpu, gpus=tp, payload_bytes=payload)


def reduce_share(reduce_s: float, *, other_s: float) -> float:
    """Share of the step that goes to all-reduces."""
    return reduce_s / (reduce_s + other_s)


def tp_advice(gpu: GpuSpec, tp: int) -> str:
    """What to do about a degree on this fabric; empty when there is nothing to say."""
    if gpu.scale_up.kind not in PCIE_KINDS or tp <= 2:
        return ""
    if tp <= 4:
        return f"TP={tp} over PCIe: benchmark it against TP=2"
    return f"TP={tp} over PCIe: all-reduces take over a third of the step; use TP=2"
