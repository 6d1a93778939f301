"""What a store is opened with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from store.codec import CODECS

MIN_BYTES = 4 << 20


@dataclass(frozen=True)
class StoreConfig:
    """A store on disk in the folder ``path``, with up to ``ram_bytes`` of it in memory too; ``None``: memory only.

    ``max_bytes`` limits the disk (or the memory store): at it the least valuable entries are evicted, by ``policy``
    (``gdsf`` or ``lru``; ``none``: nothing is, a put raises ``StoreFullError``). ``codec``: what new entries are
    written in, ``auto``: chosen for each by what it is worth. ``ram_codec``: what copies in the memory in front of the
    disk are held in; ``same`` keeps the disk's bytes. ``ttl_s``: entries unused for so long expire. ``shares``: part of
    the limit that an owner may hold when others want room (0..1; default: all). ``admission``: when full, refuse
    what is worth less than what would have to go. ``behind_bytes``: the most that waits to be written.
    ``segment_bytes``: size of a segment file (default: by ``max_bytes``). ``saved_s_per_token``: seconds of
    prefill that a use saves per token, which ``auto`` weighs (default: of a model of some billion parameters on a GPU).
    Raises ``ValueError`` with what is wrong.
    """

    path: Path | None = None
    max_bytes: int | None = None
    ram_bytes: int = 0
    codec: str = "raw"
    ram_codec: str = "same"
    policy: str = "gdsf"
    admission: bool = True
    ttl_s: float | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    behind_bytes: int = 256 << 20
    segment_bytes: int | None = None
    saved_s_per_token: float = 1e-4
    readonly: bool = False

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.path is not None and self.max_bytes < MIN_BYTES:
            raise ValueError(f"max_bytes must be at least {MIN_BYTES}, not {self.max_bytes}")
        if self.max_bytes is not None and self.max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, not {self.max_bytes}")
        if self.ram_bytes < 0:
            raise ValueError(f"ram_bytes must not be negative, not {self.ram_bytes}")
        if self.policy not in ("gdsf", "lru", "none"):
            raise ValueError(f"policy {self.policy!r} is unknown; choose one of gdsf, lru, none")
        for name, other in ((self.codec, "auto"), (self.ram_codec, "same")):
            if name not in (*CODECS, other):
                raise ValueError(f"codec {name!r} is unknown; choose one of {', '.join((*CODECS, other))}")
        if self.ttl_s is not None and self.ttl_s <= 0:
            raise ValueError(f"ttl_s must be positive, not {self.ttl_s}")
        if self.saved_s_per_token < 0:
            raise ValueError(f"saved_s_per_token must not be negative, not {self.saved_s_per_token}")
        for owner, share in self.shares.items():
            if not 0.0 < share <= 1.0:
                raise ValueError(f"the share of {owner!r} must be within 0..1, not {share}")
        if self.path is None and self.readonly:
            raise ValueError("a memory store starts empty: readonly needs a path")

    def reading(self) -> StoreConfig:
        """The same store for a process that only looks: read-only, without memory of its own."""
        return replace(self, readonly=True, ram_bytes=0)

    def to_wire(self) -> dict[str, Any]:
        """Plain values, for another process."""
        return {**asdict(self), "path": None if self.path is None else str(self.path), "shares": dict(self.shares)}

    @classmethod
    def from_wire(cls, fields: Mapping[str, Any]) -> StoreConfig:
        return cls(**{**fields, "path": None if fields["path"] is None else Path(fields["path"])})
