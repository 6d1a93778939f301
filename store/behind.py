"""Writing behind the caller's back: one thread, groups, and a bound on what may wait."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from store.errors import StoreError
from store.threads import roam
from store.types import ChunkKV, KVKey

log = logging.getLogger(__name__)

# One group is one fsync. A larger one makes the first of it wait for the last without saving much.
GROUP_BYTES = 64 << 20
GROUP_CHUNKS = 256


@dataclass(frozen=True, eq=False)
class _Waiting:
    chunk: ChunkKV
    done: Future[int] = field(default_factory=Future)

    def __post_init__(self) -> None:
        # A waiter that gives up (a cancelled asyncio task cancels what it wraps) does not call the write off.
        self.done.set_running_or_notify_cancel()

    @property
    def size(self) -> int:
        return self.chunk.k.nbytes + self.chunk.v.nbytes


class Behind:
    """Queue in front of ``put_many``. ``put`` waits while ``limit_bytes`` of tensors are queued or being written.

    Every future is done in the end: with the bytes written, with ``put_many``'s own error, or with ``StoreError``.
    Errors are logged too, for a caller who never looks. Thread-safe.
    """

    def __init__(self, put_many: Callable[[list[ChunkKV]], list[int]], limit_bytes: int) -> None:
        if limit_bytes <= 0:
            raise ValueError(f"limit_bytes must be positive, not {limit_bytes}")
        self._put_many = put_many
        self._limit = limit_bytes
        self._changed = threading.Condition()
        self._queue: deque[_Waiting] = deque()
        self._writing: list[_Waiting] = []
        self._bytes = 0
        self._closed = False
        # The interpreter waits for an executor's threads when it ends: what is queued is written even then.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="store-behind", initializer=roam)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of tensors queued or being written."""
        return self._bytes

    def put(self, chunk: ChunkKV) -> Future[int]:
        """Queue ``chunk``. Raises ``StoreError`` if closed."""
        new = _Waiting(chunk)
        with self._changed:
            # One that is larger than the bound by itself goes alone.
            self._changed.wait_for(lambda: self._closed or not self._bytes or self._bytes + new.size <= self._limit)
            if self._closed:
                raise StoreError("the store is closed: nothing can be put any more")
            # As many turns as chunks: a turn that finds its chunk written in an earlier one's group does nothing.
            self._executor.submit(self._write_group)
            self._queue.append(new)
            self._bytes += new.size
        return new.done

    def discard(self, key: KVKey) -> bool:
        """Forget what is queued of ``key`` (its futures are done with 0); one being written is waited for first.

        A delete calls this first: what was queued before it must not come back after it. True if there was any.
        """
        with self._changed:
            self._changed.wait_for(lambda: all(job.chunk.key != key for job in self._writing))
            dropped = [job for job in self._queue if job.chunk.key == key]
            if dropped:
                self._queue = deque(job for job in self._queue if job.chunk.key != key)
                self._settle(dropped)
        for job in dropped:
            job.done.set_result(0)
        return bool(dropped)

    def flush(self) -> None:
        """Until all that is queued now is written, or has failed."""
        with self._changed:
            pending = [job.done for job in (*self._writing, *self._queue)]
        for done in pending:
            done.exception()

    def close(self) -> None:
        """Write what is queued; nothing can be put after it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._executor.shutdown(wait=True)

    def _write_group(self) -> None:
        with self._changed:
            group, size = self._writing, 0
            while self._queue and len(group) < GROUP_CHUNKS and (not group or size < GROUP_BYTES):
                size += self._queue[0].size
                group.append(self._queue.popleft())
        if not group:
            return
        try:
            self._write(group)
        finally:
            for job in group:
                if not job.done.done():
                    job.done.set_exception(StoreError(f"the writing of {job.chunk.key.hex} was broken off"))
            with self._changed:
                self._writing = []
                self._settle(group)

    def _write(self, group: list[_Waiting]) -> None:
        try:
            sizes = self._put_many([job.chunk for job in group])
        except (StoreError, ValueError, MemoryError) as error:
            if len(group) > 1:
                # Which of them it was does not show: one by one. Those that are stored already are there at once.
                for job in group:
                    self._write([job])
                return
            log.error("%s could not be stored: %s", group[0].chunk.key.hex, error)
            group[0].done.set_exception(error)
            return
        for job, size in zip(group, sizes, strict=True):
            job.done.set_result(size)

    def _settle(self, jobs: list[_Waiting]) -> None:
        self._bytes -= sum(job.size for job in jobs)
        self._changed.notify_all()
