"""Rotate keys by a position delta, in plain torch."""

from __future__ import annotations

import torch


def rotate(
    k: torch.Tensor,
    delta: int | torch.Tensor,
    inv_freq: torch.Tensor,
    *,
    interleaved: bool = False,
) -> torch.Tensor:
    """Keys rotated at ``p`` become the keys at ``p + delta`` (RoPE, arXiv 2104.09864: rotations add up).

    A constant scale on the rotated keys (YaRN's attention factor) commutes with the rotation.

    Args:
        k: [..., T, H, D] floating point, any strides, any leading dimensions; not modified.
        delta: positions to add, negative allowed: an int for all rows, or an integer tensor [] or [T].
        inv_freq: [rotary_dim / 2] the model's own inverse frequencies, floating point, radians per position.
            The first ``rotary_dim`` <= D dimensions rotate, the rest pass through (partial rotary).
        interleaved: pairs are (0, 1), (2, 3), ... instead of (i, i + rotary_dim / 2) (NeoX half-split).

    Returns:
        a new contiguous tensor like ``k``. Angles are made in float64, the rotation runs in float32 (float64
        for a float64 ``k``) and is rounded once to ``k.dtype``. If all deltas are 0, the bytes of ``k``.

    Raises:
        ValueError: a shape or dtype does not fit; the message shows it.
    """
    if k.dim() < 3 or not k.is_floating_point():
        raise ValueError(f"k must be floating point [..., T, H, D], not {k.dtype} {tuple(k.shape)}")
    rows, dim, half = k.shape[-3], k.shape[-1], inv_freq.numel()
    if inv_freq.dim() != 1 or not inv_freq.is_floating_point() or 2 * half > dim:
        raise ValueError(
            f"inv_freq must be floating point [rotary_dim / 2] with rotary_dim <= {dim} "
            f"(k is {tuple(k.shape)}), not {inv_freq.dtype} {tuple(inv_freq.shape)}"
        )
    steps = torch.as_tensor(delta, device=k.device)
    if steps.is_floating_point() or steps.dtype == torch.bool or steps.shape not in ((), (rows,)):
        raise ValueError(f"delta must be an integer [] or [{rows}], not {steps.dtype} {tuple(steps.shape)}")
    if not k.numel() or not steps.any():
        return k.clone(memory_format=torch.contiguous_format)

    # float64: a float32 angle at position 100,000 is off by up to 0.004 rad, which bfloat16 still shows.
    # [T or 1, 1, half]: one row of angles serves all heads and leading dimensions.
    angle = steps.reshape(-1, 1, 1).double() * inv_freq.to(k.device).double()
    work = torch.promote_types(k.dtype, torch.float32)
    cos, sin = angle.cos().to(work), angle.sin().to(work)

    out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    # One leading index (layer) at a time: its temporaries stay in the cache, twice as fast as all at once.
    for source, target in zip(k.reshape(-1, *k.shape[-3:]), out.view(-1, *k.shape[-3:]), strict=True):
        a, b = source[..., first].to(work), source[..., second].to(work)
        target[..., first] = a * cos - b * sin
        target[..., second] = b * cos + a * sin
        target[..., 2 * half :] = source[..., 2 * half :]
    return out
