"""Who was used, noted in memory and written in batches: no reader waits for a commit."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from store.errors import StoreError
from store.evict import Policy, Tuner, missed
from store.ssd.database import Txn
from store.ssd.index import Index
from store.ssd.rows import Life
from store.types import KVKey

log = logging.getLogger(__name__)

_EVERY_S = 5.0  # what a crash forgets
_MOST = 1024  # keys waiting
_MOST_MISSED = 100_000
Batch = dict[KVKey, tuple[int, float]]  # times, and when last


class Asked(NamedTuple):
    """A key that was asked for ``times`` times, the last time at ``last``; ``life`` is None if it was not there."""

    key: KVKey
    times: int
    last: float
    life: Life | None


class Uses:
    """``write`` is called with a batch, on a thread of its own and in ``flush``. Thread-safe."""

    def __init__(self, write: Callable[[Batch], None]) -> None:
        self._write = write
        self._waiting: Batch = {}
        self._state = threading.Condition()
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def note(self, key: KVKey) -> None:
        """It was asked for."""
        now = time.time()
        with self._state:
            times, _ = self._waiting.get(key, (0, now))
            self._waiting[key] = (times + 1, now)
            if self._thread is None and not self._closed:
                # Only now: a process that never reads needs none, and a fork would lose it.
                self._thread = threading.Thread(target=self._run, name="store-uses", daemon=True)
                self._thread.start()
            if len(self._waiting) >= _MOST:
                self._state.notify()

    def flush(self) -> None:
        """Write what is waiting. Raises what ``write`` does; what could not be written is dropped."""
        with self._writing:
            with self._state:
                batch, self._waiting = self._waiting, {}
            if batch:
                self._write(batch)

    def close(self) -> None:
        with self._state:
            self._closed = True
            self._state.notify()
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._closed or len(self._waiting) >= _MOST, timeout=_EVERY_S)
                if self._closed:
                    return
            try:
                self.flush()
            except StoreError as error:  # a use that is forgotten makes eviction a little worse, no more
                log.warning("uses could not be noted: %s", error)


class Traffic:
    """``policy``: with ``gdsf`` and a ``limit`` (bytes), the variant that would have saved most lately; else ``base``.

    It goes by what this process was asked for, and forgets it with the process. Thread-safe.
    """

    def __init__(self, base: Policy, limit: int | None, low: float) -> None:
        self.base = base
        self._tuner = Tuner(limit, low=low) if limit is not None and base.name == "gdsf" else None
        self._missed: dict[KVKey, float] = {}  # since when: the tuner cannot weigh them before they have a size
        self._lock = threading.Lock()

    @property
    def policy(self) -> Policy:
        # Without the lock: it is one look at an attribute, and the caller may be in a transaction.
        return self.base if self._tuner is None else self._tuner.policy

    def asked(self, uses: Iterable[Asked]) -> None:
        """Not to be called in a transaction: it may take 0.1 ms for each."""
        if self._tuner is None:
            return
        for key, times, last, life in sorted(uses, key=lambda use: use.last):
            with self._lock:
                if life is None:
                    self._missed[key] = last
                    if len(self._missed) > _MOST_MISSED:
                        del self._missed[next(iter(self._missed))]
                else:
                    for _ in range(times):
                        self._tuner.asked(key, life.bytes, life.cost, now=last)

    def came(self, key: KVKey, bytes: int, cost: float) -> None:
        """``key`` was put: if it was missed, it is known now what was asked for."""
        with self._lock:
            if self._tuner is not None and self._missed.pop(key, None) is not None:
                self._tuner.asked(key, bytes, cost, now=time.time())


def write_uses(index: Index, policy: Policy, batch: Batch, txn: Txn) -> list[Asked]:
    """Note in the index who was used, and of those who are not there, that they were asked for; for ``Traffic``."""
    clock = index.clock(txn)
    asked: list[Asked] = []
    for key, (times, last) in batch.items():
        found = index.life(txn, key)
        if found is not None:
            life, owner = found
            usage = policy.used(life.usage, life.bytes, life.cost, now=last, clock=clock, times=times)
            index.set_life(txn, key, life.with_usage(usage), owner)
            asked.append(Asked(key, times, last, life))
            continue
        if not index.has(txn, key):
            grief = index.grief(txn, key)
            before, evicted = (None, False) if grief is None else (grief.usage, grief.evicted)
            index.mourn(txn, key, missed(policy, before, now=last, times=times), evicted=evicted)
            asked.append(Asked(key, times, last, None))
    return asked
