"""The guard of one service: samples answers, compares them in the background, decides how much is recomputed."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import NotGuardedError
from app.guard.levels import FULL, Levels, Switch
from app.guard.state import Level, State, read_state, view, write_state
from app.guard.watch import TOP, Watch
from blend.types import BlendOptions

if TYPE_CHECKING:
    from app.intake import Call
    from app.metrics import Metrics
    from app.settings import GuardSettings
    from app.traffic import Traffic
    from blend.engines import Engine

log = logging.getLogger(__name__)


class Guard:
    """See ``app.guard``. Levels hold as soon as it is made; answers are compared between ``start`` and ``close``.

    What a client chose is left alone: an explicit mode is served as asked, an explicit ratio is raised at most, and
    comparisons of either are counted but move no level (else anyone could make a collection slow for everyone by
    asking for bad blends).
    """

    def __init__(
        self,
        engine: Engine,
        settings: GuardSettings,
        traffic: Traffic,
        metrics: Metrics,
        *,
        folder: Path,
        timeout_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Reads the state kept in ``folder``; raises ``StartError``. ``timeout_s``: for one comparison."""
        self._engine, self.settings, self._traffic, self._metrics = engine, settings, traffic, metrics
        self._folder, self._timeout_s = folder, timeout_s
        self._levels = Levels(settings, self._read(), switched=self._switched, clock=clock)
        self._pending: asyncio.Queue[Watch] = asyncio.Queue(settings.max_pending)
        self._writing = asyncio.Lock()
        self._worker: asyncio.Task[None] | None = None
        self._publish()

    def start(self) -> None:
        """Begin to compare answers, if a share of them is to be compared."""
        if self.settings.share > 0 and self._worker is None:
            self._worker = asyncio.create_task(self._work(), name="ragblend-guard")

    async def close(self) -> None:
        """Stop at once; comparisons that wait are forgotten."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)

    async def settled(self) -> None:
        """Until nothing waits to be compared."""
        await self._pending.join()

    def adjust(self, blend: BlendOptions, collections: Collection[str]) -> tuple[BlendOptions, str | None]:
        """``blend`` as it is to be served over ``collections``, and why if that is not what was asked for."""
        if blend.mode != "auto":
            return blend, None
        least, why = self._levels.least(collections, trials=self._worker is not None)
        if least >= FULL:
            return dataclasses.replace(blend, mode="full"), f"guard: {why}, full prefill"
        if least <= blend.recompute_ratio:
            return blend, None
        return dataclasses.replace(blend, recompute_ratio=least), f"guard: {why}, ratio raised to {least:g}"

    def watch(self, call: Call) -> Watch | None:
        """A watch over the first answer of ``call``, if that is one of the sampled calls."""
        collections = call.grounding.collections if call.grounding else ()
        if self._worker is None or call.blend.mode == "full" or not collections or call.dry_run:
            return None
        if not sampled(call.id, self.settings.share):
            return None
        asked = call.body.rag.blend if call.body.rag else None
        chosen = asked is not None and (asked.selector is not None or asked.recompute_ratio is not None)
        return Watch(
            call.requests[0],
            tokens=self.settings.tokens,
            top=min(TOP, self._engine.info.max_logprobs),
            collections=collections,
            counts=call.blend.mode == "auto" and not chosen,
            at=self._levels.now(),
        )

    def offer(self, watch: Watch) -> None:
        """Compare ``watch`` when there is time; it is dropped when too many wait."""
        try:
            self._pending.put_nowait(watch)
        except asyncio.QueueFull:
            self._count("dropped", watch)

    def view(self) -> list[dict[str, object]]:
        """Every collection that was compared, by name."""
        return [view(name, level) for name, level in sorted(self._levels.state.collections.items())]

    async def reset(self, collection: str) -> None:
        """Serve ``collection`` as asked again. Raises ``NotGuardedError`` for one that was never compared."""
        if not self._levels.reset(collection):
            raise NotGuardedError(f"the guard knows nothing of collection {collection[:200]!r}")
        log.warning("guard: collection %r was reset", collection)
        self._publish()
        await self._save()

    async def _work(self) -> None:
        while True:
            watch = await self._pending.get()
            try:
                await self._traffic.quiet()
                await self._compare(watch)
            finally:
                self._pending.task_done()

    async def _compare(self, watch: Watch) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await watch.compare(self._engine, self.settings.max_kl)
        except TimeoutError:
            self._count("dropped", watch)
            return
        except Exception as e:  # nobody asked for this work, and it must not end the guard
            log.warning("guard: a comparison failed: %s: %s", type(e).__name__, e)
            self._count("failed", watch)
            return
        self._count("agree" if found.agree else "differ", watch)
        if watch.counts:
            self._levels.note(watch.collections, found, used=watch.asked.blend.recompute_ratio, asked_at=watch.at)
            self._publish()
            await self._save()

    def _read(self) -> State:
        model = self._engine.info.layout.digest.hex()
        state = read_state(self._folder)
        if state is None:
            return State(model=model)
        if state.model != model:
            log.info("guard: what is known is about another model and is forgotten")
            return State(model=model)
        return state

    async def _save(self) -> None:
        """A state that cannot be written must not stop the guard: it still knows."""
        async with self._writing:
            text = self._levels.state.model_dump_json(indent=1)
            try:
                await asyncio.to_thread(write_state, self._folder, text)
            except OSError as e:
                log.error("guard: the state could not be written: %s", e.strerror or e)

    def _count(self, result: str, watch: Watch) -> None:
        self._metrics.guard_comparisons.labels(result, "server" if watch.counts else "client").inc()

    def _switched(self, switch: Switch) -> None:
        self._metrics.guard_switched(switch.collection, switch.direction)
        self._publish()

    def _publish(self) -> None:
        self._metrics.show_guard({n: _figures(level) for n, level in self._levels.state.collections.items()})


def sampled(name: str, share: float) -> bool:
    """Whether the call ``name`` is among the ``share`` that is compared: the same answer for the same name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) < share * 2**64


def _figures(level: Level) -> tuple[float | None, float | None, float]:
    return level.agreement, level.mean_kl, level.ratio
