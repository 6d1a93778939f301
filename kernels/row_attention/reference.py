"""Attention of scattered query rows, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Scores held at once: 4 MiB of float32. Smaller and larger blocks measure slower (2^18: 1.3x, 2^22: 1.4x).
MAX_SCORES = 1 << 20


def row_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """Row ``r`` attends the keys ``0 .. positions[r]``; grouped-query heads.

    Args:
        q: [R, Hq, D] floating point, any strides; query head ``h`` reads key head ``h // (Hq / H)``.
        k: [N, H, D], row ``n`` is the key at position ``n``; same dtype and device as ``q``.
        v: [N, H, D] likewise.
        positions: [R] integer, each in ``0 .. N - 1``; any order, duplicates allowed; ascending is fastest.
        scale: factor on the scores, usually ``D ** -0.5``.

    Returns:
        [R, Hq, D] contiguous in ``q.dtype``. Scores, softmax and sums: float32 (float64 for float64 input).
        A row never sees a key beyond its position, be it NaN or infinite; a row that does attend a non-finite
        value is NaN there.

    Raises:
        ValueError: a shape, dtype or position does not fit; the message shows it.
    """
    check(q, k, positions)
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"k and v must match: {k.dtype} {tuple(k.shape)}, {v.dtype} {tuple(v.shape)}")
    rows, q_heads, dim = q.shape
    heads = k.shape[1]
    out = torch.empty((rows, q_heads, dim), dtype=q.dtype, device=q.device)
    if not rows:
        return out
    last = int(positions.max()) + 1
    work = torch.promote_types(q.dtype, torch.float32)
    keys = k[:last].to(work).permute(1, 2, 0)  # [H, D, N]
    values, poison = _clean(v[:last].to(work).transpose(0, 1))  # [H, N, D]

    for block, seen, scores in masked_scores(q, keys, positions, scale=scale):
        weights = scores.softmax(dim=-1)
        mixed = torch.bmm(weights, values[:, :seen])  # [H, G * r, D]
        here = mixed.view(heads, q_heads // heads, -1, dim).permute(2, 0, 1, 3)  # [r, H, G, D]
        if poison is not None:
            reached = positions[block, None, None] >= poison  # [r, H, D]
            here = here.masked_fill(reached.unsqueeze(2), float("nan"))
        out[block] = here.reshape(-1, q_heads, dim).to(q.dtype)
    return out


def check(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> None:
    """Raise ``ValueError`` unless q [R, Hq, D], k [N, H, D] and positions [R] fit together."""
    if q.dim() != 3 or k.dim() != 3 or q.shape[2] != k.shape[2] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q must be [R, Hq, D] and k [N, H, D] with Hq a multiple of H, not {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not q.is_floating_point() or q.dtype != k.dtype:
        raise ValueError(f"q and k must be of one floating point dtype, not {q.dtype} and {k.dtype}")
    if positions.shape != q.shape[:1] or positions.is_floating_point() or positions.dtype == torch.bool:
        raise ValueError(f"positions must be integer [{q.shape[0]}], not {positions.dtype} {tuple(positions.shape)}")
    if len(positions):
        low, high = (int(x) for x in positions.aminmax())
        if low < 0 or high >= k.shape[0]:
            raise ValueError(f"positions {low}..{high} are outside the keys 0..{k.shape[0] - 1}")


def masked_scores(
    q: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, *, scale: float
) -> Iterator[tuple[slice, int, torch.Tensor]]:
    """Blocks of rows: (their slice of ``q``, keys seen n, scores [H, G * r, n]); -inf beyond its position.

    ``keys`` is [H, D, N] in the working dtype. Query heads of one key head are folded into its rows (G * r),
    which shares each key between them without copying it. A block reads keys only up to its last position.
    """
    rows, q_heads, dim = q.shape
    heads, _, total = keys.shape
    step = max(1, MAX_SCORES // (q_heads * max(1, total)))
    place = torch.arange(total, device=q.device)
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        here = positions[block]
        seen = int(here.max()) + 1
        folded = q[block].to(keys.dtype).mul(scale).view(-1, heads, q_heads // heads, dim)
        folded = folded.permute(1, 2, 0, 3).reshape(heads, -1, dim)  # [H, G * r, D]
        scores = torch.bmm(folded, keys[..., :seen])
        future = place[:seen] > here[:, None]  # [r, n]
        scores.view(heads, -1, len(here), seen).masked_fill_(future, float("-inf"))
        yield block, seen, scores


def _clean(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``v`` [H, N, D] with non-finite values zeroed; per [H, D] the position of the first of them, N if none.

    A masked weight is 0, but 0 * NaN is NaN: an unseen value must be zeroed, and put back for the rows that
    do see it. The second item is None in the usual case, found by one cheap sum.
    """
    if bool(v.sum(dim=1).isfinite().all()):
        return v, None
    bad = ~v.isfinite()
    place = torch.arange(v.shape[1], device=v.device)[None, :, None]
    return v.masked_fill(bad, 0.0), torch.where(bad, place, v.shape[1]).amin(dim=1)
