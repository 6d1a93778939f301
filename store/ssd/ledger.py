"""The segments in the index: how full each is, what lives in it, and which of its dead still take room."""

from __future__ import annotations

from collections.abc import Iterator

from store.ssd.database import Cursor, Tables, Txn
from store.ssd.rows import (
    INLINE,
    Extent,
    Grave,
    Place,
    pack_extent,
    pack_grave,
    parse_extent,
    parse_grave,
    segment_key,
)


class Ledger:
    """The tables ``segments`` and ``graves`` (see ``Index``), and numbers. All of it inside a transaction."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables

    def segments(self, txn: Txn) -> dict[int, Extent]:
        """All of them, by number, ascending."""
        rows = txn.cursor(self.tables.segments)
        return {int.from_bytes(key, "big"): parse_extent(row) for key, row in rows}

    def extent(self, txn: Txn, number: int) -> Extent:
        return parse_extent(txn.get(segment_key(number), b"", db=self.tables.segments))

    def set_extent(self, txn: Txn, number: int, extent: Extent) -> None:
        txn.put(segment_key(number), pack_extent(extent), db=self.tables.segments)

    def open_extent(self, txn: Txn) -> tuple[int, Extent] | None:
        """The segment that is appended to, if there is one: the last, unless it is sealed."""
        cursor = txn.cursor(self.tables.segments)
        if not cursor.last():
            return None
        extent = parse_extent(cursor.value())
        return None if extent.sealed else (int.from_bytes(cursor.key(), "big"), extent)

    def new_segment(self, txn: Txn) -> int:
        """The number of the next segment, now in the table and empty; the one before is sealed."""
        current = self.open_extent(txn)
        if current is not None:
            self.set_extent(txn, current[0], current[1]._replace(sealed=True))
        number = self._add(txn, b"segment", 1)
        self.set_extent(txn, number, Extent())
        return number

    def seal(self, txn: Txn, number: int) -> None:
        """Append to it never again; of a segment that is not in the table, its number is used up."""
        if txn.get(segment_key(number), db=self.tables.segments) is not None:
            self.set_extent(txn, number, self.extent(txn, number)._replace(sealed=True))
        self.restore(txn, segment=number)

    def restore(self, txn: Txn, *, generation: int = 0, segment: int = 0) -> None:
        """Use no generation and no segment number up to these (again)."""
        for name, least in ((b"generation", generation), (b"segment", segment)):
            now = int.from_bytes(txn.get(name, b"", db=self.tables.meta), "little")
            self._add(txn, name, max(0, least - now))

    def drop_segment(self, txn: Txn, number: int) -> None:
        """Forget a segment and its graves; nothing in it may be live."""
        txn.delete(segment_key(number), db=self.tables.segments)
        for grave in self.graves(txn, number):
            txn.delete(pack_grave(grave)[0], db=self.tables.graves)

    def graves(self, txn: Txn, segment: int | None = None) -> list[Grave]:
        """Dead records that still take room."""
        rows = prefixed(txn.cursor(self.tables.graves), b"" if segment is None else segment_key(segment))
        return [grave for key, row in rows if (grave := parse_grave(key, row)) is not None]

    def clear_grave(self, txn: Txn, grave: Grave, *, punched: bool) -> None:
        """It was dealt with: its bytes are given back (``punched``), or it is only made unfindable."""
        key, _ = pack_grave(grave)
        if txn.get(key, db=self.tables.graves) is None:
            return  # another process did, or the segment is gone
        if punched:
            txn.delete(key, db=self.tables.graves)
            extent = self.extent(txn, grave.segment)
            self.set_extent(txn, grave.segment, extent._replace(freed=extent.freed + grave.length))
        else:
            txn.put(*pack_grave(grave._replace(deleted=False)), db=self.tables.graves)

    def _occupy(self, txn: Txn, place: Place) -> None:
        """A live record lies in ``place`` now, at the tail of its segment."""
        if place.segment != INLINE:
            self.set_extent(txn, place.segment, added(self.extent(txn, place.segment), place.length, 1))

    def _bury(self, txn: Txn, place: Place, *, deleted: bool) -> None:
        if place.segment == INLINE:
            return
        self.set_extent(txn, place.segment, added(self.extent(txn, place.segment), -place.length, -1))
        txn.put(*pack_grave(Grave(place.segment, place.offset, place.length, deleted)), db=self.tables.graves)

    def _add(self, txn: Txn, name: bytes, change: int) -> int:
        total = max(0, int.from_bytes(txn.get(name, b"", db=self.tables.meta), "little") + change)
        txn.put(name, total.to_bytes(8, "little"), db=self.tables.meta)
        return total


def prefixed(cursor: Cursor, prefix: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """The items whose key starts with ``prefix``."""
    ahead = cursor.set_range(prefix) if prefix else cursor.first()
    while ahead:
        key = bytes(cursor.key())
        if not key.startswith(prefix):
            return
        yield key, cursor.value()
        ahead = cursor.next()


def added(extent: Extent, length: int, records: int, *, tail: bool = True) -> Extent:
    """After ``records`` more (or fewer) of ``length`` bytes; a new one lies at the tail."""
    grown = extent.tail + length if tail and length > 0 else extent.tail
    live, count = max(0, extent.live + length), max(0, extent.records + records)
    return extent._replace(tail=grown, live=live, records=count)
