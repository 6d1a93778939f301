"""Which decoder layers count: ``all``, ``upper``, ``lower``, ``last``, or numbers from 0 and ranges (``3|6-8``)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NUMBERS = re.compile(r"[0-9]{1,4}(-[0-9]{1,4})?(\|[0-9]{1,4}(-[0-9]{1,4})?)*")


@dataclass(frozen=True)
class Layers:
    """A choice of layers, made before the model is known. Raises ``ValueError`` for another text."""

    text: str

    def __post_init__(self) -> None:
        if self.text in ("all", "upper", "lower", "last"):
            return
        if not _NUMBERS.fullmatch(self.text) or any(low > high for low, high in self._ranges()):
            raise ValueError("choose all, upper, lower, last, or layers from 0 such as 3, 2-4 or 1|5-6")

    @property
    def deepest(self) -> int:
        """The highest layer given by number, -1 if none is."""
        return max((high for _, high in self._ranges()), default=-1)

    def of(self, layers: int) -> frozenset[int]:
        """The chosen ones of a model with ``layers`` layers; ``upper`` is the larger half of an odd number."""
        match self.text:
            case "all":
                return frozenset(range(layers))
            case "upper":
                return frozenset(range(layers // 2, layers))
            case "lower":
                return frozenset(range(max(1, layers // 2)))
            case "last":
                return frozenset({layers - 1})
        return frozenset(i for low, high in self._ranges() for i in range(low, min(high + 1, layers)))

    def _ranges(self) -> list[tuple[int, int]]:
        if not self.text[:1].isdigit():
            return []
        pairs = [piece.partition("-") for piece in self.text.split("|")]
        return [(int(low), int(high or low)) for low, _, high in pairs]


def numbered(text: str) -> Layers:
    """Layers given by number only."""
    if not _NUMBERS.fullmatch(text):
        raise ValueError("give layers from 0 such as 1, 2-4 or 1|3")
    return Layers(text)
