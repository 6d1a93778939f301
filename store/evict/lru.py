"""Least recently used: what was not used for longest goes first. The baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from store.evict.types import Item, Usage, Worths


@dataclass(frozen=True)
class Lru:
    """Worth is the time of the last use, so a newcomer is always worth more than what goes for it."""

    name: str = "lru"
    recent: float = 0.0

    def entered(self, bytes: int, cost: float, *, now: float, clock: float, before: Usage | None) -> Usage:
        return Usage(before.frequency if before else 0.0, now, now)

    def used(self, usage: Usage, bytes: int, cost: float, *, now: float, clock: float, times: int = 1) -> Usage:
        now = max(now, usage.last)
        return Usage(usage.frequency + times, now, now)

    def worth(self, items: Sequence[Item], *, now: float, ahead: float = 0.0) -> Worths:
        return np.array([item.usage.last for item in items], dtype=np.float64)
