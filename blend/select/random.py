"""``random``: rows drawn evenly; the control every selector must beat."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch

from blend.select.base import Selection, eligible
from kernels.select_rows import select_rows

if TYPE_CHECKING:
    from blend.method import Blend


class RandomRows:
    """Rows by a generator seeded with the prompt itself, so that a repeated request selects the same ones."""

    name = "random"

    def select(self, state: Blend) -> Selection:
        seed = zlib.crc32(state.ids.numpy().tobytes())
        scores = torch.rand(state.prompt.context_tokens, generator=torch.Generator().manual_seed(seed))
        return Selection(select_rows(scores, state.budget, eligible=eligible(state)))
