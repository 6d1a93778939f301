"""One entry in a segment: a prefix and its header, padded to whole blocks; its planes; padding.

Prefix, little-endian: magic (8), version and header length (uint32), generation and payload length (uint64), XXH3-64
of all that (8). A record says everything about its entry, so that a lost index is rebuilt from the segments; the index
has the header too, so that a look-up reads nothing here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from store.errors import CorruptEntryError
from store.ssd.segment import Segment

BLOCK = 4096  # records start at multiples: a page of the cache and a block of the device belong to one record only
_MAGIC = b"ragblREC"
_VERSION = 1
_PREFIX = struct.Struct("<8sIIQQ")
_PREFIX_BYTES = _PREFIX.size + 8
_SCAN_BYTES = 1 << 20


@dataclass(frozen=True)
class Record:
    """A record found in a segment; ``header`` is the encoded one as it lies there: yet to be checked."""

    offset: int
    generation: int
    header: bytes
    payload_bytes: int

    @property
    def head(self) -> int:
        return head_bytes(len(self.header))

    @property
    def length(self) -> int:
        return record_bytes(len(self.header), self.payload_bytes)


def head_bytes(header: int) -> int:
    """Bytes before the first plane, for a header of so many bytes."""
    return -(-(_PREFIX_BYTES + header) // BLOCK) * BLOCK


def record_bytes(header: int, payload: int) -> int:
    """Bytes of the whole record."""
    return head_bytes(header) + -(-payload // BLOCK) * BLOCK


def make_head(header: bytes, generation: int, payload: int) -> bytes:
    """What goes before the planes [``head_bytes``]."""
    prefix = _PREFIX.pack(_MAGIC, _VERSION, len(header), generation, payload)
    head: bytes = prefix + xxhash.xxh3_64_digest(prefix) + header
    return head.ljust(head_bytes(len(header)), b"\0")


def padding(payload: int) -> bytes:
    """What goes after the planes."""
    return bytes(-payload % BLOCK)


def read_head(segment: Segment, offset: int) -> Record:
    """The record that starts at ``offset``. Raises ``CorruptEntryError`` if none does; ``OSError``."""
    block = bytearray(BLOCK)
    segment.read([block], offset)
    found = _parse(memoryview(block))
    if found is None:
        raise CorruptEntryError(f"no record starts at {offset} of {segment.path.name}")
    header_bytes, generation, payload = found
    head = bytearray(head_bytes(header_bytes))
    segment.read([head], offset)
    return Record(offset, generation, bytes(head[_PREFIX_BYTES : _PREFIX_BYTES + header_bytes]), payload)


def scan(segment: Segment, end: int | None = None) -> Iterator[Record]:
    """The records that lie whole before ``end`` (default: the end of the file), in order, dead ones too unless marked.

    What is not a record is stepped over block by block. Planes are not read: they may be torn. Raises ``OSError``.
    """
    end = segment.size() if end is None else min(end, segment.size())
    blocks, start = memoryview(bytearray(_SCAN_BYTES)), -_SCAN_BYTES
    offset, limit = 0, end // BLOCK * BLOCK
    while offset < limit:
        if not start <= offset < start + _SCAN_BYTES:
            start = offset
            segment.read([blocks[: min(_SCAN_BYTES, limit - start)]], start)
        at = offset - start
        if _parse(blocks[at : at + BLOCK]) is not None:
            try:
                record = read_head(segment, offset)
            except CorruptEntryError:  # its header goes beyond the end
                record = None
            if record is not None and offset + record.length <= end:
                yield record
                offset += record.length
                continue
        offset += BLOCK


def _parse(block: memoryview) -> tuple[int, int, int] | None:
    """Header bytes, generation and payload bytes of the record that starts with ``block``, None if none does."""
    if bytes(block[:8]) != _MAGIC or len(block) < _PREFIX_BYTES:
        return None
    prefix = bytes(block[: _PREFIX.size])
    if xxhash.xxh3_64_digest(prefix) != bytes(block[_PREFIX.size : _PREFIX_BYTES]):
        return None
    _, version, header, generation, payload = _PREFIX.unpack(prefix)
    return (header, generation, payload) if version == _VERSION else None
