"""Plain files of a folder that somebody else may have made: links are not followed, pipes not waited for."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from store.codec.base import Bytes
from store.errors import CorruptEntryError, StoreFormatError, StoreFullError, StoreIOError


@contextmanager
def opened_folder(folder: Path) -> Iterator[int]:
    try:
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreFormatError(f"{folder} is not a folder") from error
    try:
        yield at
    finally:
        os.close(at)


@contextmanager
def opened(at: int, name: str) -> Iterator[int]:
    """The plain file ``name`` of the folder ``at``. Raises ``CorruptEntryError`` if it is anything else."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise CorruptEntryError(f"{name} is not a plain file") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise CorruptEntryError(f"{name} is not a plain file")
        yield fd
    finally:
        os.close(fd)


def read_exactly(fd: int, offset: int, length: int) -> Bytes:
    """``length`` bytes; nothing is allocated for what the file does not hold. Raises ``CorruptEntryError``."""
    if os.fstat(fd).st_size < offset + length:
        raise CorruptEntryError(f"the file ends before {offset + length}")
    data = np.empty(length, np.uint8)
    done = 0
    while done < length:
        got = os.preadv(fd, [data[done:].data], offset + done)
        if not got:
            raise CorruptEntryError(f"the file ends before {offset + length}")
        done += got
    return data


def write_all(fd: int, data: memoryview) -> None:
    data = data.cast("B")
    while data:
        data = data[os.write(fd, data) :]


@contextmanager
def translated(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = StoreFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreIOError
        raise kind(f"{folder}: {error}") from error
