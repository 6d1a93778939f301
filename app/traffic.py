"""Who is using the engine now: chat requests go first, compile passes wait for a gap."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from app.errors import OverloadedError


class Traffic:
    """Counts running generations, refuses more than ``limit``, and lets background work wait for quiet."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    @contextmanager
    def enter(self) -> Iterator[None]:
        """One chat request. Raises ``OverloadedError`` when there are too many."""
        if self.running >= self.limit:
            raise OverloadedError(f"{self.running} requests are running; try again soon", retry_after=2)
        self.running += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self.running -= 1
            if not self.running:
                self._quiet.set()

    async def quiet(self, patience_s: float = 2.0) -> None:
        """Until no request runs, but no longer than ``patience_s``: a busy server must still precompute."""
        try:
            await asyncio.wait_for(self._quiet.wait(), patience_s)
        except TimeoutError:
            return
