"""``heads``: the first rows of every chunk, which hold the false attention sinks (EPIC/LegoLink, arXiv 2410.15332)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blend.select.base import Selection, head_rows

if TYPE_CHECKING:
    from blend.method import Blend


class Heads:
    """Spends the whole budget on chunk heads, evenly over the chunks."""

    name = "heads"

    def select(self, state: Blend) -> Selection:
        longest = max((s.tokens for s in state.prompt.segments if s.kind == "chunk"), default=0)
        return Selection(head_rows(state, longest, state.budget))
