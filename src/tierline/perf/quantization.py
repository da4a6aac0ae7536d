"""Which precision, why, and what to test first; and the arithmetic of affine codes.

The planner lists formats by memory and speed; this module holds what is left: the choice
between them by situation, the gates that a choice must pass, and the sizes and errors of
packed formats. Order of resort: KV precision when long contexts bind, weights otherwise.

Left out: calibration. How much a model loses is measured on its own tasks; the multipliers
in `METHODS` are the published rules of thumb and rest on no law, so a report prints
`end_to_end_speedup` beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tierline.perf.advice import Advice

LONG_CONTEXT_GATE = "long-context evaluation at the p99 prompt length"
TASK_GATE = "task tests (perplexity is not enough)"
STRICT_TASKS = ("code", "math", "schema")
FULL_PRECISION_TASKS = ("medical", "legal", "exact-retrieval")
FP8_GENERATIONS = ("Ada", "Hopper", "Blackwell", "CDNA3", "CDNA4")
NVFP4_GENERATIONS = ("Blackwell",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to store weights, as published rules of thumb describe it."""

    name: str
    memory_cut: float
    decode: float  # times the 16-bit rate, one stream to small batches
    prefill: float
    quality: str


METHODS = {
    m.name: m
    for m in (
        Method(name="W8A16", memory_cut=0.50, decode=1.5, prefill=0.9, quality="negligible"),
        Method(name="W4A16", memory_cut=0.75, decode=2.5, prefill=0.8, quality="mild-moderate"),
        Method(name="W8A8", memory_cut=0.50, decode=1.5, prefill=1.8, quality="moderate"),
        Method(name="FP8", memory_cut=0.50, decode=1.5, prefill=1.8, quality="negligible"),
    )
}


# --- choices --------------------------------------------------------------------------------


SITUATIONS = (
    "quality-first",
    "standard",
    "decode-bound",
    "memory-bound-sensitive",
    "maximum-compression",
    "long-context",
    "unsure",
)


def precision_advice(situation: str, *, generation: str) -> Advice:
    """Weights and KV for a situation on a generation of accelerators."""
    assert situation in SITUATIONS, situation
    fp8 = generation in FP8_GENERATIONS
    kv = "FP8 KV" if fp8 else "INT8 KV"
    eight = "FP8 weights" if fp8 else "INT8 weights"
    why_eight = () if fp8 else (f"{generation} has no FP8 math: use an INT8 artifact",)
    gates: tuple[str, ...] = (LONG_CONTEXT_GATE,)
    if situation == "quality-first":
        return Advice(verdict="BF16", reasons=("memory is free and quality is not",))
    if situation in ("standard", "decode-bound"):
        batch = ("raise the batch to its memory limit",) if situation == "decode-bound" else ()
        reasons = ("half the bytes, and double math where it is native", *batch, *why_eight)
        return Advice(verdict=f"{eight} + {kv}", reasons=reasons, gates=gates)
    if situation == "memory-bound-sensitive":
        reasons = ("weights halve at negligible loss; KV keeps 16 bit",)
        return Advice(verdict="INT8 weights + BF16 KV", reasons=reasons, gates=gates)
    if situation == "maximum-compression":
        reasons = ("a quarter of the bytes; AWQ keeps the salient channels", *why_eight)
        return Advice(verdict=f"AWQ INT4 + {kv}", reasons=reasons, gates=(TASK_GATE, *gates))
    if situation == "long-context" and generation in NVFP4_GENERATIONS:
        reasons = ("KV binds before weights do", "NVFP4 is 4.5 bits with its scales")
        return Advice(verdict="NVFP4 KV", reasons=reasons, gates=gates)
    return Advice(verdict=kv, reasons=("KV before weights", *why_eight), gates=gates)


def method_advice(use: str, *, generation: str, tasks: Sequence[str] = ()) -> Advice:
    """The weight method for a use: latency chat, high-batch summarization, or a strict domain."""
    if use in FULL_PRECISION_TASKS:
        return Advice(verdict="fp16", reasons=(f"{use} does not tolerate loss",))
    strict = [task for task in tasks if task in STRICT_TASKS]
    if use == "latency-chat":
        reasons = ("decode of few streams is bound by weight bytes", "prefill slows: split pools")
        gates = (f"{TASK_GATE} on {', '.join(strict)}",) if strict else ()
        return Advice(verdict="W4A16", reasons=reasons, gates=gates)
    assert use == "batch-summarization", use
    if generation in FP8_GENERATIONS:
        return Advice(verdict="FP8", reasons=("8-bit math doubles prefill", "native FP8"))
    return Advice(verdict="W8A8", reasons=("8-bit math doubles prefill", "INT8, no FP8 here"))


def runs_fp8_math(generation: str) -> bool:
    """Whether a generation multiplies in FP8; Ampere stores FP8 weights and computes in 16 bit."""
    return generation in FP8_GENERATIONS


# --- sizes and speed ------------------------------------------------------------------------


def packed_bits(bits: int, *, group: int, scale_bits: int = 16, zero_bits: int = 0) -> float:
    """Bits of an element with its group's scale and zero point.

    >>> [packed_bits(4, group=128), packed_bits(4, group=64), packed_bits(8, group=128)]
    [4.125, 4.25, 8.125]
    """
    return bits + (scale_bits + zero_bits) / group


def end_to_end_speedup(
    *, wide_bytes: float, narrow_bytes: float, kv_sequence_bytes: float, batch: int
) -> float:
    """Decode speedup of narrower weights when KV is read beside them.

    >>> kv = 4096 * 327_680
    >>> [round(end_to_end_speedup(wide_bytes=140e9, narrow_bytes=35e9, kv_sequence_bytes=kv,
    ...                           batch=b), 2) for b in (1, 32, 64)]
    [3.89, 2.35, 1.87]
    """
    kv = batch * kv_sequence_bytes
    return (wide_bytes + kv) / (narrow_bytes + kv)


def batch_at_speedup(
    speedup: float, *, wide_bytes: float, narrow_bytes: float, kv_sequence_bytes: float
) -> float:
    """The batch at which narrower weights still give that speedup."""
    kv = (wide_bytes - speedup * narrow_bytes) / (speedup - 1)
    return kv / kv_sequence_bytes


# --- affine codes ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """Codes of one group: value = low + code x scale."""

    scale: float
    low: float
    codes: tuple[int, ...]

    def values(self) -> tuple[float, ...]:
        """What the codes stand for."""
        return tuple(self.low + code * self.scale for code in self.codes)


def quantize(values: Sequence[float], *, bits: int) -> Affine:
    """Min/max codes over the range of the group: one outlier takes the range from the rest.

    >>> round(quantize([0.03, 0.01, 0.09, 0.02, 15.2, 0.04, 0.05, 0.02, 0.01], bits=4).scale, 5)
    1.01267
    """
    low = min(values)
    scale = (max(values) - low) / (2**bits - 1) or 1.0  # a constant group: any scale does
    return Affine(scale=scale, low=low, codes=tuple(round((v - low) / scale) for v in values))


def error_max(values: Sequence[float], code: Affine) -> float:
    """The largest difference between a value and what its code stands for."""
    return max(abs(v - q) for v, q in zip(values, code.values(), strict=True))
