"""The index made anew from the segments, when it is lost or damaged.

Segments say everything about their entries. What is not in them is lost with the index: entries small enough to lie in
the index itself, pins, how often each was used, why what is gone went, the counters.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from store.entry import Header, check_plane, decode_header
from store.errors import CorruptEntryError, StoreError
from store.evict import Usage
from store.plainfile import translated
from store.ssd.database import Database, Txn
from store.ssd.files import Files
from store.ssd.folder import ASIDE, DATA
from store.ssd.index import Index
from store.ssd.record import BLOCK, Record, scan
from store.ssd.rows import Extent, Grave, Life, Place, pack_grave
from store.ssd.segment import Segment, Segments

log = logging.getLogger(__name__)

_BATCH = 256  # records per transaction
_ROW_BYTES = 16 << 10  # of the index per entry, generously


@dataclass(frozen=True)
class Rebuilt:
    """``entries`` that are in the index now, ``skipped`` records that were damaged or overtaken by a later one."""

    entries: int
    skipped: int


class _Sound(NamedTuple):
    """A record that is what was written."""

    header: Header
    blob: bytes
    place: Place


def rebuild(db: Database, index: Index, segments: Segments, *, now: float) -> Rebuilt | None:
    """Index every sound record of every segment; of several of one key the one written last.

    For an index that is not ``complete``; it is after this. May be killed and called again, by several processes at
    once: None if another one has finished first. All segments are sealed: what is above the tail of one cannot be told
    from what is below. Raises ``StoreFullError``, ``StoreIOError``; segments that cannot be read are left out.
    """
    numbers = segments.numbers()
    last = 0  # the highest generation
    skipped = 0
    for number in numbers:
        log.info("rebuilding the index: segment %d of %d", number, numbers[-1])
        batch: list[_Sound] = []
        bad: list[Grave] = []
        for found in _records(segments, number):
            if isinstance(found, Grave):
                bad.append(found)
                skipped += 1
                continue
            batch.append(found)
            last = max(last, found.place.generation)
            if len(batch) == _BATCH:
                if not _enter(db, index, batch, bad, now):
                    return None
                batch, bad = [], []
        if not _enter(db, index, batch, bad, now):
            return None

    def finish(txn: Txn) -> int | None:
        if index.complete(txn):
            return None
        for number in numbers:
            tail, freed = _measured(segments, number)
            index.set_extent(txn, number, Extent(tail=tail, freed=freed, sealed=True))
        index.restore(txn, generation=last, segment=max(numbers, default=0))
        index.recount(txn, now=now)
        for number, extent in index.segments(txn).items():
            index.set_extent(txn, number, extent._replace(freed=min(extent.freed, extent.tail - extent.live)))
        index.set_complete(txn)
        return int(txn.stat(index.tables.entries)["entries"])

    entries = db.write(finish, need=BLOCK * (16 + len(numbers)))
    if entries is None:
        return None
    if numbers:
        log.warning("%s: the index was rebuilt: %d entries, %d records left out", db.path, entries, skipped)
    return Rebuilt(entries, skipped)


def put_aside(path: Path, files: Files | None = None) -> Path | None:
    """Rename the index of the store in ``path``, so that the next open makes a new one; its new name, if there was one.

    No process may have the store open, this one included. Raises ``StoreError`` if another has, ``StoreIOError``.
    """
    files = files if files is not None else Files()
    with translated(path), _alone(path):
        if not (path / DATA).exists():
            return None
        number = 1
        while (aside := path / f"{ASIDE}damaged-{number}").exists():
            number += 1
        os.rename(path / DATA, aside)
        files.sync_folder(path)
    log.warning("the damaged index of %s is kept as %s", path, aside.name)
    return aside


def _enter(db: Database, index: Index, batch: list[_Sound], bad: list[Grave], now: float) -> bool:
    """Put a batch into the index; False if the index is complete already: then entries may have been deleted since
    their records were read."""

    def work(txn: Txn) -> bool:
        if index.complete(txn):
            return False
        for grave in bad:
            key, row = pack_grave(grave)
            txn.put(key, row, db=index.tables.graves)
        for header, blob, place in batch:
            _enter_one(txn, index, header, blob, place, now)
        return True

    return db.write(work, need=_ROW_BYTES * (1 + len(batch)) + sum(len(found.blob) for found in batch))


def _enter_one(txn: Txn, index: Index, header: Header, blob: bytes, place: Place, now: float) -> None:
    try:
        there = index.place(txn, header.key)
    except CorruptEntryError:
        there = None
        index.remove(txn, header.key, deleted=True)
    if there is not None:
        if (there.segment, there.offset) == (place.segment, place.offset):
            return  # a rebuild that was killed has entered it
        if there.generation >= place.generation:
            # Of a moved record's two copies either will do.
            key, row = pack_grave(Grave(place.segment, place.offset, place.length, True))
            txn.put(key, row, db=index.tables.graves)
            return
        index.remove(txn, header.key, deleted=True)
    usage = Usage(frequency=1.0, last=now, priority=0.0)
    life = Life(usage.frequency, usage.last, usage.priority, float(header.tokens), now, place.length, place.payload)
    index.add(txn, header.key, place, blob, life, header.owner)
    index.learn_source(txn, header)


def _records(segments: Segments, number: int) -> Iterator[_Sound | Grave]:
    """Every record of a segment: sound, or a grave for it. What the device cannot read any more is left out."""
    try:
        segment = segments.open(number)
        for record in scan(segment):
            try:
                yield _sound(segment, record)
            except CorruptEntryError as error:
                log.warning("%s: the record at %d is left out: %s", segment.path.name, record.offset, error)
                yield Grave(number, record.offset, record.length, True)
    except OSError as error:
        log.error("segment %d cannot be read on, what follows in it is left out: %s", number, error)


def _sound(segment: Segment, record: Record) -> _Sound:
    """Raises ``CorruptEntryError`` unless every byte is as it was written; ``OSError``."""
    header = decode_header(record.header)
    if header.payload_bytes != record.payload_bytes:
        raise CorruptEntryError(f"{record.payload_bytes} bytes of planes, its header says {header.payload_bytes}")
    payload = np.empty(record.payload_bytes, np.uint8)
    segment.read([payload.data], record.offset + record.head)
    for layer, (start, size) in enumerate(zip(header.offsets, header.sizes, strict=False)):
        check_plane(header, layer, payload[start : start + size])
    place = Place(
        generation=record.generation,
        segment=segment.number,
        head=record.head,
        offset=record.offset,
        length=record.length,
        payload=record.payload_bytes,
        raw=header.raw_bytes,
    )
    return _Sound(header, record.header, place)


def _measured(segments: Segments, number: int) -> tuple[int, int]:
    """Where a segment ends, and how many bytes of it the device has back."""
    try:
        segment = segments.open(number)
        segment.sync()  # what is not written yet takes no room yet
        tail = -(-segment.size() // BLOCK) * BLOCK
        freed = max(0, tail - -(-segment.held() // BLOCK) * BLOCK)
    except OSError as error:
        log.error("segment %d cannot be opened: %s", number, error)
        tail = freed = 0
    return tail, freed


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """LMDB's own lock of the environment, exclusively: every process that has it open holds it shared."""
    lock = os.open(path / "lock.mdb", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0, os.SEEK_SET)
        except (BlockingIOError, PermissionError) as error:
            raise StoreError(f"{path} is in use by another process: stop it before its index is replaced") from error
        yield
    finally:
        os.close(lock)
