"""An entry on the SSD that is being read."""

from __future__ import annotations

import ctypes
import errno
import logging
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import xxhash
from torch import Tensor

from store.check import check_target, read_header
from store.codec import Bytes
from store.entry import Header, check_plane, decode_plane
from store.errors import CorruptEntryError, LostError, StoreError
from store.ssd.ahead import Ahead
from store.ssd.rows import INLINE, Place
from store.ssd.segment import Segment
from store.types import KVKey

T = TypeVar("T")
log = logging.getLogger(__name__)

_PIECE = 512 << 10
_MOST_MOVES = 8  # of one entry while one plane is read: more is not a collection but a bug


class Spot(NamedTuple):
    """All that is needed to read an entry: no lock, no transaction. ``segment`` is None and ``payload`` there for an
    inline entry."""

    place: Place
    header: bytes
    segment: Segment | None
    payload: bytes


def check_spot(key: KVKey, spot: Spot) -> Header:
    """The header of what is there. Raises ``CorruptEntryError`` if it is not that of ``key``, or not of these bytes."""
    header = read_header(key, spot.header)
    if header.payload_bytes != spot.place.payload:
        raise CorruptEntryError(f"{header.payload_bytes} bytes by the header, {spot.place.payload} by the index")
    if spot.segment is None and len(spot.payload) != header.payload_bytes:
        raise CorruptEntryError(f"{len(spot.payload)} bytes of {header.payload_bytes} are in the index")
    return header


class Finder(Protocol):
    """What a reader needs of its store."""

    ahead: Ahead

    def locate(self, key: KVKey) -> Spot | None:
        """Where the entry is now. Raises ``CorruptEntryError`` and ``StoreError``."""
        ...

    def drop(self, key: KVKey, place: Place | None, why: str) -> bool:
        """Take out an entry that is damaged, if it is still in ``place``; if it was taken out. Does not raise."""
        ...


class SsdFound:
    """See ``Found``. Its segment's file stays open for as long as it lives, removed or not."""

    tier = "ssd"

    def __init__(self, header: Header, spot: Spot, finder: Finder) -> None:
        self.header = header
        self._spot = spot
        self._finder = finder

    @property
    def generation(self) -> int:
        """Of the entry, as ``SsdStore.generation`` had it when it was found."""
        return self._spot.place.generation

    def read(self, layer: int, k: Tensor, v: Tensor) -> None:
        check_target(self.header, k, v)
        self._wherever(lambda spot: self._read(spot, layer, k, v))

    def advise(self) -> None:
        place, segment = self._spot.place, self._spot.segment
        if segment is not None:
            self._finder.ahead.push(segment, place.offset + place.head, place.payload)

    def planes(self) -> list[Bytes]:
        """All planes as they are stored, checked, views of one new buffer. Raises ``LostError`` as ``read``."""

        def work(spot: Spot) -> list[Bytes]:
            whole = np.empty(self.header.payload_bytes, np.uint8)
            if spot.segment is None:
                whole[:] = np.frombuffer(spot.payload, np.uint8)
            else:
                spot.segment.read([whole.data], spot.place.offset + spot.place.head)
            planes = [whole[start:stop] for start, stop in pairwise(self.header.offsets)]
            for layer, plane in enumerate(planes):
                check_plane(self.header, layer, plane)
            return planes

        return self._wherever(work)

    def stored(self, layer: int) -> Bytes:
        """A plane [n] uint8 as it is stored where the entry was when it was found, unchecked.

        Raises ``CorruptEntryError`` and ``OSError``.
        """
        return self._plane(self._spot, layer)

    def _wherever(self, work: Callable[[Spot], T]) -> T:
        """Run ``work`` where the entry is, even if it is moved meanwhile. Raises ``LostError``."""
        for _ in range(_MOST_MOVES):
            spot = self._spot
            try:
                return work(spot)
            except CorruptEntryError as error:
                self._spot = self._moved(spot, str(error))
            except OSError as error:
                if error.errno != errno.EIO:  # the process's trouble (descriptors, memory), not the entry's
                    raise LostError("load_timeout", f"{self.header.key.hex} cannot be read: {error}") from error
                self._spot = self._moved(spot, str(error))
        raise LostError("evicted", f"{self.header.key.hex} moved on and on")

    def _read(self, spot: Spot, layer: int, k: Tensor, v: Tensor) -> None:
        header = self.header
        if spot.segment is None or not header.codec.direct:
            decode_plane(header, layer, self._plane(spot, layer), k, v)
            return
        if k.nbytes + v.nbytes != header.sizes[layer]:
            raise CorruptEntryError(f"plane {layer} has {header.sizes[layer]} bytes for {k.nbytes} and {v.nbytes}")
        at = spot.place.offset + spot.place.head + header.offsets[layer]
        segment, hasher = spot.segment, xxhash.xxh3_128()
        # In pieces, each hashed while it is still in the cache: in one piece it comes a second time from memory.
        for memory in (_memory(k), _memory(v)):
            for start in range(0, len(memory), _PIECE):
                piece = memory[start : start + _PIECE]
                segment.fill(piece, at)
                hasher.update(piece)
                at += len(piece)
        if hasher.digest() != header.checksums[layer]:
            raise CorruptEntryError(f"the checksum of plane {layer} does not match")

    def _plane(self, spot: Spot, layer: int) -> Bytes:
        size, at = self.header.sizes[layer], self.header.offsets[layer]
        if spot.segment is None:
            return np.frombuffer(spot.payload, np.uint8)[at : at + size]
        plane = np.empty(size, np.uint8)
        spot.segment.read([plane.data], spot.place.offset + spot.place.head + at)
        return plane

    def _moved(self, spot: Spot, why: str) -> Spot:
        """Where it is now, if that is elsewhere. Raises ``LostError``."""
        key = self.header.key
        try:
            now = self._finder.locate(key)
        except CorruptEntryError as error:
            self._finder.drop(key, None, str(error))
            raise LostError("checksum_failed", f"{key.hex}: {error}") from error
        except StoreError as error:
            raise LostError("checksum_failed", f"{key.hex}: {error}") from error
        if now is None:
            raise LostError("evicted", f"{key.hex} is gone")
        if now.place == spot.place and (spot.place.segment != INLINE or now.payload == spot.payload):
            self._finder.drop(key, spot.place, why)
            raise LostError("checksum_failed", f"{key.hex}: {why}")
        if now.header != spot.header:  # put anew, in another encoding perhaps: what was read so far is not of it
            raise LostError("evicted", f"{key.hex} was replaced")
        return now


def _memory(x: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, valid as long as it lives. Torch's own ways to numpy take six times as long."""
    return memoryview((ctypes.c_char * x.nbytes).from_address(x.data_ptr())).cast("B")
