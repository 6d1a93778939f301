"""``deviation``: rows whose cached KV differs most from fresh KV at a check layer (CacheBlend, arXiv 2405.16444, 4.3).

All rows run through the layers up to the check layer; their fresh KV there is exact and kept. The chosen rows go on
from where they stand, so nothing is computed twice. ``filter=gradual`` is the paper's: each layer above keeps the rows
that deviate most there. The released code selects once, by V only: ``deviation(on=v)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from blend.model import Observed
from blend.select.base import Selection, eligible
from blend.select.layers import Layers, numbered
from blend.select.spec import Convert, one_of, share
from kernels.deviation import deviation
from kernels.select_rows import rows_covering, select_rows

if TYPE_CHECKING:
    from blend.method import Blend, Watch

_SPREAD = 0.25  # the first filtered layer keeps so much more than the mean, the last so much less


@dataclass(frozen=True)
class Deviation:
    """``check``: layers from 0 whose deviations are summed; the paper's is its second layer, 1.

    ``filter``: choose ``once``, or go on with fewer and fewer rows (``gradual``), as many as the budget in the mean.
    ``on``: what is compared. ``threshold``: no more rows than hold this share of the deviation.
    """

    OPTIONS: ClassVar[Mapping[str, Convert]] = {
        "check": numbered,
        "filter": one_of("once", "gradual"),
        "on": one_of("kv", "k", "v"),
        "threshold": share,
    }

    check: Layers | None = None
    filter: Literal["once", "gradual"] = "once"
    on: Literal["kv", "k", "v"] = "kv"
    threshold: float = 1.0

    @property
    def deepest(self) -> int:
        return self.check.deepest if self.check else -1

    @property
    def ends(self) -> bool:
        """Gradual filtering leaves rows behind half way; a later part could not take them up."""
        return self.filter == "gradual"

    def choose(self, state: Blend, chosen: Selection, budget: int) -> Selection:
        ok = eligible(state, chosen.rows)
        if not budget or not bool(ok.any()):
            return chosen
        layers = state.model.layout.layers
        checks = self.check.of(layers) if self.check else frozenset({min(1, layers - 1)})
        top = max(checks) + 1
        n, context = state.prompt.context_tokens, slice(state.computed, state.prompt.context_tokens)
        rows = torch.cat([torch.arange(state.computed, n), state.question_rows])
        scores = torch.zeros(n)

        def compare(layer: int, seen: Observed) -> None:
            k, v = seen.k[: n - state.computed].cpu(), seen.v[: n - state.computed].cpu()
            if layer in checks:
                old_k, old_v = state.loaded.layer(layer)
                scores[context] += deviation(k, v, old_k[context], old_v[context], use=self.on)
            # The model's cache holds fresh KV of these layers now, and so must our view of it.
            state.loaded.replace(layer, context, k, v)

        hidden = state.walk(rows, last=top, watch=compare)
        if self.threshold < 1:
            budget = min(budget, rows_covering(scores, self.threshold, forced=chosen.rows, eligible=ok))
        if self.filter == "once":
            picked = chosen.add(select_rows(scores, budget, eligible=ok))
            return Selection(picked.rows, top, hidden, rows)
        return self._filtered(state, chosen.rows, scores, ok, budget, Selection(rows, top, hidden, rows))

    def _filtered(self, state: Blend, chosen: Tensor, scores: Tensor, ok: Tensor, budget: int,
                  start: Selection) -> Selection:  # fmt: skip
        """From the check layer up with fewer and fewer rows; a row left behind keeps its fresh KV of the layers below.

        Rows that earlier parts chose, missing rows and the question go all the way.
        """
        layers = state.model.layout.layers
        sizes = gradual_sizes(budget, layers - start.layer)
        stay = torch.cat([state.loaded.missing_rows, chosen, state.question_rows]).unique()
        alive = first = select_rows(scores, sizes[0] if sizes else budget, eligible=ok)
        rows, hidden = start.rows, start.hidden
        assert hidden is not None
        for i, layer in enumerate(range(start.layer, layers)):
            if i:
                alive = select_rows(scores, sizes[i], eligible=alive)
            go = torch.cat([stay, alive]).unique()
            if not go.numel():
                break
            hidden, rows = hidden[torch.searchsorted(rows, go)], go
            compare = self._compare(state, go, alive, scores)
            hidden = state.walk(go, first=layer, last=layer + 1, hidden=hidden, watch=compare)
        return Selection(torch.cat([chosen, first]).unique(), layers, hidden, rows)

    def _compare(self, state: Blend, rows: Tensor, alive: Tensor, scores: Tensor) -> Watch:
        """Scores the ``alive`` ones of the walked ``rows`` by their deviation at the layer just run."""
        places = torch.searchsorted(rows, alive)

        def compare(layer: int, seen: Observed) -> None:
            old_k, old_v = state.loaded.layer(layer)
            fresh = seen.k[places].cpu(), seen.v[places].cpu()
            scores[alive] = deviation(*fresh, old_k[alive], old_v[alive], use=self.on)

        return compare


def gradual_sizes(budget: int, layers: int) -> list[int]:
    """Rows that run through each of ``layers`` layers: falling evenly around ``budget``, never more in the mean.

    The paper gives no schedule, only that the first keeps slightly more than the mean and later ones fewer.
    """
    if layers == 1:
        return [budget]
    return [int(budget * (1 + _SPREAD * (1 - 2 * i / (layers - 1)))) for i in range(layers)]
