"""What a compile pass has handed to the store, which writes behind its back."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from store.base import KVStore
from store.types import KVKey


@dataclass(frozen=True)
class Written:
    """Payload ``bytes`` that are durable now; how many chunks the store ``refused`` as worth less than what it has."""

    bytes: int
    refused: int


@dataclass(frozen=True)
class Writing:
    """The chunks of one pass on their way to disk: ``futures[i]`` is that of ``keys[i]``."""

    store: KVStore
    keys: Sequence[KVKey]
    futures: Sequence[Future[int]]

    def done(self) -> bool:
        return all(future.done() for future in self.futures)

    def result(self) -> Written:
        """Wait for all. Raises ``StoreError`` and its kinds, after all have ended."""
        for future in self.futures:
            future.exception()
        sizes = [future.result() for future in self.futures]
        # Nothing was written of a chunk that was there already, nor of one that was refused.
        refused = sum(not size and not self.store.contains(key) for key, size in zip(self.keys, sizes, strict=True))
        return Written(sum(sizes), refused)
