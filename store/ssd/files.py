"""The system calls the segments are made with, in one place: a test makes any of them fail by a subclass."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from pathlib import Path

Buffer = memoryview | bytes | bytearray  # of single bytes

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_MOST_BUFFERS = 512  # per call; IOV_MAX is 1024 on Linux


def _fallocate() -> ctypes._NamedFuncPointer | None:
    """fallocate(2), which Python has only without its mode; None where the C library has none."""
    try:
        call = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    call.restype = ctypes.c_int
    return call


class Files:
    """Everything raises ``OSError``."""

    def __init__(self) -> None:
        self._allocate = _fallocate()

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
        """All bytes of ``buffers``, one after the other."""
        todo = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        while todo:
            wrote = self.pwritev(descriptor, todo[:_MOST_BUFFERS], offset)
            offset += wrote
            while todo and wrote >= len(todo[0]):
                wrote -= len(todo.pop(0))
            if wrote:
                todo[0] = todo[0][wrote:]

    def pwritev(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        wrote = os.pwritev(descriptor, buffers, offset)
        if not wrote:
            raise OSError(errno.EIO, "nothing was written")
        return wrote

    def read(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Fill ``buffers`` as far as the file goes; the bytes read."""
        got = os.preadv(descriptor, buffers, offset)
        if got == sum(map(len, buffers)):
            return got
        done = got
        todo = [memoryview(buffer).cast("B") for buffer in buffers]
        while got:  # cut short: by a signal, by the 2 GiB of one call or by the end of the file
            while todo and got >= len(todo[0]):
                got -= len(todo.pop(0))
            if not todo:
                break
            todo[0] = todo[0][got:]
            got = os.preadv(descriptor, todo, offset + done)
            done += got
        return done

    def sync(self, descriptor: int) -> None:
        """Until the file's bytes and length are on the device."""
        os.fdatasync(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Until the names in it are on the device."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def punch(self, descriptor: int, offset: int, length: int) -> bool:
        """Give these bytes back to the device; they read as zeros. False where the file system cannot."""
        if self._allocate is None:
            return False
        while self._allocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, offset, length):
            code = ctypes.get_errno()
            if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                return False
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        return True

    def truncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def cached(self, descriptor: int, offset: int) -> bool:
        """If the byte there is in the kernel's cache; False where it cannot be told."""
        try:
            return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except OSError:  # it would block, or the file system cannot tell
            return False

    def advise(self, descriptor: int, offset: int, length: int) -> None:
        """Have the kernel read these bytes into its cache, without waiting for it: as many as it does at a time."""
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def unlink(self, path: Path) -> None:
        os.unlink(path)
