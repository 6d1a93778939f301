"""Assign neighbours: to each chunk the chunks of its collection whose vectors are nearest to its own.

Only the collection is searched: it is the trust domain. Whoever may add a document to it can make a text that becomes
somebody's neighbour, and with that a part of whatever is made of the two.
"""

from collections.abc import Collection

from retriever import neighbours
from retriever.catalogue import Catalogue, Found
from retriever.index import Indexes, VectorIndex
from retriever.types import Assigned

_BATCH = 32  # chunks per write transaction: others wait for it


def assign(
    catalogue: Catalogue,
    indexes: Indexes,
    collection: str,
    count: int,
    documents: Collection[str] | None,
    *,
    refresh: bool,
) -> Assigned:
    """See `Retriever.assign_neighbours`."""
    with catalogue.database.read() as sql:
        row = catalogue.collection(collection)
        indexes.current(row)  # built here, so that the writes below are short
        todo = neighbours.pending(sql, row.pk, count, documents, refresh=refresh)
    done = changed = 0
    again: dict[str, set[str]] = {}
    for start in range(0, len(todo), _BATCH):
        batch = dict(todo[start : start + _BATCH])
        with catalogue.database.write() as sql:
            index = indexes.current(catalogue.collection(collection))
            for pk, own in catalogue.chunks_at(batch).items():  # those that are still there
                changed += neighbours.assign(sql, pk, nearest(catalogue, index, own, count), count)
                done += 1
                if batch[pk] == 0:
                    again.setdefault(own.chunk.document_id, set()).add(own.chunk.id)
    return Assigned(done, changed, {document: frozenset(ids) for document, ids in again.items()})


def nearest(catalogue: Catalogue, index: VectorIndex, own: Found, count: int) -> list[int]:
    """Keys of the `count` chunks nearest to `own`, nearest first; fewer only if there are no more.

    Never `own`, nor a text twice, nor its own text (white space around it aside). Equal cosines go by chunk id, not by
    the order in which the chunks came; the search goes on until none of equal rank can be missing.
    """
    vector, limit = index.vector(own.pk), count + 8
    while True:
        hits = [(pk, round(cosine, 6)) for pk, cosine in index.search(vector, limit)]
        found = catalogue.chunks_at([pk for pk, _ in hits])
        texts, near = {own.chunk.text.strip()}, []
        for pk, cosine in sorted(hits, key=lambda hit: (-hit[1], found[hit[0]].chunk.id)):
            if (text := found[pk].chunk.text.strip()) not in texts:
                texts.add(text)
                near.append((pk, cosine))
        if limit >= len(index) or (len(near) >= count and hits[-1][1] < near[count - 1][1]):
            return [pk for pk, _ in near[:count]]
        limit *= 4
