"""Rotary positions: from the fields of a config to frequencies, and the rotation itself.

`models` call `rope_of` while they read a config; `network` calls `turning` once a step and
`rotate` in every layer.  Frequencies are computed in float32 in the order in which
transformers computes them, so that angles agree to the last bit.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tierline.catalog.config import Fields
from tierline.engine.decoder import Rope

Angles = tuple[torch.Tensor, torch.Tensor]  # cosine and sine, each [T, 1, frequencies]


def turning(rope: Rope, positions: torch.Tensor, dtype: torch.dtype) -> Angles:
    """Cosine and sine for the tokens at `positions` [T]."""
    frequencies = torch.tensor(
        rope.inverse_frequencies, dtype=torch.float32, device=positions.device
    )
    angles = (positions[:, None].float() * frequencies)[:, None]
    return (angles.cos() * rope.scale).to(dtype), (angles.sin() * rope.scale).to(dtype)


def rotate(x: torch.Tensor, angles: Angles, *, interleaved: bool) -> torch.Tensor:
    """Turn every head of x [T, heads, dim] by the angle of its token."""
    cos, sin = angles
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


# --- from a config --------------------------------------------------------------------------


def rope_of(
    fields: Fields,
    *,
    dim: int,
    theta: float = 10000.0,
    theta_key: str = "rope_theta",
    kind: str | None = None,
    scaled: bool = True,
    interleaved: bool = False,
) -> Rope:
    """The rotation of heads of `dim`, from `rope_parameters` (transformers 5) or older fields.

    `kind` is the layer type whose parameters are meant, `theta` the base where none is given,
    `scaled` whether the older `rope_scaling` applies.

    Raises SpecError for a scaling that is not known.
    """
    section = rope_parameters(fields, kind=kind, scaled=scaled)
    inner = Fields(section, where=f"{fields.where}, rope")
    base = inner.number("rope_theta", fields.number(theta_key, theta))
    name = str(section.get("rope_type", section.get("type", "default")))
    if name not in SCALINGS:
        raise fields.error(f"rope type {name!r} is not one of {', '.join(sorted(SCALINGS))}")
    plain = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    positions = inner.count(
        "original_max_position_embeddings", fields.count("max_position_embeddings", 2048)
    )
    scaled_frequencies, scale = SCALINGS[name](inner, plain, base, positions)
    inner.finish()
    return Rope(
        inverse_frequencies=tuple(scaled_frequencies.tolist()),
        scale=scale,
        interleaved=interleaved,
    )


def rope_parameters(
    fields: Fields, *, kind: str | None = None, scaled: bool = True
) -> Mapping[str, Any]:
    """The section of a config that describes the rotation; empty where there is none."""
    section = fields.section("rope_parameters")
    if section is not None:
        inner = section if kind is None else section.get(kind)
        if inner is not None and not isinstance(inner, Mapping):
            raise fields.error(f"rope_parameters of {kind} is not an object")
        return inner or {}
    return (fields.section("rope_scaling") or {}) if scaled else {}


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """How much YaRN sharpens attention over `factor` times the trained context (section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


Scaled = tuple[torch.Tensor, float]


def _default(inner: Fields, plain: torch.Tensor, base: float, positions: int) -> Scaled:
    del inner, base, positions
    return plain, 1.0


def _linear(inner: Fields, plain: torch.Tensor, base: float, positions: int) -> Scaled:
    """Position interpolation: every angle is divided."""
    del base, positions
    return plain / inner.number("factor"), 1.0


def _llama3(inner: Fields, plain: torch.Tensor, base: float, positions: int) -> Scaled:
    """Llama 3.1: slow turns are divided, fast ones kept, those between are blended."""
    del base
    factor = inner.number("factor")
    low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    inner.insist(low < high, "low_freq_factor is not below high_freq_factor")
    wavelength = 2 * math.pi / plain
    slow = torch.where(wavelength > positions / low, plain / factor, plain)
    smooth = (positions / wavelength - low) / (high - low) if high != low else torch.ones(())
    blended = (1 - smooth) * slow / factor + smooth * slow
    between = (wavelength >= positions / high) & (wavelength <= positions / low)
    return torch.where(between, blended, slow), 1.0


def _yarn(inner: Fields, plain: torch.Tensor, base: float, positions: int) -> Scaled:
    """YaRN (arXiv 2309.00071): dimensions that turn often are kept, the others divided."""
    factor = inner.number("factor")
    dim = 2 * len(plain)

    def dimension(rotations: float) -> float:
        return dim * math.log(positions / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = (
        dimension(inner.number("beta_fast", 32.0)),
        dimension(inner.number("beta_slow", 1.0)),
    )
    if inner.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    divided = 1.0 / (factor * (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)))
    scale = yarn_scale(factor)
    if inner.has("attention_factor"):
        scale = inner.number("attention_factor")
    elif inner.has("mscale") and inner.has("mscale_all_dim"):
        over = yarn_scale(factor, inner.number("mscale_all_dim"))
        scale = yarn_scale(factor, inner.number("mscale")) / over
    return divided * (1 - kept) + plain * kept, scale


SCALINGS: Mapping[str, Callable[[Fields, torch.Tensor, float, int], Scaled]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
