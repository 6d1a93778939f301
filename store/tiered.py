"""Memory in front of the disk, another machine behind it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace

from torch import Tensor

from store.base import Entry, Found, GcReport, KVStore, Miss, StoreStats, TierStats, VerifyReport
from store.behind import Behind
from store.check import mismatch
from store.codec import Bytes
from store.config import StoreConfig
from store.entry import Header
from store.errors import CorruptEntryError, LostError, StoreError
from store.held import Held, HeldFound
from store.promote import Below, Promoter
from store.ram import Ram
from store.remote import RemoteError, RemoteTier, pack, unpack
from store.types import ChunkKV, KVKey, Want

log = logging.getLogger(__name__)


class TieredStore(KVStore):
    """``config.ram_bytes`` of memory in front of ``below``, which it closes; ``remote`` is asked for what is not there.

    Inclusive: what is in memory is a copy of what is below, and is served only while it is (one look-up below per
    ``find``), so that deletes and evictions by other processes count at once. An entry is copied into memory after
    it has been read to its end, if it is worth its room; a pin holds it below, not in memory. ``put_later`` queues up
    to ``config.behind_bytes``. Counters beside those of ``below``: ``promoted``, ``ram:evicted``, ``ram:refused``
    (of this process); a damaged copy in memory counts as ``corrupt``, and is read from below instead.
    """

    tier = "ram+ssd"

    def __init__(self, config: StoreConfig, below: Below, *, remote: RemoteTier | None = None) -> None:
        if not config.ram_bytes:
            raise ValueError("a tiered store needs ram_bytes")
        self.config = config
        self._below = below
        self._remote = remote
        policy = "lru" if config.policy == "none" else config.policy  # a copy may always go
        self._ram = Ram(StoreConfig(max_bytes=config.ram_bytes, policy=policy, admission=config.admission))
        self._promoter = Promoter(self._ram, below, config.ram_codec)
        self._behind = Behind(self.put_many, config.behind_bytes)

    def find(self, want: Want) -> Found | Miss:
        self._promoter.sweep_in_time()
        held = self._copy(want.key)
        if held is None:
            self._ram.get(want.key, use=True)  # asked for in vain: admission counts it
            found = self._below.find(want)
            if isinstance(found, Miss):
                return self._find_remote(want, found)
            return _Below(found, self._promoter.offer)
        reason = mismatch(want, held.header)
        if reason is not None:
            return Miss(reason)
        self._ram.get(want.key, use=True)
        self._below.used(want.key)
        return _Above(HeldFound(held, self._drop), want, self._below)

    def contains(self, key: KVKey) -> bool:
        return self._below.contains(key)

    def put_many(self, chunks: list[ChunkKV]) -> list[int]:
        sizes = self._below.put_many(chunks)
        if self._remote is not None:
            for chunk, size in zip(chunks, sizes, strict=True):
                if size:
                    self._put_remote(self._remote, chunk.key)
        return sizes

    def put_later(self, chunk: ChunkKV) -> Future[int]:
        return self._behind.put(chunk)

    def put_encoded(self, items: list[tuple[bytes, list[Bytes]]]) -> list[int]:
        return self._below.put_encoded(items)

    def read_encoded(self, key: KVKey) -> tuple[bytes, list[Bytes]] | None:
        return self._below.read_encoded(key)

    def delete(self, key: KVKey, *, evicted: bool = False) -> bool:
        """Also from the remote tier, unless ``evicted``. Raises ``RemoteError`` if that fails; here it is gone then."""
        if not evicted:
            self._behind.discard(key)
        deleted = self._below.delete(key, evicted=evicted)
        self._ram.remove(key, forget=not evicted)
        if self._remote is not None and not evicted:
            deleted = self._remote.delete(key) or deleted
        return deleted

    def delete_many(self, keys: Iterable[KVKey], *, evicted: bool = False) -> int:
        if self._remote is not None:
            return super().delete_many(keys, evicted=evicted)
        keys = list(keys)
        if not evicted:
            for key in keys:
                self._behind.discard(key)
        deleted = self._below.delete_many(keys, evicted=evicted)
        for key in keys:
            self._ram.remove(key, forget=not evicted)
        return deleted

    def pin(self, keys: Iterable[KVKey], *, pinned: bool = True) -> int:
        return self._below.pin(keys, pinned=pinned)

    def prefetch(self, keys: Iterable[KVKey]) -> int:
        keys = list(keys)
        cold = [key for key in keys if self._ram.get(key) is None]
        return len(keys) - len(cold) + self._below.prefetch(cold)

    def warm(self, keys: Iterable[KVKey]) -> int:
        room, warmed = self.config.ram_bytes, []
        try:
            for key in keys:
                if not self._below.contains(key) and (held := self._fetch(key)) is not None:
                    self._keep(held)
                if not self._promoter.promote(key, forced=True):
                    continue
                # Used less than what else is there, they would push out one another.
                self._ram.pin([key], True)
                warmed.append(key)
                copy = self._ram.get(key)
                room -= copy.size if copy is not None else 0
                if room <= 0:
                    break
        finally:
            self._ram.pin(warmed, False)
        return sum(self._ram.get(key) is not None for key in set(warmed))

    def cool(self, keys: Iterable[KVKey]) -> int:
        self._promoter.flush()  # what has been read just now must not come up after it
        return sum(self._ram.remove(key) is not None for key in keys)

    def entries(self) -> Iterator[Entry]:
        return self._below.entries()

    def entry(self, key: KVKey) -> Entry | None:
        return self._below.entry(key)

    def stats(self) -> StoreStats:
        below, ram = self._below.stats(), self._ram
        with ram.lock:
            copies = TierStats("ram", len(ram.held), ram.bytes, ram.bytes + ram.blob_bytes, ram.config.max_bytes)
            counted = dict(ram.counters)
        counters = dict(below.counters)
        counters["corrupt"] = counters.get("corrupt", 0) + counted.get("corrupt", 0)
        counters["promoted"] = counted.get("put", 0)
        counters["ram:refused"] = counted.get("refused", 0)
        counters["ram:evicted"] = counted.get("evicted:capacity", 0)
        tiers = below.tiers or (TierStats(below.tier, below.entries, below.bytes),)
        return replace(below, tier=self.tier, counters=counters, tiers=(copies, *tiers))

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """What is below. Damaged copies in memory are dropped, and no entry is the worse for it."""
        with self._ram.lock:
            copies = list(self._ram.held.values())
        for held in copies:
            try:
                held.check()
            except CorruptEntryError as error:
                self._drop(held, error)
        return self._below.verify(repair=repair)

    def gc(self, *, full: bool = False) -> GcReport:
        report = self._below.gc(full=full)
        self._promoter.sweep()
        return report

    def flush(self) -> None:
        self._behind.flush()
        self._below.flush()

    def close(self) -> None:
        self._behind.close()
        self._promoter.close()
        self._ram.clear()
        self._below.close()

    def _copy(self, key: KVKey) -> Held | None:
        """What memory has of ``key``, if it still is a copy of what is below."""
        held = self._ram.get(key)
        if held is None or self._below.generation(key) == held.generation:
            return held
        self._ram.remove(key, only=held)
        return None

    def _drop(self, held: Held, error: CorruptEntryError) -> None:
        with self._ram.lock:
            self._ram.counters["corrupt"] += 1
            self._ram.remove(held.header.key, only=held)
        log.warning("dropped a corrupt copy from memory: %s: %s", held.header.key.hex, error)

    def _find_remote(self, want: Want, miss: Miss) -> Found | Miss:
        """What another machine has of it, else ``miss``."""
        if self._remote is None or self._below.contains(want.key):
            return miss
        held = self._fetch(want.key)
        if held is None:
            return miss
        reason = mismatch(want, held.header)
        if reason is not None:
            return Miss(reason)
        self._keep(held)
        return HeldFound(held, _log_damage, tier="remote")

    def _fetch(self, key: KVKey) -> Held | None:
        if self._remote is None:
            return None
        try:
            blob = self._remote.get_entry(key)
            return None if blob is None else unpack(key, blob)
        except RemoteError as error:
            log.warning("%s could not be asked for %s: %s", self._remote.name, key.hex, error)
        except CorruptEntryError as error:
            log.warning("what %s has of %s is damaged: %s", self._remote.name, key.hex, error)
        return None

    def _keep(self, held: Held) -> None:
        try:
            self._below.put_encoded([(held.blob, list(held.planes))])
        except StoreError as error:
            log.warning("%s could not be kept: %s", held.header.key.hex, error)

    def _put_remote(self, remote: RemoteTier, key: KVKey) -> None:
        try:
            encoded = self._below.read_encoded(key)
            if encoded is not None and not remote.contains(key):
                remote.put_entry(key, pack(*encoded))
        except (RemoteError, LostError) as error:
            log.warning("%s did not take %s: %s", remote.name, key.hex, error)


class _Below:
    """``Found`` below; when its last plane has been read, ``read_all`` is told."""

    def __init__(self, found: Found, read_all: Callable[[Header], None]) -> None:
        self.header = found.header
        self.tier = found.tier
        self._found = found
        self._left = set(range(found.header.layout.layers))
        self._read_all = read_all

    def read(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._found.read(layer, k, v)
        left = self._left
        if left:
            left.discard(layer)
            if not left:
                self._read_all(self.header)

    def advise(self) -> None:
        self._found.advise()


class _Above:
    """``Found`` in memory; should a plane be damaged there, it is read below, and so is the rest."""

    def __init__(self, copy: HeldFound, want: Want, below: Below) -> None:
        self.header = copy.header
        self.tier = copy.tier
        self._found: Found = copy
        self._want = want
        self._below = below
        self._lock = threading.Lock()

    def read(self, layer: int, k: Tensor, v: Tensor) -> None:
        found = self._found
        try:
            found.read(layer, k, v)
        except LostError:
            if found.tier != "ram":
                raise
            self._descend(found).read(layer, k, v)

    def advise(self) -> None:
        self._found.advise()

    def _descend(self, copy: Found) -> Found:
        with self._lock:
            if self._found is copy:
                found = self._below.find(self._want)
                if isinstance(found, Miss):
                    raise LostError(found.reason, f"{self.header.key.hex}: gone below its damaged copy in memory")
                self._found = found
            return self._found


def _log_damage(held: Held, error: CorruptEntryError) -> None:
    log.warning("memory went bad: %s: %s", held.header.key.hex, error)
