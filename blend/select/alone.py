"""FusionRAG's cheap probe: the question alone, its last layer's queries against the stored keys of that layer.

The question runs behind the canonical prefix (FusionRAG's S), without the chunks. A row always sees all rows before it,
so the question runs in the place of the first chunk rows, whose cached KV is put back; RoPE is relative, so the
queries are then turned to their true positions. Rows that the engine's own prefix cache holds are shared with other
requests: they are not touched, and the question stands behind all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blend.model import Observed
from kernels.attention_mass import attention_mass
from kernels.rotate import rotate

if TYPE_CHECKING:
    from blend.method import Blend


def alone(state: Blend, *, among: Tensor | None = None) -> Tensor:
    """[N] float32: the last layer's attention mass of the question alone on each loaded context row.

    The softmax runs over the prefix and the loaded rows (those of ``among`` [N] bool, if given); other rows score 0. It
    costs a pass of the question's rows without context, and of the prefix if that is missing.
    """
    n, model, loaded = state.prompt.context_tokens, state.model, state.loaded
    question = state.question_rows
    base = max(state.computed, *(s.stop for s in state.prompt.segments if s.kind == "prefix"), 0)
    lost = loaded.missing_rows[loaded.missing_rows < base]
    places = torch.arange(base, base + question.numel())
    rows = torch.cat([lost, places])
    fresh = q = torch.empty(0)

    def keep(layer: int, seen: Observed) -> None:
        nonlocal fresh, q
        if layer == model.layout.layers - 1:
            fresh, q = seen.k[: lost.numel()].cpu(), seen.q[lost.numel() :].cpu()

    state.walk(rows, hidden=model.embed(torch.cat([state.ids[lost], state.ids[question]])), watch=keep, counted=lost)
    loaded.restore(places[places < n])
    keys = loaded.layer(model.layout.layers - 1)[0].clone()
    keys[lost] = fresh
    there = loaded.present.clone() if among is None else loaded.present & among
    there[lost] = True
    seen_rows = there.nonzero().flatten()
    rope = model.rope
    q = rotate(q, int(question[0]) - base, rope.inv_freq.float(), interleaved=rope.interleaved)
    mass = torch.zeros(n)
    if seen_rows.numel():
        last = torch.full_like(question, seen_rows.numel() - 1)
        mass[seen_rows] = attention_mass(q, keys[seen_rows], last, scale=model.scale)
    return mass
