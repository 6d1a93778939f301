"""A store in this process's memory."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from store.base import Entry, Miss, StoreStats, VerifyReport
from store.check import Request, absence, read_entry, read_header
from store.codec import CorruptEntryError, decode_planes, encode
from store.errors import StoreFullError
from store.types import ChunkKV, KVKey, KVLayout

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Held:
    header: bytes
    planes: tuple[bytes, ...]
    source: bytes
    layout: bytes

    @property
    def size(self) -> int:
        return sum(len(plane) for plane in self.planes)


class MemoryStore:
    """Chunks in encoded, immutable form; ``get`` decodes a copy, so that no caller can damage what is held.

    With ``limit_bytes`` the least recently used entries make room for new ones and are remembered as evicted.
    Thread-safe. ``corrupt`` counts the damaged entries met so far.
    """

    tier = "ram"

    def __init__(self, limit_bytes: int | None = None) -> None:
        if limit_bytes is not None and limit_bytes <= 0:
            raise ValueError(f"limit_bytes must be positive, not {limit_bytes}")
        self.limit_bytes = limit_bytes
        self.corrupt = 0
        self._held: OrderedDict[KVKey, _Held] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._evicted: set[KVKey] = set()
        self._sources: dict[bytes, dict[bytes, str]] = {}  # source -> layout digest -> tokenizer
        self._lock = threading.RLock()

    def get(
        self, key: KVKey, layout: KVLayout, token_ids: tuple[int, ...], *, source: bytes, tokenizer: str
    ) -> ChunkKV | Miss:
        request = Request(key, layout, token_ids, source, tokenizer)
        with self._lock:
            held = self._held.get(key)
            if held is None:
                known = self._sources.get(source, {}).items()
                return Miss(absence(request, evicted=key in self._evicted, known=known))
            self._held.move_to_end(key)
        # Outside the lock: what is held is immutable, and the copy and its checksums take the time.
        try:
            return read_entry(request, held.header, lambda _: held.planes)
        except CorruptEntryError as error:
            with self._lock:
                self.corrupt += 1
                if self._held.get(key) is held:
                    self._remove(key)
            log.warning("dropped a corrupt entry from memory: %s: %s", key.hex, error)
            return Miss("checksum_failed")

    def contains(self, key: KVKey) -> bool:
        with self._lock:
            return key in self._held

    def put(self, chunk: ChunkKV) -> int:
        header, planes = encode(chunk)
        new = _Held(header, tuple(plane.tobytes() for plane in planes), chunk.source, chunk.layout.digest)
        with self._lock:
            if chunk.key in self._held:
                if _fault(chunk.key, self._held[chunk.key]) is None:
                    self._know(chunk)
                    return 0
                self._remove(chunk.key)
            if self.limit_bytes is not None:
                if new.size > self.limit_bytes:
                    raise StoreFullError(f"a chunk of {new.size} bytes is larger than the limit of {self.limit_bytes}")
                while self._bytes + new.size > self.limit_bytes:
                    self.delete(next(iter(self._held)), evicted=True)
            self._know(chunk)
            self._held[chunk.key] = new
            self._bytes += new.size
            self._evicted.discard(chunk.key)
        return new.size

    def delete(self, key: KVKey, *, evicted: bool = False) -> bool:
        with self._lock:
            if key not in self._held:
                return False
            held = self._remove(key)
            if evicted:
                self._evicted.add(key)
            else:
                self._sources.get(held.source, {}).pop(held.layout, None)
            return True

    def entries(self) -> Iterator[Entry]:
        with self._lock:
            snapshot = sorted(self._held.items(), key=lambda item: item[0])
        for key, held in snapshot:
            try:
                header = read_header(key, held.header)
            except CorruptEntryError:
                continue  # verify reports it
            yield Entry(
                key=key,
                tokens=len(header.token_ids),
                bytes=held.size,
                layout=header.layout.digest.hex(),
                tokenizer=header.tokenizer,
                source=header.source,
            )

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(self.tier, len(self._held), self._bytes)

    def verify(self, *, repair: bool = False) -> VerifyReport:
        with self._lock:
            snapshot = sorted(self._held.items(), key=lambda item: item[0])
        bad = tuple(key for key, held in snapshot if _fault(key, held) is not None)
        repaired = sum(self.delete(key) for key in bad) if repair else 0
        return VerifyReport(len(snapshot), bad, repaired)

    def close(self) -> None:
        with self._lock:
            self._held.clear()
            self._bytes = 0

    def _know(self, chunk: ChunkKV) -> None:
        self._sources.setdefault(chunk.source, {})[chunk.layout.digest] = chunk.tokenizer

    def _remove(self, key: KVKey) -> _Held:
        held = self._held.pop(key)
        self._bytes -= held.size
        return held


def _fault(key: KVKey, held: _Held) -> str | None:
    """What is wrong with the bytes held, None if nothing."""
    try:
        decode_planes(read_header(key, held.header), held.planes)
    except CorruptEntryError as error:
        return str(error)
    return None
