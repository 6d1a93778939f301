"""Rotate keys by a position delta, in plain torch."""

from __future__ import annotations

import torch

_BLOCK = 1 << 17  # elements rotated at once: the temporaries stay in the core's cache, twice as fast as all at once


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
    _check_frequencies(inv_freq, k)
    rows = k.shape[-3]
    steps = torch.as_tensor(delta, device=k.device)
    if steps.is_floating_point() or steps.dtype == torch.bool or steps.shape not in ((), (rows,)):
        raise ValueError(f"delta must be an integer [] or [{rows}], not {steps.dtype} {tuple(steps.shape)}")
    out = k.clone(memory_format=torch.contiguous_format)
    if not k.numel() or not steps.any():
        return out
    cos, sin = angles(steps.expand(rows) if steps.dim() else steps[None], inv_freq, k.dtype)
    for plane in out.view(-1, *k.shape[-3:]):
        rotate_(plane, cos.expand(rows, -1, -1), sin.expand(rows, -1, -1), interleaved=interleaved)
    return out


def angles(
    delta: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for ``rotate_``: made once, they serve the keys of every layer.

    Args:
        delta: [T] integer, positions to add to each row.
        inv_freq: [rotary_dim / 2] as for ``rotate``.
        dtype: of the keys.

    Returns:
        two [T, 1, rotary_dim / 2], float32 (float64 for float64 keys), on the device of ``delta``.
    """
    # float64: a float32 angle at position 100,000 is off by up to 0.004 rad, which bfloat16 still shows.
    # One row of angles serves all heads.
    angle = delta.reshape(-1, 1, 1).double() * inv_freq.to(delta.device).double()
    work = torch.promote_types(dtype, torch.float32)
    return angle.cos().to(work), angle.sin().to(work)


def rotate_(k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False) -> None:
    """``rotate`` in place, to the bit, with the angles made before.

    Args:
        k: [T, H, D] floating point, any strides; rotated where it is.
        cos, sin: [T, 1, rotary_dim / 2] by ``angles``. A row whose delta is 0 may change the sign of a zero.
        interleaved: as for ``rotate``.

    Raises:
        ValueError: a shape does not fit; the message shows it.
    """
    half = cos.shape[-1]
    if k.dim() != 3 or cos.shape != (k.shape[0], 1, half) or sin.shape != cos.shape or 2 * half > k.shape[2]:
        raise ValueError(
            f"cos and sin must be [T, 1, rotary_dim / 2] for k [T, H, D] {tuple(k.shape)}, "
            f"not {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    rows = max(1, _BLOCK // max(1, 2 * half * k.shape[1]))
    first = slice(0, None, 2) if interleaved else slice(0, half)
    second = slice(1, None, 2) if interleaved else slice(half, None)
    for block, c, s in zip(k.split(rows), cos.split(rows), sin.split(rows), strict=True):
        turning = block[..., : 2 * half]
        wide = turning.to(cos.dtype)  # the block itself if it is wide already: both halves are read before one changes
        a, b = wide[..., first], wide[..., second]
        from_a, from_b = a * s, b * s
        a.mul_(c).sub_(from_b)
        b.mul_(c).add_(from_a)
        if wide is not turning:
            turning.copy_(wide)


def _check_frequencies(inv_freq: torch.Tensor, k: torch.Tensor) -> None:
    half, dim = inv_freq.numel(), k.shape[-1]
    if inv_freq.dim() != 1 or not inv_freq.is_floating_point() or 2 * half > dim:
        raise ValueError(
            f"inv_freq must be floating point [rotary_dim / 2] with rotary_dim <= {dim} "
            f"(k is {tuple(k.shape)}), not {inv_freq.dtype} {tuple(inv_freq.shape)}"
        )
