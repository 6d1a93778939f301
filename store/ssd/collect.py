"""Dead bytes given back to the device: what lives in a segment is copied to the end of the log, then its file goes.

Deleted records are punched out of their files at once where the file system can do that; this is for those that cannot,
and for segments of which little is left. It may be killed at any point: an entry is where the index says, a file that
the index does not know is removed at the next start, and a copy nobody refers to is dead.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from store.check import read_header
from store.codec import Bytes
from store.entry import Header, check_plane
from store.errors import CorruptEntryError, StoreFullError, StoreIOError
from store.ssd.append import Appender, Piece
from store.ssd.database import Database, Txn
from store.ssd.index import Index
from store.ssd.rows import Extent, Place, parse_place
from store.ssd.segment import Segments
from store.types import KVKey

log = logging.getLogger(__name__)

_BATCH_BYTES = 32 << 20  # copied in one transaction: so long other writers wait
_BATCH_RECORDS = 256
_DEAD_SHARE = 0.25
_SPARSE = 4  # a file of which less than a quarter lives is merged with others, even if its holes take no room
_ROW_BYTES = 16 << 10  # of the index per moved entry, generously


@dataclass(frozen=True)
class Collected:
    """``freed`` bytes of the device, ``moved`` bytes copied for it, ``segments`` removed, ``bad`` entries that were
    found damaged and dropped."""

    freed: int = 0
    moved: int = 0
    segments: int = 0
    bad: tuple[KVKey, ...] = ()


_Entry = tuple[KVKey, Place]


class _Victim(NamedTuple):
    number: int
    live: list[_Entry]

    @property
    def need(self) -> int:
        """Bytes its copies take."""
        return sum(place.length for _, place in self.live)


class _Copy(NamedTuple):
    """What was read of an entry; no ``piece`` if that is damaged."""

    key: KVKey
    place: Place
    piece: Piece | None
    fault: str = ""


class _Moved(NamedTuple):
    bytes: int
    bad: list[KVKey]


def collect(
    db: Database,
    index: Index,
    segments: Segments,
    appender: Appender,
    *,
    most_bytes: int | None = None,
    full: bool = False,
) -> Collected:
    """Empty the segments with the highest share of dead bytes, copying at most ``most_bytes`` (None: no limit).

    ``full``: every segment that has any dead byte, so that none is left. Raises ``StoreIOError``, and
    ``StoreFullError`` before anything is changed if the device has no room for the copies of even one segment.
    """
    victims = _victims(db, index, appender.segment_bytes, most_bytes, full)
    freed = moved = removed = 0
    bad: list[KVKey] = []
    refused: list[int] = []
    for victim in victims:
        if victim.need > db.spare_bytes():
            refused.append(victim.need)
            continue
        emptied = _empty(db, index, segments, appender, victim)
        removed += 1
        moved += emptied.bytes
        bad += emptied.bad
        freed += _unlink(segments, victim.number) - emptied.bytes
    if refused and not removed:
        raise StoreFullError(
            f"{db.path}: a collection needs {min(refused)} bytes for copies before it can free a segment, there are "
            f"{max(0, db.spare_bytes())} free beyond the reserve; delete or evict entries, or make room on the device"
        )
    return Collected(max(0, freed), moved, removed, tuple(bad))


def remove_leftovers(db: Database, index: Index, segments: Segments) -> None:
    """Remove what killed processes have left: files that the index does not know, and what lies above the tails.

    Only of a complete index: before, nobody knows what is left over. What cannot be removed is logged, and stays.
    """
    if not any(db.read(lambda txn: _leftovers(txn, index, segments))):
        return

    def work(txn: Txn) -> None:
        # Files are made and written inside write transactions only: none is in the making now.
        orphans, ends = _leftovers(txn, index, segments)
        for number in orphans:
            log.warning("%s belongs to nobody and is removed", segments.path(number))
            _unlink(segments, number)
        for number, tail in ends.items():
            log.warning("%s is cut to its tail, %d", segments.path(number), tail)
            try:
                segments.open(number).trim(tail)
                segments.open(number).sync()
            except OSError as error:
                log.warning("%s stays as it is for now: %s", segments.path(number), error)

    db.write(work, need=0)


def _leftovers(txn: Txn, index: Index, segments: Segments) -> tuple[list[int], dict[int, int]]:
    """Numbers of files of nobody, and the tails of files that are longer."""
    if not index.complete(txn):
        return [], {}
    known = index.segments(txn)
    there = {}
    for number in segments.numbers():
        with suppress(FileNotFoundError):  # collected meanwhile by another process
            there[number] = segments.path(number).stat().st_size
    longer = {number: known[number].tail for number in there if number in known and there[number] > known[number].tail}
    return [number for number in there if number not in known], longer


def _victims(db: Database, index: Index, segment_bytes: int, most_bytes: int | None, full: bool) -> list[_Victim]:
    """What to empty, the most worthwhile first."""
    candidates = {n: e for n, e in db.read(index.segments).items() if _worth_it(e, segment_bytes, full)}
    if any(not extent.sealed for extent in candidates.values()):

        def seal(txn: Txn) -> None:  # what is emptied is not appended to
            for number in candidates:
                index.seal(txn, number)

        db.write(seal, need=0)
    if not candidates:
        return []
    live = db.read(lambda txn: _live(txn, index, set(candidates)))
    chosen, total = [], 0
    for number in sorted(candidates, key=lambda n: (_waste(candidates[n]), n), reverse=True):
        victim = _Victim(number, sorted(live[number], key=lambda entry: entry[1].offset))
        if most_bytes is None or not victim.need or total + victim.need <= most_bytes:
            total += victim.need
            chosen.append(victim)
    return chosen


def _live(txn: Txn, index: Index, numbers: set[int]) -> dict[int, list[_Entry]]:
    """What lives in these segments, in one pass over the index: it is by key. Nothing enters a sealed segment, so a
    snapshot has all that will have to go; damaged rows are left to whoever asks for them."""
    live: dict[int, list[_Entry]] = {number: [] for number in numbers}
    for raw, row in txn.cursor(index.tables.entries):
        digest = bytes(raw)
        try:
            place = parse_place(digest, row)
            if place.segment in live:
                live[place.segment].append((KVKey(digest), place))
        except (CorruptEntryError, ValueError):
            continue
    return live


def _worth_it(extent: Extent, segment_bytes: int, full: bool) -> bool:
    if extent.sealed and not extent.records:
        return True
    sparse = extent.live * _SPARSE < extent.tail
    if full:
        small = extent.sealed and extent.live * _SPARSE < segment_bytes
        return extent.dead > 0 or sparse or small
    return extent.sealed and (sparse or extent.dead > _DEAD_SHARE * extent.held)


def _waste(extent: Extent) -> float:
    """Of its bytes, those that are of no use; an empty one before all others."""
    return 1.0 - extent.live / max(1, extent.tail) if extent.live else 2.0


def _empty(db: Database, index: Index, segments: Segments, appender: Appender, victim: _Victim) -> _Moved:
    """Move all that lives in a segment and forget it; its file is the caller's."""
    total, bad = 0, []
    batches = list(_batches(victim.live))
    for n, batch in enumerate(batches):
        copies = _read(db, index, segments, batch)
        moved = _move(db, index, appender, copies, drop=victim.number if n + 1 == len(batches) else None)
        total += moved.bytes
        bad += moved.bad
    return _Moved(total, bad)


