"""What eviction is decided by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from store.types import KVKey

Reason = Literal["capacity", "expired", "share"]
Worths = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Usage:
    """How an entry has been used: kept with it, and for a while after it is gone.

    ``frequency``: uses; below 1 nobody has asked for it yet. ``last``: time of the last use (or of its coming), seconds
    since the epoch. ``priority``: what else its policy wants to know; meaningful to that policy only.
    """

    frequency: float
    last: float
    priority: float


@dataclass(frozen=True)
class Item:
    """One entry as eviction sees it. ``cost``: seconds (or any unit) saved when it is used instead of recomputed."""

    key: KVKey
    bytes: int
    cost: float
    usage: Usage
    owner: str = "default"
    pinned: bool = False


class Policy(Protocol):
    """Says what entries are worth; the least goes first. Stateless: all it knows of an entry is in its ``Usage``.

    ``clock`` is the tier's, kept by it, and rises to the worth of what is evicted (the inflation of GreedyDual;
    Cherkasova 1998): for policies that age by it.
    """

    @property
    def name(self) -> str: ...

    @property
    def recent(self) -> float:
        """Part of the room, 0..1, that is kept for what was used last, whatever it is worth."""
        ...

    def entered(self, bytes: int, cost: float, *, now: float, clock: float, before: Usage | None) -> Usage:
        """Usage of a new entry. ``before``: what is remembered of it: from an earlier life, or that it was asked for
        and missing (see ``Misses``, ``missed``); None: nobody has asked for it."""
        ...

    def used(self, usage: Usage, bytes: int, cost: float, *, now: float, clock: float, times: int = 1) -> Usage:
        """Usage after ``times`` more uses."""
        ...

    def worth(self, items: Sequence[Item], *, now: float, ahead: float = 0.0) -> Worths:
        """What a byte of each is worth now (mean over the next ``ahead`` seconds), in the policy's own unit."""
        ...


@dataclass(frozen=True)
class Rules:
    """``limit`` bytes for all; evict down to ``low`` of it. ``shares``: see ``StoreConfig``. ``ttl_s``: unused for so
    long, an entry has expired."""

    limit: int
    low: float = 0.9
    shares: Mapping[str, float] = field(default_factory=dict)
    ttl_s: float | None = None


@dataclass(frozen=True)
class Choice:
    """``victims`` in order, each with its reason; ``clock`` after them; ``enough`` if the need is met by them."""

    victims: tuple[tuple[KVKey, Reason], ...]
    clock: float
    enough: bool
