"""How much attention each key receives, in plain torch."""

from __future__ import annotations

import torch

from kernels.row_attention.reference import check, masked_scores


def attention_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per key, the causal softmax weight summed over query rows and heads.

    Args:
        q: [R, Hq, D] floating point, any strides; query head ``h`` reads key head ``h // (Hq / H)``.
        k: [N, H, D], row ``n`` is the key at position ``n``; same dtype and device as ``q``.
        positions: [R] integer, each in ``0 .. N - 1``; row ``r`` attends the keys ``0 .. positions[r]``.
        scale: factor on the scores, usually ``D ** -0.5``.
        out: [N] float32 to add to (several layers sum into one buffer); a new zero buffer if None.

    Returns:
        ``out`` [N] float32; one call adds R * Hq in total, and nothing to keys beyond every position, be they
        NaN.

    Raises:
        ValueError: a shape, dtype or position does not fit; the message shows it.
    """
    check(q, k, positions)
    if out is None:
        out = torch.zeros(k.shape[0], dtype=torch.float32, device=k.device)
    elif out.shape != k.shape[:1] or out.dtype != torch.float32:
        raise ValueError(f"out must be float32 [{k.shape[0]}], not {out.dtype} {tuple(out.shape)}")
    if not q.shape[0]:
        return out
    keys = k[: int(positions.max()) + 1].to(torch.promote_types(q.dtype, torch.float32)).permute(1, 2, 0)
    for _, seen, scores in masked_scores(q, keys, positions, scale=scale):
        out[:seen] += scores.softmax(dim=-1).sum(dim=(0, 1))
    return out
