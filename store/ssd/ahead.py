"""Read ahead: the kernel is told what will be read, on a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections import deque

from store.ssd.segment import Segment

log = logging.getLogger(__name__)

# Linux does no more per call than the device's readahead window and silently drops the rest; the usual one is 128 KiB.
_STEP = 128 << 10
_PROBE = 1 << 20  # so much is taken to be cached if its first and last bytes are
_MOST = 1024  # requests waiting; the oldest are dropped


class Ahead:
    """Requests are worked off in order. Nobody waits for them: telling the kernel blocks while the device's queue is
    full. Thread-safe."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Segment, int, int]] = deque(maxlen=_MOST)
        self._state = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def push(self, segment: Segment, offset: int, length: int) -> None:
        """These bytes will be read soon."""
        with self._state:
            if self._closed:
                return
            self._waiting.append((segment, offset, length))
            if self._thread is None:  # only now: a fork would lose it
                self._thread = threading.Thread(target=self._run, name="store-ahead", daemon=True)
                self._thread.start()
            self._state.notify()

    def close(self) -> None:
        with self._state:
            self._closed = True
            self._waiting.clear()
            self._state.notify()
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._closed or bool(self._waiting))
                if self._closed:
                    return
                segment, offset, length = self._waiting.popleft()
            try:
                self._advise(segment, offset, length)
            except OSError as error:  # it was only advice
                log.debug("reading ahead in %s was refused: %s", segment.path, error)

    def _advise(self, segment: Segment, offset: int, length: int) -> None:
        stop = offset + length
        for start in range(offset, stop, _PROBE):
            last = min(start + _PROBE, stop)
            if self._closed or (segment.cached(start) and segment.cached(last - 1)):
                continue
            for at in range(start, last, _STEP):
                segment.advise(at, min(_STEP, last - at))
