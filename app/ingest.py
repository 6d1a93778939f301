"""Documents on their way in: parse, chunk, embed, index; then compile their KV. Steps of a job (``app.jobs``)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from app.errors import BadRequestError, shape_of
from app.jobs import Content, DocumentResult, Item, Job, JobRecords
from app.metrics import Metrics
from app.precompute import Precomputer, PrecomputeReport
from app.schema.ingest import IngestDocument
from retriever.errors import (
    ParseError,
    RetrieverError,
    UnknownCollectionError,
    UnknownDocumentError,
    UnsupportedFormatError,
)
from retriever.parse import from_text, parse_many
from retriever.retriever import Retriever
from retriever.types import Document, DocumentInfo, IngestResult

_GROUP = 32  # documents embedded together, so that many small ones fill the embedder's batches
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Parsed:
    """One item after parsing: documents, or ready-made chunks, or the reason it failed."""

    item: Item
    documents: tuple[Document, ...] = ()
    chunks: tuple[str, ...] = ()
    error: ParseError | None = None


def items_of(documents: Sequence[IngestDocument]) -> list[tuple[Item, Content]]:
    """Job items of a JSON request. Raises ``BadRequestError`` naming the field."""
    items: list[tuple[Item, Content]] = []
    for n, d in enumerate(documents):
        if (d.text is None) == (d.chunks is None):
            raise BadRequestError(f"documents[{n}] needs either text or chunks", param=f"documents[{n}].text")
        text = d.text if d.text is not None else json.dumps(d.chunks)
        name = d.filename or f"{d.title or d.id or f'document-{n + 1}'}.txt"
        item = Item(n, "text" if d.chunks is None else "chunks", name, d.title, d.id, dict(d.metadata or {}))
        items.append((item, text.encode()))
    return items


def open_collection(retriever: Retriever, name: str) -> None:
    """Make sure the collection exists. Raises ``BadRequestError`` for a name no collection can have."""
    try:
        retriever.create_collection(name)
    except UnknownCollectionError as e:
        raise BadRequestError(str(e), param="collection") from e


class Ingester:
    """The two steps of a job. Work on text runs in a thread, one job at a time."""

    def __init__(self, retriever: Retriever, precomputer: Precomputer, metrics: Metrics, records: JobRecords) -> None:
        self._retriever, self._precomputer, self._metrics, self._records = (
            retriever,
            precomputer,
            metrics,
            records,
        )

    async def ingest(self, job: Job, changed: Callable[[], None]) -> None:
        """Bring ``job`` to ``searchable``, or to ``failed`` if none of its documents could be."""
        await asyncio.to_thread(self._ingest, job, changed)
        await self._precomputer.sweep()
        for d in job.documents:
            self._metrics.documents.labels(d.status).inc()
        bad = [d for d in job.documents if d.error is not None]
        if bad:
            first = bad[0].error or {}
            several = len(job.documents) > 1
            message = (
                f"{len(bad)} of {len(job.documents)} failed; the first: {first['message']}"
                if several
                else first["message"]
            )
            job.last_error = {"code": first["code"], "message": message}
        job.state = "failed" if len(bad) == len(job.documents) else "searchable"
        job.progress = {}
        changed()

    async def precompute(self, job: Job, changed: Callable[[], None]) -> None:
        """Compile what ``job`` brought in. A full store leaves it ``searchable`` with ``last_error``."""
        job.state = "precomputing"
        changed()
        documents = await asyncio.to_thread(self._documents, job)

        def tell(report: PrecomputeReport, total: int) -> None:
            job.progress = {"stage": "precomputing", "done": report.chunks, "total": total}

        report = await self._precomputer.run(documents, progress=tell)
        job.progress = {}
        job.cascaded = report.cascaded
        if report.error is not None:
            job.state = "searchable"
            message = f"the documents can be asked about; their KV was not all stored: {report.error}"
            job.last_error = {"code": "server_error", "message": message}
            return
        job.state = "precomputed"
        for d in job.documents:
            if d.status == "searchable":
                d.status = "precomputed"

    def _documents(self, job: Job) -> list[DocumentInfo]:
        found = []
        for d in job.documents:
            if d.document_id is not None and d.status == "searchable":
                try:
                    found.append(self._retriever.document(d.document_id, job.collection))
                except UnknownDocumentError:
                    log.info("document %s of job %s was deleted before it was precomputed", d.document_id, job.id)
        return found

    # -- in the thread --------------------------------------------------------------------------------------------

    def _ingest(self, job: Job, changed: Callable[[], None]) -> None:
        group: list[_Parsed] = []
        for parsed in self._parsed(job):
            if parsed.error is not None:
                job.documents.append(_failed(parsed.item.filename, parsed.error))
            elif parsed.chunks:
                job.documents.append(self._store_chunks(job, parsed))
            else:
                group.append(parsed)
                if sum(len(p.documents) for p in group) >= _GROUP:
                    self._store(job, group)
                    group = []
            changed()
        self._store(job, group)

    def _parsed(self, job: Job) -> Iterator[_Parsed]:
        for n, item in enumerate(job.items):
            job.state = "parsing"
            job.progress = {"stage": "parsing", "done": n, "total": len(job.items)}
            data = self._records.bytes_of(job.id, item.number)
            try:
                yield _parse(item, data)
            except ParseError as e:
                yield _Parsed(item, error=e)

    def _store(self, job: Job, group: Sequence[_Parsed]) -> None:
        """Index a group at once; if one document is refused, each on its own, so that the others are kept."""
        if not group:
            return
        documents = [d for p in group for d in p.documents]
        try:
            results = self._retriever.ingest(job.collection, documents, progress=_progress(job))
        except ParseError as e:
            if len(documents) == 1:
                job.documents.append(_failed(documents[0].filename, e))
                return
            for p in group:
                for d in p.documents:
                    self._store(job, [_Parsed(p.item, (d,))])
            return
        job.documents += [_searchable(r) for r in results]

    def _store_chunks(self, job: Job, parsed: _Parsed) -> DocumentResult:
        item = parsed.item
        try:
            result = self._retriever.ingest_chunks(
                job.collection,
                parsed.chunks,
                title=item.title,
                filename=item.filename,
                metadata=item.metadata,
                document_id=item.document_id,
                progress=_progress(job),
            )
        except ParseError as e:
            return _failed(item.filename, e)
        return _searchable(result)


def _parse(item: Item, data: bytes) -> _Parsed:
    if item.kind == "chunks":
        return _Parsed(item, chunks=tuple(json.loads(data)))
    if item.kind == "text":
        document = from_text(
            data.decode(),
            title=item.title,
            filename=item.filename,
            metadata=item.metadata,
            document_id=item.document_id,
        )
        return _Parsed(item, (document,))
    found = parse_many(data, item.filename, title=item.title, metadata=item.metadata, document_id=item.document_id)
    return _Parsed(item, tuple(found))


def _progress(job: Job) -> Callable[[str, int, int], None]:
    def tell(stage: str, done: int, total: int) -> None:
        job.state = "chunking" if stage == "chunking" else "embedding"
        job.progress = {"stage": stage, "done": done, "total": total}

    return tell


def _searchable(result: IngestResult) -> DocumentResult:
    d = result.document
    return DocumentResult(d.filename, "searchable", d.id, d.title, len(result.chunks), result.unchanged)


def _failed(filename: str, error: RetrieverError) -> DocumentResult:
    code = "unsupported_file" if isinstance(error, UnsupportedFormatError) else "invalid_file"
    message = str(error) if shape_of(error).show else "the server failed on this file"
    return DocumentResult(filename, "failed", error={"code": code, "message": message})
