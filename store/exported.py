"""An export as it lies in a folder: read, and nothing of it believed."""

from __future__ import annotations

import hashlib
import os
from itertools import pairwise
from pathlib import Path

import numpy as np

from store.check import read_header
from store.codec.base import Bytes
from store.entry import check_plane
from store.errors import CorruptEntryError, StoreError, StoreFormatError
from store.manifest import NAME, DataFile, Item
from store.plainfile import opened, read_exactly

_MANIFEST_BYTES = 2 << 30
_BLOCK = 4 << 20


class DamagedExportError(StoreError):
    """The files are not what the manifest says, or the manifest is not the demanded one."""


def read_entry(at: int, item: Item) -> tuple[bytes, list[Bytes]]:
    """Header and planes of an entry of the export in the folder ``at``.

    Raises ``CorruptEntryError`` unless they are in every respect what the manifest and the header itself say of them.
    """
    try:
        with opened(at, item.file) as fd:
            data = read_exactly(fd, item.offset, item.length)
    except FileNotFoundError as error:
        raise CorruptEntryError("its file is missing") from error
    if hashlib.sha256(data.data).hexdigest() != item.sha256:
        raise CorruptEntryError("its SHA-256 is not the manifest's")
    blob = data[: item.header].tobytes()
    header = read_header(item.kv_key, blob)
    payload = header.payload_bytes
    fact = (header.layout.digest.hex(), header.tokens, payload, item.header + payload)
    if (item.layout, item.tokens, item.bytes, item.length) != fact:
        raise CorruptEntryError("its header is not what the manifest says")
    planes = [data[item.header + start : item.header + end] for start, end in pairwise(header.offsets)]
    for layer, plane in enumerate(planes):
        check_plane(header, layer, plane)
    return blob, planes


def read_manifest(at: int, folder: Path) -> bytes:
    """Its bytes, unread. Raises ``StoreFormatError`` if there is none."""
    try:
        with opened(at, NAME) as fd:
            size = os.fstat(fd).st_size
            if size > _MANIFEST_BYTES:
                raise StoreFormatError(f"{folder / NAME} has {size} bytes, more than {_MANIFEST_BYTES}")
            return read_exactly(fd, 0, size).tobytes()
    except FileNotFoundError as error:
        raise StoreFormatError(f"{folder} has no {NAME}: not an export, or one that was broken off") from error
    except CorruptEntryError as error:
        raise StoreFormatError(f"{folder / NAME}: {error}") from error


def check_file(at: int, folder: Path, file: DataFile) -> None:
    """Raises ``DamagedExportError`` unless it has the size and the SHA-256 of the manifest."""
    found = hashlib.sha256()
    block = np.empty(_BLOCK, np.uint8)
    try:
        with opened(at, file.name) as fd:
            size = os.fstat(fd).st_size
            if size != file.bytes:
                raise DamagedExportError(f"{folder / file.name} has {size} bytes, the manifest says {file.bytes}")
            offset = 0
            while got := os.preadv(fd, [block.data], offset):
                found.update(block.data[:got])
                offset += got
    except (FileNotFoundError, CorruptEntryError) as error:
        raise DamagedExportError(f"{folder / file.name} cannot be read: {error}") from error
    if found.hexdigest() != file.sha256:
        raise DamagedExportError(
            f"{folder / file.name} has SHA-256 {found.hexdigest()}, the manifest says {file.sha256}; "
            "fetch it again, or take only its sound entries (salvage)"
        )
