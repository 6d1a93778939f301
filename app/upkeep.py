"""Verification and collection of the store: one at a time, going on when nobody waits any more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from app.errors import OverloadedError
from app.store_metrics import StoreMetrics
from store.base import GcReport, KVStore, VerifyReport
from store.errors import StoreError

log = logging.getLogger(__name__)


class Upkeep:
    """Works on ``store`` in a thread, and remembers the last report of each kind."""

    def __init__(self, store: KVStore, metrics: StoreMetrics) -> None:
        self._store, self._metrics = store, metrics
        self._task: asyncio.Task[dict[str, Any]] | None = None
        self._running: dict[str, Any] | None = None
        self._last: dict[str, dict[str, Any]] = {}

    def view(self) -> dict[str, Any]:
        """What runs, and how the last verification and collection ended."""
        return {"running": self._running, "verify": self._last.get("verify"), "gc": self._last.get("gc")}

    async def verify(self, *, repair: bool, patience_s: float) -> dict[str, Any] | None:
        """The report; ``None`` if it takes longer than ``patience_s`` (it goes on). Raises ``OverloadedError`` while
        another runs, and ``StoreError``."""
        return await self._start("verify", lambda: self._verify(repair), patience_s)

    async def gc(self, *, full: bool, patience_s: float) -> dict[str, Any] | None:
        """As ``verify``."""
        return await self._start("gc", lambda: self._gc(full), patience_s)

    async def close(self) -> None:
        """After the store was closed, which ends what still ran on it: nothing done so far is lost."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _start(self, kind: str, work: Callable[[], dict[str, Any]], patience_s: float) -> dict[str, Any] | None:
        if self._running is not None:
            raise OverloadedError(f"{self._running['kind']} is running; GET /cache/summary tells when it has ended")
        self._running = {"kind": kind, "since": int(time.time())}
        task = self._task = asyncio.create_task(self._run(kind, work))
        task.add_done_callback(_seen)
        await asyncio.wait([task], timeout=patience_s)  # whoever stops waiting does not stop it
        return task.result() if task.done() else None

    async def _run(self, kind: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        begin = time.perf_counter()
        report: dict[str, Any] = {}
        try:
            report = await asyncio.to_thread(work)
            return report
        except StoreError as e:
            log.error("the store's %s failed: %s", kind, e)
            report = {"error": type(e).__name__}  # its words may hold paths
            raise
        finally:
            seconds = round(time.perf_counter() - begin, 3)
            self._last[kind] = report | {"ended_at": int(time.time()), "seconds": seconds}
            self._task = self._running = None

    def _verify(self, repair: bool) -> dict[str, Any]:
        report = self._store.verify(repair=repair)
        self._metrics.verified(report)
        return verify_view(report)

    def _gc(self, full: bool) -> dict[str, Any]:
        report = self._store.gc(full=full)
        self._metrics.collected(report)
        return gc_view(report)


def _seen(task: asyncio.Task[dict[str, Any]]) -> None:
    """Nobody may be waiting for its exception, which is logged and kept."""
    if not task.cancelled():
        task.exception()


def verify_view(report: VerifyReport) -> dict[str, Any]:
    return {"checked": report.checked, "bad": [key.hex for key in report.bad], "repaired": report.repaired}


def gc_view(report: GcReport) -> dict[str, Any]:
    """Bytes freed and moved, entries expired and evicted."""
    return {
        "freed_bytes": report.freed,
        "moved_bytes": report.moved,
        "expired": report.expired,
        "evicted": report.evicted,
    }
