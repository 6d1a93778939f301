"""``heads``: the first rows of every chunk, which hold the false attention sinks (EPIC/LegoLink, arXiv 2410.15332)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from blend.select.base import Plain, Selection, eligible
from blend.select.chunks import chunk_rows
from blend.select.spec import Convert, whole
from kernels.select_rows import select_rows

if TYPE_CHECKING:
    from blend.method import Blend


@dataclass(frozen=True)
class Heads(Plain):
    """The first ``rows`` of each chunk (0: as many as the budget holds), all chunks' first rows before their second."""

    OPTIONS: ClassVar[Mapping[str, Convert]] = {"rows": whole(1, 4096)}

    rows: int = 0

    def choose(self, state: Blend, chosen: Selection, budget: int) -> Selection:
        _, place = chunk_rows(state.prompt)
        ok = eligible(state, chosen.rows)
        if self.rows:
            ok &= place < self.rows
        return chosen.add(select_rows(-place, budget, eligible=ok))
