"""Which stored KV is meant: collections, documents and chunks in terms of what the store has.

The store knows keys and sources; the catalogue knows collections, documents and chunks. A chunk's source follows from
its id and the tenant's salt alone (``store.key.source_of``), so no model, tokenizer or engine is needed to find what
the store has of a document, and what a former model has left is found too.

One entry may serve several chunks: content addresses make equal texts behind equal contexts one, and its source is that
of the first. ``References`` find those too; without them (they need the tokenizer and the model's fingerprint) a chunk
that shares another's entry is taken to have none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from app.errors import BadRequestError
from app.rag import References
from retriever.errors import UnknownDocumentError
from retriever.retriever import Retriever
from retriever.types import ChunkName
from store.base import Entry, KVStore
from store.key import source_of
from store.types import KVKey

PREFIX = "prefix"
"""What the canonical prefix is called where a chunk id is expected."""

_ADDRESSED = 5000
"""Looking at more chunks does not wait for all their documents to be tokenised: then it goes by sources alone."""


def prefix_source(salt: bytes) -> bytes:
    """What names the canonical prefix in the store (``KeyMaker.prefix_ref``)."""
    return source_of(salt, "\0prefix")


@dataclass(frozen=True)
class Selection:
    """Which chunks are meant: each field narrows it down, several values of one are alternatives; or ``everything``.

    ``PREFIX`` among the ``chunks`` is the canonical prefix.
    """

    collections: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()
    chunks: tuple[str, ...] = ()
    everything: bool = False

    @property
    def empty(self) -> bool:
        return not (self.collections or self.documents or self.chunks or self.everything)

    def require(self) -> Selection:
        """Itself. Raises ``BadRequestError`` unless it says clearly what is meant."""
        if self.empty:
            raise BadRequestError("nothing is selected; name collections, documents or chunks, or ask for all")
        if self.everything and (self.collections or self.documents or self.chunks):
            raise BadRequestError("all and collections, documents or chunks exclude each other", param="all")
        return self


@dataclass(frozen=True)
class Row:
    """One stored chunk. ``chunk``: where it stands; ``None`` for the prefix, and for what no document of today has."""

    entry: Entry
    chunk: ChunkName | None
    is_prefix: bool = False


@dataclass(frozen=True)
class Chosen:
    """What a selection came to: ``chunks`` selected, and the ``entries`` stored of them (several, if several models
    have compiled one)."""

    chunks: int
    entries: tuple[Entry, ...]

    @property
    def keys(self) -> list[KVKey]:
        return [e.key for e in self.entries]

    @property
    def bytes(self) -> int:
        return sum(e.bytes for e in self.entries)


@dataclass(frozen=True)
class Where:
    """Where chunks are stored: by source, and by address as far as those are known."""

    sources: dict[bytes, ChunkName]
    keys: dict[KVKey, ChunkName]


class Chooser:
    """Finds what ``store`` has, for the tenant of ``salt``. Blocks. ``retriever`` ``None``: nothing was ever ingested.

    Each call reads the names of the chunks and lists the store; with ``references``, it addresses the selected
    documents too. Raises ``StoreError``, ``UnknownCollectionError``, ``UnknownDocumentError``.
    """

    def __init__(
        self, store: KVStore, retriever: Retriever | None, salt: bytes, references: References | None = None
    ) -> None:
        self._store, self._retriever, self._salt, self._references = store, retriever, salt, references

    def choose(self, selection: Selection, *, layout: str | None = None) -> Chosen:
        """What is stored of a selection; of the model with this ``layout`` digest (hex) only, if given.

        ``everything`` is all but the canonical prefix. Raises ``BadRequestError`` for an empty selection.
        """
        selection.require()
        where = self.where(self.selected(selection), exactly=not selection.everything)
        entries = tuple(
            row.entry
            for row in self._listed(selection, where)
            if (layout is None or row.entry.layout == layout) and not (selection.everything and row.is_prefix)
        )
        return Chosen(len(where.sources), entries)

    def rows(self, selection: Selection) -> Iterator[Row]:
        """What is stored of a selection, in key order; empty: all."""
        names = self.selected(selection)
        narrow = not (selection.empty or selection.everything) and len(names) <= _ADDRESSED
        return self._listed(selection, self.where(names, exactly=narrow))

    def _listed(self, selection: Selection, where: Where) -> Iterator[Row]:
        prefix = prefix_source(self._salt)
        everything = selection.empty or selection.everything
        for entry in self._store.entries():
            name = where.keys.get(entry.key) or where.sources.get(entry.source)
            if entry.source == prefix:
                if everything or PREFIX in selection.chunks:
                    yield Row(entry, None, is_prefix=True)
            elif everything or name is not None:
                yield Row(entry, name)

    def selected(self, selection: Selection) -> list[ChunkName]:
        """The chunks of a selection; one that stands in several collections is there as often."""
        chunks = set(selection.chunks) - {PREFIX}
        if selection.chunks and not chunks:
            return []
        found, documents = [], set()
        for name in self.names(selection.collections, selection.documents):
            documents.add(name.document_id)
            if not chunks or name.id in chunks:
                found.append(name)
        _require_known(set(selection.documents) - documents, "document", selection.collections)
        _require_known(chunks - {name.id for name in found}, "chunk", selection.collections)
        return found

    def names(self, collections: Collection[str] = (), documents: Collection[str] = ()) -> Iterator[ChunkName]:
        """Of the chunks there are, in these collections and documents if any are given."""
        if self._retriever is None:  # nothing was ever ingested
            return
        for collection in collections or (None,):
            yield from self._retriever.chunk_names(collection, documents or None)

    def where(self, names: Sequence[ChunkName], *, exactly: bool = True) -> Where:
        """``exactly``: with the addresses, if there are references."""
        where = Where({}, {})
        documents: dict[tuple[str, str], dict[str, ChunkName]] = {}
        for name in names:
            where.sources.setdefault(source_of(self._salt, name.id), name)
            documents.setdefault((name.collection, name.document_id), {})[name.id] = name
        if self._references is None or self._retriever is None or not exactly:
            return where
        for (collection, document_id), chunks in documents.items():
            try:
                refs = self._references.of(self._retriever.document(document_id, collection))
            except UnknownDocumentError:
                continue  # deleted meanwhile
            where.keys.update((r.key, chunks[r.name]) for r in refs if r.name in chunks)
        return where

    def collections(self) -> set[str]:
        """The names of all there are."""
        return set() if self._retriever is None else {c.name for c in self._retriever.collections()}


def _require_known(missing: Collection[str], kind: str, collections: Sequence[str]) -> None:
    if missing:
        where = f" in collection {', '.join(collections)}" if collections else ""
        raise UnknownDocumentError(f"no {kind} {min(missing)[:200]!r}{where}")
