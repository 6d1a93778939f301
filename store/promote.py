"""Bringing entries from the tier below into memory, behind the reader's back."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

from store.base import KVStore
from store.codec import Bytes, open_codec
from store.entry import Header
from store.errors import CorruptEntryError, LostError, StoreError, StoreFullError
from store.held import Held
from store.ram import Ram
from store.threads import yield_to_others
from store.types import KVKey

log = logging.getLogger(__name__)

MOST_QUEUED = 1024
SWEEP_S = 30.0


class Below(KVStore, Protocol):
    """What a tier in memory needs of the one below it."""

    def generation(self, key: KVKey) -> int | None:
        """Names one write of the entry: never used again for the same key. It counts as no use."""
        ...

    def used(self, key: KVKey) -> None:
        """Note a use: it was read from above."""
        ...

    def read_encoded(self, key: KVKey) -> tuple[bytes, list[Bytes]] | None:
        """Header and planes as stored, checked, in memory of their own. It counts as no use. None if there is no
        entry. Raises ``LostError`` if it is damaged."""
        ...

    def put_encoded(self, items: list[tuple[bytes, list[Bytes]]]) -> list[int]:
        """``put_many`` of entries in that form. Raises ``CorruptEntryError`` unless they are sound."""
        ...


class Promoter:
    """Copies entries of ``below`` into ``ram``; ``codec``: what they are held in (``same``: as they are stored).

    Thread-safe. A copy carries the generation it is a copy of, and none of an entry that is gone stays.
    """

    def __init__(self, ram: Ram, below: Below, codec: str) -> None:
        self._ram = ram
        self._below = below
        self._codec = None if codec in ("same", "auto") else open_codec(codec)
        self._lock = threading.Lock()
        self._queued: set[KVKey] = set()
        self._closed = False
        self._swept = time.monotonic()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="store-promote", initializer=yield_to_others)

    def offer(self, header: Header) -> None:
        """The entry has been read from below: copy it if it is worth its room. Returns at once."""
        with self._lock:
            if self._closed or header.key in self._queued or len(self._queued) >= MOST_QUEUED:
                return
            self._queued.add(header.key)
            self._executor.submit(self._promote_offered, header).add_done_callback(_log_error)

    def promote(self, key: KVKey, *, forced: bool) -> bool:
        """Copy it now, ``forced`` whatever it is worth; whether the copy is there. Raises ``StoreIOError``."""
        generation = self._below.generation(key)
        if generation is None:
            return False
        old = self._ram.get(key)
        if old is not None:
            if old.generation == generation:
                return True
            self._ram.remove(key, only=old)
        try:
            encoded = self._below.read_encoded(key)
            if encoded is None:
                return False
            new = Held.made(*encoded)
            if self._codec is not None and new.header.codec.name != self._codec.name:
                new = new.recoded(self._codec)
            new = replace(new, generation=generation)
            if self._ram.insert(new, forced=forced) is None:
                return False
        except (LostError, CorruptEntryError, StoreFullError) as error:
            log.info("%s stays out of memory: %s", key.hex, error)
            return False
        # Deleted while it was copied? A delete takes it out below first, then here: one of the two sees the other.
        if self._below.generation(key) != generation:
            self._ram.remove(key, only=new)
            return False
        held = self._ram.get(key)  # perhaps another thread's copy, which was faster
        return held is not None and held.generation == generation

    def sweep(self) -> None:
        """Let go of copies of what other processes have deleted: they would not be served, but are not to stay either.

        Raises ``StoreIOError``.
        """
        with self._ram.lock:
            copies = list(self._ram.held.items())
        for key, held in copies:
            if self._below.generation(key) != held.generation:
                self._ram.remove(key, only=held)

    def sweep_in_time(self) -> None:
        """``sweep``, behind the caller's back, if that is long ago."""
        if time.monotonic() - self._swept < SWEEP_S:
            return
        with self._lock:
            if self._closed or time.monotonic() - self._swept < SWEEP_S:
                return
            self._swept = time.monotonic()
            self._executor.submit(self.sweep).add_done_callback(_log_error)

    def flush(self) -> None:
        """Until all that was offered so far is copied, or not."""
        with self._lock:
            if self._closed:
                return
            last = self._executor.submit(lambda: None)
        last.result()

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _promote_offered(self, header: Header) -> None:
        try:
            codec = self._codec
            layout = header.layout
            size = (
                header.payload_bytes
                if codec is None or codec.name == header.codec.name
                else layout.layers * codec.plane_bytes(layout, header.tokens)
            )
            if self._ram.would_take(header, size):
                self.promote(header.key, forced=False)
        except StoreError as error:
            log.warning("%s could not be copied into memory: %s", header.key.hex, error)
        finally:
            with self._lock:
                self._queued.discard(header.key)


def _log_error(done: Future[None]) -> None:
    if not done.cancelled() and done.exception() is not None:
        log.error("promotion failed", exc_info=done.exception())
