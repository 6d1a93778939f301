"""Compile the KV of documents into the store, ahead of any question. Used by ingest and by the command line."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.errors import SettingsError
from app.files import DataFileError
from app.pins import Pins
from app.rag import References
from app.rates import Rates
from app.saving import PrefillRate
from app.sweep import sweep, sweep_overtaken
from app.traffic import Traffic
from blend.engines import Engine
from blend.errors import NonFiniteError, PromptTooLongError
from blend.prompt import ChunkRef
from blend.types import CompileJob, CompileResult
from retriever.errors import UnknownCollectionError, UnknownDocumentError
from retriever.retriever import Retriever
from retriever.types import DocumentInfo
from store.errors import StoreError, StoreFullError
from store.types import KVKey

if TYPE_CHECKING:
    from app.service import Service

GIB = 1 << 30
FINISH_S = 30.0
log = logging.getLogger(__name__)


@dataclass
class PrecomputeReport:
    """Chunks ``done`` now, ``skipped`` (the store has them), ``refused`` (a full store has nothing that is worth less),
    ``failed``; payload ``bytes`` written, ``tokens`` run
    through the model (contexts included). ``stopped`` says why it ended early, if it did.

    ``cascaded``: chunks that got new neighbours because one of theirs was deleted or changed, and are therefore
    compiled again, whichever document they are of. ``removed``: stored chunks that were stale and are deleted.
    ``oldest`` is the first entry of this run."""

    done: int = 0
    skipped: int = 0
    refused: int = 0
    failed: int = 0
    cascaded: int = 0
    removed: int = 0
    bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stopped: str | None = None
    error: str | None = None
    oldest: KVKey | None = None

    @property
    def chunks(self) -> int:
        """Chunks dealt with so far."""
        return self.done + self.skipped + self.refused + self.failed


_Work = tuple[DocumentInfo, frozenset[str] | None]
"""A document to compile, and the ids of its chunks that are meant; ``None``: all."""

Progress = Callable[[PrecomputeReport, int], None]
"""Called after every pass with the report so far (it goes on changing) and the number of chunks in all."""


async def precompute(
    service: Service,
    *,
    collection: str | None = None,
    only_missing: bool = True,
    refresh_neighbours: bool = False,
    max_gib: float | None = None,
    progress: Progress | None = None,
) -> PrecomputeReport:
    """Compile all documents of ``collection`` (default: of every collection).

    Resumable: with ``only_missing`` what the store has is skipped. Interruptible: when cancelled, the running pass is
    finished, then ``CancelledError`` is raised; ``progress`` has seen the report. ``max_gib`` bounds what is written.
    A full store ends the run with ``stopped`` set. ``refresh_neighbours`` searches every chunk's neighbours again
    before. Raises ``UnknownCollectionError``, ``EngineError``; ``SettingsError`` for ``refresh_neighbours`` in another
    compile context.
    """
    documents = await asyncio.to_thread(service.retriever.documents, collection)
    return await service.precomputer.run(
        documents,
        only_missing=only_missing,
        refresh_neighbours=refresh_neighbours,
        max_gib=max_gib,
        progress=progress,
    )


class Precomputer:
    """Runs compile passes one at a time, and each only when no chat request is waiting.

    ``neighbours``: how many a chunk gets in the compile context ``neighbours``.
    """

    def __init__(
        self, engine: Engine, retriever: Retriever, references: References, traffic: Traffic, *, neighbours: int,
        pins: Pins, rates: Rates, prefill: PrefillRate,
    ) -> None:  # fmt: skip
        self._engine, self._retriever, self._references, self._traffic = engine, retriever, references, traffic
        self._neighbours, self._pins, self._rates, self._prefill = neighbours, pins, rates, prefill
        self._measured = (0, 0.0)  # tokens and seconds of this run's passes
        self._one = asyncio.Lock()

    async def sweep(self) -> int:
        """Delete the stored KV that is stale; how many entries that were. What cannot be deleted now is logged, and
        tried again by the next sweep."""
        return await self._deleted(sweep, self._retriever, self._references, self._engine.store)

    async def run(
        self,
        documents: Sequence[DocumentInfo],
        *,
        only_missing: bool = True,
        refresh_neighbours: bool = False,
        max_gib: float | None = None,
        progress: Progress | None = None,
    ) -> PrecomputeReport:
        """See ``precompute``. Chunks of other documents that lost a neighbour are compiled too."""
        if refresh_neighbours and self._references.keys.context != "neighbours":
            raise SettingsError(
                f"compile.context is {self._references.keys.context}, so there are no neighbours to refresh; set it to "
                "neighbours"
            )
        report, begin = PrecomputeReport(), time.perf_counter()
        async with self._one, self._measuring():
            if (job := await asyncio.to_thread(self._prefix_job)) is not None:
                await self._passes([job], report, None, lambda: None)
                report = PrecomputeReport(
                    bytes=report.bytes, tokens=report.tokens, stopped=report.stopped, error=report.error
                )
            work = await asyncio.to_thread(self._work, documents, report, refresh_neighbours)
            report.removed = await self.sweep()
            total = sum(d.chunks if only is None else len(only) for d, only in work)

            def tell() -> None:
                report.seconds = time.perf_counter() - begin
                if progress is not None:
                    progress(report, total)

            for document, only in work:
                if report.stopped:
                    break
                try:
                    jobs, present = await asyncio.to_thread(self._jobs, document, only, only_missing)
                except UnknownDocumentError:
                    continue  # deleted meanwhile
                report.skipped += present
                tell()
                try:
                    await self._passes(jobs, report, max_gib, tell)
                finally:
                    report.removed += await self._deleted(
                        sweep_overtaken, self._references, self._engine.store, document, jobs
                    )
            tell()
        return report

    @asynccontextmanager
    async def _measuring(self) -> AsyncIterator[None]:
        """Passes inside are timed, for the estimates of later runs."""
        self._measured = (0, 0.0)
        try:
            yield
        finally:
            info = self._engine.info
            try:
                self._rates.learn(info.name, info.layout, info.device, *self._measured)
            except DataFileError as e:
                log.warning("the speed of this run is not kept: %s", e)

    async def _deleted(self, delete: Callable[..., int], *what: Any) -> int:
        try:
            return await asyncio.to_thread(delete, *what)
        except StoreError as e:
            log.error("stale KV could not be deleted: %s", e)
            return 0

    def _work(self, documents: Sequence[DocumentInfo], report: PrecomputeReport, refresh: bool) -> list[_Work]:
        """``documents``, and chunks of others whose neighbours had been taken back; all have neighbours then."""
        work: list[_Work] = [(document, None) for document in documents]
        if self._references.keys.context != "neighbours":
            return work
        for collection in dict.fromkeys(d.collection for d in documents):
            given = {d.id for d in documents if d.collection == collection}
            try:
                found = self._retriever.assign_neighbours(
                    collection, self._neighbours, documents=given, refresh=refresh
                )
            except UnknownCollectionError:
                continue  # deleted meanwhile
            again = sum(len(chunks) for chunks in found.again.values())
            if found.changed:
                log.info(
                    "collection %s: %d chunks have new neighbours, %d of them because one was deleted or changed",
                    collection, found.changed, again,
                )  # fmt: skip
            report.cascaded += again
            if others := found.again.keys() - given:
                work += [(d, found.again[d.id]) for d in self._retriever.documents(collection) if d.id in others]
        return work

    async def _passes(
        self,
        jobs: Sequence[CompileJob],
        report: PrecomputeReport,
        max_gib: float | None,
        tell: Callable[[], None],
    ) -> None:
        for job in jobs:
            need = sum(len(c) for c in job.chunks) * self._engine.info.layout.token_bytes
            if max_gib is not None and report.bytes + need > max_gib * GIB:
                report.stopped = f"the limit of {max_gib} GiB is reached"
                return
            await self._traffic.quiet()
            try:
                result = await _finished(self._engine.compile(job))
            except StoreFullError as e:
                report.failed += len(job.chunks)
                report.stopped = report.error = f"the KV store is full: {e}"
                return
            except (StoreError, PromptTooLongError, NonFiniteError) as e:
                log.warning("pass %s was not stored: %s", job.id, e)
                report.failed += len(job.chunks)
                report.error = str(e)
                continue
            report.done += result.chunks - result.refused
            report.refused += result.refused
            report.bytes += result.bytes
            report.tokens += result.tokens
            self._prefill.saw_compile(result.tokens, result.seconds)
            self._measured = (self._measured[0] + result.tokens, self._measured[1] + result.seconds)
            tell()
            report.oldest = report.oldest or job.keys[0]
            if result.refused == result.chunks or not self._engine.store.contains(report.oldest):
                # What comes is refused, or pushes out what this run has made before: passes for nothing.
                report.stopped = "the KV store is full, and what it holds is worth as much; raise store.max_gib"
                report.error = report.stopped
                return

    def _prefix_job(self) -> CompileJob | None:
        job = self._references.keys.prefix_job()
        return None if self._engine.store.contains(job.keys[0]) else job

    def _jobs(
        self, document: DocumentInfo, only: frozenset[str] | None, only_missing: bool
    ) -> tuple[list[CompileJob], int]:
        """Passes for ``document``, and how many of the chunks that are meant no pass touches."""
        refs = self._references.of(document)
        self._pin(document, refs)
        meant = [only is None or r.name in only for r in refs]
        wanted = [
            m and not (only_missing and self._engine.store.contains(r.key)) for r, m in zip(refs, meant, strict=True)
        ]
        jobs = self._references.keys.jobs(refs, wanted)
        return jobs, sum(meant) - sum(len(j.chunks) for j in jobs)

    def _pin(self, document: DocumentInfo, refs: Sequence[ChunkRef]) -> None:
        """An update gives a pinned document new keys. They are pinned before they are stored."""
        try:
            if keys := self._pins.keys(document, refs):
                self._engine.store.pin(keys)
        except (DataFileError, StoreError) as e:
            log.warning("document %s is not pinned again: %s", document.id, e)


async def _finished(passing: Coroutine[Any, Any, CompileResult]) -> CompileResult:
    """The result of a compile pass; a cancellation waits for its end, so that no half pass is thrown away."""
    task = asyncio.ensure_future(passing)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=FINISH_S)
        task.cancel()  # an engine that hangs must not keep the service from stopping
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # taken note of: the pass is not counted, and nobody is left to tell
        raise
