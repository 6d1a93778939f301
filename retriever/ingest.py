"""Documents -> catalogue: chunk, embed, write. A document is stored whole or not at all."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from retriever.catalogue import Catalogue
from retriever.chunk import CountTokens
from retriever.clean import clean
from retriever.embed import Embedder
from retriever.errors import EmptyDocumentError, IndexMismatchError, UnknownDocumentError, UnreadableDocumentError
from retriever.metadata import clean_metadata
from retriever.types import Chunk, Document, IngestResult, Progress

_EMBED_BATCH = 64  # chunks per call of the embedder, and about as many per group of documents written
_PROBES = (
    "The river was wide.",
    "1984: naïve co-operation",
    "Übergrößenträger",
    "日本語のテキスト",
    "x = f(y[0]) // 2",
)


@dataclass(frozen=True)
class Prepared:
    """A document that has to be stored."""

    document: Document
    chunks: list[Chunk]
    fingerprint: str


def check_document(document: Document) -> None:
    """Refuses what `parse` would not have made, so that hand-made documents cannot harm the catalogue."""
    if not document.text.strip():
        raise EmptyDocumentError(f"{document.filename}: holds no text")
    if not document.id or any(character.isspace() for character in document.id):
        raise UnreadableDocumentError(f"{document.filename}: document id {document.id!r} must not hold whitespace")
    for name in ("id", "title", "text", "filename"):
        if clean(getattr(document, name)) != getattr(document, name):
            raise UnreadableDocumentError(
                f"{document.filename}: the {name} holds invisible or unnormalised characters; make it with from_text"
            )
    if clean_metadata(document.metadata, document.filename) != dict(document.metadata):
        raise UnreadableDocumentError(
            f"{document.filename}: the metadata holds invisible or unnormalised characters; make it with from_text"
        )


def chunker_signature(count_tokens: CountTokens, chunk_tokens: int) -> str:
    """Changes with the chunk size and, for all practical purposes, with the tokenizer."""
    return json.dumps([chunk_tokens, *(count_tokens(probe) for probe in _PROBES)])


def fingerprint(document: Document, signature: str) -> str:
    """Identity of all that is stored of a document: equal means ingesting it again would change nothing."""
    # Lone surrogates cannot be here (`check_document`); JSON keeps 1, 1.0, "1" and true apart.
    content = json.dumps(
        [
            document.id, document.title, document.text, document.filename, document.media_type, document.sha256,
            sorted(document.metadata.items()), [[page.number, page.start, page.stop] for page in document.pages],
            signature,
        ]
    )  # fmt: skip
    return hashlib.sha256(content.encode()).hexdigest()


def store(
    catalogue: Catalogue,
    embedder: Embedder,
    collection: str,
    documents: Sequence[Document],
    make_chunks: Callable[[Document], list[Chunk]],
    signature: str,
    progress: Progress,
) -> list[IngestResult]:
    """One result per document, in order. What was stored before an error stays stored."""
    catalogue.collection(collection)  # fail before any work
    for document in documents:
        check_document(document)
    prints = [fingerprint(document, signature) for document in documents]
    known = [catalogue.document(document.id, collection) for document in documents]
    unchanged = [row is not None and row[2] == print_ for row, print_ in zip(known, prints, strict=True)]
    prepared: list[Prepared] = []
    for done, (document, print_, same) in enumerate(zip(documents, prints, unchanged, strict=True), start=1):
        if not same:
            prepared.append(Prepared(document, make_chunks(document), print_))
        progress("chunking", done, len(documents))
    total = sum(len(entry.chunks) for entry in prepared)
    embedded = indexed = 0
    for group in _groups(prepared):
        vectors = _embed(catalogue, embedder, group, partial(_report, progress, embedded, total))
        for entry, rows in zip(group, vectors, strict=True):
            catalogue.put_document(collection, entry.document, entry.chunks, rows, entry.fingerprint)
            indexed += 1
            embedded += len(entry.chunks)
            progress("indexing", indexed, len(prepared))
    return [
        _result(catalogue, collection, document.id, same) for document, same in zip(documents, unchanged, strict=True)
    ]


def _groups(prepared: list[Prepared]) -> Iterator[list[Prepared]]:
    """Small documents together, so that the embedder gets full batches; large ones alone."""
    group: list[Prepared] = []
    chunks = 0
    for entry in prepared:
        if group and chunks + len(entry.chunks) > _EMBED_BATCH:
            yield group
            group, chunks = [], 0
        group.append(entry)
        chunks += len(entry.chunks)
    if group:
        yield group


def _embed(
    catalogue: Catalogue, embedder: Embedder, group: list[Prepared], progress: Callable[[int], None]
) -> list[NDArray[np.float32]]:
    """Per document [chunks, dimension]."""
    texts = [dense_text(entry.document.title, chunk) for entry in group for chunk in entry.chunks]
    parts = []
    for start in range(0, len(texts), _EMBED_BATCH):
        part = embedder.embed(texts[start : start + _EMBED_BATCH])
        check_vectors(part, len(texts[start : start + _EMBED_BATCH]), catalogue.dimension, embedder.name)
        parts.append(part)
        progress(start + len(part))
    vectors = np.concatenate(parts) if parts else np.zeros((0, catalogue.dimension), dtype=np.float32)
    stops = np.cumsum([len(entry.chunks) for entry in group])
    return np.split(vectors, stops[:-1])


def _report(progress: Progress, before: int, total: int, done: int) -> None:
    progress("embedding", before + done, total)


def dense_text(title: str, chunk: Chunk) -> str:
    """What is embedded of a chunk. Title and heading first: "she" then has a name, and truncation cuts the tail."""
    lines = [title, chunk.heading or "", chunk.text]
    return "\n".join(line for line in lines if line)


def check_vectors(vectors: NDArray[np.float32], rows: int, dimension: int, embedder_name: str) -> None:
    if vectors.shape != (rows, dimension) or vectors.dtype != np.float32 or not np.isfinite(vectors).all():
        raise IndexMismatchError(
            f"the embedder {embedder_name!r} gave {vectors.dtype} {vectors.shape}, the data folder holds finite "
            f"float32 [{rows}, {dimension}]; use the embedder the folder was made with"
        )


def _result(catalogue: Catalogue, collection: str, document_id: str, unchanged: bool) -> IngestResult:
    row = catalogue.document(document_id, collection)
    if row is None:
        raise UnknownDocumentError(f"document {document_id!r} was deleted while it was being ingested")
    chunks = tuple(found.chunk for found in catalogue.chunks(row[0]))
    return IngestResult(row[1], chunks, unchanged)
