"""Frequency x cost / bytes, with a frequency that ages by a power law, and a part of the room for what was used last.

GreedyDual-Size with Frequency (Cherkasova, HPL-98-69R1; for KV: PGDSF of RAGCache, arXiv 2404.12457) ranks by
frequency x cost / bytes and ages by a clock that rises with every eviction; here each use ages by itself, as
(seconds since)^-decay: the odds that a thing is needed again fall like that in news, mail and memory (Anderson and
Schooler 1991), and a power has no scale: there is no half-life to be set to the traffic. docs/eviction.md compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from store.evict.types import Item, Usage, Worths

_SOON_S = 1.0  # two uses within a second are no more telling than two a second apart
_UNUSED = 0.5  # what an entry that nobody asked for counts as: less than one that somebody did


@dataclass(frozen=True)
class Gdsf:
    """``decay``: from 0 (old uses count as new ones) to 1 exclusive. ``recent``: see ``Policy``.

    Of ``Usage``, ``frequency`` counts uses and ``priority`` is the time of the first one.
    """

    name: str = "gdsf"
    decay: float = 0.5
    recent: float = 0.6

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay must be 0 or more and less than 1, not {self.decay}")
        if not 0.0 <= self.recent <= 1.0:
            raise ValueError(f"recent must be within 0..1, not {self.recent}")

    def entered(self, bytes: int, cost: float, *, now: float, clock: float, before: Usage | None) -> Usage:
        if before is None or before.frequency < 1.0:
            return Usage(_UNUSED, now, now)
        # The request that was missed is in `before` already: it is not counted a second time. What comes back unasked
        # begins a new time to live.
        return Usage(before.frequency, max(now, before.last), before.priority)

    def used(self, usage: Usage, bytes: int, cost: float, *, now: float, clock: float, times: int = 1) -> Usage:
        if usage.frequency < 1.0:
            return Usage(float(times), now, now)
        return Usage(usage.frequency + times, max(now, usage.last), usage.priority)

    def worth(self, items: Sequence[Item], *, now: float, ahead: float = 0.0) -> Worths:
        """Cost by byte times need: the sum over all uses of (age)^-decay, taken from their number and the first and
        the last one, as if those between them were spread evenly (Petrov, ICCM 2006: base-level learning)."""
        fields = [
            (item.usage.frequency, item.usage.last, item.usage.priority, item.cost / max(1, item.bytes))
            for item in items
        ]
        uses, last, first, density = np.array(fields, dtype=np.float64).reshape(-1, 4).T
        last = np.minimum(last, now)  # a clock that was set back must not make an age negative
        # At least a second between the first and the last of several: of those further back it changes nothing.
        between = np.maximum(last - first, _SOON_S)
        age = now - last + _SOON_S
        one = self._mean(age, np.full_like(age, ahead))
        if ahead > 0.0:
            many = (self._mean(age, between) + self._mean(age + ahead, between)) / 2
        else:
            many = self._mean(age, between)
        need: Worths = np.where(uses <= 1.0, uses * one, one + (uses - 1.0) * many)
        return need * density

    def _mean(self, age: Worths, width: Worths) -> Worths:
        """Mean of t^-decay over [age, age + width]."""
        power = 1.0 - self.decay
        thin = width < 1e-6 * age
        safe = np.where(thin, 1.0, width)
        mean: Worths = np.where(thin, age**-self.decay, ((age + safe) ** power - age**power) / (power * safe))
        return mean
