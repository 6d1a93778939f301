"""The model's own RoPE: frequencies for re-rotation, and refusal of what is not recognised.

K is stored rotated for the position it was compiled at. Moving it by ``d`` positions multiplies it by the rotation of
angle ``d * inv_freq``; a constant scale on K (YaRN's attention factor) commutes with that, so one table serves all.
The formulas are closed forms of the papers (RoPE arXiv 2104.09864; YaRN arXiv 2309.00071; Llama 3.1 model card) and are
checked at start-up against what the engine really computes (``check_tables``): never against themselves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blend.errors import UnsupportedModelError

KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, eq=False)
class Rope:
    """``inv_freq`` [rotary_dim / 2] float64 on the CPU, radians per position; ``signature`` goes into every key."""

    kind: str
    inv_freq: Tensor
    rotary_dim: int
    signature: str
    interleaved: bool = False
    attention_factor: float = 1.0


def rope_from_config(config: Mapping[str, Any], head_dim: int) -> Rope:
    """Read ``rope_parameters`` (transformers 5) or ``rope_theta``/``rope_scaling`` of a Hugging Face config.

    Raises ``UnsupportedModelError`` naming the field for every kind but ``KINDS``.
    """
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    nested = [k for k, v in scaling.items() if isinstance(v, Mapping)]
    if nested:
        raise UnsupportedModelError(
            f"config field rope_parameters has one RoPE per layer type ({', '.join(sorted(nested))}); "
            "blending needs one RoPE for all layers"
        )
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"config field rope_parameters.rope_type is {kind!r}; re-rotation is exact only for {', '.join(KINDS)}"
        )
    if "mrope_section" in scaling:
        raise UnsupportedModelError("config field rope_parameters.mrope_section: multimodal RoPE is not supported")
    theta = scaling.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise UnsupportedModelError("config has no rope_theta: the model does not use rotary positions")
    partial = float(scaling.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0))
    rotary_dim = int(head_dim * partial)
    factor = float(scaling.get("factor", 1.0))
    base = 1.0 / float(theta) ** (torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    attention_factor = 1.0
    if kind == "default":
        inv_freq = base
    elif kind == "linear":
        inv_freq = base / factor
    elif kind == "llama3":
        inv_freq = _llama3(base, scaling)
    else:
        original = float(scaling.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 0)
        inv_freq = _yarn(base, scaling, float(theta), rotary_dim, original)
        attention_factor = _yarn_attention(scaling, factor)
    text = f"{kind}|{rotary_dim}|{attention_factor!r}|" + ",".join(repr(x) for x in inv_freq.tolist())
    signature = hashlib.sha256(text.encode()).hexdigest()[:32]
    return Rope(kind, inv_freq, rotary_dim, signature, attention_factor=attention_factor)


def check_tables(rope: Rope, positions: Tensor, cos: Tensor, sin: Tensor, tolerance: float) -> None:
    """Compare our angles with the engine's tables.

    ``positions`` [P]; ``cos`` and ``sin`` [P, rotary_dim / 2] as the engine multiplies them (attention factor
    included). Raises ``UnsupportedModelError`` when any entry differs by more than ``tolerance``.
    """
    angle = positions.double()[:, None] * rope.inv_freq[None]
    if cos.shape != angle.shape or sin.shape != angle.shape:
        raise UnsupportedModelError(
            f"the engine rotates {2 * cos.shape[-1]} dimensions of a head, the config says {rope.rotary_dim}"
        )
    worst = max(
        float((cos.double() - angle.cos() * rope.attention_factor).abs().max()),
        float((sin.double() - angle.sin() * rope.attention_factor).abs().max()),
    )
    if not worst <= tolerance:
        raise UnsupportedModelError(
            f"the engine's rotary tables differ from rope_type {rope.kind!r} of the config by {worst:.3g} "
            f"(allowed {tolerance:.3g}); this RoPE is not recognised"
        )


def _llama3(base: Tensor, p: Mapping[str, Any]) -> Tensor:
    factor, low, high = float(p["factor"]), float(p["low_freq_factor"]), float(p["high_freq_factor"])
    original = float(p["original_max_position_embeddings"])
    wavelength = 2 * math.pi / base
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * base / factor + smooth * base


def _yarn(base: Tensor, p: Mapping[str, Any], theta: float, dim: int, original: float) -> Tensor:
    factor = float(p["factor"])

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(float(p.get("beta_fast") or 32)), dimension(float(p.get("beta_slow") or 1))
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return base / factor * ramp + base * (1 - ramp)


def _yarn_attention(p: Mapping[str, Any], factor: float) -> float:
    def mscale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(float(p["mscale"])) / mscale(float(p["mscale_all_dim"]))
    return mscale(1.0)
