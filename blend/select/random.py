"""``random``: rows drawn evenly; the control every selector must beat."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from blend.select.base import Plain, Selection, eligible
from blend.select.spec import Convert, whole
from kernels.select_rows import select_rows

if TYPE_CHECKING:
    from blend.method import Blend


@dataclass(frozen=True)
class RandomRows(Plain):
    """Rows by a generator seeded with the prompt and ``seed``, so that a repeated request selects the same ones."""

    OPTIONS: ClassVar[Mapping[str, Convert]] = {"seed": whole(0, 2**31 - 1)}

    seed: int = 0

    def choose(self, state: Blend, chosen: Selection, budget: int) -> Selection:
        seed = zlib.crc32(state.ids.numpy().tobytes(), self.seed)
        scores = torch.rand(state.prompt.context_tokens, generator=torch.Generator().manual_seed(seed))
        return chosen.add(select_rows(scores, budget, eligible=eligible(state, chosen.rows)))
