"""New records at the end of the last segment."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from store.codec import Bytes
from store.ssd.database import Txn
from store.ssd.files import Buffer
from store.ssd.index import Index
from store.ssd.record import head_bytes, make_head, padding, record_bytes
from store.ssd.segment import Segment, Segments

log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """One entry to be written: its encoded header and planes."""

    header: bytes
    planes: Sequence[Bytes]
    generation: int

    @property
    def payload(self) -> int:
        return sum(plane.size for plane in self.planes)

    @property
    def head(self) -> int:
        return head_bytes(len(self.header))

    @property
    def length(self) -> int:
        return record_bytes(len(self.header), self.payload)

    def buffers(self) -> list[Buffer]:
        head = make_head(self.header, self.generation, self.payload)
        return [head, *(plane.data for plane in self.planes), padding(self.payload)]


class Appender:
    """Appends inside write transactions, so one process at a time. ``segment_bytes``: a segment is sealed rather than
    grow beyond; a larger record gets one of its own."""

    def __init__(self, index: Index, segments: Segments, segment_bytes: int) -> None:
        self.segment_bytes = segment_bytes
        self.created = 0  # segments so far
        self._index = index
        self._segments = segments
        # After a failed write or sync the kernel may have dropped dirty pages and call the next sync a success.
        self._distrusted: set[int] = set()

    def append(self, txn: Txn, pieces: Sequence[Piece]) -> list[tuple[int, int]]:
        """Write and sync; segment and offset of each. The caller puts them into the index, in this order, and commits.

        Raises ``OSError``; then the transaction must be aborted.
        """
        for number in self._distrusted:
            self._index.seal(txn, number)
        spots: list[tuple[int, int]] = []
        waiting: list[Buffer] = []
        number, start = self._current(txn)
        tail = start
        for piece in pieces:
            if not number or (tail and tail + piece.length > self.segment_bytes):
                self._write(number, waiting, start)
                number, start, tail, waiting = self._create(txn), 0, 0, []
            spots.append((number, tail))
            waiting += piece.buffers()
            tail += piece.length
        self._write(number, waiting, start)
        return spots

    def trim(self, txn: Txn) -> None:
        """Cut what a crash left above the tail: a scan would find entries in it that have been deleted since."""
        number, tail = self._current(txn)
        if number:
            self._segments.open(number).trim(tail)

    def _current(self, txn: Txn) -> tuple[int, int]:
        """The segment to append to and its tail; number 0 if a new one is due."""
        current = self._index.open_extent(txn)
        if current is None or current[0] in self._distrusted:
            return 0, 0
        number, extent = current
        try:
            segment = self._linked(number)
            if segment.size() >= extent.tail:
                return number, extent.tail
            log.warning("%s is shorter than its index: nothing is appended to it", segment.path)
        except FileNotFoundError:
            log.warning("%s is missing", self._segments.path(number))
        self._distrusted.add(number)
        return 0, 0

    def _linked(self, number: int) -> Segment:
        """The file of that name now: one that is open here may have been removed by another process."""
        segment = self._segments.open(number)
        if segment.linked:
            return segment
        self._segments.forget(number)
        return self._segments.open(number)

    def _create(self, txn: Txn) -> int:
        number = self._index.new_segment(txn)
        try:
            self._segments.create(number)
        except OSError:
            self._give_up(number, 0)
            raise
        self.created += 1
        return number

    def _write(self, number: int, buffers: list[Buffer], start: int) -> None:
        if not number:
            return
        segment = self._segments.open(number)
        try:
            # Also of a segment that is only sealed now: nobody would cut its garbage off later.
            trimmed = segment.trim(start)
            segment.write(buffers, start)
            if buffers or trimmed:
                segment.sync()
        except OSError:
            self._give_up(number, start)
            raise

    def _give_up(self, number: int, tail: int) -> None:
        """What was written is nobody's: the transaction is not committed."""
        self._distrusted.add(number)
        with suppress(OSError):  # the next one who appends does it else, or nobody: a scan checks what it finds
            if tail:
                self._segments.open(number).trim(tail)
            else:
                self._segments.remove(number)
