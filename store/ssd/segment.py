"""Segment files: append-only, shared by all processes that have the store open.

``segments/%08d.seg``, counted from 1, numbers are never used twice. What is below a segment's tail (the index has it)
is never written again, but for the marks of the dead; what is above is a crash's garbage and is overwritten.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from store.errors import CorruptEntryError
from store.ssd.files import Buffer, Files

log = logging.getLogger(__name__)

FOLDER = "segments"
_MOST_OPEN = 128  # descriptors kept; what a reader holds stays open besides


class Segment:
    """One open file. Thread-safe. It is closed when the last one lets go of it: a reader never reads from a descriptor
    whose number is another file's by now. Everything raises ``OSError``."""

    def __init__(self, files: Files, path: Path, number: int, flags: int) -> None:
        self.path = path
        self.number = number
        self._files = files
        self._descriptor = files.open(path, flags)
        weakref.finalize(self, os.close, self._descriptor).atexit = False

    def read(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Fill the buffers. Raises ``CorruptEntryError`` if the file ends before."""
        got, need = self._files.read(self._descriptor, buffers, offset), sum(map(len, buffers))
        if got != need:
            raise CorruptEntryError(f"{self.path.name} ends {need - got} bytes too early")

    def fill(self, buffer: memoryview, offset: int) -> None:
        """``read`` of one buffer, in as few steps as Python can."""
        if self._files.read(self._descriptor, (buffer,), offset) != len(buffer):
            raise CorruptEntryError(f"{self.path.name} ends too early")

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        self._files.write(self._descriptor, buffers, offset)

    def sync(self) -> None:
        self._files.sync(self._descriptor)

    def punch(self, offset: int, length: int) -> bool:
        """Give the bytes of a dead record back to the device; False where the file system cannot."""
        return self._files.punch(self._descriptor, offset, length)

    def mark_dead(self, offset: int) -> None:
        """Make sure that no scan finds the record that starts there. Not yet durable."""
        self._files.write(self._descriptor, [bytes(64)], offset)

    def trim(self, tail: int) -> bool:
        """Cut off a crash's garbage: whole records may be in it, of entries that nobody was told are stored. True if
        there was any; not yet durable."""
        if self.size() <= tail:
            return False
        self._files.truncate(self._descriptor, tail)
        return True

    def cached(self, offset: int) -> bool:
        """If the byte there can be read without waiting for the device."""
        return self._files.cached(self._descriptor, offset)

    def advise(self, offset: int, length: int) -> None:
        """See ``Files.advise``."""
        self._files.advise(self._descriptor, offset, length)

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def held(self) -> int:
        """Bytes it takes on the device."""
        return os.fstat(self._descriptor).st_blocks * 512

    @property
    def linked(self) -> bool:
        """False when the file was removed, by whichever process."""
        return os.fstat(self._descriptor).st_nlink > 0


class Segments:
    """The segment files of the store in ``path``. Thread-safe. Everything raises ``OSError``."""

    def __init__(self, path: Path, files: Files, *, readonly: bool) -> None:
        self.folder = path / FOLDER
        self.files = files
        self._flags = os.O_RDONLY if readonly else os.O_RDWR
        self._open: OrderedDict[int, Segment] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        if not readonly and not self.folder.is_dir():
            self.folder.mkdir(mode=0o700)
            files.sync_folder(path)

    def open(self, number: int) -> Segment:
        """Raises ``FileNotFoundError`` when it has been removed."""
        with self._lock:
            segment = self._open.get(number)
            if segment is None:
                segment = Segment(self.files, self.path(number), number, self._flags)
                self._keep(segment)
            else:
                self._open.move_to_end(number)
            return segment

    def create(self, number: int) -> Segment:
        """A new, empty file, its name durable; of a crash that came before the index knew it nothing remains."""
        segment = Segment(self.files, self.path(number), number, self._flags | os.O_CREAT | os.O_TRUNC)
        self.files.sync_folder(self.folder)
        with self._lock:
            self._keep(segment)
        return segment

    def remove(self, number: int) -> int:
        """Remove the file, after the index has forgotten it; the bytes that it took. Readers that hold it read on."""
        self.forget(number)
        path = self.path(number)
        try:
            held = path.stat().st_blocks * 512
            self.files.unlink(path)
        except FileNotFoundError:
            return 0
        return held

    def forget(self, number: int) -> None:
        """Open it anew the next time."""
        with self._lock:
            self._open.pop(number, None)

    def sweep(self) -> None:
        """Let go of files that other processes have removed: an open one still takes its bytes on the device."""
        with self._lock:
            for number in [n for n, segment in self._open.items() if not segment.linked]:
                del self._open[number]

    def numbers(self) -> list[int]:
        """Those of the files that are there, ascending."""
        if not self.folder.is_dir():
            return []
        names = (Path(name) for name in os.listdir(self.folder))
        return sorted(int(name.stem) for name in names if name.suffix == ".seg" and name.stem.isdecimal())

    def path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.seg"

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _keep(self, segment: Segment) -> None:
        self._open[segment.number] = segment
        self._open.move_to_end(segment.number)
        while len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)
