"""The probe: the question runs over the fused cache, and each context row scores the attention it gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blend.model import Observed
from kernels.attention_mass import attention_mass

if TYPE_CHECKING:
    from blend.method import Blend


def probe(state: Blend, repair: Tensor, *, layers: frozenset[int] | None = None, among: Tensor | None = None) -> Tensor:
    """[N] float32: attention mass of the question on each context row, summed over heads, its rows and ``layers``.

    The ``repair`` rows [M] int64 (missing ones must be among them) run in the same walk: a layer writes all its rows'
    fresh KV before any row attends, so the question sees them repaired. The question attends to itself as well; those
    columns are dropped, and the KV the probe leaves at the question's rows is overwritten when the question runs again.
    The walk ends with the deepest of ``layers`` (None: all). The softmax runs over the rows of ``among`` [N] bool, the
    ``repair`` rows and the question (None: over every row); other rows score 0.
    """
    n, m, layout = state.prompt.context_tokens, repair.numel(), state.model.layout
    question = state.question_rows
    keys = torch.zeros(int(question[-1]) + 1, layout.heads, layout.head_dim, dtype=layout.torch_dtype)
    mass = torch.zeros(keys.shape[0])
    seen_rows: Tensor | None = None
    if among is not None:
        mask = torch.zeros(keys.shape[0], dtype=torch.bool)
        mask[:n] = among
        mask[repair] = mask[question] = True
        seen_rows = mask.nonzero().flatten()

    # Rows that only the engine's own prefix cache holds.
    unknown = (~state.loaded.present[: state.computed]).nonzero().flatten()

    def add(layer: int, seen: Observed) -> None:
        if layers is not None and layer not in layers:
            return
        fresh = seen.k.cpu()
        keys[:n] = state.loaded.layer(layer)[0]
        keys[unknown] = 0
        keys[repair], keys[question] = fresh[:m], fresh[m:]
        if seen_rows is None:
            attention_mass(seen.q[m:].cpu(), keys, question, scale=state.model.scale, out=mass)
            return
        places = torch.searchsorted(seen_rows, question)
        mass[seen_rows] += attention_mass(seen.q[m:].cpu(), keys[seen_rows], places, scale=state.model.scale)

    last = None if layers is None else max(layers) + 1
    state.walk(torch.cat([repair, question]), last=last, watch=add)
    return mass[:n]
