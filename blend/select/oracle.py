"""``oracle``: what a selector would choose if it knew full prefill. For evaluation: it costs a full prefill.

The whole prompt runs in the request's own cache, the rows are scored by the truth, and the cached KV is put back; the
chosen rows are then recomputed like any selector's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from blend.model import Observed
from blend.select.base import Plain, Selection, eligible
from blend.select.spec import Convert, one_of
from kernels.attention_mass import attention_mass
from kernels.deviation import deviation
from kernels.select_rows import select_rows

if TYPE_CHECKING:
    from blend.method import Blend


@dataclass(frozen=True)
class Oracle(Plain):
    """``by`` the true KV deviation or the question's true attention, both summed over all layers."""

    OPTIONS: ClassVar[Mapping[str, Convert]] = {"by": one_of("deviation", "attention")}

    by: Literal["deviation", "attention"] = "deviation"

    def choose(self, state: Blend, chosen: Selection, budget: int) -> Selection:
        ok = eligible(state, chosen.rows)
        if not budget or not bool(ok.any()):
            return chosen
        loaded, n = state.loaded, state.prompt.context_tokens
        context, question = torch.arange(state.computed, n), state.question_rows
        part, count = slice(state.computed, n), n - state.computed
        scores = torch.zeros(n + question.numel())

        def compare(layer: int, seen: Observed) -> None:
            k, v = seen.k.cpu(), seen.v.cpu()
            old_k, old_v = loaded.layer(layer)
            if self.by == "deviation":
                scores[part] += deviation(k[:count], v[:count], old_k[part], old_v[part])
            elif question.numel():
                cached = old_k[: state.computed].clone()
                cached[~loaded.present[: state.computed]] = 0  # only the engine's own prefix cache holds them
                keys = torch.cat([cached, k])
                attention_mass(seen.q[count:].cpu(), keys, question, scale=state.model.scale, out=scores)

        state.walk(torch.cat([context, question]), watch=compare)
        loaded.restore(context)
        return chosen.add(select_rows(scores[:n], budget, eligible=ok))
