"""Selectors by spec: ``open_selector("heads(rows=1)+question")``. Several exist so that they can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from blend.errors import UnknownSelectorError
from blend.select.all import AllRows
from blend.select.base import Part, Selection, Selector
from blend.select.combine import Combined
from blend.select.deviation import Deviation
from blend.select.heads import Heads
from blend.select.none import NoRows
from blend.select.oracle import Oracle
from blend.select.question import Question
from blend.select.random import RandomRows
from blend.select.spec import PartSpec, parse, read_options

__all__ = ["AUTO", "NAMES", "Selection", "Selector", "open_selector"]

AUTO = "question(pool=1)"
"""What ``auto`` stands for where no certificate says otherwise: chosen by measurement, see ``LOG.md``."""

NAMES = ("auto", "none", "all", "deviation", "heads", "question", "random", "oracle")

_ALONE = frozenset({"auto", "none", "all"})
_PARTS: Mapping[str, type[Deviation | Heads | Question | RandomRows | Oracle]] = {
    "deviation": Deviation,
    "heads": Heads,
    "question": Question,
    "random": RandomRows,
    "oracle": Oracle,
}


def open_selector(spec: str, *, layers: int | None = None) -> Selector:
    """The selector that ``spec`` describes (grammar: ``spec.py``), for a model with ``layers`` layers if that is known.

    Raises ``UnknownSelectorError`` naming the part at fault and the choices.
    """
    specs = parse(spec, NAMES, _ALONE)
    match specs[0].name:
        case "none":
            return NoRows()
        case "all":
            return AllRows()
        case "auto":
            return _combined("auto", parse(AUTO, NAMES, _ALONE), layers)
    return _combined("+".join(map(str, specs)), specs, layers)


def _combined(name: str, specs: tuple[PartSpec, ...], layers: int | None) -> Combined:
    parts = tuple(_open(spec, layers) for spec in specs)
    for part, spec in zip(parts[:-1], specs, strict=False):
        if part.ends:
            raise UnknownSelectorError(f"selector part '{spec}' must be the last one of {name!r}")
    return Combined(name, parts, tuple(spec.share for spec in specs))


def _open(spec: PartSpec, layers: int | None) -> Part:
    kind: Callable[..., Part] = _PARTS[spec.name]
    values = read_options(spec, _PARTS[spec.name].OPTIONS)
    try:
        part = kind(**values)
    except ValueError as e:
        raise UnknownSelectorError(f"selector part '{spec}': {e}") from e
    if layers is not None and part.deepest >= layers:
        raise UnknownSelectorError(
            f"selector part '{spec}' names layer {part.deepest}; the model has layers 0 to {layers - 1}"
        )
    return part
