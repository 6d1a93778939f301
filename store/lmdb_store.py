"""A store on disk, shared by the processes of one machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from store.base import Entry, Miss, StoreStats, VerifyReport
from store.check import Planes, Request, absence, read_entry, read_header
from store.codec import CorruptEntryError, Header, decode_planes, encode
from store.database import Cursor, DamagedError, Database, Txn
from store.errors import StoreError
from store.types import ChunkKV, KVKey, KVLayout

log = logging.getLogger(__name__)

_BATCH = 256  # entries listed per read transaction: an open one keeps the map from growing and pages from reuse


class LmdbStore:
    """Chunks in LMDB under the folder ``path``. Thread-safe; several processes may read and write at once.

    ``max_bytes`` caps the data file (at least ``database.MIN_BYTES``). ``corrupt`` counts the damaged entries
    met so far. Raises at opening as ``Database`` does; every method may raise ``StoreIOError``, writes
    ``StoreFullError`` and, on a read-only store, ``StoreError``.
    """

    tier = "ssd"

    def __init__(
        self, path: Path, *, max_bytes: int | None = None, readonly: bool = False, map_size: int = 64 << 20
    ) -> None:
        self._db = Database(path, max_bytes=max_bytes, map_size=map_size, readonly=readonly)
        self._tables = self._db.tables
        self.corrupt = 0

    def get(
        self, key: KVKey, layout: KVLayout, token_ids: tuple[int, ...], *, source: bytes, tokenizer: str
    ) -> ChunkKV | Miss:
        request = Request(key, layout, token_ids, source, tokenizer)
        try:
            return self._db.read(lambda txn: self._read(txn, request))
        except DamagedError as error:
            self.corrupt += 1
            log.error("cannot look up %s: %s", key.hex, error)
        except CorruptEntryError as error:
            self.corrupt += 1
            log.warning("corrupt entry %s in %s: %s", key.hex, self._db.path, error)
            if not self._db.readonly:
                try:
                    self._drop_if_bad(key)
                except StoreError as failure:  # the answer is the same, and the next reader tries again
                    log.warning("could not delete the corrupt entry %s: %s", key.hex, failure)
        return Miss("checksum_failed")

    def contains(self, key: KVKey) -> bool:
        return self._db.read(lambda txn: txn.get(key.digest, db=self._tables.headers) is not None)

    def put(self, chunk: ChunkKV) -> int:
        header, planes = encode(chunk)
        size = sum(len(plane) for plane in planes)
        digest, tables = chunk.key.digest, self._tables

        def work(txn: Txn) -> int:
            known, tokenizer = chunk.source + chunk.layout.digest, chunk.tokenizer.encode()
            if txn.get(known, b"", db=tables.sources) != tokenizer:  # a put that changes nothing costs no sync
                txn.put(known, tokenizer, db=tables.sources)
            if self._present(txn, digest):
                if self._fault(txn, chunk.key) is None:
                    return 0
                self._erase(txn, chunk.key)
            txn.put(digest, header, db=tables.headers)
            for layer, plane in enumerate(planes):
                txn.put(_plane_key(digest, layer), plane.data, db=tables.planes)
            txn.delete(digest, db=tables.tombstones)
            self._count(txn, size)
            return size

        # A plane of its own pages, a header, and the pages of the trees that change.
        return self._db.write(work, need=size + len(header) + 4096 * (len(planes) + 16))

    def delete(self, key: KVKey, *, evicted: bool = False) -> bool:
        def work(txn: Txn) -> bool:
            if not self._present(txn, key.digest):
                return False
            self._erase(txn, key, keep_source=evicted)
            if evicted:
                txn.put(key.digest, b"", db=self._tables.tombstones)
            return True

        return self._db.write(work, need=0)

    def entries(self) -> Iterator[Entry]:
        for keys in self._keys():
            yield from self._db.read(lambda txn, keys=keys: self._list(txn, keys))  # type: ignore[misc]

    def stats(self) -> StoreStats:
        def work(txn: Txn) -> StoreStats:
            return StoreStats(self.tier, txn.stat(self._tables.headers)["entries"], self._counted(txn))

        return self._db.read(work)

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """Check every byte; planes without a header are a bad entry. ``repair`` also recounts ``stats``."""
        checked, bad = 0, []
        for keys in self._keys():
            checked += len(keys)
            for key in keys:
                if self._db.read(lambda txn, key=key: self._fault(txn, key)):  # type: ignore[misc]
                    bad.append(key)
        bad += self._db.read(self._orphans)
        repaired = 0
        if repair:
            repaired = sum(self._drop_if_bad(key) for key in bad)
            self._db.write(self._recount, need=0)
        return VerifyReport(checked, tuple(bad), repaired)

    def close(self) -> None:
        self._db.close()

    # Inside a transaction

    def _read(self, txn: Txn, request: Request) -> ChunkKV | Miss:
        blob = txn.get(request.key.digest, db=self._tables.headers)
        if blob is not None:
            return read_entry(request, blob, lambda header: self._planes(txn, header))
        evicted = txn.get(request.key.digest, db=self._tables.tombstones) is not None
        known = self._known(txn, request.source)
        return Miss(absence(request, evicted=evicted, known=known))

    def _planes(self, txn: Txn, header: Header) -> Planes:
        layers, table = range(header.layout.layers), self._tables.planes
        return [txn.get(_plane_key(header.key.digest, layer), db=table) for layer in layers]

    def _known(self, txn: Txn, source: bytes) -> list[tuple[bytes, str]]:
        return [
            (key[32:], bytes(value).decode(errors="replace"))
            for key, value in _prefixed(txn.cursor(self._tables.sources), source)
        ]

    def _present(self, txn: Txn, digest: bytes) -> bool:
        """True if there is a header or, after damage, at least a plane."""
        if txn.get(digest, db=self._tables.headers) is not None:
            return True
        return any(True for _ in _prefixed(txn.cursor(self._tables.planes), digest))

    def _fault(self, txn: Txn, key: KVKey) -> str | None:
        """What is wrong with the entry, None if nothing or if it is not there."""
        if not self._present(txn, key.digest):
            return None
        blob = txn.get(key.digest, db=self._tables.headers)
        if blob is None:
            return "planes without a header"
        try:
            header = read_header(key, blob)
            decode_planes(header, self._planes(txn, header))
        except CorruptEntryError as error:
            return str(error)
        found = sum(1 for _ in _prefixed(txn.cursor(self._tables.planes), key.digest))
        return None if found == header.layout.layers else f"{found} planes for {header.layout.layers} layers"

    def _erase(self, txn: Txn, key: KVKey, *, keep_source: bool = True) -> None:
        blob = txn.pop(key.digest, db=self._tables.headers)
        size = 0
        cursor = txn.cursor(self._tables.planes)
        while cursor.set_range(key.digest) and cursor.key()[:32] == key.digest:
            size += len(cursor.value())
            cursor.delete()
        try:
            header = read_header(key, blob or b"")
        except CorruptEntryError:
            pass  # its source is unknown, its size is what was found
        else:
            size = header.payload_bytes  # what put counted, whatever damage did to the planes
            if not keep_source:
                txn.delete(header.source + header.layout.digest, db=self._tables.sources)
        self._count(txn, -size)

    def _list(self, txn: Txn, keys: list[KVKey]) -> list[Entry]:
        found = []
        for key in keys:
            try:
                header = read_header(key, txn.get(key.digest, b"", db=self._tables.headers))
            except CorruptEntryError:
                continue  # or deleted meanwhile; verify reports it
            found.append(
                Entry(
                    key=key,
                    tokens=len(header.token_ids),
                    bytes=header.payload_bytes,
                    layout=header.layout.digest.hex(),
                    tokenizer=header.tokenizer,
                    source=header.source,
                )
            )
        return found

    def _orphans(self, txn: Txn) -> list[KVKey]:
        cursor, found = txn.cursor(self._tables.planes), []
        ahead = cursor.first()
        while ahead:
            digest = bytes(cursor.key()[:32])
            if len(digest) == 32 and txn.get(digest, db=self._tables.headers) is None:
                found.append(KVKey(digest))
            ahead = cursor.set_range(digest + b"\xff" * 3)  # past the last layer of this digest
        return found

    def _counted(self, txn: Txn) -> int:
        return int.from_bytes(txn.get(b"bytes", b"", db=self._tables.meta), "little")

    def _count(self, txn: Txn, change: int) -> None:
        total = max(0, self._counted(txn) + change)
        txn.put(b"bytes", total.to_bytes(8, "little"), db=self._tables.meta)

    def _recount(self, txn: Txn) -> None:
        total = 0
        for raw, blob in txn.cursor(self._tables.headers):
            try:
                total += read_header(KVKey(bytes(raw)), blob).payload_bytes
            except (CorruptEntryError, ValueError):
                continue
        self._count(txn, total - self._counted(txn))

    # Across transactions

    def _keys(self) -> Iterator[list[KVKey]]:
        """All keys in order, a batch per read transaction; what changes meanwhile may or may not show."""
        start = b""

        def work(txn: Txn) -> list[bytes]:
            cursor = txn.cursor(self._tables.headers)
            batch: list[bytes] = []
            ahead = cursor.set_range(start)
            while ahead and len(batch) < _BATCH:
                batch.append(bytes(cursor.key()))
                ahead = cursor.next()
            return batch

        while batch := self._db.read(work):
            yield [KVKey(digest) for digest in batch if len(digest) == 32]
            start = batch[-1] + b"\0"

    def _drop_if_bad(self, key: KVKey) -> bool:
        """Delete the entry if it is still bad: another process may have put a good one since."""

        def work(txn: Txn) -> bool:
            if self._fault(txn, key) is None:
                return False
            self._erase(txn, key)
            return True

        return self._db.write(work, need=0)


def _plane_key(digest: bytes, layer: int) -> bytes:
    return digest + layer.to_bytes(2, "big")


def _prefixed(cursor: Cursor, prefix: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """The items whose key starts with ``prefix``."""
    ahead = cursor.set_range(prefix)
    while ahead:
        key = bytes(cursor.key())
        if not key.startswith(prefix):
            return
        yield key, cursor.value()
        ahead = cursor.next()
