"""Choose the rows to recompute, in plain torch."""

from __future__ import annotations

import torch


def select_rows(
    scores: torch.Tensor,
    budget: int,
    *,
    forced: torch.Tensor | None = None,
    eligible: torch.Tensor | None = None,
) -> torch.Tensor:
    """The forced rows, then the best-scored eligible ones until there are ``budget`` rows.

    Args:
        scores: [N] floating point or integer, higher is better. A NaN ranks with +inf: what cannot be scored
            is not trusted. Equal scores: the lower row wins.
        budget: rows to return in all, >= 0. Forced rows count toward it; they are returned even if they
            exceed it.
        forced: rows always returned, as bool [N] or as integer rows [F] in any order, duplicates allowed.
        eligible: rows that scores may choose, as bool [N] or as integer rows [E]; None means all. A forced
            row need not be eligible.

    Returns:
        int64 rows, ascending, no duplicates.

    Raises:
        ValueError: a shape, dtype, row or the budget does not fit; the message shows it.
    """
    if scores.dim() != 1 or scores.is_complex() or scores.dtype == torch.bool:
        raise ValueError(f"scores must be real numbers [N], not {scores.dtype} {tuple(scores.shape)}")
    if budget < 0:
        raise ValueError(f"budget must be >= 0, not {budget}")
    chosen = _mask("forced", forced, scores, default=False)
    open_rows = (_mask("eligible", eligible, scores, default=True) & ~chosen).nonzero().squeeze(1)
    left = max(0, budget - int(chosen.sum()))
    ranked = scores[open_rows]
    if scores.is_floating_point():
        # The sort is asked for NaN == +inf explicitly: backends differ in where they put NaN.
        ranked = ranked.masked_fill(ranked.isnan(), float("inf"))
    # stable and ascending rows: among equals the lower row comes first, on every device.
    order = ranked.sort(descending=True, stable=True).indices[:left]
    chosen[open_rows[order]] = True
    return chosen.nonzero().squeeze(1)


def rows_covering(
    scores: torch.Tensor,
    part: float,
    *,
    forced: torch.Tensor | None = None,
    eligible: torch.Tensor | None = None,
) -> int:
    """How many of the best eligible rows, beside the forced ones, it takes to hold ``part`` of the mass.

    Args:
        scores: [N] as for ``select_rows``. The mass is the sum over forced and eligible rows; a score below 0
            holds none. With a score that is not finite nothing is known, and every row is needed.
        part: the share to hold, 0 .. 1.
        forced, eligible: as for ``select_rows``. What forced rows hold counts first.

    Returns:
        a number of rows, 0 .. eligible rows that are not forced.

    Raises:
        ValueError: a shape, dtype, row or ``part`` does not fit; the message shows it.
    """
    if scores.dim() != 1 or scores.is_complex() or scores.dtype == torch.bool:
        raise ValueError(f"scores must be real numbers [N], not {scores.dtype} {tuple(scores.shape)}")
    if not 0 <= part <= 1:
        raise ValueError(f"part must be within 0 .. 1, not {part}")
    held = _mask("forced", forced, scores, default=False)
    free = _mask("eligible", eligible, scores, default=True) & ~held
    mass = scores.double().clamp(min=0)
    best = mass[free].sort(descending=True).values
    start = mass[held].sum()
    total = start + best.sum()
    if not bool(total.isfinite()):
        return len(best)
    return int((start + best.cumsum(0) - best < part * total).sum())


def runs(rows: torch.Tensor) -> list[tuple[int, int]]:
    """Contiguous segments of ``rows``: half-open ``(start, stop)``, ascending, never adjacent.

    Args:
        rows: [R] integer, strictly ascending, as ``select_rows`` returns them.

    Raises:
        ValueError: not [R] integers in strictly ascending order.
    """
    if rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(f"rows must be integer [R], not {rows.dtype} {tuple(rows.shape)}")
    if not len(rows):
        return []
    step = rows.diff()
    if bool((step <= 0).any()):
        raise ValueError(f"rows must be strictly ascending; {int((step <= 0).sum())} of {len(rows)} are not")
    breaks = (step > 1).nonzero().squeeze(1)
    starts = torch.cat((rows[:1], rows[breaks + 1]))
    stops = torch.cat((rows[breaks], rows[-1:])) + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _mask(name: str, given: torch.Tensor | None, scores: torch.Tensor, *, default: bool) -> torch.Tensor:
    """``given`` as a new bool [N]."""
    total = len(scores)
    if given is None:
        return torch.full((total,), default, dtype=torch.bool, device=scores.device)
    if given.dtype == torch.bool and given.shape == scores.shape:
        return given.clone()
    if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(f"{name} must be bool [{total}] or integer rows, not {given.dtype} {tuple(given.shape)}")
    mask = torch.zeros(total, dtype=torch.bool, device=scores.device)
    if len(given):
        low, high = (int(x) for x in given.aminmax())
        if low < 0 or high >= total:
            raise ValueError(f"{name} has rows {low}..{high}, outside 0..{total - 1}")
        mask[given.long()] = True
    return mask
