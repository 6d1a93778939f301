"""One LMDB environment: opened safely, grown when full, its errors translated.

LMDB runs with its default guarantees: every commit is synced, and the map is read-only memory. MDB_WRITEMAP
is off for good: it makes the data file sparse, and a full disk then kills the process with SIGBUS at the
first touch of a page that cannot be backed; without it a full disk is an error from ``write()``, and stray
pointers cannot damage the data.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import lmdb

from store.errors import StoreError, StoreFormatError, StoreFullError, StoreIOError
from store.ssd.folder import MAX_READERS, SEGMENTS, LostIndexError, free_bytes, prepare
from store.ssd.gate import Gate
from store.types import FORMAT_VERSION

log = logging.getLogger(__name__)

PROGRAM = b"ragblend kv store"
_MIN_MAP = 1 << 20
_MAX_HEADROOM = 1 << 20
_MAX_RESERVE = 256 << 20

T = TypeVar("T")
Txn: TypeAlias = "lmdb.Transaction[memoryview]"  # generic in the stubs only
Cursor: TypeAlias = "lmdb.Cursor[memoryview]"


class DamagedError(StoreIOError):
    """LMDB's own pages are damaged; single entries can no longer be told apart."""


class Tables(NamedTuple):
    """The named databases. Keys -> values, all bytes; what is in them: ``store.ssd.index``."""

    entries: lmdb._Database
    payloads: lmdb._Database
    usage: lmdb._Database
    pins: lmdb._Database
    tombstones: lmdb._Database
    sources: lmdb._Database
    segments: lmdb._Database
    graves: lmdb._Database
    meta: lmdb._Database


