"""``all``: recompute every row; equals full prefill (invariant 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blend.select.base import Selection

if TYPE_CHECKING:
    from blend.method import Blend


class AllRows:
    """Selects every context row, whatever the budget."""

    name = "all"

    def select(self, state: Blend) -> Selection:
        return Selection(torch.arange(state.computed, max(state.computed, state.prompt.context_tokens)))
