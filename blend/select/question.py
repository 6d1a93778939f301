"""``question``: rows the question attends to (FusionRAG 2601.12904, ProphetKV 2602.02579, InfoFlow-KV 2603.05353).

The question's rows run over the fused cache at their true positions, with missing rows and what earlier parts chose
repaired in the same walk; each context row scores the softmax mass it gets. What the options stand for: ``README.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from blend.select.alone import alone
from blend.select.base import Selection, eligible
from blend.select.chunks import allot_chunks, chunk_rows, pooled, ranks
from blend.select.layers import Layers
from blend.select.probe import probe
from blend.select.spec import Convert, flag, one_of, share, whole
from kernels.select_rows import rows_covering, select_rows

if TYPE_CHECKING:
    from blend.method import Blend

_ALL = Layers("all")


@dataclass(frozen=True)
class Question:
    """Top rows by the question's attention.

    ``layers``: whose attention counts. ``pool``: a row scores the best of that many rows on either side. ``rounds``: 2
    spends half the budget, repairs those rows, and asks again. ``anchors``: only this share of each chunk is scored.
    ``budget``: one for all, or one for each chunk by its mass. ``fast``: the question alone, last layer. ``threshold``:
    no more rows than hold this share of the mass. ``keep``: leave chunks alone that know more than the prompt says.
    """

    OPTIONS: ClassVar[Mapping[str, Convert]] = {
        "layers": Layers,
        "pool": whole(0, 256),
        "rounds": whole(1, 2),
        "anchors": share,
        "budget": one_of("global", "chunks"),
        "fast": flag,
        "threshold": share,
        "keep": flag,
    }
    ends = False

    layers: Layers = _ALL
    pool: int = 0
    rounds: int = 1
    anchors: float = 1.0
    budget: Literal["global", "chunks"] = "global"
    fast: bool = False
    threshold: float = 1.0
    keep: bool = False

    def __post_init__(self) -> None:
        if self.fast and (self.layers.text not in ("all", "last") or self.rounds != 1):
            raise ValueError("fast=true asks the last layer once, without the context; leave layers and rounds out")

    @property
    def deepest(self) -> int:
        return self.layers.deepest

    def choose(self, state: Blend, chosen: Selection, budget: int) -> Selection:
        before = chosen.rows.numel()
        for i in range(self.rounds):
            most = before + budget * (i + 1) // self.rounds
            ok = eligible(state, chosen.rows, keep=self.keep)
            if state.question_rows.numel() and most > chosen.rows.numel() and bool(ok.any()):
                scores = self._score(state, chosen.rows)
                chosen = chosen.add(self._best(state, scores, chosen.rows, ok, most - chosen.rows.numel()))
        return chosen

    def _score(self, state: Blend, chosen: Tensor) -> Tensor:
        layers = self.layers.of(state.model.layout.layers)
        among = anchor_rows(state, self.anchors, layers) if self.anchors < 1 else None
        if self.fast:
            mass = alone(state, among=among)
        else:
            mass = probe(state, torch.cat([state.loaded.missing_rows, chosen]).unique(), layers=layers, among=among)
        return pooled(mass, state.prompt, self.pool)

    def _best(self, state: Blend, scores: Tensor, chosen: Tensor, ok: Tensor, budget: int) -> Tensor:
        """The best ``budget`` rows or fewer among ``ok`` [N] bool."""
        if self.anchors < 1:
            ok = ok & ~(scores <= 0)  # NaN stays: what cannot be scored is not trusted
        if self.threshold < 1:
            budget = min(budget, rows_covering(scores, self.threshold, forced=chosen, eligible=ok))
        if self.budget == "chunks":
            segment, _ = chunk_rows(state.prompt)
            count = int(segment[-1]) + 1
            mass = torch.zeros(count).index_add_(0, segment, scores.where(ok, 0.0))
            rows = allot_chunks(budget, mass, torch.bincount(segment[ok], minlength=count))
            ok = ok & (ranks(scores.masked_fill(~ok, -torch.inf), segment) < rows[segment])
        return select_rows(scores, budget, eligible=ok)


def anchor_rows(state: Blend, part: float, layers: frozenset[int]) -> Tensor:
    """[N] bool: the prefix, and of each loaded chunk the first row and the ``part`` of rows with the smallest keys.

    Keys with a small norm draw much attention (arXiv 2406.11430); the norm is summed over heads and ``layers``. QCFuse
    picks its anchors offline, by reconstructing each chunk (KVzip); this needs nothing but the stored keys.
    """
    loaded = state.loaded
    segment, place = chunk_rows(state.prompt)
    norms = torch.zeros(loaded.present.shape)
    for layer in sorted(layers):
        norms += loaded.layer(layer)[0].float().norm(dim=-1).sum(dim=-1)
    wanted = (torch.bincount(segment).double() * part).ceil()
    mask = (ranks(-norms, segment) < wanted[segment]) | (place == 0)
    for s in state.prompt.segments:
        if s.kind == "prefix":
            mask[s.start : s.stop] = True
    return mask & loaded.present
