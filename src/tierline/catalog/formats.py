"""Number formats: how many bits an element takes with its scales, and which math runs on it.

Bits include the metadata: NVFP4 is 4 bits plus an FP8 scale for 16 elements (4.5), int4
in groups of 128 is 4 bits plus an FP16 scale and a 4-bit zero (4.15625). A format whose
`math` is bf16 is weight-only: it saves memory and bandwidth, not FLOPs.
"""

from dataclasses import dataclass

from tierline.base.errors import SpecError
from tierline.base.names import lookup

ATTENTION_STAYS_16_BIT_UNDER_BITS = 8  # narrower MoE checkpoints keep attention in bf16


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One number format of weights or of the KV cache."""

    name: str
    bits: float  # per element, scales and zeros included
    math: str  # the rate of the accelerator that its matrix products run at
    quality: str  # none, negligible, mild, moderate: what a user must test for
    note: str = ""

    @property
    def bytes_per_element(self) -> float:
        """Bytes per element, scales and zeros included."""
        return self.bits / 8


WEIGHT_FORMATS = {
    f.name: f
    for f in (
        Format(name="fp32", bits=32, math="bf16", quality="none"),
        Format(name="bf16", bits=16, math="bf16", quality="none"),
        Format(name="fp8", bits=8, math="fp8", quality="negligible", note="W8A8, per tensor"),
        Format(
            name="fp8-block",
            bits=8 + 32 / (128 * 128),
            math="fp8",
            quality="negligible",
            note="128x128 blocks with an FP32 scale",
        ),
        Format(name="int8", bits=8, math="int8", quality="moderate", note="W8A8, per channel"),
        Format(
            name="int8-g128", bits=8 + 16 / 128, math="bf16", quality="negligible", note="W8A16"
        ),
        Format(
            name="int4-g128",
            bits=4 + (16 + 4) / 128,
            math="bf16",
            quality="mild",
            note="AWQ/GPTQ W4A16: FP16 scale and 4-bit zero for 128 elements",
        ),
        Format(
            name="int4-g32",
            bits=4 + 16 / 32,
            math="bf16",
            quality="mild",
            note="W4A16: symmetric, BF16 scale for 32 elements (Kimi-K2.5 experts)",
        ),
        Format(
            name="int4-g64",
            bits=4 + (16 + 4) / 64,
            math="bf16",
            quality="mild",
            note="W4A16: FP16 scale and 4-bit zero for 64 elements",
        ),
        Format(name="nvfp4", bits=4.5, math="fp4", quality="mild", note="FP8 scale for 16"),
        Format(name="mxfp4", bits=4.25, math="fp4", quality="mild", note="E8M0 scale for 32"),
    )
}

KV_FORMATS = {
    f.name: f
    for f in (
        Format(name="bf16", bits=16, math="bf16", quality="none"),
        Format(name="fp8", bits=8, math="bf16", quality="negligible"),
        Format(name="int8", bits=8, math="bf16", quality="negligible"),
        Format(name="nvfp4", bits=4.5, math="bf16", quality="moderate", note="Blackwell only"),
    )
}


def weight_format(name: str) -> Format:
    """The weight format of that name; raises `SpecError` with the nearest names."""
    return lookup("weight format", name, WEIGHT_FORMATS, error=SpecError)


def kv_format(name: str) -> Format:
    """The KV-cache format of that name; raises `SpecError` with the nearest names."""
    return lookup("KV format", name, KV_FORMATS, error=SpecError)
