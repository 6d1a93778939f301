"""What the LMDB tables hold, and the changes that keep them true to each other. All of it inside a transaction.

Keys -> values; numbers little-endian, but in keys big-endian so that they sort. ``digest`` is a key's 32 bytes.

``entries``     digest -> ``Place`` (48), XXH3-64 of digest and place (8), the entry's header
``payloads``    digest -> the planes of a small entry, one after the other
``usage``       digest -> ``Life`` (56), owner (UTF-8): all that eviction needs to know of an entry
``pins``        digest -> empty; the entry need not be there
``tombstones``  digest -> ``Grief`` (25): of entries that were evicted, or asked for and never there
``sources``     source + layout digest -> tokenizer
``segments``    number (4) -> ``Extent`` (33), XXH3-64 (8)
``graves``      number (4) + offset (8) -> ``Grave``'s rest (9), XXH3-64 (8): dead records that still take room
``meta``        generation, segment (the last number), clock, bytes, raw_bytes, count:NAME, complete
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from store.check import read_header
from store.entry import Header
from store.errors import CorruptEntryError
from store.evict import Item, Usage
from store.ssd.database import Txn
from store.ssd.ledger import Ledger, added, prefixed
from store.ssd.rows import (
    PLACE_BYTES,
    Grief,
    Life,
    Place,
    pack_grief,
    pack_life,
    pack_place,
    parse_grief,
    parse_life,
    parse_place,
)
from store.types import ChunkKV, KVKey

_TOTALS = (b"bytes", b"raw_bytes")
MOST_TOMBSTONES = 100_000


class Index(Ledger):
    """The tables' rows. Stateless; no method begins a transaction. Thread-safe as far as ``txn`` is."""

    # Entries

    def find(self, txn: Txn, key: KVKey) -> tuple[Place, bytes] | None:
        """Where the entry is and its encoded header, yet to be checked. Raises ``CorruptEntryError``."""
        row = txn.get(key.digest, db=self.tables.entries)
        return None if row is None else (parse_place(key.digest, row), bytes(row[PLACE_BYTES:]))

    def place(self, txn: Txn, key: KVKey) -> Place | None:
        """The same without the header. Raises ``CorruptEntryError``."""
        row = txn.get(key.digest, db=self.tables.entries)
        return None if row is None else parse_place(key.digest, row)

    def has(self, txn: Txn, key: KVKey) -> bool:
        return txn.get(key.digest, db=self.tables.entries) is not None

    def payload(self, txn: Txn, key: KVKey) -> bytes:
        """The planes of an inline entry, yet to be checked."""
        return bytes(txn.get(key.digest, b"", db=self.tables.payloads))

    def add(self, txn: Txn, key: KVKey, place: Place, header: bytes, life: Life, owner: str) -> None:
        """A new entry (there must be none under its key); its payload is the caller's to write."""
        self._put_place(txn, key, place, header)
        txn.put(key.digest, pack_life(life, owner), db=self.tables.usage)
        txn.delete(key.digest, db=self.tables.tombstones)
        self._occupy(txn, place)
        for name, change in zip(_TOTALS, (place.payload, place.raw), strict=True):
            self._add(txn, name, change)

    def remove(self, txn: Txn, key: KVKey, *, deleted: bool, bury: bool = True) -> Place | None:
        """Take an entry out; its record gets a grave, unless not ``bury``: when nobody knows if it is its record. None
        if its row is too damaged to say where it was (then ``recount`` is due). ``deleted``: a scan must not find it
        again."""
        row = txn.pop(key.digest, db=self.tables.entries)
        txn.delete(key.digest, db=self.tables.payloads)
        txn.delete(key.digest, db=self.tables.usage)
        try:
            place = parse_place(key.digest, row or b"")
        except CorruptEntryError:
            return None
        if bury:
            self._bury(txn, place, deleted=deleted)
        for name, change in zip(_TOTALS, (place.payload, place.raw), strict=True):
            self._add(txn, name, -change)
        return place

    def move(self, txn: Txn, key: KVKey, place: Place) -> None:
        """The entry, which must be there, is in ``place`` now; where it was gets a grave. Raises
        ``CorruptEntryError``."""
        found = self.find(txn, key)
        if found is None:
            raise CorruptEntryError(f"the entry {key.hex} is not there")
        was, header = found
        self._bury(txn, was, deleted=True)
        self._occupy(txn, place)
        self._put_place(txn, key, place, header)

    def keys(self, txn: Txn, start: bytes, most: int) -> list[bytes]:
        """Up to ``most`` digests from ``start`` on, in order."""
        cursor = txn.cursor(self.tables.entries)
        batch: list[bytes] = []
        ahead = cursor.set_range(start)
        while ahead and len(batch) < most:
            batch.append(bytes(cursor.key()))
            ahead = cursor.next()
        return batch

    # Use

    def life(self, txn: Txn, key: KVKey) -> tuple[Life, str] | None:
        """The life of an entry and its owner; None if there is none, or it is damaged."""
        return parse_life(txn.get(key.digest, db=self.tables.usage))

    def set_life(self, txn: Txn, key: KVKey, life: Life, owner: str) -> None:
        txn.put(key.digest, pack_life(life, owner), db=self.tables.usage)

    def items(self, txn: Txn) -> Iterator[Item]:
        """Every entry as eviction sees it."""
        pins = {bytes(digest) for digest in txn.cursor(self.tables.pins).iternext(values=False)}
        for raw, row in txn.cursor(self.tables.usage):
            digest, found = bytes(raw), parse_life(row)
            if found is not None and len(digest) == 32:
                life, owner = found
                yield Item(KVKey(digest), life.bytes, life.cost, life.usage, owner, digest in pins)

    def pinned(self, txn: Txn, key: KVKey) -> bool:
        return txn.get(key.digest, db=self.tables.pins) is not None

    def pin(self, txn: Txn, key: KVKey, *, pinned: bool) -> bool:
        """True if that changes anything."""
        if pinned:
            return txn.put(key.digest, b"", db=self.tables.pins, overwrite=False)
        return txn.delete(key.digest, db=self.tables.pins)

    def count_pinned(self, txn: Txn) -> int:
        """How many entries are pinned."""
        pins = txn.cursor(self.tables.pins).iternext(values=False)
        return sum(txn.get(bytes(digest), db=self.tables.entries) is not None for digest in pins)

    # Memory of what is not there

    def grief(self, txn: Txn, key: KVKey) -> Grief | None:
        return parse_grief(txn.get(key.digest, db=self.tables.tombstones))

    def mourn(self, txn: Txn, key: KVKey, usage: Usage, *, evicted: bool) -> None:
        """Remember; the longest unused of too many are forgotten."""
        grief = Grief(evicted, usage.frequency, usage.last, usage.priority)
        txn.put(key.digest, pack_grief(grief), db=self.tables.tombstones)
        if txn.stat(self.tables.tombstones)["entries"] > MOST_TOMBSTONES * 9 // 8:
            # An eighth at once: on the average the price is a few comparisons.
            rows = ((bytes(digest), parse_grief(row)) for digest, row in txn.cursor(self.tables.tombstones))
            ages = sorted((grief.last if grief else 0.0, digest) for digest, grief in rows)
            for _, digest in ages[:-MOST_TOMBSTONES]:
                txn.delete(digest, db=self.tables.tombstones)

    def forget(self, txn: Txn, key: KVKey) -> None:
        txn.delete(key.digest, db=self.tables.tombstones)

    def learn_source(self, txn: Txn, chunk: ChunkKV | Header) -> bool:
        """Remember that the source exists for this model; False if that was known."""
        known, tokenizer = chunk.source + chunk.layout.digest, chunk.tokenizer.encode()
        if txn.get(known, b"", db=self.tables.sources) == tokenizer:
            return False
        return txn.put(known, tokenizer, db=self.tables.sources)

    def forget_source(self, txn: Txn, header: Header) -> None:
        txn.delete(header.source + header.layout.digest, db=self.tables.sources)

    def known(self, txn: Txn, source: bytes) -> list[tuple[bytes, str]]:
        """The (layout digest, tokenizer) pairs of a source."""
        rows = prefixed(txn.cursor(self.tables.sources), source)
        return [(key[32:], bytes(value).decode(errors="replace")) for key, value in rows]

    # Numbers

    def complete(self, txn: Txn) -> bool:
        """False while the index is being rebuilt: entries of the segments may be missing."""
        return txn.get(b"complete", db=self.tables.meta) is not None

    def set_complete(self, txn: Txn) -> None:
        txn.put(b"complete", b"", db=self.tables.meta)

    def next_generation(self, txn: Txn) -> int:
        return self._add(txn, b"generation", 1)

    def total_bytes(self, txn: Txn) -> tuple[int, int]:
        """Payload bytes of all entries, as stored and decoded."""
        stored, raw = (int.from_bytes(txn.get(name, b"", db=self.tables.meta), "little") for name in _TOTALS)
        return stored, raw

    def count(self, txn: Txn, name: str, times: int = 1) -> None:
        self._add(txn, b"count:" + name.encode(), times)

    def counters(self, txn: Txn) -> dict[str, int]:
        rows = prefixed(txn.cursor(self.tables.meta), b"count:")
        return {key[6:].decode(errors="replace"): int.from_bytes(value, "little") for key, value in rows}

    def clock(self, txn: Txn) -> float:
        """Of the eviction policy."""
        row = txn.get(b"clock", b"", db=self.tables.meta)
        return float(struct.unpack("<d", row)[0]) if len(row) == 8 else 0.0

    def set_clock(self, txn: Txn, clock: float) -> None:
        txn.put(b"clock", struct.pack("<d", clock), db=self.tables.meta)

    def recount(self, txn: Txn, *, now: float) -> None:
        """Make what is counted true to the entries that are there; orphans of damage are dropped.

        Bytes that no entry and no grave accounts for count as dead: a collection finds them.
        """
        extents = {number: e._replace(live=0, records=0) for number, e in self.segments(txn).items()}
        stored = raw = 0
        seen: set[bytes] = set()
        for key, row in txn.cursor(self.tables.entries):
            digest = bytes(key)
            try:
                place = parse_place(digest, row)
            except CorruptEntryError:
                continue
            seen.add(digest)
            stored, raw = stored + place.payload, raw + place.raw
            if place.segment in extents:
                extents[place.segment] = added(extents[place.segment], place.length, 1, tail=False)
            if txn.get(digest, db=self.tables.usage) is None:
                self._guess_life(txn, digest, place, bytes(row[PLACE_BYTES:]), now)
        for number, extent in extents.items():
            self.set_extent(txn, number, extent)
        for name, total in zip(_TOTALS, (stored, raw), strict=True):
            txn.put(name, total.to_bytes(8, "little"), db=self.tables.meta)
        for table in (self.tables.usage, self.tables.payloads):
            for digest in [bytes(key) for key in txn.cursor(table).iternext(values=False)]:
                if digest not in seen:
                    txn.delete(digest, db=table)

    def _guess_life(self, txn: Txn, digest: bytes, place: Place, header: bytes, now: float) -> None:
        try:
            found = read_header(KVKey(digest), header)
            owner, cost = found.owner, float(found.tokens)
        except CorruptEntryError:
            owner, cost = "default", 0.0
        life = Life(1.0, now, 0.0, cost, now, place.length, place.payload)
        txn.put(digest, pack_life(life, owner), db=self.tables.usage)

    def _put_place(self, txn: Txn, key: KVKey, place: Place, header: bytes) -> None:
        txn.put(key.digest, pack_place(key.digest, place) + header, db=self.tables.entries)
