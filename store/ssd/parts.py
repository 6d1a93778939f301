"""What a store on disk is made of, opened together and recovered from what a crash has left."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from store.config import StoreConfig
from store.errors import StoreError
from store.evict import Policy
from store.ssd.append import Appender
from store.ssd.collect import remove_leftovers
from store.ssd.database import DamagedError, Database
from store.ssd.files import Files
from store.ssd.index import Index
from store.ssd.put import Putter
from store.ssd.rebuild import put_aside, rebuild
from store.ssd.reclaim import Reclaimer
from store.ssd.room import Room, segment_bytes
from store.ssd.segment import Segments

log = logging.getLogger(__name__)

_MAP_BYTES = 64 << 20  # of the index at first


class Parts:
    """Opens as ``Database`` does, and raises so. An index that is damaged or lost is rebuilt from the segments, unless
    ``config.readonly``. ``note_uses`` is called before anybody is evicted."""

    def __init__(
        self, path: Path, config: StoreConfig, policy: Policy, files: Files, note_uses: Callable[[], None]
    ) -> None:
        self.db = self._open(path, config, files)
        try:
            with self.db.translated():
                self.segments = Segments(path, files, readonly=config.readonly)
            self.index = Index(self.db.tables)
            self.appender = Appender(self.index, self.segments, segment_bytes(config))
            self.reclaimer = Reclaimer(self.index, self.segments)
            self.room = Room(config, policy, self.db, self.index, self.appender, self.reclaimer, note_uses)
            self.putter = Putter(self.db, self.index, self.appender, self.room, self.reclaimer)
            if not config.readonly:
                self._recover()
        except StoreError:
            self.db.close()
            raise

    def close(self) -> None:
        self.segments.close()
        self.db.close()

    @staticmethod
    def _open(path: Path, config: StoreConfig, files: Files) -> Database:
        def opened() -> Database:
            return Database(path, max_bytes=config.max_bytes, map_size=_MAP_BYTES, readonly=config.readonly)

        try:
            return opened()
        except DamagedError as error:
            if config.readonly:
                raise
            log.error("%s", error)
            put_aside(path, files)
            return opened()

    def _recover(self) -> None:
        with self.db.translated():
            if not self.db.read(self.index.complete):
                rebuild(self.db, self.index, self.segments, now=time.time())
            remove_leftovers(self.db, self.index, self.segments)
            found = self.db.read(self.index.segments)
            # It was still appended to when its last record died, and nobody looked at it since.
            if empty := [number for number, extent in found.items() if extent.sealed and not extent.records]:
                self.reclaimer.settle((), self.db.write(lambda txn: self.reclaimer.drop_empty(txn, empty), need=0))
            self.reclaimer.settle(self.db.read(self.index.graves))
