"""A readers-writer lock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Many threads pass together, or one alone. A waiting one keeps newcomers out, so that it is not starved.

    Not re-entrant: a thread inside must not enter again.
    """

    def __init__(self) -> None:
        self._state = threading.Condition()
        self._inside = 0
        self._alone = False
        self._waiting = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._state:
            self._state.wait_for(lambda: not self._alone and not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            with self._state:
                self._inside -= 1
                self._state.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._state:
            self._waiting += 1
            try:
                self._state.wait_for(lambda: not self._alone and not self._inside)
            finally:
                self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._state:
                self._alone = False
                self._state.notify_all()
