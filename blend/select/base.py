"""What a selector is, and what the parts of one share: which context rows are worth recomputing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from blend.select.spec import Convert

if TYPE_CHECKING:
    from blend.method import Blend


def no_rows() -> Tensor:
    """[0] int64."""
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Selection:
    """Context rows to recompute: ``rows`` [R] int64, ascending.

    A selector that already ran rows through the first layers hands over ``hidden`` [M, d_model] of ``hidden_rows`` [M]
    (which hold ``rows``, the missing rows and the question) as they enter layer ``layer``. With ``layer`` equal to the
    model's number of layers, nothing is left to do.
    """

    rows: Tensor
    layer: int = 0
    hidden: Tensor | None = None
    hidden_rows: Tensor | None = None

    def add(self, rows: Tensor) -> Selection:
        """These rows as well; what was handed over stays."""
        return replace(self, rows=torch.cat([self.rows, rows]).unique())


class Selector(Protocol):
    """Chooses rows at or above ``state.computed``, ``state.budget`` of them at most."""

    @property
    def name(self) -> str:
        """Its spec."""
        ...

    def select(self, state: Blend) -> Selection: ...


class Part(Protocol):
    """One part of a spec. Its constructor takes the options in ``OPTIONS`` and raises ``ValueError`` if they clash."""

    OPTIONS: ClassVar[Mapping[str, Convert]]

    @property
    def deepest(self) -> int:
        """The highest layer its options name, -1 if none."""
        ...

    @property
    def ends(self) -> bool:
        """Whether no other part may follow."""
        ...

    def choose(self, state: Blend, chosen: Selection, budget: int) -> Selection:
        """``chosen`` and at most ``budget`` rows more."""
        ...


class Plain:
    """A part that names no layers and may stand anywhere."""

    deepest = -1
    ends = False


def eligible(state: Blend, chosen: Tensor | None = None, *, keep: bool = False) -> Tensor:
    """[N] bool: loaded chunk rows that are not ``chosen`` [R] yet.

    Missing rows are computed anyway; the prefix is exact where it stands. ``keep``: nor rows of ``lacking`` chunks.
    """
    mask = state.loaded.present.clone()
    mask[: state.computed] = False
    for segment in state.prompt.segments:
        if segment.kind == "prefix" or (keep and segment.lacking):
            mask[segment.start : segment.stop] = False
    if chosen is not None:
        mask[chosen] = False
    return mask
