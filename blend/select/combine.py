"""Parts in order, each on its share of the budget, on rows that no earlier part chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from blend.select.base import Part, Selection, no_rows

if TYPE_CHECKING:
    from blend.method import Blend


@dataclass(frozen=True)
class Combined:
    """A selector made of ``parts``, with one entry of ``shares`` each (see ``allot``)."""

    name: str
    parts: tuple[Part, ...]
    shares: tuple[Fraction | None, ...]

    def select(self, state: Blend) -> Selection:
        chosen = Selection(no_rows())
        for i, part in enumerate(self.parts):
            chosen = part.choose(state, chosen, allot(self.shares, i, state.budget, chosen.rows.numel()))
        return chosen


def allot(shares: Sequence[Fraction | None], part: int, budget: int, spent: int) -> int:
    """Rows that ``part`` may choose after earlier parts chose ``spent`` of the ``budget`` rows.

    A part with a share gets it, used up or not; the shares are cut where they add up, so that shares of 1 in all are
    the whole budget. A part without one gets an equal part of what is left and not reserved for the shares to come.
    """
    given = [s or Fraction(0) for s in shares]
    ends = [int(sum(given[: i + 1], Fraction(0)) * budget) for i in range(len(given))]
    begin = ends[part - 1] if part else 0
    if shares[part] is not None:
        return min(ends[part] - begin, budget - spent)
    reserved = ends[-1] - ends[part]
    return max(0, budget - spent - reserved) // sum(s is None for s in shares[part:])
