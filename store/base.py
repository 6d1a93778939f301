"""The protocol of every store."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from store.types import ChunkKV, KVKey, KVLayout, MissReason


@dataclass(frozen=True)
class Miss:
    """Why there is no KV to serve."""

    reason: MissReason


@dataclass(frozen=True)
class Entry:
    """One stored chunk as a listing shows it; ``layout`` is the hex digest of its ``KVLayout``."""

    key: KVKey
    tokens: int
    bytes: int
    layout: str
    tokenizer: str
    source: builtins.bytes  # the field above hides the type


@dataclass(frozen=True)
class StoreStats:
    """``entries`` and payload ``bytes`` held; ``tier`` is the name reported to users (``ram``, ``ssd``)."""

    tier: str
    entries: int
    bytes: int


@dataclass(frozen=True)
class VerifyReport:
    """``checked`` entries, keys whose bytes are ``bad``, and how many were ``repaired`` (deleted)."""

    checked: int
    bad: tuple[KVKey, ...]
    repaired: int


class KVStore(Protocol):
    """Chunk KV by content address.

    Every implementation: what is read is checksum-correct and equal to what was put, or a ``Miss``; ``put``
    is atomic and idempotent; an entry whose layout or token ids differ from the asked-for ones is a miss,
    never served.
    """

    tier: str

    def get(
        self, key: KVKey, layout: KVLayout, token_ids: tuple[int, ...], *, source: bytes, tokenizer: str
    ) -> ChunkKV | Miss: ...

    def contains(self, key: KVKey) -> bool: ...

    def put(self, chunk: ChunkKV) -> int:
        """Store and return the payload bytes written (0 if it was there).

        Raises ``StoreFullError``, ``StoreIOError``.
        """
        ...

    def delete(self, key: KVKey, *, evicted: bool = False) -> bool:
        """Remove; with ``evicted`` a later miss says so. True if it was there."""
        ...

    def entries(self) -> Iterator[Entry]: ...

    def stats(self) -> StoreStats: ...

    def verify(self, *, repair: bool = False) -> VerifyReport: ...

    def close(self) -> None: ...
