"""The objects that flow through the retriever. All frozen; all offsets are in characters, stop exclusive."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Scalar = str | int | float | bool  # metadata values; scalars only, so that filters can compare them
Progress = Callable[[str, int, int], None]  # (stage, done, total); stages: "chunking" | "embedding" | "indexing"


@dataclass(frozen=True)
class Page:
    """The characters of `Document.text` that page `number` (1-based) holds."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class Document:
    """Clean text with its origin. `sha256` is of the raw bytes, before any cleaning."""

    id: str
    title: str
    text: str
    filename: str
    media_type: str
    sha256: str
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    pages: tuple[Page, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A piece of one document: `document.text[start:stop] == text`. `page`, `heading`: in force at `start`."""

    id: str
    document_id: str
    ordinal: int
    text: str
    start: int
    stop: int
    page: int | None
    heading: str | None


@dataclass(frozen=True)
class DocumentInfo:
    """What the catalogue knows of a document, without its text. `created_at` is seconds since the epoch."""

    id: str
    collection: str
    title: str
    filename: str
    media_type: str
    sha256: str
    metadata: Mapping[str, Scalar]
    chunks: int
    characters: int
    created_at: float


@dataclass(frozen=True)
class CollectionInfo:
    """A named set of documents. `created_at` is seconds since the epoch."""

    name: str
    documents: int
    chunks: int
    created_at: float


@dataclass(frozen=True)
class ChunkName:
    """A chunk without its text, and the document it stands in."""

    id: str
    ordinal: int
    document_id: str
    collection: str
    title: str
    filename: str


@dataclass(frozen=True)
class Hit:
    """A chunk found by a search. `score` is in 0..1; what it means depends on the mode, see `Retriever.search`."""

    chunk: Chunk
    score: float
    document: DocumentInfo


@dataclass(frozen=True)
class IngestResult:
    """`unchanged` means the same document was there already and nothing was redone."""

    document: DocumentInfo
    chunks: tuple[Chunk, ...]
    unchanged: bool


@dataclass(frozen=True)
class Neighbourhood:
    """A document's chunks in order, each with its assigned neighbours, nearest first (none: not assigned, or alone).

    `version` is another one after every change of the chunks or of their neighbours, and never a former one again.
    """

    version: tuple[int, int]
    chunks: tuple[Chunk, ...]
    neighbours: tuple[tuple[Chunk, ...], ...]


@dataclass(frozen=True)
class Assigned:
    """What `Retriever.assign_neighbours` did: chunks it looked at, and of these those that got other neighbours.

    `again`: document id -> ids of its chunks whose neighbours had been taken back, since one was deleted or changed.
    """

    chunks: int
    changed: int
    again: Mapping[str, frozenset[str]]
