"""The folder of a database on disk, before LMDB touches it."""

from __future__ import annotations

import os
from pathlib import Path

from store.errors import StoreFormatError, StoreFullError

DATA = "data.mdb"
SEGMENTS = "segments"
ASIDE = "data.mdb."  # what a damaged index is renamed to begins so
MAX_READERS = 512
_LOCK_BYTES = 64 * (MAX_READERS + 64)  # a cache line per reader, and LMDB's header


class LostIndexError(StoreFormatError):
    """The index is missing or cannot be opened, but there are segments that it can be made anew from: by opening the
    store for writing, once ``put_aside`` has moved what is there."""


def prepare(path: Path, *, readonly: bool) -> None:
    """Make the folder, or see that it may hold a store.

    Segments without an index may be there: the index is rebuilt from them, but not read-only (``LostIndexError``).
    Raises ``StoreFormatError`` if it holds anything else, ``StoreFullError``, ``OSError``.
    """
    try:
        if not readonly:
            path.mkdir(parents=True, exist_ok=True)
        names = set(os.listdir(path))
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        raise StoreFormatError(f"{path} is not a folder") from error
    if DATA not in names and not all(map(_ours, names)):
        raise StoreFormatError(f"{path} holds no KV store: {sorted(names)[:5]}")
    if DATA not in names and readonly:
        if SEGMENTS in names:
            raise LostIndexError(f"{path} has lost its index {DATA}; its segments are there")
        raise StoreFormatError(f"{path} holds no KV store: {sorted(names)[:5]}")
    if not readonly:
        _back_lock_file(path)


def _ours(name: str) -> bool:
    return name in ("lock.mdb", SEGMENTS) or name.startswith(ASIDE)


def free_bytes(path: Path) -> int:
    """Bytes this user may still write on the device of ``path``."""
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


def _back_lock_file(path: Path) -> None:
    """Give ``lock.mdb`` its blocks before LMDB maps it: on a full disk the sparse file is a SIGBUS otherwise.

    Only a new file is opened here: closing any descriptor of a file drops this process's locks on it (POSIX),
    and with them those of an environment that is open already.
    """
    lock = path / "lock.mdb"
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if lock.stat().st_blocks * 512 < _LOCK_BYTES and free_bytes(path) < _LOCK_BYTES:
            raise StoreFullError(f"{path}: the device is full") from None
        return
    try:
        os.posix_fallocate(descriptor, 0, _LOCK_BYTES)
    except OSError:
        lock.unlink()
        raise
    finally:
        os.close(descriptor)
