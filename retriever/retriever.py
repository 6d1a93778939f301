"""The retriever: one data folder, one embedder, one chunk size. Safe for threads, and beside other processes."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from retriever import neighbours
from retriever.assign import assign
from retriever.catalogue import Catalogue
from retriever.check import check
from retriever.chunk import CountTokens, chunk, chunks_at
from retriever.clean import clean, clean_line
from retriever.embed import Embedder
from retriever.errors import EmptyDocumentError, UnknownDocumentError
from retriever.filters import compile_filter
from retriever.index import Indexes
from retriever.ingest import check_vectors, chunker_signature, store
from retriever.parse import from_text
from retriever.search import MODES, Mode, Query, search
from retriever.types import (
    Assigned,
    Chunk,
    ChunkName,
    CollectionInfo,
    Document,
    DocumentInfo,
    Hit,
    IngestResult,
    Neighbourhood,
    Progress,
    Scalar,
)

MAX_K = 1000
MAX_NEIGHBOURS = 16
_JOINT = "\n\n"  # between ready-made chunks in the text of their document


class Retriever:
    """Documents in, ranked chunks out.

    A document is known by its id within a collection; the same id may stand in several. Methods that take an id and
    no collection mean the first collection, by name, that has it (`delete_document`: all of them). Chunk ids follow
    from document id, ordinal and text, so equal chunk ids have equal text everywhere.

    Another process may change the same folder at any time; every call sees its committed changes.
    """

    def __init__(self, catalogue: Catalogue, embedder: Embedder, count_tokens: CountTokens, chunk_tokens: int) -> None:
        self._catalogue = catalogue
        self._indexes = Indexes(catalogue)
        self._embedder = embedder
        self._count_tokens = count_tokens
        self._chunk_tokens = chunk_tokens

    @classmethod
    def open(cls, path: Path, embedder: Embedder, count_tokens: CountTokens, *, chunk_tokens: int = 512) -> "Retriever":
        """Opens or creates the data folder `path`.

        Raises `IndexMismatchError` when it was made with another embedder or schema, `CatalogueError` when SQLite
        cannot open it, `OSError` when the folder cannot be made.
        """
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
        catalogue = Catalogue.open(path, embedder.name, lambda: embedder.dimension)
        return cls(catalogue, embedder, count_tokens, chunk_tokens)

    def __enter__(self) -> "Retriever":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Further calls raise `CatalogueError`."""
        self._catalogue.database.close()

    # Collections

    def create_collection(self, name: str) -> None:
        """Idempotent. `UnknownCollectionError` unless 1 to 64 letters, digits, ".", "_", "-", alphanumeric first."""
        self._catalogue.create_collection(name)

    def collections(self) -> list[CollectionInfo]:
        """By name; "default" is always among them."""
        return self._catalogue.collections()

    def delete_collection(self, name: str) -> None:
        """With all its documents. Deleting "default" empties it. `UnknownCollectionError` when there is none."""
        self._catalogue.delete_collection(name)
        with self._catalogue.database.read():
            alive = [self._catalogue.collection(info.name).pk for info in self._catalogue.collections()]
            self._indexes.keep_only(alive)

    # In

    def ingest(
        self, collection: str, documents: Sequence[Document], *, progress: Progress | None = None
    ) -> list[IngestResult]:
        """Chunks, embeds and stores documents; on disk when it returns, whole or not at all each.

        A document of known id and equal content is `unchanged` and costs nothing; of known id and new content it
        replaces the old one in one transaction. Content includes title, metadata, pages, chunk size and tokenizer.
        `progress(stage, done, total)` counts documents while "chunking" and "indexing", chunks while "embedding".

        Raises `UnknownCollectionError`, `ParseError` for documents that `parse` would not have made,
        `IndexMismatchError`, `CatalogueError`; documents stored before the error stay.
        """
        signature = chunker_signature(self._count_tokens, self._chunk_tokens)
        return self._store(collection, documents, self._chunk, signature, progress)

    def ingest_chunks(
        self,
        collection: str,
        texts: Sequence[str],
        *,
        title: str | None = None,
        filename: str = "chunks.txt",
        metadata: Mapping[str, Scalar] | None = None,
        document_id: str | None = None,
        progress: Progress | None = None,
    ) -> IngestResult:
        """One document whose chunks are exactly these texts (cleaned as any text is), whatever their length."""
        cleaned = [clean(text) for text in texts]
        if not cleaned or not all(text.strip() for text in cleaned):
            raise EmptyDocumentError(f"{filename}: needs at least one chunk, and text in every chunk")
        spans = []
        start = 0
        for text in cleaned:
            spans.append((start, start + len(text)))
            start += len(text) + len(_JOINT)
        # The boundaries belong to the identity: the same text cut elsewhere is another document.
        cut = json.dumps(cleaned)
        identity = "doc_" + hashlib.sha256(json.dumps([filename, cut]).encode()).hexdigest()[:24]
        joined = from_text(
            _JOINT.join(cleaned),
            title=title,
            filename=filename,
            metadata=metadata,
            document_id=document_id if document_id is not None else identity,
        )
        # from_text trims newlines at the ends, which belong to the first and last chunk here.
        document = replace(joined, text=_JOINT.join(cleaned))
        [result] = self._store(
            collection, [document], lambda whole: chunks_at(whole, spans, []), f"ready-made {cut}", progress
        )
        return result

    # Out

    def search(
        self,
        collections: Sequence[str],
        query: str,
        *,
        k: int = 6,
        filters: Mapping[str, Any] | None = None,
        mode: Mode = "hybrid",
        score_threshold: float | None = None,
        neighbours: int = 0,
    ) -> list[Hit]:
        """The best `k` chunks of these collections, best first, ties by chunk id. Any query text is allowed.

        Scores are in 0..1. "dense": the cosine, negative ones as 0. "text": bm25 / (1 + bm25). "hybrid": reciprocal
        rank fusion of the two (k = 60), scaled so that first in both is 1.0; it says how well placed a chunk is among
        the others, not how well it fits. `score_threshold` drops hits below it. A query without a single word finds
        nothing by text, a blank one nothing at all.

        `filters` as in OpenAI's file_search, see `compile_filter`. `neighbours=n` adds up to n chunks before and
        after each hit from its document, directly behind the hit, nearest first, with the hit's score times 0.99 per
        step; they come in addition to the `k` hits, and no chunk comes twice.

        Raises `UnknownCollectionError`, `FilterError`, `IndexMismatchError`; `ValueError` for k, mode or neighbours.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; choose {', '.join(MODES)}")
        if not 1 <= k <= MAX_K:
            raise ValueError(f"k is {k}; it must be 1 to {MAX_K}")
        if neighbours < 0:
            raise ValueError(f"neighbours is {neighbours}; it must not be negative")
        predicate = compile_filter(filters)
        text = clean_line(query)
        for name in collections:
            self._catalogue.collection(name)
        if not text:
            return []
        vector = None
        if mode != "text":
            vectors = self._embedder.embed([text])
            check_vectors(vectors, 1, self._catalogue.dimension, self._embedder.name)
            vector = vectors[0]
        asked = Query(text, vector, mode, k, predicate, score_threshold, neighbours)
        return search(self._catalogue, self._indexes, collections, asked)

    def document(self, document_id: str, collection: str | None = None) -> DocumentInfo:
        """`UnknownDocumentError` when there is none."""
        return self._row(document_id, collection)[1]

    def documents(self, collection: str | None = None) -> list[DocumentInfo]:
        """In the order they were ingested. `UnknownCollectionError`."""
        return list(self._catalogue.documents(collection).values())

    def document_text(self, document_id: str, collection: str | None = None) -> str:
        with self._catalogue.database.read():
            return self._catalogue.text(self._row(document_id, collection)[0])

    def chunks(self, document_id: str, collection: str | None = None) -> list[Chunk]:
        """Of one document, in order. `UnknownDocumentError`."""
        with self._catalogue.database.read():
            return [found.chunk for found in self._catalogue.chunks(self._row(document_id, collection)[0])]

    def chunk(self, chunk_id: str) -> Chunk:
        """`UnknownDocumentError` when there is none."""
        found = self._catalogue.chunk(chunk_id)
        if found is None:
            raise UnknownDocumentError(f"no chunk {chunk_id!r}; it was replaced or deleted")
        return found

    def all_chunks(self, collection: str | None = None) -> Iterator[Chunk]:
        """Every chunk, in the order of ingestion, a few hundred at a time; changes meanwhile may or may not show."""
        collection_pk = None if collection is None else self._catalogue.collection(collection).pk
        last = 0
        while block := self._catalogue.chunks_after(last, collection_pk, 500):
            yield from (found.chunk for found in block)
            last = block[-1].pk

    def chunk_names(
        self, collection: str | None = None, documents: Collection[str] | None = None
    ) -> Iterator[ChunkName]:
        """As `all_chunks`, without the texts; of `documents` only, if given. `UnknownCollectionError`."""
        if collection is not None:
            self._catalogue.collection(collection)
        last = 0
        while block := self._catalogue.names_after(last, collection, documents, 10_000):
            yield from (name for _, name in block)
            last = block[-1][0]

    # Neighbours

    def assign_neighbours(
        self, collection: str, count: int, *, documents: Collection[str] | None = None, refresh: bool = False
    ) -> Assigned:
        """Gives chunks the `count` chunks of the collection nearest to them by vector, see `assign.nearest`.

        A chunk is assigned once, however the collection grows. It is assigned again when one of its neighbours was
        deleted or changed (such chunks are always included), when `count` is another, and with `refresh`. `documents`:
        only the chunks of these (default: of all). Idempotent; may be cut short at any point and called again.

        Raises `UnknownCollectionError`; `ValueError` for a `count` outside 1..16.
        """
        if not 1 <= count <= MAX_NEIGHBOURS:
            raise ValueError(f"count is {count}; it must be 1 to {MAX_NEIGHBOURS}")
        return assign(self._catalogue, self._indexes, collection, count, documents, refresh=refresh)

    def neighbourhood(self, document_id: str, collection: str | None = None) -> Neighbourhood:
        """A document's chunks with their neighbours, from one snapshot. `UnknownDocumentError`."""
        with self._catalogue.database.read() as sql:
            pk = self._row(document_id, collection)[0]
            found = self._catalogue.chunks(pk)
            near = neighbours.of_document(sql, pk)
            known = self._catalogue.chunks_at({key for keys in near.values() for key in keys})
            return Neighbourhood(
                (pk, neighbours.revision(sql, pk)),
                tuple(own.chunk for own in found),
                tuple(tuple(known[key].chunk for key in near.get(own.pk, ())) for own in found),
            )

    def version(self, document_id: str, collection: str | None = None) -> tuple[int, int]:
        """That of the document's `Neighbourhood` now. `UnknownDocumentError`."""
        with self._catalogue.database.read() as sql:
            pk = self._row(document_id, collection)[0]
            return pk, neighbours.revision(sql, pk)

    def stale(self) -> tuple[int, list[str]]:
        """(mark, ids of chunks that were deleted, replaced or given other neighbours since `forget_stale(mark)`).

        For whoever keeps things derived from chunks: discard those, then forget. Listed in the transaction of the
        change, so a crash loses none; what is listed after `mark` stays listed.
        """
        with self._catalogue.database.read() as sql:
            return neighbours.stale(sql)

    def forget_stale(self, mark: int) -> None:
        """See `stale`."""
        with self._catalogue.database.write() as sql:
            neighbours.forget_stale(sql, mark)

    def documents_with(self, chunk_ids: Collection[str]) -> list[DocumentInfo]:
        """Documents, in whatever collection, that have a chunk of one of these ids now."""
        with self._catalogue.database.read() as sql:
            return list(self._catalogue.documents_at(neighbours.holders(sql, chunk_ids)).values())

    # Away

    def delete_document(self, document_id: str, collection: str | None = None) -> bool:
        """With its chunks, vectors and keyword rows, from the collection or from all. False when there was none."""
        return self._catalogue.delete_document(document_id, collection)

    def purge(self) -> None:
        """Makes deletions final: no byte of deleted text is left in any file of the folder. Takes a while.

        Raises `CatalogueError` while another process reads or writes.
        """
        self._catalogue.purge()

    def check(self) -> list[str]:
        """What is wrong with the data folder, in words; [] when it is sound."""
        return check(self._catalogue, self._indexes)

    def _row(self, document_id: str, collection: str | None) -> tuple[int, DocumentInfo, str]:
        row = self._catalogue.document(document_id, collection)
        if row is None:
            where = "" if collection is None else f" in collection {collection!r}"
            raise UnknownDocumentError(f"no document {document_id!r}{where}")
        return row

    def _chunk(self, document: Document) -> list[Chunk]:
        return chunk(document, self._count_tokens, chunk_tokens=self._chunk_tokens)

    def _store(
        self,
        collection: str,
        documents: Sequence[Document],
        make_chunks: Callable[[Document], list[Chunk]],
        signature: str,
        progress: Progress | None,
    ) -> list[IngestResult]:
        silent: Progress = progress or (lambda stage, done, total: None)
        return store(self._catalogue, self._embedder, collection, documents, make_chunks, signature, silent)
