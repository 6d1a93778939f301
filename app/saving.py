"""How fast this server prefills, learned while it serves: what reuse is worth in seconds."""

from __future__ import annotations

from collections import deque
from statistics import median

_LAST = 64
_LEAST_TOKENS = 32  # below, a pass is overhead, not prefill


class PrefillRate:
    """Seconds per token, the median of the last observations.

    Full prefills count before compile passes, which run another path (their KV is captured and stored). Prefill is
    slower per token in longer contexts, so this is that of contexts as long as those observed.
    """

    def __init__(self) -> None:
        self._full: deque[float] = deque(maxlen=_LAST)
        self._compiled: deque[float] = deque(maxlen=_LAST)

    def saw_full(self, tokens: int, seconds: float) -> None:
        """A full prefill of ``tokens`` that had the engine for itself."""
        if tokens >= _LEAST_TOKENS:
            self._full.append(seconds / tokens)

    def saw_compile(self, tokens: int, seconds: float) -> None:
        """A compile pass."""
        if tokens >= _LEAST_TOKENS:
            self._compiled.append(seconds / tokens)

    @property
    def seconds_per_token(self) -> float | None:
        """``None`` before the first observation."""
        seen = self._full or self._compiled
        return median(seen) if seen else None
