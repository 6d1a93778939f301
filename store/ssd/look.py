"""Where an entry is, or why there is none."""

from __future__ import annotations

from functools import partial

from store.base import Miss
from store.check import absence
from store.errors import CorruptEntryError, StoreIOError
from store.ssd.database import Database, Txn
from store.ssd.found import Spot
from store.ssd.index import Index
from store.ssd.rows import INLINE, Place
from store.ssd.segment import Segments
from store.types import KVKey, Want

_MOST_LOOKS = 8


def look(db: Database, index: Index, segments: Segments, key: KVKey, want: Want | None) -> Spot | Miss:
    """One read transaction, and the file of its segment opened if it is not yet. ``want`` is asked for the reason of a
    miss; without it that is always ``evicted``.

    Raises ``CorruptEntryError`` if the row is damaged or the file is missing, ``StoreIOError``.
    """
    before: Place | None = None
    for _ in range(_MOST_LOOKS):
        found = db.read(partial(_row, index, key, want))
        if isinstance(found, Miss):
            return found
        place, header, payload = found
        if place.segment == INLINE:
            return Spot(place, header, None, payload)
        try:
            return Spot(place, header, segments.open(place.segment), b"")
        except FileNotFoundError:  # collected meanwhile: then the entry is elsewhere
            if place == before:
                break
            before = place
        except OSError as error:
            raise StoreIOError(f"{segments.path(place.segment)}: {error}") from error
    raise CorruptEntryError(f"{segments.path(place.segment)} is missing")


def _row(index: Index, key: KVKey, want: Want | None, txn: Txn) -> tuple[Place, bytes, bytes] | Miss:
    found = index.find(txn, key)
    if found is not None:
        place, header = found
        return place, header, index.payload(txn, key) if place.segment == INLINE else b""
    if want is None:
        return Miss("evicted")
    grief = index.grief(txn, key)
    known = index.known(txn, want.source)
    return Miss(absence(want, evicted=grief is not None and grief.evicted, known=known))
