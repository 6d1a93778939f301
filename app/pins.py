"""What operators have pinned, by document: kept in the data directory, and applied again to KV that is compiled later.

The store pins keys, and an update gives a document new ones. So the documents are remembered here, and whoever compiles
one pins its keys before they are stored (``Pins.keys``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from app.files import DataFileError, locked, read_model, replace_text
from blend.prompt import ChunkRef
from retriever.types import ChunkName, DocumentInfo
from store.types import KVKey

FILE = "pins.json"


class Pinned(BaseModel):
    """Everything, whole collections, documents as ``(collection, document id)``, single chunk ids."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    everything: bool = False
    collections: set[str] = set()
    documents: set[tuple[str, str]] = set()
    chunks: set[str] = set()

    def has(self, chunk: ChunkName) -> bool:
        return (
            self.everything
            or chunk.collection in self.collections
            or (chunk.collection, chunk.document_id) in self.documents
            or chunk.id in self.chunks
        )

    def has_document(self, collection: str, document_id: str) -> bool:
        """Whether all its chunks are pinned, whichever they are."""
        return self.everything or collection in self.collections or (collection, document_id) in self.documents


class Pins:
    """The pins kept in ``folder``. Several processes may share it: nothing is held in memory.

    Methods raise ``DataFileError`` naming the file and the fault.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def read(self) -> Pinned:
        remedy = "restore it, or remove it and pin again"
        return read_model(self._path, Pinned, wrong="does not hold pins", remedy=remedy) or Pinned()

    @contextmanager
    def changing(self) -> Iterator[Pinned]:
        """The pins, to be changed in the block; kept at its end unless it raises."""
        try:
            with locked(self._path):
                pinned = self.read()
                yield pinned
                replace_text(self._path, _text(pinned))
        except OSError as e:
            raise DataFileError(f"{self._path} cannot be written: {e.strerror or e}") from e

    def keys(self, document: DocumentInfo, refs: Sequence[ChunkRef]) -> list[KVKey]:
        """Of a document's ``refs``, the addresses of those that are pinned."""
        pinned = self.read()
        if pinned.has_document(document.collection, document.id):
            return [r.key for r in refs]
        return [r.key for r in refs if r.name in pinned.chunks]


def _text(pinned: Pinned) -> str:
    """As JSON that people can read and compare."""
    fields = pinned.model_dump(mode="json")
    return json.dumps({name: sorted(v) if isinstance(v, list) else v for name, v in fields.items()}, indent=1)
