"""Entries taken out: deleted, evicted by hand, or dropped because they are damaged."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from store.check import read_header
from store.errors import CorruptEntryError
from store.evict import Policy, missed
from store.ssd.database import Txn
from store.ssd.parts import Parts
from store.ssd.record import read_head
from store.ssd.rows import INLINE, Grave, Place
from store.types import KVKey


class _Gone(NamedTuple):
    """``there``: if there was an entry; the grave of its record, and segments that are empty without it."""

    there: bool
    graves: list[Grave]
    empty: list[int]


_NOTHING = _Gone(False, [], [])


def delete(parts: Parts, policy: Policy, keys: Sequence[KVKey], *, evicted: bool) -> int:
    """See ``KVStore.delete``; how many were there. What is deleted and not only evicted is found by no scan of the
    segments afterwards."""
    index = parts.index

    def one(txn: Txn, key: KVKey) -> _Gone:
        if not evicted:
            index.pin(txn, key, pinned=False)
            index.forget(txn, key)
        if not index.has(txn, key):
            return _NOTHING
        if evicted:
            found = index.life(txn, key)
            usage = found[0].usage if found is not None else missed(policy, None, now=time.time())
            index.mourn(txn, key, usage, evicted=True)
        else:
            _forget_source(parts, txn, key)
        index.count(txn, "evicted:asked" if evicted else "deleted")
        return _take(parts, txn, key, deleted=not evicted)

    def work(txn: Txn) -> list[_Gone]:
        if not evicted:
            parts.appender.trim(txn)
        return [one(txn, key) for key in keys]

    return _write(parts, work)


def drop(parts: Parts, key: KVKey, place: Place | None) -> bool:
    """Take out a damaged entry if it is still in ``place`` (None: its row is damaged, or its file missing): another
    process may have put a good one since. True if it was taken out."""
    index = parts.index

    def work(txn: Txn) -> list[_Gone]:
        sure = False
        try:
            now = index.place(txn, key)
        except CorruptEntryError:
            pass
        else:
            if now is None or (now != place if place is not None else _readable(parts, now)):
                return []
            sure = _is_its_own(parts, key, now)
        index.count(txn, "corrupt")
        return [_take(parts, txn, key, deleted=True, sure=sure)]

    return bool(_write(parts, work))


def _write(parts: Parts, work: Callable[[Txn], list[_Gone]]) -> int:
    """Commit what ``work`` takes out, then give its bytes back; how many entries were there."""
    done = parts.reclaimer.done()

    def whole(txn: Txn) -> list[_Gone]:
        parts.reclaimer.note(txn, done)
        return work(txn)

    gone = parts.db.write(whole, need=0)
    parts.reclaimer.noted(done)
    empty = {number for one in gone for number in one.empty}
    parts.reclaimer.settle([grave for one in gone for grave in one.graves], empty)
    return sum(one.there for one in gone)


def _take(parts: Parts, txn: Txn, key: KVKey, *, deleted: bool, sure: bool = True) -> _Gone:
    place = parts.index.remove(txn, key, deleted=deleted, bury=sure)
    if place is None or not sure:
        parts.index.recount(txn, now=time.time())
    if place is None or place.segment == INLINE or not sure:
        return _Gone(True, [], [])
    grave = Grave(place.segment, place.offset, place.length, deleted)
    return _Gone(True, [grave], parts.reclaimer.drop_empty(txn, [place.segment]))


def _forget_source(parts: Parts, txn: Txn, key: KVKey) -> None:
    try:
        found = parts.index.find(txn, key)
        if found is not None:
            parts.index.forget_source(txn, read_header(key, found[1]))
    except CorruptEntryError:
        pass  # its source is unknown


def _is_its_own(parts: Parts, key: KVKey, place: Place) -> bool:
    """If the record there is the entry's: of a damaged row it may be another's, whose bytes must not be given back."""
    if place.segment == INLINE:
        return True
    try:
        record = read_head(parts.segments.open(place.segment), place.offset)
        return record.generation == place.generation and read_header(key, record.header).key == key
    except (CorruptEntryError, OSError):
        return False


def _readable(parts: Parts, place: Place) -> bool:
    return place.segment == INLINE or parts.segments.path(place.segment).exists()
