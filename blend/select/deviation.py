"""``deviation``: rows whose cached KV differs most from fresh KV at a check layer (CacheBlend, arXiv 2405.16444, 4.3).

All rows run through the layers up to the check layer; their fresh KV there is exact and kept. K and V both count, as in
the paper (the released code uses V only). The chosen rows go on from where they stand, so nothing is computed twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blend.model import Observed
from blend.select.base import Selection, eligible
from kernels.deviation import deviation
from kernels.select_rows import select_rows

if TYPE_CHECKING:
    from blend.method import Blend


class Deviation:
    """``check_layer`` counts from 0; the paper's choice is 1 (its second layer)."""

    name = "deviation"

    def __init__(self, check_layer: int = 1) -> None:
        self.check_layer = check_layer

    def select(self, state: Blend) -> Selection:
        n = state.prompt.context_tokens
        check = min(self.check_layer, state.model.layout.layers - 1)
        context = torch.arange(state.computed, n)
        rows = torch.cat([context, state.question_rows])
        scores = torch.zeros(n)

        def compare(layer: int, seen: Observed) -> None:
            if layer == check:
                m = context.numel()
                old = slice(state.computed, n)
                scores[old] = deviation(
                    seen.k[:m].cpu(), seen.v[:m].cpu(), state.loaded.k[layer, old], state.loaded.v[layer, old]
                )

        hidden = state.walk(rows, last=check + 1, watch=compare)
        chosen = select_rows(scores, state.budget, eligible=eligible(state))
        return Selection(chosen, layer=check + 1, hidden=hidden, hidden_rows=rows)
