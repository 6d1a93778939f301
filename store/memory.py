"""A store in this process's memory."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import replace

from store.base import Entry, Found, GcReport, KVStore, Miss, StoreStats, TierStats, VerifyReport
from store.check import absence, listed, mismatch
from store.codec import Bytes, Codec, open_codec
from store.codec.choose import Prices, choose_codec
from store.config import StoreConfig
from store.errors import CorruptEntryError, LostError
from store.held import Held, HeldFound
from store.ram import Ram
from store.types import ChunkKV, KVKey, Want

log = logging.getLogger(__name__)

REMEMBERED = 100_000  # evicted keys
READ_BYTES_S = 6e9  # what one core checks and copies in a second (measured: 5.8), to choose a codec by


class MemoryStore(KVStore):
    """Chunks in encoded, immutable form; a read copies, so that no caller can damage what is held.

    At ``config.max_bytes`` (payload bytes; None: no limit) entries are evicted by ``config.policy`` and remembered
    as evicted. Thread-safe.
    """

    tier = "ram"

    def __init__(self, config: StoreConfig | None = None) -> None:
        self.config = config if config is not None else StoreConfig()
        self._ram = Ram(self.config)
        self._held = self._ram.held
        self._lock = self._ram.lock
        self._generation = 0
        self._gone: OrderedDict[KVKey, None] = OrderedDict()  # evicted, the oldest first
        self._sources: dict[bytes, dict[bytes, str]] = {}  # source -> layout digest -> tokenizer
        self._sources_of: dict[KVKey, tuple[bytes, set[bytes]]] = {}  # key -> layout digest, its sources

    def find(self, want: Want) -> Found | Miss:
        with self._lock:
            held = self._ram.get(want.key)
            if held is None:
                self._ram.get(want.key, use=True)
                known = self._sources.get(want.source, {}).items()
                return Miss(absence(want, evicted=want.key in self._gone, known=known))
            reason = mismatch(want, held.header)
            if reason is not None:
                return Miss(reason)
            self._ram.get(want.key, use=True)
        return HeldFound(held, self._drop)

    def contains(self, key: KVKey) -> bool:
        return self._ram.get(key) is not None

    def put_many(self, chunks: list[ChunkKV]) -> list[int]:
        return [
            0 if self._is_sound(chunk.key, chunk.source) else self._insert(Held.of(chunk, self._codec(chunk)))
            for chunk in chunks
        ]

    def put_encoded(self, items: list[tuple[bytes, list[Bytes]]]) -> list[int]:
        """``put_many`` of entries as ``entry.encode`` makes them; their planes are the store's from now on.

        Raises ``CorruptEntryError`` unless they are sound.
        """
        sizes = []
        for blob, planes in items:
            new = Held.made(blob, planes)
            new.check()
            present = self._is_sound(new.header.key, new.header.source)
            sizes.append(0 if present else self._insert(new))
        return sizes

    def read_encoded(self, key: KVKey) -> tuple[bytes, list[Bytes]] | None:
        """Header and planes as stored, checked; read-only. It counts as no use. None if there is no entry.

        Raises ``LostError`` if it is damaged.
        """
        held = self._ram.get(key)
        if held is None:
            return None
        try:
            held.check()
        except CorruptEntryError as error:
            self._drop(held, error)
            raise LostError("checksum_failed", f"{key.hex}: {error}") from error
        return held.blob, list(held.planes)

    def generation(self, key: KVKey) -> int | None:
        """Names one ``put`` of the entry. It counts as no use."""
        held = self._ram.get(key)
        return None if held is None else held.generation

    def used(self, key: KVKey) -> None:
        """Note a use."""
        self._ram.get(key, use=True)

    def delete(self, key: KVKey, *, evicted: bool = False) -> bool:
        with self._lock:
            if not evicted:
                self._ram.pin([key], False)
            held = self._ram.remove(key, forget=not evicted)
            if held is None:
                return False
            self._ram.counters["evicted:asked" if evicted else "deleted"] += 1
            if evicted:
                self._remember([key])
            else:
                self._forget(key)
            return True

    def pin(self, keys: Iterable[KVKey], *, pinned: bool = True) -> int:
        return self._ram.pin(keys, pinned)

    def prefetch(self, keys: Iterable[KVKey]) -> int:
        return sum(self.contains(key) for key in keys)

    def warm(self, keys: Iterable[KVKey]) -> int:
        return self.prefetch(keys)

    def cool(self, keys: Iterable[KVKey]) -> int:
        return 0

    def entries(self) -> Iterator[Entry]:
        with self._lock:
            keys = sorted(self._held)
        for key in keys:
            entry = self.entry(key)
            if entry is not None:
                yield entry

    def entry(self, key: KVKey) -> Entry | None:
        with self._lock:
            held = self._ram.get(key)
            if held is None:
                return None
            header, life = held.header, self._ram.lives[key]
            usage = life.item.usage
            return listed(
                header, bytes=held.size, pinned=life.item.pinned,
                created=life.created, used=usage.last, frequency=usage.frequency,
            )  # fmt: skip

    def stats(self) -> StoreStats:
        ram = self._ram
        with self._lock:
            tier = TierStats(self.tier, len(ram.held), ram.bytes, ram.bytes + ram.blob_bytes, self.config.max_bytes)
            return StoreStats(
                self.tier,
                tier.entries,
                tier.bytes,
                raw_bytes=ram.raw_bytes,
                pinned=sum(key in ram.held for key in ram.pins),
                counters=dict(ram.counters),
                tiers=(tier,),
            )

    def verify(self, *, repair: bool = False) -> VerifyReport:
        with self._lock:
            snapshot = sorted(self._held.items(), key=lambda item: item[0])
        bad = tuple(key for key, held in snapshot if not held.is_intact())
        repaired = sum(self.delete(key) for key in bad) if repair else 0
        return VerifyReport(len(snapshot), bad, repaired)

    def gc(self, *, full: bool = False) -> GcReport:
        with self._lock:
            before = self._ram.bytes
            victims = self._ram.expire()
            self._remember(key for key, _ in victims)
            expired = sum(reason == "expired" for _, reason in victims)
            return GcReport(before - self._ram.bytes, 0, expired, len(victims) - expired)

    def flush(self) -> None:
        return None

    def close(self) -> None:
        with self._lock:
            self._ram.clear()
            for known in (self._gone, self._sources, self._sources_of):
                known.clear()

    def _codec(self, chunk: ChunkKV) -> Codec:
        if self.config.codec != "auto":
            return open_codec(self.config.codec)
        frequency, pressure = self._ram.outlook(chunk.key)
        return choose_codec(
            tokens=len(chunk.token_ids),
            layout=chunk.layout,
            frequency=frequency,
            saved_s_per_token=self.config.saved_s_per_token,
            prices=Prices(read_bytes_s=READ_BYTES_S, pressure=pressure),
        )

    def _is_sound(self, key: KVKey, source: bytes) -> bool:
        """Whether the entry is there and intact; if it is, its new source is noted, if damaged, it is dropped."""
        held = self._ram.get(key)
        if held is None:
            return False
        try:
            held.check()
        except CorruptEntryError as error:
            self._drop(held, error)
            return False
        with self._lock:
            if self._ram.get(key) is None:
                return False
            self._know(held, source)
        return True

    def _insert(self, new: Held) -> int:
        key = new.header.key
        with self._lock:
            present = self.contains(key)
            self._generation += 1
            new = replace(new, generation=self._generation)
            evicted = self._ram.insert(new)
            if evicted is None:
                return 0
            self._remember(evicted)
            self._gone.pop(key, None)
            self._know(new, new.header.source)
        return 0 if present else new.size

    def _drop(self, held: Held, error: CorruptEntryError) -> None:
        key = held.header.key
        with self._lock:
            self._ram.counters["corrupt"] += 1
            self._ram.remove(key, only=held)
        log.warning("dropped a corrupt entry from memory: %s: %s", key.hex, error)

    def _remember(self, evicted: Iterable[KVKey]) -> None:
        for key in evicted:
            self._gone[key] = None
        while len(self._gone) > REMEMBERED:
            self._forget(self._gone.popitem(last=False)[0])

    def _know(self, held: Held, source: bytes) -> None:
        layout = held.header.layout.digest
        self._sources.setdefault(source, {})[layout] = held.header.tokenizer
        self._sources_of.setdefault(held.header.key, (layout, set()))[1].add(source)

    def _forget(self, key: KVKey) -> None:
        """That it was ever stored, from whichever source."""
        layout, sources = self._sources_of.pop(key, (b"", ()))
        for source in sources:
            known = self._sources.get(source, {})
            known.pop(layout, None)
            if not known:
                self._sources.pop(source, None)
