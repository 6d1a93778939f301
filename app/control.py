"""What operators do to the stored KV, by document: look, pin, unpin, evict; and which keys they mean.

The store knows keys and sources; the catalogue knows collections, documents and chunks. A chunk's source follows from
its id and the tenant's salt alone (``store.key.source_of``), so no model, tokenizer or engine is needed to find what
the store has of a document: all of this works beside a running server, and without one.

One entry may serve several chunks: content addresses make equal texts behind equal contexts one, and its source is that
of the first. ``References`` find those too; without them (they need the tokenizer and the model's fingerprint) a chunk
that shares another's entry is taken to have none.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from app.errors import BadRequestError
from app.pins import Pinned, Pins
from app.rag import References
from retriever.errors import UnknownDocumentError
from retriever.retriever import Retriever
from retriever.types import ChunkName
from store.base import Entry, KVStore
from store.key import source_of
from store.types import KVKey

PREFIX = "prefix"
"""What the canonical prefix is called where a chunk id is expected."""

Sort = Literal["key", "used", "frequency", "bytes", "tokens", "created"]
SORTS: tuple[Sort, ...] = ("key", "used", "frequency", "bytes", "tokens", "created")


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
class Listing:
    """``rows`` in order, of ``total`` that match (``bytes`` together). ``next``: the cursor behind them, if any."""

    rows: tuple[Row, ...]
    total: int
    bytes: int
    next: str | None


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
class Changed:
    """Of what was ``chosen``: entries ``changed``, and those ``kept`` as they were because they are pinned."""

    chosen: Chosen
    changed: int
    kept: int = 0


@dataclass(frozen=True)
class _Where:
    """Where chunks are stored: by source, and by address as far as it is known."""

    sources: dict[bytes, ChunkName]
    keys: dict[KVKey, ChunkName]


class Control:
    """Works on the ``store``, for the tenant of ``salt``. Blocks: call it in a thread. Raises ``StoreError``,
    ``DataFileError``, ``UnknownCollectionError``, ``UnknownDocumentError``.

    Finding what is stored of a selection reads the names of the chunks and lists the store, once for each call; with
    ``references``, it addresses the selected documents too.
    """

    def __init__(
        self, store: KVStore, retriever: Retriever | None, salt: bytes, pins: Pins, references: References | None = None
    ) -> None:
        self.store, self.pins = store, pins
        self._retriever, self._salt, self._references = retriever, salt, references

    # -- look -----------------------------------------------------------------------------------------------------

    def listing(
        self,
        selection: Selection = Selection(),
        *,
        pinned: bool | None = None,
        codec: str | None = None,
        sort: Sort = "key",
        limit: int | None = 50,
        after: str | None = None,
    ) -> Listing:
        """Stored chunks that match, highest ``sort`` value first (keys: lowest), then by key.

        ``after``: the ``next`` of a page before. What changes between two pages may be in both or in none. Raises
        ``BadRequestError`` for a cursor that is none of ours, or of another sort.
        """
        if sort not in SORTS:
            raise BadRequestError(f"sort {sort!r} is unknown; choose one of {', '.join(SORTS)}", param="sort")
        begin = None if after is None else _read_cursor(after, sort)
        total = size = 0

        def ranks() -> Iterator[tuple[float, bytes, Row]]:
            nonlocal total, size
            for row in self._rows(selection):
                e = row.entry
                if (pinned is not None and e.pinned != pinned) or (codec is not None and e.codec != codec):
                    continue
                total, size = total + 1, size + e.bytes
                rank = (_rank(e, sort), e.key.digest)
                if begin is None or rank > begin:
                    yield (*rank, row)

        if limit is None:
            found = sorted(ranks(), key=lambda r: r[:2])
        else:
            found = heapq.nsmallest(limit + 1, ranks(), key=lambda r: r[:2])
        more = limit is not None and len(found) > limit
        found = found[:limit]
        cursor = _write_cursor(found[-1][:2], sort) if more and found else None
        return Listing(tuple(row for *_, row in found), total, size, cursor)

    def choose(self, selection: Selection, *, layout: str | None = None) -> Chosen:
        """What is stored of a selection; of the model with this ``layout`` digest (hex) only, if given.

        ``everything`` is all but the canonical prefix. Raises ``BadRequestError`` for an empty selection.
        """
        selection.require()
        where = self._where(self._selected(selection), exactly=not selection.everything)
        entries = tuple(
            row.entry
            for row in self._listed(selection, where)
            if (layout is None or row.entry.layout == layout) and not (selection.everything and row.is_prefix)
        )
        return Chosen(len(where.sources), entries)

    # -- steer ----------------------------------------------------------------------------------------------------

    def pin(self, selection: Selection, *, layout: str | None = None) -> Changed:
        """Keep what is stored of a selection from eviction and expiry, and whatever will be compiled for it."""
        chosen = self.choose(selection, layout=layout)
        with self.pins.changing() as pinned:
            self._remember(pinned, selection)
        # Remembered first: a crash between the two pins too little now, which the next precompute mends.
        return Changed(chosen, self.store.pin(chosen.keys))

    def unpin(self, selection: Selection) -> Changed:
        """No longer, whatever pinned it: itself or what it is part of is forgotten, and so is what is part of it.

        ``kept``: entries that stay pinned, because something wider is (a collection, say, and this is one document).
        """
        chosen = self.choose(selection)
        with self.pins.changing() as pinned:
            self._forget(pinned, selection)
        still = self._where([name for name in self._names() if pinned.has(name)])
        keys = [e.key for e in chosen.entries if e.source not in still.sources and e.key not in still.keys]
        return Changed(chosen, self.store.pin(keys, pinned=False), len(chosen.entries) - len(keys))

    def evict(self, selection: Selection) -> Changed:
        """Delete what is stored of a selection, except what is pinned. It is compiled again by the next precompute."""
        chosen = self.choose(selection)
        keys = [e.key for e in chosen.entries if not e.pinned]
        gone = sum(self.store.delete(key, evicted=True) for key in keys)
        return Changed(chosen, gone, len(chosen.entries) - len(keys))

    # -- which ----------------------------------------------------------------------------------------------------

    def _rows(self, selection: Selection) -> Iterator[Row]:
        """What is stored of a selection, in key order; empty: all."""
        everything = selection.empty or selection.everything
        return self._listed(selection, self._where(self._selected(selection), exactly=not everything))

    def _listed(self, selection: Selection, where: _Where) -> Iterator[Row]:
        prefix = prefix_source(self._salt)
        everything = selection.empty or selection.everything
        for entry in self.store.entries():
            name = where.keys.get(entry.key) or where.sources.get(entry.source)
            if entry.source == prefix:
                if everything or PREFIX in selection.chunks:
                    yield Row(entry, None, is_prefix=True)
            elif everything or name is not None:
                yield Row(entry, name)

    def _selected(self, selection: Selection) -> list[ChunkName]:
        """The chunks of a selection; one that stands in several collections is there as often."""
        chunks = set(selection.chunks) - {PREFIX}
        if selection.chunks and not chunks:
            return []
        found, documents = [], set()
        for name in self._names(selection.collections, selection.documents):
            documents.add(name.document_id)
            if not chunks or name.id in chunks:
                found.append(name)
        _require_known(set(selection.documents) - documents, "document", selection.collections)
        _require_known(chunks - {name.id for name in found}, "chunk", selection.collections)
        return found

    def _names(self, collections: Collection[str] = (), documents: Collection[str] = ()) -> Iterator[ChunkName]:
        if self._retriever is None:  # nothing was ever ingested
            return
        for collection in collections or (None,):
            yield from self._retriever.chunk_names(collection, documents or None)

    def _where(self, names: Sequence[ChunkName], *, exactly: bool = True) -> _Where:
        """``exactly``: with the addresses, if there are references."""
        where = _Where({}, {})
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

    def _remember(self, pinned: Pinned, selection: Selection) -> None:
        if selection.everything:
            pinned.everything = True
        elif selection.chunks:
            pinned.chunks |= set(selection.chunks) - {PREFIX}
        elif selection.documents:
            pinned.documents |= {(name.collection, name.document_id) for name in self._selected(selection)}
        else:
            pinned.collections |= set(selection.collections)

    def _forget(self, pinned: Pinned, selection: Selection) -> None:
        if selection.everything:
            pinned.everything = False
            pinned.collections.clear()
            pinned.documents.clear()
            pinned.chunks.clear()
            return
        names = self._selected(selection)
        pinned.chunks -= {name.id for name in names}
        if selection.chunks:
            return
        pinned.documents -= {(name.collection, name.document_id) for name in names}
        if not selection.documents:
            collections = set(selection.collections)
            pinned.collections -= collections
            pinned.documents = {d for d in pinned.documents if d[0] not in collections}


def _require_known(missing: Collection[str], kind: str, collections: Sequence[str]) -> None:
    if missing:
        where = f" in collection {', '.join(collections)}" if collections else ""
        raise UnknownDocumentError(f"no {kind} {min(missing)[:200]!r}{where}")


def _rank(entry: Entry, sort: Sort) -> float:
    return 0.0 if sort == "key" else -float(getattr(entry, sort))


def _write_cursor(rank: tuple[float, bytes], sort: Sort) -> str:
    return f"{sort}:{rank[0].hex()}:{rank[1].hex()}"


def _read_cursor(text: str, sort: Sort) -> tuple[float, bytes]:
    name, _, rest = text.partition(":")
    value, _, key = rest.partition(":")
    try:
        rank = float.fromhex(value), KVKey.from_hex(key).digest
    except (ValueError, OverflowError):
        name = ""
    if name != sort:
        raise BadRequestError(f"after must be the 'next' of a page sorted by {sort}, not {text[:100]!r}", param="after")
    return rank
