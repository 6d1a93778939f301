"""Vectors in memory, one exact inner-product FAISS index per collection, built from the catalogue and kept in step.

No index file is ever read: the stored float32 vectors are the truth, and loading them is about as fast.
"""

from collections.abc import Collection

import faiss
import numpy as np
from numpy.typing import NDArray

from retriever.catalogue import Catalogue, CollectionRow

Keys = NDArray[np.int64]


class VectorIndex:
    """Exact search by inner product, which is the cosine for vectors of length 1. Not thread-safe."""

    def __init__(self, dimension: int) -> None:
        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def keys(self) -> Keys:
        """[n] in the order they were added."""
        keys: Keys = faiss.vector_to_array(self._index.id_map)
        return keys

    def add(self, keys: Keys, vectors: NDArray[np.float32]) -> None:
        """keys [n], vectors [n, dimension]."""
        self._index.add_with_ids(np.ascontiguousarray(vectors, dtype=np.float32), keys)

    def remove(self, keys: Keys) -> None:
        self._index.remove_ids(faiss.IDSelectorBatch(keys))

    def vector(self, key: int) -> NDArray[np.float32]:
        """[dimension]; the key must be there."""
        found: NDArray[np.float32] = self._index.reconstruct(key)
        return found

    def search(self, vector: NDArray[np.float32], limit: int, allowed: Keys | None = None) -> list[tuple[int, float]]:
        """(key, cosine) of the `limit` nearest to `vector` [dimension], best first, among `allowed` when given."""
        limit = min(limit, len(self) if allowed is None else len(allowed))
        if limit < 1:
            return []
        query = np.ascontiguousarray(vector[None, :], dtype=np.float32)
        if allowed is None:
            scores, keys = self._index.search(query, limit)
        else:
            parameters = faiss.SearchParameters()
            parameters.sel = faiss.IDSelectorBatch(allowed)
            scores, keys = self._index.search(query, limit, params=parameters)
        return [(int(key), float(score)) for key, score in zip(keys[0], scores[0], strict=True) if key >= 0]


class Indexes:
    """The indexes of all collections. Not thread-safe: call inside the catalogue's transaction, which is locked."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._indexes: dict[int, tuple[int, VectorIndex]] = {}  # collection key -> (generation, index)

    def current(self, collection: CollectionRow) -> VectorIndex:
        """The index as of the collection's generation: what this or another process changed since is picked up."""
        generation, index = self._indexes.get(collection.pk, (-1, VectorIndex(self._catalogue.dimension)))
        if generation == collection.generation:
            return index
        held = index.keys()
        # Keys only grow and rows never change, so new vectors are those above the last key; the rest may have gone.
        for keys, vectors in self._catalogue.vectors_after(collection.pk, int(held[-1]) if len(held) else 0):
            index.add(keys, vectors)
        stored = self._catalogue.chunk_pks(collection.pk)
        if len(stored) != len(index):
            index.remove(np.setdiff1d(held, stored))
        self._indexes[collection.pk] = (collection.generation, index)
        return index

    def keep_only(self, collection_pks: Collection[int]) -> None:
        """Frees the indexes of deleted collections."""
        for pk in set(self._indexes) - set(collection_pks):
            del self._indexes[pk]
