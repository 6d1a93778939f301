"""The room of dead records given back to the device.

A record that dies gets a grave in the same transaction. After the commit its blocks are punched out of the file, which
costs no copying; the grave's row goes with the next transaction. A kill in between leaves graves, which the next one
who opens the store or collects finds.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Iterable

from store.ssd.database import Txn
from store.ssd.index import Index
from store.ssd.rows import Grave
from store.ssd.segment import Segments

log = logging.getLogger(__name__)


class Reclaimer:
    """Thread-safe. ``supported`` turns False when the file system cannot punch: then collections copy."""

    def __init__(self, index: Index, segments: Segments) -> None:
        self.supported = True
        self._index = index
        self.segments = segments
        self._done: dict[Grave, bool] = {}  # if its bytes are given back
        self._lock = threading.Lock()

    def drop_empty(self, txn: Txn, numbers: Iterable[int]) -> list[int]:
        """Forget those of the segments in which nothing lives; their files are to be removed after the commit."""
        empty = []
        for number in set(numbers):
            extent = self._index.extent(txn, number)
            if extent.sealed and not extent.records:
                self._index.drop_segment(txn, number)
                empty.append(number)
        return empty

    def settle(self, graves: Iterable[Grave], empty: Iterable[int] = ()) -> int:
        """After the commit: remove ``empty`` segments, make deleted records unfindable, give the bytes back; how many.

        What fails is left to the next collection: the entries are gone all the same.
        """
        freed = 0
        for number in empty:
            try:
                freed += self.segments.remove(number)
            except OSError as error:
                log.warning("could not remove %s: %s", self.segments.path(number), error)
        by_segment: dict[int, list[Grave]] = defaultdict(list)
        for grave in graves:
            if grave not in self._done and grave.segment not in empty:
                by_segment[grave.segment].append(grave)
        for number, dead in by_segment.items():
            try:
                freed += self._dig(number, dead)
            except FileNotFoundError:
                continue  # collected meanwhile
            except OSError as error:
                log.warning("could not give back records of %s: %s", self.segments.path(number), error)
        return freed

    def done(self) -> dict[Grave, bool]:
        """The graves that ``note`` has to take out of the index."""
        with self._lock:
            return dict(self._done)

    def unnoted(self) -> int:
        """Bytes that are given back and that the index still counts."""
        return sum(grave.length for grave, punched in self.done().items() if punched)

    def note(self, txn: Txn, done: dict[Grave, bool]) -> None:
        for grave, punched in done.items():
            self._index.clear_grave(txn, grave, punched=punched)

    def noted(self, done: dict[Grave, bool]) -> None:
        """``note`` was committed."""
        with self._lock:
            for grave in done:
                self._done.pop(grave, None)

    def _dig(self, number: int, graves: list[Grave]) -> int:
        segment = self.segments.open(number)
        punched: dict[Grave, bool] = {}
        for grave in graves:
            # Also where the bytes are given back: a hole is not durable before the next sync.
            segment.mark_dead(grave.offset)
            if self.supported:
                self.supported = segment.punch(grave.offset, grave.length)
            punched[grave] = self.supported
        if any(grave.deleted for grave in graves):
            segment.sync()
        with self._lock:
            self._done.update(punched)
        return sum(grave.length for grave, freed in punched.items() if freed)
