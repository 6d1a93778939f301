"""Selectors by name: ``open_selector("auto")``. Several exist so that they can be compared."""

from __future__ import annotations

from blend.errors import UnknownSelectorError
from blend.select.all import AllRows
from blend.select.base import Selection, Selector
from blend.select.deviation import Deviation
from blend.select.heads import Heads
from blend.select.none import NoRows
from blend.select.question import Question
from blend.select.random import RandomRows

__all__ = ["NAMES", "Selection", "Selector", "open_selector"]

NAMES = ("auto", "none", "all", "deviation", "heads", "question", "random")


def open_selector(name: str) -> Selector:
    """The selector called ``name``. Raises ``UnknownSelectorError`` listing the choices."""
    match name:
        case "auto":
            return Question("auto", heads_per_chunk=1)
        case "none":
            return NoRows()
        case "all":
            return AllRows()
        case "deviation":
            return Deviation()
        case "heads":
            return Heads()
        case "question":
            return Question()
        case "random":
            return RandomRows()
    raise UnknownSelectorError(f"selector {name!r} is unknown; choose one of {', '.join(NAMES)}")
