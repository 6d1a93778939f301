"""Query -> ranked chunks: by meaning, by words, or both fused by rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from retriever.catalogue import Catalogue, Found
from retriever.filters import Predicate
from retriever.index import Indexes
from retriever.keywords import match_words
from retriever.types import Hit

Mode = Literal["hybrid", "dense", "text"]
MODES: tuple[str, ...] = get_args(Mode)
RRF_K = 60  # Cormack, Clarke and Büttcher, SIGIR 2009
NEIGHBOUR_DECAY = 0.99
Ranking = list[tuple[Found, float]]  # best first, one entry per chunk id


@dataclass(frozen=True)
class Query:
    """`vector` [dimension] is None in mode "text". Checked by `Retriever.search`."""

    text: str
    vector: NDArray[np.float32] | None
    mode: Mode
    k: int
    predicate: Predicate | None
    score_threshold: float | None
    neighbours: int


def search(catalogue: Catalogue, indexes: Indexes, collections: Sequence[str], query: Query) -> list[Hit]:
    """See `Retriever.search`. Everything is read from one snapshot."""
    with catalogue.database.read():
        dense, text = _candidates(catalogue, indexes, collections, query)
        ranking = fuse(dense, text) if query.mode == "hybrid" else dense or text
        threshold = query.score_threshold if query.score_threshold is not None else -1.0
        own = [(found, score) for found, score in ranking[: query.k] if score >= threshold]
        found = _with_neighbours(catalogue, own, query.neighbours) if query.neighbours else own
        documents = catalogue.documents_at({entry.document_pk for entry, _ in found})
        return [Hit(entry.chunk, score, documents[entry.document_pk]) for entry, score in found]


def fuse(*rankings: Ranking) -> Ranking:
    """Reciprocal rank fusion, scaled so that first place in every ranking is 1.0."""
    scores: dict[str, float] = {}
    entries: dict[str, Found] = {}
    for ranking in rankings:
        for place, (found, _) in enumerate(ranking, start=1):
            scores[found.chunk.id] = scores.get(found.chunk.id, 0.0) + (RRF_K + 1) / (RRF_K + place)
            entries.setdefault(found.chunk.id, found)
    return _ranked([(entries[chunk_id], score / len(rankings)) for chunk_id, score in scores.items()])


def _candidates(
    catalogue: Catalogue, indexes: Indexes, collections: Sequence[str], query: Query
) -> tuple[Ranking, Ranking]:
    depth = max(50, 4 * query.k)  # fusion looks beyond the first k of either ranking
    words = match_words(query.text) if query.mode != "dense" else None
    dense: dict[int, float] = {}
    text: dict[int, float] = {}
    for name in dict.fromkeys(collections):
        row = catalogue.collection(name)
        documents = allowed = None
        if query.predicate is not None:
            documents = [pk for pk, info in catalogue.documents(name).items() if query.predicate(info)]
            allowed = catalogue.chunk_pks(row.pk, documents)
        if query.vector is not None:
            nearest = indexes.current(row).search(query.vector, depth, allowed)
            dense.update((pk, min(1.0, max(0.0, cosine))) for pk, cosine in nearest)
        if words is not None:
            matches = catalogue.match(row.pk, words, depth, documents)
            text.update((pk, bm25 / (1.0 + bm25)) for pk, bm25 in matches)
    found = catalogue.chunks_at(dense.keys() | text.keys())
    return (
        _ranked([(found[pk], score) for pk, score in dense.items()]),
        _ranked([(found[pk], score) for pk, score in text.items()]),
    )


def _ranked(entries: Ranking) -> Ranking:
    """Best first, ties by chunk id; a chunk that several collections hold is kept once."""
    ordered = sorted(entries, key=lambda entry: (-entry[1], entry[0].chunk.id, entry[0].pk))
    unique: dict[str, tuple[Found, float]] = {}
    for entry in ordered:
        unique.setdefault(entry[0].chunk.id, entry)
    return list(unique.values())


def _with_neighbours(catalogue: Catalogue, own: Ranking, distance: int) -> Ranking:
    """Every hit followed by its neighbours, nearest first; a chunk that is a hit itself is never repeated."""
    seen = {found.chunk.id for found, _ in own}
    result: Ranking = []
    for found, score in own:
        result.append((found, score))
        at = found.chunk.ordinal
        around = catalogue.chunks(found.document_pk, at - distance, at + distance)
        for entry in sorted(around, key=lambda entry: (abs(entry.chunk.ordinal - at), entry.chunk.ordinal)):
            if entry.chunk.id not in seen:
                seen.add(entry.chunk.id)
                result.append((entry, score * NEIGHBOUR_DECAY ** abs(entry.chunk.ordinal - at)))
    return result
