"""What is stored, as lists and figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from store.base import Entry, StoreStats, TierStats
from store.check import listed, read_header
from store.errors import CorruptEntryError
from store.ssd.database import Database, Txn
from store.ssd.index import Index
from store.ssd.parts import Parts
from store.types import KVKey

_BATCH = 256  # entries per read transaction: an open one keeps the map from growing and pages from reuse


def batches(db: Database, index: Index) -> Iterator[list[KVKey]]:
    """All keys in order, in batches."""
    start = b""
    while batch := db.read(partial(index.keys, start=start, most=_BATCH)):
        yield [KVKey(digest) for digest in batch if len(digest) == 32]
        start = batch[-1] + b"\0"


def describe(index: Index, key: KVKey, txn: Txn) -> Entry | None:
    """None if it is not there, or damaged (``verify`` reports it)."""
    try:
        found = index.find(txn, key)
        if found is None:
            return None
        header = read_header(key, found[1])
    except CorruptEntryError:
        return None
    lived = index.life(txn, key)
    created, used, frequency = (lived[0].created, lived[0].last, lived[0].frequency) if lived else (0.0,) * 3
    pinned = index.pinned(txn, key)
    return listed(header, bytes=header.payload_bytes, pinned=pinned, created=created, used=used, frequency=frequency)


def figures(parts: Parts, limit: int | None, seen: Mapping[str, int], tier: str, txn: Txn) -> StoreStats:
    """``seen``: what this process has counted and could not write down."""
    index = parts.index
    entries = int(txn.stat(index.tables.entries)["entries"])
    stored, raw = index.total_bytes(txn)
    held = parts.room.held(txn) - parts.reclaimer.unnoted()
    counters = index.counters(txn)
    for name, times in seen.items():
        counters[name] = counters.get(name, 0) + times
    tiers = (TierStats(tier, entries, stored, held, limit),)
    return StoreStats(tier, entries, stored, raw, index.count_pinned(txn), counters, tiers)
