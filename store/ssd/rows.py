"""The rows of the index, and their bytes."""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

from store.errors import CorruptEntryError
from store.evict import Usage

INLINE = 0  # as a segment's number: the planes are in the index itself
_PLACE, _LIFE, _GRIEF = struct.Struct("<QIIQQQQ"), struct.Struct("<dddddQQ"), struct.Struct("<?ddd")
_EXTENT, _GRAVE = struct.Struct("<QQQQ?"), struct.Struct("<Q?")
PLACE_BYTES = _PLACE.size + 8


class Place(NamedTuple):
    """Where an entry is. ``generation`` is new with every put and stays when the entry is moved.

    ``segment`` its file, or ``INLINE``; ``head`` bytes before the first plane, ``offset`` where the record starts and
    ``length`` what it takes (inline: the payload); ``payload`` and ``raw`` bytes of the planes, stored and decoded.
    """

    generation: int
    segment: int
    head: int
    offset: int
    length: int
    payload: int
    raw: int


class Life(NamedTuple):
    """An entry for eviction: ``Usage``'s fields, ``cost`` as in ``Item``, ``created`` seconds since the epoch,
    ``bytes`` that it takes, and ``payload`` bytes of its planes."""

    frequency: float
    last: float
    priority: float
    cost: float
    created: float
    bytes: int
    payload: int

    @property
    def usage(self) -> Usage:
        return Usage(self.frequency, self.last, self.priority)

    def with_usage(self, usage: Usage) -> Life:
        return self._replace(frequency=usage.frequency, last=usage.last, priority=usage.priority)


class Grief(NamedTuple):
    """What is remembered of a key that is not held: if it was ``evicted``, and its ``Usage``."""

    evicted: bool
    frequency: float
    last: float
    priority: float

    @property
    def usage(self) -> Usage:
        return Usage(self.frequency, self.last, self.priority)


class Extent(NamedTuple):
    """A segment: ``tail`` is where the next record goes, ``live`` bytes of its ``records`` live records, ``freed``
    bytes of dead ones that the device has back already; a ``sealed`` one is not appended to."""

    tail: int = 0
    live: int = 0
    freed: int = 0
    records: int = 0
    sealed: bool = False

    @property
    def held(self) -> int:
        """Bytes it takes on the device."""
        return self.tail - self.freed

    @property
    def dead(self) -> int:
        """Bytes it takes on the device for nothing."""
        return self.tail - self.freed - self.live


class Grave(NamedTuple):
    """A dead record; a ``deleted`` one must be made unfindable to a scan."""

    segment: int
    offset: int
    length: int
    deleted: bool


def pack_place(digest: bytes, place: Place) -> bytes:
    packed = _PLACE.pack(*place)
    check: bytes = xxhash.xxh3_64_digest(digest + packed)
    return packed + check


def parse_place(digest: bytes, row: memoryview | bytes) -> Place:
    """Raises ``CorruptEntryError`` unless it is as ``pack_place`` wrote it for ``digest``."""
    packed, check = bytes(row[: _PLACE.size]), bytes(row[_PLACE.size : PLACE_BYTES])
    if len(packed) < _PLACE.size or xxhash.xxh3_64_digest(digest + packed) != check:
        raise CorruptEntryError(f"the index row of {digest.hex()} is damaged")
    return Place(*_PLACE.unpack(packed))


def pack_life(life: Life, owner: str) -> bytes:
    return _LIFE.pack(*life) + owner.encode()


def parse_life(row: memoryview | bytes | None) -> tuple[Life, str] | None:
    """A life and its owner; None if the row cannot be one (nothing that is served depends on it)."""
    if row is None or len(row) < _LIFE.size:
        return None
    return Life(*_LIFE.unpack(row[: _LIFE.size])), bytes(row[_LIFE.size :]).decode(errors="replace")


def pack_grief(grief: Grief) -> bytes:
    return _GRIEF.pack(*grief)


def parse_grief(row: memoryview | bytes | None) -> Grief | None:
    return None if row is None or len(row) != _GRIEF.size else Grief(*_GRIEF.unpack(row))


def pack_extent(extent: Extent) -> bytes:
    return _sealed(_EXTENT.pack(*extent))


def parse_extent(row: memoryview | bytes) -> Extent:
    """A damaged one is sealed: what is in it stays readable, nothing is appended and nothing cut off."""
    packed = _unsealed(row)
    return Extent(sealed=True) if packed is None else Extent(*_EXTENT.unpack(packed))


def pack_grave(grave: Grave) -> tuple[bytes, bytes]:
    """Key and value."""
    key = segment_key(grave.segment) + grave.offset.to_bytes(8, "big")
    return key, _sealed(_GRAVE.pack(grave.length, grave.deleted))


def parse_grave(key: bytes, row: memoryview | bytes) -> Grave | None:
    """None if it is damaged: nothing is punched for it."""
    packed = _unsealed(row)
    if len(key) != 12 or packed is None:
        return None
    return Grave(int.from_bytes(key[:4], "big"), int.from_bytes(key[4:], "big"), *_GRAVE.unpack(packed))


def segment_key(number: int) -> bytes:
    return number.to_bytes(4, "big")


def _sealed(packed: bytes) -> bytes:
    check: bytes = xxhash.xxh3_64_digest(packed)
    return packed + check


def _unsealed(row: memoryview | bytes) -> bytes | None:
    packed = bytes(row[:-8])
    return packed if xxhash.xxh3_64_digest(packed) == bytes(row[-8:]) and packed else None
