"""KV at rest: content addresses, codec, stores, verification. Knows nothing of models, prompts or HTTP."""

from __future__ import annotations

from pathlib import Path

from store.base import Entry, KVStore, Miss, StoreStats, VerifyReport
from store.errors import StoreError, StoreFormatError, StoreFullError, StoreIOError
from store.key import context_hash, make_key, source_of
from store.lmdb_store import LmdbStore
from store.memory import MemoryStore
from store.types import DTYPES, FORMAT_VERSION, ChunkKV, KVKey, KVLayout, MissReason

__all__ = [
    "DTYPES",
    "FORMAT_VERSION",
    "ChunkKV",
    "Entry",
    "KVKey",
    "KVLayout",
    "KVStore",
    "LmdbStore",
    "MemoryStore",
    "Miss",
    "MissReason",
    "StoreError",
    "StoreFormatError",
    "StoreFullError",
    "StoreIOError",
    "StoreStats",
    "VerifyReport",
    "context_hash",
    "make_key",
    "open_store",
    "source_of",
]


def open_store(path: Path | None, *, max_bytes: int | None = None, readonly: bool = False) -> KVStore:
    """The store in the folder ``path``, or a new one in memory if ``path`` is None.

    ``max_bytes`` is a limit: at it a memory store evicts the least recently used, a store on disk raises
    ``StoreFullError``. Raises ``StoreError`` and its kinds as ``LmdbStore`` does; ``ValueError`` for a
    read-only memory store, which would always be empty.
    """
    if path is None:
        if readonly:
            raise ValueError("a memory store starts empty: readonly needs a path")
        return MemoryStore(max_bytes)
    return LmdbStore(path, max_bytes=max_bytes, readonly=readonly)
