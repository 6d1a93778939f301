"""Entries out of a store into a folder of plain files, and back in: another machine, another disk, a backup.

The folder has data files (each entry as it is stored: header, then planes, so in any codec) and ``manifest.json``,
written last: without it the export is not complete. An import believes nothing: not the names in the manifest, not
the headers, not the bytes; it may be killed and started again, and goes on where it was.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from store.base import Entry
from store.check import read_header
from store.codec.base import Bytes
from store.errors import CorruptEntryError, LostError, StoreFormatError
from store.exported import DamagedExportError, check_file, read_entry, read_manifest
from store.manifest import NAME, DataFile, Item, Manifest, sha256
from store.plainfile import opened_folder, translated, write_all
from store.types import KVKey

__all__ = ["DamagedExportError", "ExportReport", "ImportReport", "Portable", "export", "import_"]

log = logging.getLogger(__name__)

FILE_BYTES = 1 << 30
GROUP_BYTES = 64 << 20

Progress = Callable[[int, int], None]


class Portable(Protocol):
    """What a store needs for it: entries as they are stored, checked on both ways."""

    def entries(self) -> Iterator[Entry]: ...

    def contains(self, key: KVKey) -> bool: ...

    def read_encoded(self, key: KVKey) -> tuple[bytes, list[Bytes]] | None: ...

    def put_encoded(self, items: list[tuple[bytes, list[Bytes]]]) -> list[int]: ...


@dataclass(frozen=True)
class ExportReport:
    """``entries`` written, their ``tokens`` and payload ``bytes``; ``left_out``: asked for but gone or damaged.

    ``manifest`` is the SHA-256 of ``manifest.json`` in hex, for the receiver to demand.
    """

    entries: int
    tokens: int
    bytes: int
    files: int
    left_out: int
    manifest: str


@dataclass(frozen=True)
class ImportReport:
    """``imported`` entries and their payload ``bytes`` as written, ``present`` ones that were there before,
    ``refused`` by the store as not worth their room, ``damaged`` ones (key and what was wrong; with ``salvage``).
    """

    imported: int
    bytes: int
    present: int
    refused: int
    damaged: tuple[tuple[KVKey, str], ...]
    manifest: str


def export(
    store: Portable,
    folder: Path,
    keys: Iterable[KVKey] | None = None,
    *,
    progress: Progress | None = None,
    file_bytes: int = FILE_BYTES,
) -> ExportReport:
    """Write the entries ``keys`` (default: all) into ``folder``, new or empty; data files of about ``file_bytes``.

    The store may be in use meanwhile. ``progress(done, total)`` counts entries. Raises ``StoreFormatError`` if the
    folder holds anything, ``StoreFullError``, ``StoreIOError``; what was written is removed then.
    """
    wanted = list(dict.fromkeys(keys)) if keys is not None else [entry.key for entry in store.entries()]
    with translated(folder):
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(os.listdir(folder))
    if found:
        raise StoreFormatError(f"{folder} is not empty ({', '.join(found[:3])}): export into a new folder")
    writer = _Writer(folder, file_bytes)
    left_out = 0
    try:
        with translated(folder):
            for n, key in enumerate(wanted):
                try:
                    encoded = store.read_encoded(key)
                except LostError as lost:
                    log.warning("%s is not exported: %s", key.hex, lost)
                    encoded = None
                if encoded is None:
                    left_out += 1
                else:
                    writer.add(key, *encoded)
                if progress is not None:
                    progress(n + 1, len(wanted))
            digest = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    items = writer.items
    return ExportReport(
        entries=len(items),
        tokens=sum(item.tokens for item in items),
        bytes=sum(item.bytes for item in items),
        files=len(writer.files),
        left_out=left_out,
        manifest=digest,
    )


def import_(
    store: Portable,
    folder: Path,
    *,
    expect: str | None = None,
    salvage: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Put the entries of an export into ``store``; those it has are skipped, so a broken-off import is just repeated.

    Every data file that is needed is compared with its SHA-256 before anything is put, and every entry again as it is.
    ``expect``: SHA-256 (hex) that the manifest must have. ``salvage``: take the sound entries of damaged files.
    Raises ``DamagedExportError``, ``StoreFormatError`` for what is no export of this version, and what ``put`` raises.
    """
    with translated(folder), opened_folder(folder) as at:
        data = read_manifest(at, folder)
        digest = sha256(data)
        if expect is not None and digest != expect.strip().lower():
            raise DamagedExportError(f"{folder / NAME} has SHA-256 {digest}, demanded is {expect}")
        manifest = Manifest.from_bytes(data)
        todo = [item for item in manifest.items if not store.contains(item.kv_key)]
        if not salvage:
            needed = {item.file for item in todo}
            for file in manifest.files:
                if file.name in needed:
                    check_file(at, folder, file)
        reader = _Reader(at, folder, store, salvage, progress)
        reader.run(todo, present=len(manifest.items) - len(todo))
    return ImportReport(
        imported=reader.imported,
        bytes=reader.bytes,
        present=len(manifest.items) - len(todo) + reader.present,
        refused=reader.refused,
        damaged=tuple(reader.damaged),
        manifest=digest,
    )


