"""Delete the stored KV that may rest on text which is gone: of deleted, replaced and re-assigned chunks.

The catalogue lists such chunks in the transaction of each change, so a crash between the change and the sweep leaves
the list, and the next sweep does the work. A chunk's entries are found by its source, which is the same whatever it was
compiled behind and by whichever model; those that are still its address today stay.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from app.rag import References
from blend.types import CompileJob
from retriever.errors import UnknownDocumentError
from retriever.retriever import Retriever
from retriever.types import DocumentInfo
from store.base import KVStore
from store.types import KVKey

log = logging.getLogger(__name__)


def sweep(retriever: Retriever, references: References, store: KVStore) -> int:
    """Delete what is stale; how many entries that were. Free when nothing is, else one listing of the store.

    Raises ``CatalogueError``, ``StoreError``; then all that is stale stays listed.
    """
    mark, ids = retriever.stale()
    if not ids:
        return 0
    names = {references.keys.source(name): name for name in ids}
    found = [(entry.key, names[entry.source]) for entry in store.entries() if entry.source in names]
    current = _keys(references, retriever.documents_with({name for _, name in found})) if found else set()
    gone = store.delete_many(key for key, _ in found if key not in current)
    retriever.forget_stale(mark)
    if gone:
        log.info("deleted %d stored chunks whose text, or text they were compiled behind, is gone", gone)
    return gone


def sweep_overtaken(
    references: References, store: KVStore, document: DocumentInfo, jobs: Collection[CompileJob]
) -> int:
    """Delete what ``jobs`` have just stored for ``document`` and a change meanwhile has made stale.

    That change may have been swept before these passes ended, so nobody else would find their entries.
    """
    current = _keys(references, [document])
    return store.delete_many(key for job in jobs for key in job.keys if key not in current)


def _keys(references: References, documents: Collection[DocumentInfo]) -> set[KVKey]:
    """Addresses of all chunks of ``documents`` now."""
    keys: set[KVKey] = set()
    for document in documents:
        try:
            keys.update(ref.key for ref in references.of(document))
        except UnknownDocumentError:
            continue  # deleted meanwhile, and listed again
    return keys
