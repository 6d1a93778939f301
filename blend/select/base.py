"""The protocol of a selector: which context rows are worth recomputing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from blend.method import Blend


@dataclass(frozen=True)
class Selection:
    """Context rows to recompute: ``rows`` [R] int64, ascending.

    A selector that already ran rows through the first layers hands over ``hidden`` [M, d_model] of ``hidden_rows`` [M]
    (which hold ``rows``, the missing rows and the question) as they enter layer ``layer``.
    """

    rows: Tensor
    layer: int = 0
    hidden: Tensor | None = None
    hidden_rows: Tensor | None = None


class Selector(Protocol):
    """Chooses at most ``state.budget`` rows at or above ``state.computed``."""

    name: str

    def select(self, state: Blend) -> Selection: ...


def no_rows() -> Tensor:
    """[0] int64."""
    return torch.empty(0, dtype=torch.int64)


def eligible(state: Blend) -> Tensor:
    """[N] bool: loaded chunk rows. Missing rows are computed anyway; the prefix is exact where it stands."""
    mask = state.loaded.present.clone()
    mask[: state.computed] = False
    for segment in state.prompt.segments:
        if segment.kind == "prefix":
            mask[segment.start : segment.stop] = False
    return mask


def head_rows(state: Blend, rows_per_chunk: int, limit: int) -> Tensor:
    """First ``rows_per_chunk`` eligible rows of every chunk, row by row over the chunks until ``limit``."""
    ok = eligible(state)
    picked: list[int] = []
    for i in range(rows_per_chunk):
        for s in state.prompt.segments:
            if s.kind == "chunk" and i < s.tokens and ok[s.start + i] and len(picked) < limit:
                picked.append(s.start + i)
    return torch.tensor(sorted(picked), dtype=torch.int64)