class Database:
    """Transactions on the store's tables for one process's threads; other processes may have it open too.

    ``max_bytes`` caps the data file; ``map_size`` is where the map starts (it grows geometrically). Do not
    use it across ``fork``. A transaction must not be begun inside another one of the same thread.

    Raises ``StoreFormatError`` for a folder of another program or version (``LostIndexError`` for an index that is not
    LMDB's, beside segments), ``StoreError`` if this process has
    it open already, ``StoreFullError`` and ``StoreIOError``.
    """

    def __init__(self, path: Path, *, max_bytes: int | None, map_size: int, readonly: bool) -> None:
        self.path = path
        self.readonly = readonly
        self.max_bytes = max_bytes
        self._gate = Gate()
        self._open = True
        with self.translated():
            prepare(path, readonly=readonly)
            self._env = lmdb.open(
                str(path),
                map_size=max(_MIN_MAP, min(map_size, self._headed(max_bytes) if max_bytes else map_size)),
                max_dbs=len(Tables._fields),
                max_readers=MAX_READERS,
                readonly=readonly,
                create=not readonly,
                mode=0o600,
                # The 0.9 engine and file format; left out, an environment variable chooses for new databases.
                lib_version=0,
            )
        try:
            with self.translated():
                self._env.reader_check()  # free the slots of processes that were killed
                self.tables = self._attach()
        except StoreError:
            self._env.close()
            raise

    def read(self, work: Callable[[Txn], T]) -> T:
        """Run ``work`` in a read transaction. Its buffers end with it: copy out what is returned."""
        with self.translated():
            while True:
                with self._gate.shared():
                    self._must_be_open()
                    try:
                        with self._env.begin(buffers=True) as txn:
                            return work(txn)
                    except lmdb.MapResizedError:
                        pass
                self._adopt_size()

    def write(self, work: Callable[[Txn], T], *, need: int) -> T:
        """Run ``work`` in one write transaction: committed and synced on return, undone on any error.

        ``need`` is about how many bytes it adds; 0 means that it frees space, and may use the headroom kept
        for that (LMDB copies pages even to delete). ``work`` runs again after the map has grown. Raises
        ``StoreFullError`` at ``max_bytes`` or when the disk is full up to the reserve.
        """
        if self.readonly:
            raise StoreError(f"{self.path} is open read-only")
        with self.translated(need):
            self._keep_reserve(need)
            while True:
                with self._gate.shared():
                    self._must_be_open()
                    size = self._env.info()["map_size"]
                    try:
                        with self._env.begin(write=True, buffers=True) as txn:
                            return work(txn)
                    except lmdb.MapResizedError:
                        full = False
                    except lmdb.MapFullError:
                        full = True
                if not full:
                    self._adopt_size()
                elif not self._grow(size, need):
                    raise StoreFullError(
                        f"{self.path}: no room for {need} bytes (file {self._file_bytes()}, limit "
                        f"{self.max_bytes}, free on the device {free_bytes(self.path)}, "
                        f"kept in reserve {self._reserve()})"
                    )

    def file_bytes(self) -> int:
        """Bytes of the data file."""
        return self._file_bytes()

    def idle_bytes(self, txn: Txn) -> int:
        """Bytes of the data file that are free to be used again, about."""
        stats = [txn.stat(), *(txn.stat(table) for table in self.tables)]
        used = sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats)
        return max(0, self._used_bytes() - (used + 2) * int(stats[0]["psize"]))

    def spare_bytes(self) -> int:
        """Bytes that may still be written on the device: what is free but for a reserve."""
        return free_bytes(self.path) - self._reserve()

    def close(self) -> None:
        with self._gate.alone():
            self._open = False
            self._env.close()

    # Opening

    def _attach(self) -> Tables:
        while True:
            try:
                self._restore_length()
                if not self.readonly:
                    return self.write(self._create, need=0)
                return self._existing()
            except lmdb.MapResizedError:  # another process grew it since it was opened, a moment ago
                self._env.set_mapsize(0)

    def _restore_length(self) -> None:
        """Bring a truncated data file back to its length.

        Reading the map beyond the file's end is a SIGBUS; zeros are found by the checksums. (A shorter file
        can also be in order: LMDB need not write free pages at the end.) The write transaction keeps others
        from extending it.
        """
        if self.readonly:
            if self._file_bytes() < self._used_bytes():
                raise StoreIOError(f"{self.path} is truncated; open it for writing once")
            return
        with self._env.begin(write=True):
            used = self._used_bytes()
            if 0 < self._file_bytes() < used:
                log.warning("%s is shorter than its database; lengthened to %d bytes", self.path, used)
                os.truncate(self.path / "data.mdb", used)

    def _create(self, txn: Txn) -> Tables:
        if txn.stat()["entries"]:
            return self._existing(txn)
        tables = Tables(*(self._env.open_db(name.encode(), txn=txn) for name in Tables._fields))
        txn.put(b"program", PROGRAM, db=tables.meta)
        txn.put(b"format", FORMAT_VERSION.to_bytes(4, "little"), db=tables.meta)
        return tables

    def _existing(self, txn: Txn | None = None) -> Tables:
        # Without a transaction py-lmdb takes one that keeps the handles; our read transactions would not.
        try:
            meta = self._env.open_db(b"meta", txn=txn, create=False)
            if txn is None:
                with self._env.begin(buffers=True) as reading:
                    self._recognise(meta, reading)
            else:
                self._recognise(meta, txn)
            return Tables(*(self._env.open_db(n.encode(), txn=txn, create=False) for n in Tables._fields))
        except (lmdb.NotFoundError, lmdb.IncompatibleError, lmdb.DbsFullError) as error:
            raise StoreFormatError(f"{self.path} is an LMDB database of another program") from error

    def _recognise(self, meta: lmdb._Database, txn: Txn) -> None:
        program, version = txn.get(b"program", b"", db=meta), txn.get(b"format", b"", db=meta)
        if program != PROGRAM or version != FORMAT_VERSION.to_bytes(4, "little"):
            raise StoreFormatError(
                f"{self.path} holds {bytes(program)!r} format {int.from_bytes(version, 'little')}, "
                f"this is {PROGRAM!r} format {FORMAT_VERSION}"
            )

    def _must_be_open(self) -> None:
        if not self._open:
            raise StoreError(f"{self.path} is closed")

    # Size. The map may only be replaced while no transaction of this process is open: always alone in the
    # gate.

    def _adopt_size(self) -> None:
        """Follow a map that another process has grown."""
        with self._gate.alone():
            self._must_be_open()
            self._env.set_mapsize(0)

    def _grow(self, seen: int, need: int) -> bool:
        """Enlarge the map that was ``seen`` full; False if it must not grow."""
        with self._gate.alone():
            self._must_be_open()
            size = self._env.info()["map_size"]
            if size > seen:
                return True  # another thread did
            wish = max(2 * size, size + 2 * need) if need else size + _MAX_HEADROOM
            target = min(wish, self._cap(need))
            if target <= size:
                return False
            self._env.set_mapsize(target)
            return True

    def _keep_reserve(self, need: int) -> None:
        """Shrink a map that could fill the device, which others may have filled since it grew."""
        if not need:
            return
        with self._gate.shared():
            self._must_be_open()
            cap, size, used = self._cap(need), self._env.info()["map_size"], self._used_bytes()
        if size > max(cap, used):
            with self._gate.alone():
                self._must_be_open()
                self._env.set_mapsize(max(cap, _MIN_MAP))  # LMDB raises it to what is in use

    def _cap(self, need: int) -> int:
        """Bytes the map may have for a write of ``need`` (see ``write``)."""
        disk = self._file_bytes() + free_bytes(self.path) - (self._reserve() if need else 0)
        if self.max_bytes is not None:
            disk = min(disk, self._headed(self.max_bytes) if need else self.max_bytes)
        return disk // 4096 * 4096

    @staticmethod
    def _headed(max_bytes: int) -> int:
        return max_bytes - min(_MAX_HEADROOM, max_bytes // 4)

    def _used_bytes(self) -> int:
        return int((self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"])

    def _file_bytes(self) -> int:
        return (self.path / "data.mdb").stat().st_size

    def _reserve(self) -> int:
        """Bytes of the device left free, so that deleting still works when it is full."""
        disk = os.statvfs(self.path)
        return min(_MAX_RESERVE, disk.f_blocks * disk.f_frsize // 32)

    @property
    def closed(self) -> bool:
        return not self._open

    @contextmanager
    def translated(self, need: int = 0) -> Iterator[None]:
        """The one place where LMDB's errors, and those of files, become the store's."""
        try:
            yield
        except (lmdb.InvalidError, lmdb.VersionMismatchError) as error:
            words = f"{self.path} is not an LMDB database of this version: {error}"
            if (self.path / SEGMENTS).is_dir():
                raise LostIndexError(f"{words}; its segments are there") from error
            raise StoreFormatError(words) from error
        except (lmdb.CorruptedError, lmdb.PageNotFoundError) as error:
            raise DamagedError(f"{self.path} is damaged: {error}") from error
        except lmdb.Error as error:
            if "already open" in str(error):
                raise StoreError(f"{self.path} is already open in this process") from error
            # LMDB reports a write cut short by a full disk as EIO.
            short = error.code == errno.EIO and free_bytes(self.path) < need + self._reserve()
            if error.code in (errno.ENOSPC, errno.EDQUOT) or short:
                raise StoreFullError(f"{self.path}: the device is full: {error}") from error
            raise StoreIOError(f"{self.path}: {error}") from error
        except OSError as error:
            kind = StoreFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreIOError
            raise kind(f"{self.path}: {error}") from error
