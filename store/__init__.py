"""KV at rest: content addresses, codec, stores, verification. Knows nothing of models, prompts or HTTP."""

from __future__ import annotations

from store.base import Entry, Found, GcReport, KVStore, Miss, StoreStats, TierStats, VerifyReport
from store.config import StoreConfig
from store.errors import LostError, StoreError, StoreFormatError, StoreFullError, StoreIOError
from store.key import context_hash, make_key, source_of
from store.types import DTYPES, FORMAT_VERSION, ChunkKV, KVKey, KVLayout, MissReason, Want

__all__ = [
    "DTYPES",
    "FORMAT_VERSION",
    "ChunkKV",
    "Entry",
    "Found",
    "GcReport",
    "KVKey",
    "KVLayout",
    "KVStore",
    "LostError",
    "Miss",
    "MissReason",
    "StoreConfig",
    "StoreError",
    "StoreFormatError",
    "StoreFullError",
    "StoreIOError",
    "StoreStats",
    "TierStats",
    "VerifyReport",
    "Want",
    "context_hash",
    "make_key",
    "open_store",
    "source_of",
]


def open_store(config: StoreConfig) -> KVStore:
    """The store that ``config`` describes. Raises ``StoreError`` and its kinds."""
    if config.path is None:
        from store.memory import MemoryStore

        return MemoryStore(config)
    from store.ssd import SsdStore

    disk = SsdStore(config)
    if not config.ram_bytes:
        return disk
    from store.tiered import TieredStore

    return TieredStore(config, disk)
