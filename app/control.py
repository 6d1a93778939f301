"""What operators do to the stored KV, by document: look, pin, unpin, evict.

None of it needs a model or an engine: it works beside a running server, and without one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from app.choose import PREFIX, Chooser, Chosen, Row, Selection
from app.errors import BadRequestError
from app.pins import Pinned, Pins
from app.rag import References
from retriever.retriever import Retriever
from store.base import Entry, KVStore
from store.types import KVKey

Sort = Literal["key", "used", "frequency", "bytes", "tokens", "created"]
EVERYTHING = Selection(everything=True)
SORTS: tuple[Sort, ...] = ("key", "used", "frequency", "bytes", "tokens", "created")


@dataclass(frozen=True)
class Listing:
    """``rows`` in order, of ``total`` that match (``bytes`` together). ``next``: the cursor behind them, if any."""

    rows: tuple[Row, ...]
    total: int
    bytes: int
    next: str | None


@dataclass(frozen=True)
class Changed:
    """Of what was ``chosen``: entries ``changed``, and those ``kept`` as they were because they are pinned."""

    chosen: Chosen
    changed: int
    kept: int = 0


class Control:
    """Works on the ``store``, for the tenant of ``salt``. Blocks: call it in a thread. Raises ``DataFileError``, and as
    ``Chooser`` does."""

    def __init__(
        self, store: KVStore, retriever: Retriever | None, salt: bytes, pins: Pins, references: References | None = None
    ) -> None:
        self.store, self.pins = store, pins
        self._chooser = Chooser(store, retriever, salt, references)

    # -- look -----------------------------------------------------------------------------------------------------

    def listing(
        self,
        selection: Selection = EVERYTHING,
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
            for row in self._chooser.rows(selection):
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
        """See ``Chooser.choose``."""
        return self._chooser.choose(selection, layout=layout)

    # -- steer ----------------------------------------------------------------------------------------------------

    def pin(self, selection: Selection, *, layout: str | None = None) -> Changed:
        """Keep what is stored of a selection from eviction and expiry, and whatever will be compiled for it."""
        selection.require()
        with self.pins.changing() as pinned:
            self._prune(pinned)
        chosen = self.choose(selection, layout=layout)
        with self.pins.changing() as pinned:
            self._remember(pinned, selection)
        # Remembered first: a crash between the two pins too little now, which the next precompute mends.
        return Changed(chosen, self.store.pin(chosen.keys))

    def unpin(self, selection: Selection) -> Changed:
        """No longer, whatever pinned it: itself or what it is part of is forgotten, and so is what is part of it.

        ``kept``: entries that stay pinned, because something wider is (a collection, say, and this is one document).
        """
        selection.require()
        with self.pins.changing() as pinned:
            self._prune(pinned)
        chosen = self.choose(selection)
        with self.pins.changing() as pinned:
            self._forget(pinned, selection)
        still = self._chooser.where([name for name in self._chooser.names() if pinned.has(name)])
        keys = [e.key for e in chosen.entries if e.source not in still.sources and e.key not in still.keys]
        return Changed(chosen, self.store.pin(keys, pinned=False), len(chosen.entries) - len(keys))

    def evict(self, selection: Selection) -> Changed:
        """Delete what is stored of a selection, except what is pinned. It is compiled again by the next precompute."""
        chosen = self.choose(selection)
        keys = [e.key for e in chosen.entries if not e.pinned]
        gone = self.store.delete_many(keys, evicted=True)
        return Changed(chosen, gone, len(chosen.entries) - len(keys))

    # -- what is remembered ---------------------------------------------------------------------------------------

    def _prune(self, pinned: Pinned) -> None:
        """Forget what is gone: whatever has its name one day is something else."""
        names = list(self._chooser.names())
        pinned.collections &= self._chooser.collections()
        pinned.documents &= {(n.collection, n.document_id) for n in names}
        pinned.chunks &= {n.id for n in names}

    def _remember(self, pinned: Pinned, selection: Selection) -> None:
        if selection.everything:
            pinned.everything = True
        elif selection.chunks:
            pinned.chunks |= set(selection.chunks) - {PREFIX}
        elif selection.documents:
            pinned.documents |= {(name.collection, name.document_id) for name in self._chooser.selected(selection)}
        else:
            pinned.collections |= set(selection.collections)

    def _forget(self, pinned: Pinned, selection: Selection) -> None:
        if selection.everything:
            pinned.everything = False
            pinned.collections.clear()
            pinned.documents.clear()
            pinned.chunks.clear()
            return
        names = self._chooser.selected(selection)
        pinned.chunks -= {name.id for name in names}
        if selection.chunks:
            return
        pinned.documents -= {(name.collection, name.document_id) for name in names}
        if not selection.documents:
            collections = set(selection.collections)
            pinned.collections -= collections
            pinned.documents = {d for d in pinned.documents if d[0] not in collections}


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