def _batches(live: Sequence[_Entry]) -> Iterator[list[_Entry]]:
    """At least one, perhaps empty."""
    batch: list[_Entry] = []
    held = 0
    for key, place in live:
        if batch and (held + place.length > _BATCH_BYTES or len(batch) == _BATCH_RECORDS):
            yield batch
            batch, held = [], 0
        batch.append((key, place))
        held += place.length
    yield batch


def _read(db: Database, index: Index, segments: Segments, batch: Sequence[_Entry]) -> list[_Copy]:
    """What the entries are, checked, outside of a write transaction: other writers go on meanwhile.

    Damage is what cannot be read at all, too; of other failures ``StoreIOError``.
    """
    copies = []
    for key, place in batch:
        try:
            found = db.read(lambda txn, key=key: index.find(txn, key))  # type: ignore[misc]
            if found is None or found[0] != place:
                continue  # deleted or put anew since the segment was chosen
            planes = _planes(segments, place, read_header(key, found[1]))
            copies.append(_Copy(key, place, Piece(found[1], planes, place.generation)))
        except CorruptEntryError as error:
            copies.append(_Copy(key, place, None, str(error)))
        except OSError as error:
            if not isinstance(error, FileNotFoundError) and error.errno != errno.EIO:
                raise StoreIOError(f"{segments.path(place.segment)}: {error}") from error
            copies.append(_Copy(key, place, None, str(error)))
    return copies


def _planes(segments: Segments, place: Place, header: Header) -> list[Bytes]:
    """Raises ``CorruptEntryError`` unless they are what was written; ``OSError``."""
    payload = np.empty(header.payload_bytes, np.uint8)
    segments.open(place.segment).read([payload.data], place.offset + place.head)
    planes = [payload[start:end] for start, end in pairwise(header.offsets)]
    for layer, plane in enumerate(planes):
        check_plane(header, layer, plane)
    return planes


def _move(db: Database, index: Index, appender: Appender, copies: Sequence[_Copy], drop: int | None) -> _Moved:
    """Append what is still where it was read, in one transaction; with ``drop``, forget that segment then."""

    def work(txn: Txn) -> _Moved:
        here = [copy for copy in copies if _still(txn, index, copy)]
        good = [(copy, copy.piece) for copy in here if copy.piece is not None]
        spots = appender.append(txn, [piece for _, piece in good])
        for (copy, piece), (number, offset) in zip(good, spots, strict=True):
            place = copy.place._replace(segment=number, offset=offset, head=piece.head, length=piece.length)
            index.move(txn, copy.key, place)
        bad = [copy for copy in here if copy.piece is None]
        for copy in bad:
            log.warning("%s is damaged and dropped: %s", copy.key.hex, copy.fault)
            index.remove(txn, copy.key, deleted=True)
            index.count(txn, "corrupt")
        if drop is not None:
            index.drop_segment(txn, drop)
        return _Moved(sum(piece.length for _, piece in good), [copy.key for copy in bad])

    need = _ROW_BYTES * (1 + len(copies)) + sum(len(copy.piece.header) for copy in copies if copy.piece is not None)
    return db.write(work, need=need)


def _still(txn: Txn, index: Index, copy: _Copy) -> bool:
    try:
        return index.place(txn, copy.key) == copy.place
    except CorruptEntryError:
        return False  # its row has been damaged since: found by whoever asks for it


def _unlink(segments: Segments, number: int) -> int:
    """The bytes it took. What cannot be removed now is an orphan, removed at a later start."""
    try:
        return segments.remove(number)
    except OSError as error:
        log.warning("%s stays for now: %s", segments.path(number), error)
        return 0
