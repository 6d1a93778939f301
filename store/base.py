"""The protocol of every store, and what its answers are made of."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from store.errors import LostError, StoreError
from store.types import ChunkKV, KVKey, MissReason, Want

if TYPE_CHECKING:
    from store.entry import Header


@dataclass(frozen=True)
class Miss:
    """Why there is no KV to serve."""

    reason: MissReason


class Found(Protocol):
    """An entry that is what was asked for, by its checked header; its planes are read one by one, in any order.

    Thread-safe. It holds no lock and keeps nothing from being deleted; what it needs goes with it.
    """

    header: Header
    tier: str

    def read(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write K and V of ``layer`` into ``k`` and ``v`` [T, H, D] (CPU, contiguous, the layout's dtype), checked.

        Raises ``LostError`` if they cannot be read or are not what was written; then ``k`` and ``v`` hold anything.
        The store has dealt with the damage (an entry moved meanwhile is read where it is now).
        """
        ...

    def advise(self) -> None:
        """Say that it will be read soon: what can be fetched ahead is. Returns at once."""
        ...


@dataclass(frozen=True)
class Entry:
    """One stored chunk as a listing shows it; ``layout`` is the hex digest of its ``KVLayout``.

    ``bytes`` as stored, ``raw_bytes`` in the layout's dtype. ``used`` and ``created`` are seconds since the epoch
    (0: unknown), ``frequency`` how often it was used, older uses counting less.
    """

    key: KVKey
    tokens: int
    bytes: int
    layout: str
    tokenizer: str
    source: builtins.bytes  # the field above hides the type
    codec: str = "raw"
    raw_bytes: int = 0
    owner: str = "default"
    pinned: bool = False
    created: float = 0.0
    used: float = 0.0
    frequency: float = 0.0


@dataclass(frozen=True)
class TierStats:
    """One tier: ``entries`` and their payload ``bytes``; ``held_bytes`` what it takes (files, dead bytes too) and
    ``limit_bytes`` what it may take."""

    tier: str
    entries: int
    bytes: int
    held_bytes: int = 0
    limit_bytes: int | None = None


@dataclass(frozen=True)
class StoreStats:
    """``entries`` and payload ``bytes`` held; ``tier`` is the name reported to users (``ram``, ``ssd``).

    ``raw_bytes`` is what ``bytes`` would be uncompressed. ``counters`` count for ever, over restarts and processes
    where the tier is on disk: ``evicted:REASON``, ``refused``, ``corrupt``, ``put``, ``deleted``. ``tiers`` has the
    figures of each tier of a store that has several; an entry in two tiers counts once above.
    """

    tier: str
    entries: int
    bytes: int
    raw_bytes: int = 0
    pinned: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)
    tiers: tuple[TierStats, ...] = ()


@dataclass(frozen=True)
class VerifyReport:
    """``checked`` entries, keys whose bytes are ``bad``, and how many were ``repaired`` (deleted)."""

    checked: int
    bad: tuple[KVKey, ...]
    repaired: int


@dataclass(frozen=True)
class GcReport:
    """What a collection did: ``freed`` bytes of the device, ``moved`` bytes copied for it, ``expired`` entries whose
    time to live was over, ``evicted`` ones beyond the limit."""

    freed: int
    moved: int
    expired: int
    evicted: int


class KVStore(Protocol):
    """Chunk KV by content address. Subclass it: ``get``, ``put`` and ``put_later`` are written here.

    Every implementation: what is read is checksum-correct and equal to what was put (to what its codec makes of it,
    for a lossy one), or a ``Miss``; ``put`` is atomic and idempotent; an entry whose layout, tokenizer or token ids
    differ from the wanted ones is a miss, never served. Thread-safe. Methods raise ``StoreIOError``; those that write
    ``StoreFullError``, and ``StoreError`` on a read-only store.
    """

    tier: str

    def find(self, want: Want) -> Found | Miss:
        """The entry, its planes yet unread. It counts as a use."""
        ...

    def get(self, want: Want) -> ChunkKV | Miss:
        """The whole entry in memory of its own."""
        from store.check import read_whole

        found = self.find(want)
        if isinstance(found, Miss):
            return found
        try:
            return read_whole(found, want)
        except LostError as lost:
            return Miss(lost.reason)

    def contains(self, key: KVKey) -> bool: ...

    def put(self, chunk: ChunkKV) -> int:
        """Store one chunk (see ``put_many``); its bytes."""
        return self.put_many([chunk])[0]

    def put_many(self, chunks: list[ChunkKV]) -> list[int]:
        """Store and return the payload bytes written of each: 0 if it was there, or is worth less than what would
        have to go for it (``counters["refused"]``). On return they are durable, as far as the tier is at all.

        Raises ``StoreFullError`` if there is no room for one of them and none can be made; those before it are stored.
        """
        ...

    def put_later(self, chunk: ChunkKV) -> Future[int]:
        """Store behind the caller's back, who must not change the tensors; the future is done when it is durable.

        Waits while too much is queued already.
        """
        done: Future[int] = Future()
        try:
            done.set_result(self.put(chunk))
        except StoreError as error:
            done.set_exception(error)
        return done

    def delete(self, key: KVKey, *, evicted: bool = False) -> bool:
        """Remove; with ``evicted`` a later miss says so. True if it was there. A pin goes too, unless ``evicted``."""
        ...

    def delete_many(self, keys: Iterable[KVKey], *, evicted: bool = False) -> int:
        """``delete`` of many, cheaper where that can be; how many were there."""
        return sum(self.delete(key, evicted=evicted) for key in keys)

    def pin(self, keys: Iterable[KVKey], *, pinned: bool = True) -> int:
        """Keep from eviction and expiry (or no longer); keys not stored yet may be pinned. How many changed."""
        ...

    def prefetch(self, keys: Iterable[KVKey]) -> int:
        """Fetch ahead what will be read soon, as far as the tier can; how many keys were there. Returns at once."""
        ...

    def warm(self, keys: Iterable[KVKey]) -> int:
        """Bring entries into the fastest tier now; how many are there after it."""
        ...

    def cool(self, keys: Iterable[KVKey]) -> int:
        """Drop entries from the fastest tier, they stay in the next; how many were there. 0 if there is one tier."""
        ...

    def entries(self) -> Iterator[Entry]:
        """All entries in key order; what changes meanwhile may or may not show."""
        ...

    def entry(self, key: KVKey) -> Entry | None: ...

    def stats(self) -> StoreStats: ...

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """Read every byte and check it; ``repair`` deletes what is bad."""
        ...

    def gc(self, *, full: bool = False) -> GcReport:
        """Expire, evict down to the limit, give dead bytes back to the device; ``full``: all of them.

        May be killed at any point.
        """
        ...

    def flush(self) -> None:
        """Until everything put behind is durable, and uses are noted."""
        ...

    def close(self) -> None: ...
