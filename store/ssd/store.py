"""A store on disk, shared by the processes of one machine."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from store.base import Entry, Found, GcReport, KVStore, Miss, StoreStats, VerifyReport
from store.check import mismatch
from store.codec import Bytes, Codec, open_codec
from store.codec.choose import Prices, choose_codec
from store.config import StoreConfig
from store.entry import check_plane, decode_header, encode
from store.errors import CorruptEntryError, LostError, StoreError
from store.evict import open_policy
from store.ssd import listing, remove
from store.ssd.ahead import Ahead
from store.ssd.collect import collect, remove_leftovers
from store.ssd.database import DamagedError, Txn
from store.ssd.files import Files
from store.ssd.found import Spot, SsdFound, check_spot
from store.ssd.look import look
from store.ssd.parts import Parts
from store.ssd.put import Coded
from store.ssd.rebuild import put_aside
from store.ssd.rows import INLINE, Place
from store.ssd.uses import Batch, Uses, write_uses
from store.ssd.verify import verify
from store.types import ChunkKV, KVKey, Want

log = logging.getLogger(__name__)

_GROUP_BYTES = 64 << 20  # encoded at once, and written in one transaction: so long other writers wait
_DELETED = 1024  # entries deleted in one transaction
_SWEEP_S = 10.0


class SsdStore(KVStore):
    """Chunks in segment files under the folder ``config.path``, with LMDB as their index.

    Several processes may read and write at once; one process opens it once, and not across a fork. What it does to
    files goes through ``files``. Raises at opening as ``Database`` does; an index that is damaged or lost is rebuilt
    then, from the segments.
    """

    tier = "ssd"

    def __init__(self, config: StoreConfig, *, files: Files | None = None) -> None:
        if config.path is None:
            raise ValueError("an SSD store needs a path")
        self.config = config
        self.path = config.path
        self._files = files if files is not None else Files()
        self._policy = open_policy(config.policy)
        self._uses = Uses(self._note)
        self.ahead = Ahead()
        self._seen: Counter[str] = Counter()  # what a read-only store cannot write down
        self._swept = time.monotonic()
        self._sweeping = threading.Lock()
        self._parts = self._open()

    def _open(self) -> Parts:
        return Parts(self.path, self.config, self._policy, self._files, self._uses.flush)

    # Reading

    def find(self, want: Want) -> Found | Miss:
        key = want.key
        place: Place | None = None
        try:
            spot = look(self._parts.db, self._parts.index, self._parts.segments, key, want)
            if isinstance(spot, Miss):
                if self.config.max_bytes is not None:
                    self.used(key)  # so that it is worth more when it comes (back)
                return spot
            place = spot.place
            header = check_spot(key, spot)
        except DamagedError as error:
            self._seen["corrupt"] += 1
            log.error("cannot look up %s: %s", key.hex, error)
            return Miss("checksum_failed")
        except CorruptEntryError as error:
            self.drop(key, place, str(error))
            return Miss("checksum_failed")
        reason = mismatch(want, header)
        if reason is not None:
            return Miss(reason)
        self.used(key)
        return SsdFound(header, spot, self)

    def locate(self, key: KVKey) -> Spot | None:
        """Where the entry is. Raises ``CorruptEntryError`` if its row is damaged or its file is missing."""
        spot = look(self._parts.db, self._parts.index, self._parts.segments, key, None)
        return None if isinstance(spot, Miss) else spot

    def contains(self, key: KVKey) -> bool:
        return self._parts.db.read(lambda txn: self._parts.index.has(txn, key))

    def generation(self, key: KVKey) -> int | None:
        """A number that changes when the entry does; None if there is none."""
        place = self._parts.db.read(partial(self._place, key))
        return None if place is None else place.generation

    def read_encoded(self, key: KVKey) -> tuple[bytes, list[Bytes]] | None:
        """The entry as it is stored, its header and its planes [n] uint8 in one new buffer; None if there is none.

        Every checksum is verified. Not a use. Raises ``LostError`` if it is damaged, and has dealt with it.
        """
        place: Place | None = None
        try:
            spot = self.locate(key)
            if spot is None:
                return None
            place = spot.place
            found = SsdFound(check_spot(key, spot), spot, self)
        except CorruptEntryError as error:
            self.drop(key, place, str(error))
            raise LostError("checksum_failed", f"{key.hex}: {error}") from error
        return spot.header, found.planes()

    def used(self, key: KVKey) -> None:
        """Note a use, of a copy in a tier above for example."""
        if not self.config.readonly:
            self._uses.note(key)
        if time.monotonic() - self._swept > _SWEEP_S and self._sweeping.acquire(blocking=False):
            try:
                self._swept = time.monotonic()
                self._parts.segments.sweep()
            finally:
                self._sweeping.release()

    def prefetch(self, keys: Iterable[KVKey]) -> int:
        wanted = list(keys)
        places = self._parts.db.read(lambda txn: [self._place(key, txn) for key in wanted])
        there = [place for place in places if place is not None]
        for place in there:
            if place.segment != INLINE:
                try:
                    self.ahead.push(self._parts.segments.open(place.segment), place.offset, place.length)
                except OSError as error:  # it was only advice
                    log.debug("no prefetch: %s", error)
        return len(there)

    def warm(self, keys: Iterable[KVKey]) -> int:
        """There is one tier: into the kernel's page cache, as ``prefetch``."""
        return self.prefetch(keys)

    def cool(self, keys: Iterable[KVKey]) -> int:
        return 0

    def _place(self, key: KVKey, txn: Txn) -> Place | None:
        try:
            return self._parts.index.place(txn, key)
        except CorruptEntryError:
            return None  # whoever reads it deals with it

    # Writing

    def put_many(self, chunks: list[ChunkKV]) -> list[int]:
        self._must_write()
        sizes: list[int] = []
        group: list[Coded] = []
        for chunk in chunks:
            if sum(one.payload for one in group) >= _GROUP_BYTES:
                sizes += self._put(group)
                group = []
            blob, planes = encode(chunk, self._codec(chunk))
            group.append(Coded(decode_header(blob), blob, planes))
        return sizes + self._put(group)

    def put_encoded(self, items: Sequence[tuple[bytes, list[Bytes]]]) -> list[int]:
        """``put_many`` of entries as ``read_encoded`` returns them. Raises ``CorruptEntryError`` if one is not."""
        self._must_write()
        group = []
        for blob, planes in items:
            header = decode_header(blob)
            if len(planes) != header.layout.layers:
                raise CorruptEntryError(f"{len(planes)} planes for {header.layout.layers} layers")
            for layer, plane in enumerate(planes):
                check_plane(header, layer, plane)
            group.append(Coded(header, blob, planes))
        return self._put(group)

    def _codec(self, chunk: ChunkKV) -> Codec:
        if self.config.codec != "auto":
            return open_codec(self.config.codec)
        frequency, pressure = self._parts.db.read(partial(self._parts.room.outlook, chunk.key))
        return choose_codec(
            tokens=len(chunk.token_ids),
            layout=chunk.layout,
            frequency=frequency,
            saved_s_per_token=self.config.saved_s_per_token,
            prices=Prices(pressure=pressure),
        )

    def _put(self, group: list[Coded]) -> list[int]:
        index = self._parts.index
        there = self._parts.db.read(lambda txn: [one.key for one in group if index.has(txn, one.key)])
        for key in there:  # what is there is left alone if it is sound
            try:
                self.read_encoded(key)
            except LostError as lost:
                log.info("to be replaced: %s", lost)
        return self._parts.putter.put(group)

    def delete(self, key: KVKey, *, evicted: bool = False) -> bool:
        return self.delete_many([key], evicted=evicted) == 1

    def delete_many(self, keys: Iterable[KVKey], *, evicted: bool = False) -> int:
        """``delete`` of many with one commit, and one sync per segment for all of them; how many were there."""
        wanted = list(keys)
        groups = (wanted[start : start + _DELETED] for start in range(0, len(wanted), _DELETED))
        return sum(remove.delete(self._parts, self._policy, group, evicted=evicted) for group in groups)

    def drop(self, key: KVKey, place: Place | None, why: str) -> bool:
        """Take out an entry that is damaged, if it is still in ``place``; if it was taken out. Does not raise."""
        log.warning("corrupt entry %s in %s: %s", key.hex, self.path, why)
        if self.config.readonly:
            self._seen["corrupt"] += 1
            return False
        try:
            return remove.drop(self._parts, key, place)
        except StoreError as failure:  # the answer is the same, and the next reader tries again
            log.warning("could not delete the corrupt entry %s: %s", key.hex, failure)
            return False

    def pin(self, keys: Iterable[KVKey], *, pinned: bool = True) -> int:
        wanted = list(keys)

        def work(txn: Txn) -> int:
            return sum(self._parts.index.pin(txn, key, pinned=pinned) for key in wanted)

        return self._parts.db.write(work, need=128 * len(wanted) + 4096 if pinned else 0)

    # Looking after

    def batches(self) -> Iterator[list[KVKey]]:
        """All keys in order, in batches."""
        return listing.batches(self._parts.db, self._parts.index)

    def entries(self) -> Iterator[Entry]:
        index = self._parts.index
        for keys in self.batches():
            listed = self._parts.db.read(lambda txn, keys=keys: [listing.describe(index, key, txn) for key in keys])  # type: ignore[misc]
            yield from (entry for entry in listed if entry is not None)

    def entry(self, key: KVKey) -> Entry | None:
        return self._parts.db.read(partial(listing.describe, self._parts.index, key))

    def stats(self) -> StoreStats:
        return self._parts.db.read(partial(listing.figures, self._parts, self.config.max_bytes, self._seen, self.tier))

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """As promised; ``repair`` also rebuilds an index whose own pages are damaged, if no other process has it
        open."""
        if repair:
            self._must_write()
        try:
            return verify(self, repair=repair)
        except DamagedError as error:
            if not repair:
                raise
            log.error("the index is rebuilt: %s", error)
        self._parts.close()
        try:
            put_aside(self.path, self._files)
        finally:  # another process has it open: then this one goes on with what there is
            self._parts = self._open()
        return verify(self, repair=True)

    def recount(self) -> None:
        """Make what is counted true to the entries that are there."""
        self._parts.db.write(lambda txn: self._parts.index.recount(txn, now=time.time()), need=0)

    def gc(self, *, full: bool = False) -> GcReport:
        self._must_write()
        self.flush()
        parts, limit = self._parts, self._parts.room.limit
        held = parts.db.read(parts.room.held)
        made = parts.room.make(None, 0 if limit is None else max(0, held - limit))
        with parts.db.translated():
            parts.reclaimer.settle(parts.db.read(parts.index.graves))
            self._settle()
            remove_leftovers(parts.db, parts.index, parts.segments)
            moved = collect(parts.db, parts.index, parts.segments, parts.appender, full=full).moved
        parts.segments.sweep()
        freed = max(0, held - parts.db.read(parts.room.held))
        return GcReport(freed, moved, made.expired, made.evicted)

    def flush(self) -> None:
        if not self.config.readonly:
            self._uses.flush()
            self._settle()

    def close(self) -> None:
        self.ahead.close()
        self._uses.close()
        if not self._parts.db.closed:
            try:
                self.flush()
            except StoreError as error:
                log.warning("uses could not be noted: %s", error)
        self._parts.close()

    def _settle(self) -> None:
        """Note in the index which dead bytes have been given back."""
        done = self._parts.reclaimer.done()
        if done:
            self._parts.db.write(lambda txn: self._parts.reclaimer.note(txn, done), need=0)
            self._parts.reclaimer.noted(done)

    def _note(self, batch: Batch) -> None:
        asked = self._parts.db.write(partial(write_uses, self._parts.index, self._policy, batch), need=0)
        self._parts.room.traffic.asked(asked)

    def _must_write(self) -> None:
        if self.config.readonly:
            raise StoreError(f"{self.path} is open read-only")
