"""Every byte of a store on disk read and checked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Protocol

from store.base import VerifyReport
from store.entry import check_plane
from store.errors import CorruptEntryError
from store.ssd.found import Finder, Spot, SsdFound, check_spot
from store.ssd.record import read_head
from store.types import KVKey

log = logging.getLogger(__name__)


class Verified(Finder, Protocol):
    """What is needed of the store."""

    def batches(self) -> Iterator[list[KVKey]]:
        """All keys, in batches."""
        ...

    def recount(self) -> None:
        """Make what is counted true to the entries that are there."""
        ...


def verify(store: Verified, *, repair: bool) -> VerifyReport:
    """Check every entry: its row, its header, its planes, and the record that a lost index would be rebuilt from.

    ``repair`` drops what is bad and counts anew. Raises ``StoreIOError``, ``DamagedError`` if LMDB's own pages are.
    """
    checked, bad, repaired = 0, [], 0
    for keys in store.batches():
        checked += len(keys)
        for key in keys:
            fault = _fault(store, key)
            if fault is None:
                continue
            bad.append(key)
            spot, why = fault
            if repair:
                repaired += store.drop(key, None if spot is None else spot.place, why)
            else:
                log.warning("%s is corrupt: %s", key.hex, why)
    if repair:
        store.recount()
    return VerifyReport(checked, tuple(bad), repaired)


def _fault(store: Verified, key: KVKey) -> tuple[Spot | None, str] | None:
    """What is wrong with an entry and where it is, None if nothing or if it is gone."""
    spot: Spot | None = None
    try:
        while True:
            before, spot = spot, store.locate(key)
            if spot is None:
                return None
            try:
                _check(store, key, spot)
                return None
            except CorruptEntryError as error:
                if before is not None and before.place == spot.place:  # else it was moved while it was read
                    return spot, str(error)
    except CorruptEntryError as error:
        return None, str(error)
    except OSError as error:
        return spot, str(error)


def _check(store: Verified, key: KVKey, spot: Spot) -> None:
    """Raises ``CorruptEntryError`` and ``OSError``."""
    header = check_spot(key, spot)
    found = SsdFound(header, spot, store)
    for layer in range(header.layout.layers):
        check_plane(header, layer, found.stored(layer))
    if spot.segment is not None:
        record = read_head(spot.segment, spot.place.offset)
        if (record.header, record.generation) != (spot.header, spot.place.generation):
            raise CorruptEntryError("the record and the index differ")
