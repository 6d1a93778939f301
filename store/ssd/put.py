"""Entries put on the SSD, in groups: one transaction and one sync of the segment for all of a group."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from store.codec import Bytes
from store.entry import Header
from store.errors import StoreFullError
from store.evict import Item
from store.ssd.append import Appender, Piece
from store.ssd.database import Database, Txn
from store.ssd.index import Index
from store.ssd.reclaim import Reclaimer
from store.ssd.record import head_bytes, record_bytes
from store.ssd.room import Need, Room
from store.ssd.rows import INLINE, Grave, Life, Place
from store.types import KVKey

log = logging.getLogger(__name__)

INLINE_BYTES = 32 << 10  # payloads up to this go into the index: a file system block and a read of their own cost more
_MOST_ROUNDS = 4


class Coded(NamedTuple):
    """An entry as it is written; ``header`` is what ``blob`` says."""

    header: Header
    blob: bytes
    planes: Sequence[Bytes]

    @property
    def key(self) -> KVKey:
        return self.header.key

    @property
    def payload(self) -> int:
        return self.header.payload_bytes

    @property
    def record(self) -> int:
        return record_bytes(len(self.blob), self.payload)


class _Short(NamedTuple):
    """Bytes that are missing."""

    bytes: int


class Putter:
    """Puts groups, making room for them. Thread-safe."""

    def __init__(self, db: Database, index: Index, appender: Appender, room: Room, reclaimer: Reclaimer) -> None:
        self._db = db
        self._index = index
        self._appender = appender
        self._room = room
        self._reclaimer = reclaimer

    def put(self, group: Sequence[Coded]) -> list[int]:
        """As ``put_many``; sound entries that are there already are left alone, damaged ones must have been dropped."""
        sizes: list[int] = []
        created = self._appender.created
        while len(sizes) < len(group):
            rest = group[len(sizes) :]
            done = self._write(rest)
            if isinstance(done, _Short):  # one by one: each newcomer is weighed against those who would have to go
                done = [self._squeeze(rest[0])]
            sizes += done
        if self._appender.created != created:
            self._room.tidy()
        return sizes

    def _squeeze(self, one: Coded) -> int:
        """Put into a store that is full."""
        for _ in range(_MOST_ROUNDS):
            done = self._write([one])
            if not isinstance(done, _Short):
                return done[0]
            self._room.note_uses()
            made = self._room.make(self._newcomer(one), done.bytes)
            if not made.admitted:
                return 0
        raise StoreFullError(
            f"{self._db.path}: no room for {one.record} bytes under the limit of {self._room.limit}, whoever is evicted"
        )

    def _newcomer(self, one: Coded) -> Item:
        def work(txn: Txn) -> Item:
            life = self._life(txn, one, one.record, time.time())
            pinned = self._index.pinned(txn, one.key)
            return Item(one.key, one.record, life.cost, life.usage, one.header.owner, pinned)

        return self._db.read(work)

    def _write(self, group: Sequence[Coded]) -> list[int] | _Short:
        done = self._reclaimer.done()
        most = sum(one.record for one in group) + sum(len(one.blob) for one in group)
        result = self._db.write(partial(self._enter, group, done), need=min(most, _index_bytes(group)))
        self._reclaimer.noted(done)
        if not isinstance(result, _Short):
            for one, size in zip(group, result, strict=True):
                if size:
                    self._room.traffic.came(one.key, one.record, cost_of(one.header))
        return result

    def _enter(self, group: Sequence[Coded], done: dict[Grave, bool], txn: Txn) -> list[int] | _Short:
        index = self._index
        for one in group:
            index.learn_source(txn, one.header)  # the entry may be there from another source
        fresh: dict[KVKey, Coded] = {}
        for one in group:
            if one.key not in fresh and not index.has(txn, one.key):
                fresh[one.key] = one
        if not fresh:
            return [0] * len(group)
        self._reclaimer.note(txn, done)
        small = self._room.inline_allowed(txn)
        inline = {key for key, one in fresh.items() if small and one.payload <= INLINE_BYTES}
        needs = [self._room.need(len(o.blob), o.payload, o.record, inline=k in inline) for k, o in fresh.items()]
        short = self._room.short(txn, Need(sum(n.segments for n in needs), sum(n.rows for n in needs)))
        if short:
            return _Short(short)
        self._add(txn, fresh, inline)
        return [one.payload if fresh.get(one.key) is one else 0 for one in group]

    def _add(self, txn: Txn, fresh: dict[KVKey, Coded], inline: set[KVKey]) -> None:
        index, now = self._index, time.time()
        generations = {key: index.next_generation(txn) for key in fresh}
        outside = [key for key in fresh if key not in inline]
        pieces = [Piece(fresh[key].blob, fresh[key].planes, generations[key]) for key in outside]
        spots = dict(zip(outside, self._appender.append(txn, pieces), strict=True)) if pieces else {}
        for key, one in fresh.items():
            raw, length = one.header.raw_bytes, one.record
            if key in inline:
                length = -(-(one.payload + len(one.blob)) // 4096) * 4096
                place = Place(generations[key], INLINE, 0, 0, length, one.payload, raw)
                payload = b"".join(plane.data for plane in one.planes)
                txn.put(key.digest, payload, db=index.tables.payloads)
            else:
                segment, offset = spots[key]
                place = Place(generations[key], segment, head_bytes(len(one.blob)), offset, length, one.payload, raw)
            life = self._life(txn, one, length, now)
            index.add(txn, key, place, one.blob, life, one.header.owner)
        index.count(txn, "put", len(fresh))

    def _life(self, txn: Txn, one: Coded, length: int, now: float) -> Life:
        grief = self._index.grief(txn, one.key)
        cost = cost_of(one.header)
        before = None if grief is None else grief.usage
        usage = self._room.traffic.base.entered(length, cost, now=now, clock=self._index.clock(txn), before=before)
        return Life(usage.frequency, usage.last, usage.priority, cost, now, length, one.payload)


def cost_of(header: Header) -> float:
    """What recomputing the entry would cost, in tokens."""
    return float(header.tokens)


def _index_bytes(group: Sequence[Coded]) -> int:
    """About what the group adds to the index."""
    small = sum(one.payload for one in group if one.payload <= INLINE_BYTES)
    return small + sum(len(one.blob) + 4096 * 4 for one in group) + 4096 * 16
