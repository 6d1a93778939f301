"""A tier on another machine, shared by several: a slot. What fills it (Valkey, S3) needs these four calls."""

from __future__ import annotations

import struct
from typing import Protocol

import numpy as np

from store.check import read_header
from store.codec import Bytes
from store.entry import check_plane
from store.errors import CorruptEntryError, StoreError
from store.held import Held
from store.types import KVKey

MAGIC = b"ragblnE1"
_PREFIX = struct.Struct("<8sQ")


class RemoteError(StoreError):
    """The remote tier could not be asked, or refused; the message says what it said."""


class RemoteTier(Protocol):
    """Whole entries as blobs (``pack``) by key. Thread-safe; every call ends within a bound of its own.

    Nothing it returns is trusted: ``unpack`` checks it. Raises ``RemoteError`` and nothing else.
    """

    name: str

    def get_entry(self, key: KVKey) -> bytes | None: ...

    def put_entry(self, key: KVKey, blob: bytes) -> None: ...

    def contains(self, key: KVKey) -> bool: ...

    def delete(self, key: KVKey) -> bool: ...


def pack(header: bytes, planes: list[Bytes]) -> bytes:
    """One blob, little-endian: magic (8), header length (uint64), header, planes one after the other."""
    return b"".join((_PREFIX.pack(MAGIC, len(header)), header, *(plane.data for plane in planes)))


def unpack(key: KVKey, blob: bytes) -> Held:
    """The entry in ``blob``; its planes are views of it. Raises ``CorruptEntryError`` unless every byte is sound and
    it is the entry of ``key``."""
    if len(blob) < _PREFIX.size:
        raise CorruptEntryError(f"a packed entry has only {len(blob)} bytes")
    magic, size = _PREFIX.unpack_from(blob)
    if magic != MAGIC:
        raise CorruptEntryError(f"a packed entry starts with {magic!r}")
    start = _PREFIX.size + size
    head = blob[_PREFIX.size : start]
    header = read_header(key, head)
    if len(blob) != start + header.payload_bytes:
        raise CorruptEntryError(f"a packed entry has {len(blob)} bytes, not {start + header.payload_bytes}")
    payload = np.frombuffer(blob, np.uint8, offset=start)
    planes = [payload[at:end] for at, end in zip(header.offsets, header.offsets[1:], strict=False)]
    for layer, plane in enumerate(planes):
        check_plane(header, layer, plane)
    return Held(head, header, tuple(planes))
