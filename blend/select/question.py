"""``question``: rows the question attends to (FusionRAG 2601.12904, ProphetKV 2602.02579, InfoFlow-KV 2603.05353).

The question's rows run over the fused cache at their true positions; each context row scores the softmax mass it gets,
summed over heads, question rows and layers. ``auto`` first repairs the first row of every chunk (their false sinks
would swallow the attention) and spends what is left of the budget by question: chosen by measurement, see ``LOG.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blend.model import Observed
from blend.select.base import Selection, eligible, head_rows
from kernels.attention_mass import attention_mass
from kernels.select_rows import select_rows

if TYPE_CHECKING:
    from blend.method import Blend


class Question:
    """Repairs ``heads_per_chunk`` first rows (at most half the budget), probes, and takes the top rows by mass."""

    def __init__(self, name: str = "question", heads_per_chunk: int = 0) -> None:
        self.name = name
        self.heads_per_chunk = heads_per_chunk

    def select(self, state: Blend) -> Selection:
        heads = head_rows(state, self.heads_per_chunk, state.budget // 2)
        if state.question_rows.numel() == 0:
            return Selection(heads)
        _repair(state, torch.cat([state.loaded.missing_rows, heads]).unique())
        scores = probe(state)
        return Selection(select_rows(scores, state.budget, forced=heads, eligible=eligible(state)))


def probe(state: Blend) -> Tensor:
    """[N] float32: attention mass of the question on each context row, summed over all layers.

    The question attends to itself as well; those columns are dropped. The probe's own KV at the question's rows is
    overwritten when the question runs again on the repaired cache.
    """
    n = state.prompt.context_tokens
    rows = state.question_rows
    keys = torch.empty(int(rows[-1]) + 1, *state.loaded.k.shape[2:], dtype=state.loaded.k.dtype)
    keys[n:] = 0
    mass = torch.zeros(keys.shape[0])

    def add(layer: int, seen: Observed) -> None:
        keys[:n] = state.loaded.k[layer]
        keys[rows] = seen.k.cpu()
        attention_mass(seen.q.cpu(), keys, rows, scale=state.model.scale, out=mass)

    state.walk(rows, watch=add)
    return mass[:n]


def _repair(state: Blend, rows: Tensor) -> None:
    """Compute ``rows`` on the fused cache as it is, and remember their fresh K for the probe."""
    if rows.numel() == 0:
        return

    def keep(layer: int, seen: Observed) -> None:
        state.loaded.k[layer, rows] = seen.k.cpu()

    state.walk(rows, watch=keep)
