"""How far stored keys and values are from fresh ones, in plain torch."""

from __future__ import annotations

from typing import Literal

import torch


def deviation(
    k_fresh: torch.Tensor,
    v_fresh: torch.Tensor,
    k_stored: torch.Tensor,
    v_stored: torch.Tensor,
    *,
    use: Literal["kv", "k", "v"] = "kv",
) -> torch.Tensor:
    """Per row, the squared L2 distance of K plus that of V (KV deviation, CacheBlend, arXiv 2405.16444).

    Args:
        k_fresh, v_fresh, k_stored, v_stored: [T, H, D] floating point of one shape, any strides, dtypes may
            differ; both keys are rotated for the same positions.
        use: which of the two count.

    Returns:
        [T] float32, 0 where fresh and stored are equal; differences are float32 (float64 for float64 input).

    Raises:
        ValueError: shapes differ or are not [T, H, D], a dtype is not floating point, or ``use`` is unknown.
    """
    given = (k_fresh, v_fresh, k_stored, v_stored)
    if k_fresh.dim() != 3 or len({x.shape for x in given}) != 1 or not all(x.is_floating_point() for x in given):
        shown = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in given)
        raise ValueError(f"k_fresh, v_fresh, k_stored, v_stored must all be floating point [T, H, D], not {shown}")
    if use not in ("kv", "k", "v"):
        raise ValueError(f"use must be 'kv', 'k' or 'v', not {use!r}")
    total = torch.zeros(k_fresh.shape[0], dtype=torch.float32, device=k_fresh.device)
    if "k" in use:
        total += _distance(k_fresh, k_stored)
    if "v" in use:
        total += _distance(v_fresh, v_stored)
    return total


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    work = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (a.to(work) - b.to(work)).square_().sum(dim=(1, 2))