class _Writer:
    """Writes data files one after the other, and what goes into the manifest."""

    def __init__(self, folder: Path, file_bytes: int) -> None:
        self.folder, self.file_bytes = folder, file_bytes
        self.files: list[DataFile] = []
        self.items: list[Item] = []
        self._made: list[str] = []
        self._name = ""
        self._fd: int | None = None
        self._at = 0
        self._hash = hashlib.sha256()

    def add(self, key: KVKey, blob: bytes, planes: list[Bytes]) -> None:
        header = read_header(key, blob)
        if self._fd is not None and self._at >= self.file_bytes:
            self._close()
        if self._fd is None:
            self._name, self._at, self._hash = f"chunks-{len(self.files):05}.kv", 0, hashlib.sha256()
            self._fd = self._create(self._name)
        entry, start = hashlib.sha256(), self._at
        for view in (memoryview(blob), *(plane.data for plane in planes)):
            entry.update(view)
            self._hash.update(view)
            write_all(self._fd, view)
            self._at += view.nbytes
        self.items.append(
            Item(
                key=key.hex,
                layout=header.layout.digest.hex(),
                tokens=header.tokens,
                bytes=header.payload_bytes,
                file=self._name,
                offset=start,
                length=self._at - start,
                header=len(blob),
                sha256=entry.hexdigest(),
            )
        )

    def finish(self) -> str:
        """The manifest, under its name only when it and all data are durable; its SHA-256."""
        self._close()
        data = Manifest(tuple(self.files), tuple(self.items)).to_bytes()
        self._fd = self._create(NAME + ".part")
        write_all(self._fd, memoryview(data))
        self._sync()
        (self.folder / (NAME + ".part")).rename(self.folder / NAME)
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return sha256(data)

    def abandon(self) -> None:
        """Remove what was written; what cannot be removed stays, without a manifest."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        for name in (NAME, *self._made):
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s stays of an export that failed: %s", self.folder / name, error)

    def _create(self, name: str) -> int:
        fd = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        self._made.append(name)
        return fd

    def _close(self) -> None:
        if self._fd is not None:
            self.files.append(DataFile(self._name, self._at, self._hash.hexdigest()))
            self._sync()

    def _sync(self) -> None:
        assert self._fd is not None
        os.fsync(self._fd)
        fd, self._fd = self._fd, None
        os.close(fd)


class _Reader:
    """Reads entries in the order of the files, checks them, and puts them in groups."""

    def __init__(self, at: int, folder: Path, store: Portable, salvage: bool, progress: Progress | None) -> None:
        self.at, self.folder, self.store, self.salvage, self.progress = at, folder, store, salvage, progress
        self.imported = self.bytes = self.present = self.refused = 0
        self.damaged: list[tuple[KVKey, str]] = []

    def run(self, items: list[Item], *, present: int) -> None:
        group: list[tuple[bytes, list[Bytes]]] = []
        keys: list[KVKey] = []
        held = 0
        for n, item in enumerate(items):
            try:
                group.append(read_entry(self.at, item))
                keys.append(item.kv_key)
                held += item.length
            except CorruptEntryError as error:
                if not self.salvage:
                    raise DamagedExportError(f"{self.folder / item.file}: entry {item.key}: {error}") from error
                self.damaged.append((item.kv_key, str(error)))
            if held >= GROUP_BYTES or (n + 1 == len(items) and group):
                self._put(keys, group)
                group, keys, held = [], [], 0
            if self.progress is not None:
                self.progress(present + n + 1, present + len(items))

    def _put(self, keys: list[KVKey], group: list[tuple[bytes, list[Bytes]]]) -> None:
        before = [self.store.contains(key) for key in keys]
        for there, key, written in zip(before, keys, self.store.put_encoded(group), strict=True):
            if written:
                self.imported += 1
                self.bytes += written
            elif there or self.store.contains(key):
                self.present += 1
            else:
                self.refused += 1
