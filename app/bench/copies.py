"""Bytes that the processor moves for each byte that a read delivers."""

from __future__ import annotations

import tracemalloc

from app.bench.delivery import Delivery, make_chunk
from store import KVStore, StoreConfig
from store.ssd import SsdStore
from store.tiered import TieredStore


def count_copies(bench: Delivery) -> dict[str, float]:
    """By path: what system calls copied, and what was copied or decoded in memory (not what a codec moves within).

    ``ssd`` (from the page cache) and ``ram``; the same with the name of the first codec that is not raw, if any.
    """
    raw = {"ssd": _count(bench, bench.ssd, within=0), "ram": _count(bench, bench.tiers, within=1)}
    codec = next((name for name in bench.setup.codecs if name != "raw"), None)
    if codec is None:
        return raw
    config = StoreConfig(path=bench.folder / "coded", codec=codec, ram_bytes=2 * bench.total)
    below = SsdStore(config, files=bench.files)
    tiers = TieredStore(config, below)
    try:
        below.put_many([make_chunk(bench.setup, number, values=True) for number in range(bench.setup.chunks)])
        # Decoding writes the bytes delivered, from wherever the plane was read into: that is the copy.
        raw[f"ssd {codec}"] = _count(bench, below, within=1, decoded=True)
        if tiers.warm([want.key for want in bench.wants]) == bench.setup.chunks:
            raw[f"ram {codec}"] = _count(bench, tiers, within=1, decoded=True)
    finally:
        tiers.close()
    return raw


def _count(bench: Delivery, store: KVStore, *, within: int, decoded: bool = False) -> float:
    """``within``: the copies in memory that the path is known to make. One more if it allocates as much as a plane."""
    bench.files.bytes = 0
    tracemalloc.start()
    bench.read_chunks(store, 1)
    scratch = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    plane = bench.total // bench.setup.chunks // bench.setup.layers
    buffered = not decoded and scratch >= plane // 2
    return round(bench.files.bytes / bench.total + within + buffered, 3)
