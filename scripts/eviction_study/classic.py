"""GreedyDual-Size with Frequency as published: what ours is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from store.evict import Item, Usage
from store.evict.types import Worths


@dataclass(frozen=True)
class ClassicGdsf:
    """priority = clock + frequency x cost / bytes, set at each use (Cherkasova, HPL-98-69R1, section 3)."""

    name: str = "gdsf-clock"
    recent: float = 0.0

    def entered(self, bytes: int, cost: float, *, now: float, clock: float, before: Usage | None) -> Usage:
        # Published: an entry begins at 1, whatever was known of it.
        return Usage(1.0, now, clock + cost / max(1, bytes))

    def used(self, usage: Usage, bytes: int, cost: float, *, now: float, clock: float, times: int = 1) -> Usage:
        uses = usage.frequency + times
        return Usage(uses, now, clock + uses * cost / max(1, bytes))

    def worth(self, items: Sequence[Item], *, now: float, ahead: float = 0.0) -> Worths:
        return np.array([item.usage.priority for item in items], dtype=np.float64)
