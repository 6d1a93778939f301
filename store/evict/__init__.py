"""Which entries go when room runs out, and which may enter. Pure functions over what a tier knows of its entries."""

from __future__ import annotations

from store.evict.admit import Door, Misses, admits, missed
from store.evict.choose import choose
from store.evict.gdsf import Gdsf
from store.evict.lru import Lru
from store.evict.tune import Tuner
from store.evict.types import Choice, Item, Policy, Reason, Rules, Usage

__all__ = [
    "Choice", "Item", "Policy", "Reason", "Rules", "Usage",
    "Gdsf", "Lru", "open_policy", "Tuner",
    "choose", "admits", "Door", "missed", "Misses",
]  # fmt: skip


def open_policy(name: str) -> Policy:
    """``gdsf``, ``lru``, or ``none``: uses are noted as for ``lru``, but ``choose`` only takes what has expired."""
    if name == "gdsf":
        return Gdsf()
    if name in ("lru", "none"):
        return Lru(name=name)
    raise ValueError(f"policy {name!r} is unknown; choose one of gdsf, lru, none")
