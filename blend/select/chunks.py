"""Scores and chunks: places within a chunk, windows, and how much of a budget each chunk gets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from blend.types import Prompt

_EVEN = 0.25  # of the budget goes to the chunks by size, whatever they score


def chunk_rows(prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Of each context row [N] int64: the segment it lies in, and its place there from 0."""
    segments = [s for s in prompt.segments if s.kind != "question"]
    sizes = torch.tensor([s.tokens for s in segments], dtype=torch.int64)
    starts = torch.tensor([s.start for s in segments], dtype=torch.int64)
    segment = torch.repeat_interleave(torch.arange(len(segments)), sizes)
    return segment, torch.arange(prompt.context_tokens) - starts[segment]


def pooled(scores: Tensor, prompt: Prompt, width: int) -> Tensor:
    """[N]: the highest of ``scores`` [N] among the ``width`` rows before and after each row, within its segment."""
    sizes = [s.tokens for s in prompt.segments if s.kind != "question"]
    if not width:
        return scores
    parts = [max_pool1d(p[None], 2 * width + 1, 1, width)[0] if len(p) else p for p in scores.split(sizes)]
    return torch.cat(parts)


def ranks(scores: Tensor, group: Tensor) -> Tensor:
    """[N] int64: each row's rank, from 0 for the highest, among the rows of its ``group`` [N] int64.

    Equal scores: the lower row is first. NaN ranks with +inf.
    """
    best = scores.masked_fill(scores.isnan(), float("inf")).sort(descending=True, stable=True).indices
    order = best[group[best].sort(stable=True).indices]  # by group, the best first
    sizes = torch.bincount(group)
    first = (sizes.cumsum(0) - sizes)[group[order]]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - first
    return rank


def allot_chunks(budget: int, mass: Tensor, room: Tensor) -> Tensor:
    """[C] int64: rows for each chunk, ``budget`` in all, none above its ``room`` [C] int64.

    A quarter goes by room, so that no chunk is left out because another is loud; the rest by ``mass`` [C]. What a full
    chunk cannot use goes to the others in the same proportion. (Cache-Craft, arXiv 2502.15734, has such budgets by
    the attention between chunks that it stored.)
    """
    room = room.double()
    left = min(float(budget), float(room.sum()))
    mass = mass.double().nan_to_num(posinf=0.0)
    weight = _EVEN * room / room.sum().clamp(min=1.0)
    weight += (1 - _EVEN) * (mass / mass.sum() if mass.sum() > 0 else room / room.sum().clamp(min=1.0))
    quota = torch.zeros_like(room)
    while left > 1e-9:  # each turn fills a chunk or spends the rest
        open_ = quota < room
        more = torch.where(open_, weight, 0.0)
        quota = torch.minimum(room, quota + left * more / more.sum())
        left = min(float(budget), float(room.sum())) - float(quota.sum())
    rows = (quota + 1e-9).floor()
    rest = round(min(float(budget), float(room.sum())) - float(rows.sum()))
    fraction = torch.where(rows < room, quota - rows, -1.0)
    rows[fraction.sort(descending=True, stable=True).indices[:rest]] += 1
    return rows.long()
