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
        scores = probe(state, torch.cat([state.loaded.missing_rows, heads]).unique())
        return Selection(select_rows(scores, state.budget, forced=heads, eligible=eligible(state)))


def probe(state: Blend, repair: Tensor) -> Tensor:
    """[N] float32: attention mass of the question on each context row, summed over all layers.

    The ``repair`` rows [M] int64 (missing ones must be among them) run in the same walk: a layer writes all its rows'
    fresh KV before any row attends, so the question sees them repaired. The question attends to itself as well; those
    columns are dropped, and the KV the probe leaves at the question's rows is overwritten when the question runs again.
    """
    n, m = state.prompt.context_tokens, repair.numel()
    question = state.question_rows
    keys = torch.zeros(int(question[-1]) + 1, *state.loaded.k.shape[2:], dtype=state.loaded.k.dtype)
    mass = torch.zeros(keys.shape[0])

    def add(layer: int, seen: Observed) -> None:
        keys[:n] = state.loaded.k[layer]
        fresh = seen.k.cpu()
        keys[repair], keys[question] = fresh[:m], fresh[m:]
        attention_mass(seen.q[m:].cpu(), keys, question, scale=state.model.scale, out=mass)

    state.walk(torch.cat([repair, question]), watch=add)
    return mass[:n]
