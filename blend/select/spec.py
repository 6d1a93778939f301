"""Selector specs: ``part+part...``, a part being ``name(key=value,...):share``, as in ``heads(rows=1)+question:0.8``.

Options and share may be left out. A spec may come from a client, so its length and its number of parts are bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from blend.errors import UnknownSelectorError

MAX_LENGTH = 200
MAX_PARTS = 4  # each may cost a walk

Convert = Callable[[str], object]
"""Text of an option to its value; raises ``ValueError`` telling what is allowed."""

_PART = re.compile(r"\s*([a-z]+)\s*(?:\(([^()]*)\))?\s*(?::\s*([0-9.]+)\s*)?")
_SHARE = re.compile(r"[01]|[01]?\.[0-9]{1,6}")
_SHAPE = "a part is name, name(key=value,...), name:share or name(key=value,...):share"


@dataclass(frozen=True)
class PartSpec:
    """One part as it was written. ``share`` of the budget, in (0, 1]; None: what the others leave."""

    name: str
    options: tuple[tuple[str, str], ...] = ()
    share: Fraction | None = None

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options)
        share = "" if self.share is None else f":{float(self.share):.6f}".rstrip("0").rstrip(".")
        return self.name + (f"({options})" if options else "") + share


def parse(text: str, names: tuple[str, ...], alone: frozenset[str]) -> tuple[PartSpec, ...]:
    """The parts of ``text``, whose names are among ``names``; a name in ``alone`` takes no options, share or company.

    Raises ``UnknownSelectorError`` naming the part, what is wrong with it, and the choices.
    """
    if len(text) > MAX_LENGTH:
        raise UnknownSelectorError(
            f"selector {text[:40]!r}... has {len(text)} characters; a spec has {MAX_LENGTH} at most"
        )
    parts = tuple(_part(piece, names) for piece in text.split("+"))
    if len(parts) > MAX_PARTS:
        raise UnknownSelectorError(f"selector {text!r} has {len(parts)} parts; a spec has {MAX_PARTS} at most")
    for part in parts:
        if part.name in alone and (len(parts) > 1 or part.options or part.share):
            raise UnknownSelectorError(f"selector {part.name!r} stands alone, without options, share or other parts")
    total = sum((p.share for p in parts if p.share), Fraction(0))
    if total > 1:
        raise UnknownSelectorError(f"the shares of selector {text!r} add up to {float(total):g}; they may reach 1")
    return parts


def _part(piece: str, names: tuple[str, ...]) -> PartSpec:
    found = _PART.fullmatch(piece)
    name = found[1] if found else piece.strip()
    if not found and (start := re.match(r"[a-z]+", name)) and start[0] in names:
        raise UnknownSelectorError(f"selector part {name!r} cannot be read; {_SHAPE}")
    if not found or name not in names:
        raise UnknownSelectorError(f"selector {name!r} is unknown; choose one of {', '.join(names)}")
    options: dict[str, str] = {}
    for item in found[2].split(",") if found[2] is not None and found[2].strip() else ():
        key, equals, value = (x.strip() for x in item.partition("="))
        if not (key and equals and value):
            raise UnknownSelectorError(f"selector part {piece.strip()!r} has the option {item.strip()!r}; {_SHAPE}")
        if key in options:
            raise UnknownSelectorError(f"selector part {piece.strip()!r} has the option {key!r} twice")
        options[key] = value
    share = None
    if found[3] is not None:
        if not _SHARE.fullmatch(found[3]) or not 0 < Fraction(found[3]) <= 1:
            raise UnknownSelectorError(
                f"selector part {piece.strip()!r} has the share {found[3]}; give one above 0, at most 1, with at most "
                "6 decimals"
            )
        share = Fraction(found[3])
    return PartSpec(name, tuple(options.items()), share)


def read_options(part: PartSpec, known: Mapping[str, Convert]) -> dict[str, object]:
    """The values of ``part``'s options. Raises ``UnknownSelectorError`` for an unknown key or a bad value."""
    values = {}
    for key, text in part.options:
        if key not in known:
            takes = ", ".join(known) or "no options"
            raise UnknownSelectorError(f"selector {part.name!r} has no option {key!r}; it takes {takes}")
        try:
            values[key] = known[key](text)
        except ValueError as e:
            raise UnknownSelectorError(f"selector {part.name!r} cannot have {key}={text}; {e}") from e
    return values


def whole(low: int, high: int) -> Convert:
    """An integer in ``low .. high``."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"give a whole number from {low} to {high}")
        return int(text)

    return convert


def share(text: str) -> float:
    """A number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise ValueError("give a number above 0, at most 1")
    return value


def one_of(*choices: str) -> Convert:
    """One of ``choices``."""

    def convert(text: str) -> str:
        if text not in choices:
            raise ValueError(f"choose {' or '.join(choices)}")
        return text

    return convert


def flag(text: str) -> bool:
    """``true`` or ``false``."""
    return one_of("true", "false")(text) == "true"
