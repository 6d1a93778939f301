"""What is stored, as typed rows: collections, documents, chunks, vectors and a keyword index per collection.

The catalogue is the truth; the FAISS indexes are rebuilt from it.
"""

import json
import re
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retriever import keywords, neighbours
from retriever.database import Database, claim
from retriever.errors import IndexMismatchError, UnknownCollectionError
from retriever.types import Chunk, ChunkName, CollectionInfo, Document, DocumentInfo

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_INFO = """d.id, c.name, d.title, d.filename, d.media_type, d.sha256, d.metadata, d.chunks, d.characters, d.created_at
    FROM documents d JOIN collections c ON c.pk = d.collection_pk"""
_CHUNK = "k.id, d.id, k.ordinal, k.text, k.start, k.stop, k.page, k.heading"


@dataclass(frozen=True)
class CollectionRow:
    """`generation` grows with every change of the collection, by whichever process."""

    pk: int
    name: str
    generation: int


@dataclass(frozen=True)
class Found:
    """A chunk with the keys of its row and of its document's row."""

    pk: int
    document_pk: int
    chunk: Chunk


class Catalogue:
    """Methods that read see one snapshot when called inside `with catalogue.database.read()`."""

    def __init__(self, database: Database, dimension: int) -> None:
        self.database = database
        self.dimension = dimension

    @classmethod
    def open(cls, folder: Path, embedder_name: str, dimension: Callable[[], int]) -> "Catalogue":
        """Creates the folder and "default" when new. `IndexMismatchError` when made with another embedder."""
        folder.mkdir(parents=True, exist_ok=True)
        database = Database.open(folder / "catalogue.sqlite3")
        try:
            catalogue = cls(database, claim(database, embedder_name, dimension))
            with database.read() as sql:
                new = not sql.execute("SELECT 1 FROM collections").fetchone()
            if new:
                catalogue.create_collection("default")
        except BaseException:
            database.close()
            raise
        return catalogue

    # Collections

    def create_collection(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise UnknownCollectionError(
                f"{name!r} cannot name a collection: 1 to 64 letters, digits, '.', '_' or '-', "
                "the first a letter or digit"
            )
        with self.database.write() as sql:
            _create_collection(sql, name)

    def collection(self, name: str) -> CollectionRow:
        with self.database.read() as sql:
            return _collection(sql, name)

    def collections(self) -> list[CollectionInfo]:
        with self.database.read() as sql:
            rows = sql.execute(
                """SELECT c.name, count(d.pk), coalesce(sum(d.chunks), 0), c.created_at FROM collections c
                   LEFT JOIN documents d ON d.collection_pk = c.pk GROUP BY c.pk ORDER BY c.name"""
            )
            return [CollectionInfo(*row) for row in rows]

    def delete_collection(self, name: str) -> CollectionRow:
        with self.database.write() as sql:
            row = _collection(sql, name)
            keywords.drop(sql, row.pk)
            neighbours.release_collection(sql, row.pk)
            sql.execute("DELETE FROM collections WHERE pk = ?", (row.pk,))
            _create_collection(sql, "default")  # it always exists
            return row

    # Documents

    def put_document(
        self,
        collection: str,
        document: Document,
        chunks: Sequence[Chunk],
        vectors: NDArray[np.float32],
        fingerprint: str,
    ) -> None:
        """Adds the document with its chunks and vectors [len(chunks), dimension], or replaces it, in one step."""
        with self.database.write() as sql:
            row = _collection(sql, collection)
            old = sql.execute(
                "SELECT pk, created_at FROM documents WHERE collection_pk = ? AND id = ?", (row.pk, document.id)
            ).fetchone()
            kept = None
            if old:
                kept = neighbours.release(sql, old[0], {chunk.id for chunk in chunks})
                _delete_document(sql, row.pk, old[0])
            document_pk = sql.execute(
                "INSERT INTO documents VALUES(NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
                (
                    row.pk, document.id, document.title, document.filename, document.media_type, document.sha256,
                    json.dumps(dict(document.metadata), sort_keys=True), len(chunks), len(document.text),
                    old[1] if old else time.time(), fingerprint, document.text,
                ),
            ).lastrowid  # fmt: skip
            pks: dict[str, int] = {}
            for chunk, vector in zip(chunks, vectors, strict=True):
                pk = sql.execute(
                    "INSERT INTO chunks VALUES(NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                    (
                        row.pk, document_pk, chunk.id, chunk.ordinal, chunk.text,
                        chunk.start, chunk.stop, chunk.page, chunk.heading,
                    ),
                ).lastrowid  # fmt: skip
                pks[chunk.id] = _key(pk)
                sql.execute("INSERT INTO vectors VALUES(?, ?)", (pk, vector.astype("<f4").tobytes()))
                keywords.add(sql, row.pk, pks[chunk.id], document.title, chunk)
            if kept is not None:
                neighbours.restore(sql, kept, pks)
            _touch(sql, row.pk)

    def delete_document(self, document_id: str, collection: str | None) -> bool:
        """From the collection, or from every collection that has it."""
        with self.database.write() as sql:
            rows = sql.execute(
                """SELECT d.collection_pk, d.pk FROM documents d JOIN collections c ON c.pk = d.collection_pk
                   WHERE d.id = ?1 AND (?2 IS NULL OR c.name = ?2)""",
                (document_id, collection),
            ).fetchall()
            for collection_pk, document_pk in rows:
                neighbours.release(sql, document_pk)
                _delete_document(sql, collection_pk, document_pk)
                _touch(sql, collection_pk)
            return bool(rows)

    def document(self, document_id: str, collection: str | None) -> tuple[int, DocumentInfo, str] | None:
        """(row key, information, fingerprint). In several collections: that of the first by name."""
        with self.database.read() as sql:
            row = sql.execute(
                f"""SELECT d.pk, d.fingerprint, {_INFO} WHERE d.id = ?1 AND (?2 IS NULL OR c.name = ?2)
                    ORDER BY c.name LIMIT 1""",
                (document_id, collection),
            ).fetchone()
        return (row[0], _info(row[2:]), row[1]) if row else None

    def documents(self, collection: str | None) -> dict[int, DocumentInfo]:
        """Row key -> information, in the order they were put."""
        with self.database.read() as sql:
            if collection is not None:
                _collection(sql, collection)
            rows = sql.execute(f"SELECT d.pk, {_INFO} WHERE ?1 IS NULL OR c.name = ?1 ORDER BY d.pk", (collection,))
            return {row[0]: _info(row[1:]) for row in rows}

    def documents_at(self, document_pks: Collection[int]) -> dict[int, DocumentInfo]:
        with self.database.read() as sql:
            rows = sql.execute(
                f"SELECT d.pk, {_INFO} WHERE d.pk IN (SELECT value FROM json_each(?))", (_keys(document_pks),)
            )
            return {row[0]: _info(row[1:]) for row in rows}

    def text(self, document_pk: int) -> str:
        with self.database.read() as sql:
            return str(sql.execute("SELECT text FROM documents WHERE pk = ?", (document_pk,)).fetchone()[0])

    # Chunks

    def chunks(self, document_pk: int, first: int = 0, last: int = 2**62) -> list[Found]:
        """Chunks of one document with ordinals first..last, both included."""
        return self._found("d.pk = ? AND k.ordinal BETWEEN ? AND ? ORDER BY k.ordinal", (document_pk, first, last))

    def chunks_at(self, chunk_pks: Collection[int]) -> dict[int, Found]:
        found = self._found("k.pk IN (SELECT value FROM json_each(?))", (_keys(chunk_pks),))
        return {entry.pk: entry for entry in found}

    def chunk(self, chunk_id: str) -> Chunk | None:
        found = self._found("k.id = ? ORDER BY k.pk LIMIT 1", (chunk_id,))
        return found[0].chunk if found else None

    def chunks_after(self, pk: int, collection_pk: int | None, limit: int) -> list[Found]:
        return self._found(
            "k.pk > ?1 AND (?2 IS NULL OR k.collection_pk = ?2) ORDER BY k.pk LIMIT ?3", (pk, collection_pk, limit)
        )

    def names_after(
        self, pk: int, collection: str | None, document_ids: Collection[str] | None, limit: int
    ) -> list[tuple[int, ChunkName]]:
        """Row keys and names of chunks with keys above `pk`, ascending; of a collection, of these documents."""
        given = None if document_ids is None else json.dumps(sorted(document_ids))
        with self.database.read() as sql:
            rows = sql.execute(
                """SELECT k.pk, k.id, k.ordinal, d.id, c.name, d.title, d.filename FROM chunks k
                   JOIN documents d ON d.pk = k.document_pk JOIN collections c ON c.pk = k.collection_pk
                   WHERE k.pk > ?1 AND (?2 IS NULL OR c.name = ?2)
                   AND (?3 IS NULL OR d.id IN (SELECT value FROM json_each(?3))) ORDER BY k.pk LIMIT ?4""",
                (pk, collection, given, limit),
            )
            return [(row[0], ChunkName(*row[1:])) for row in rows]

    def chunk_pks(self, collection_pk: int, document_pks: Collection[int] | None = None) -> NDArray[np.int64]:
        """Keys of the collection's chunks, ascending; of these documents only, when given."""
        with self.database.read() as sql:
            if document_pks is None:
                rows = sql.execute("SELECT pk FROM chunks WHERE collection_pk = ? ORDER BY pk", (collection_pk,))
            else:
                rows = sql.execute(
                    """SELECT pk FROM chunks WHERE document_pk IN (SELECT value FROM json_each(?))
                       AND collection_pk = ? ORDER BY pk""",
                    (_keys(document_pks), collection_pk),
                )
            return np.fromiter((row[0] for row in rows), dtype=np.int64)

    def vectors_after(
        self, collection_pk: int, pk: int, limit: int = 4096
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Blocks of (keys [n], vectors [n, dimension]) of the chunks with keys above `pk`, ascending."""
        with self.database.read() as sql:
            rows = sql.execute(
                """SELECT k.pk, v.vector FROM chunks k JOIN vectors v ON v.chunk_pk = k.pk
                   WHERE k.collection_pk = ? AND k.pk > ? ORDER BY k.pk""",
                (collection_pk, pk),
            )
            while block := rows.fetchmany(limit):
                keys = np.array([key for key, _ in block], dtype=np.int64)
                flat = np.frombuffer(b"".join(vector for _, vector in block), dtype="<f4")
                if flat.size != len(block) * self.dimension:
                    raise IndexMismatchError(f"stored vectors are not of dimension {self.dimension}; ingest again")
                yield keys, flat.reshape(len(block), self.dimension).astype(np.float32)

    def match(
        self, collection_pk: int, words: str, limit: int, document_pks: Collection[int] | None
    ) -> list[tuple[int, float]]:
        """Keyword search, see `keywords.match`."""
        with self.database.read() as sql:
            return keywords.match(sql, collection_pk, words, limit, document_pks)

    def purge(self) -> None:
        """Rewrites the keyword indexes and empties the log: deleted text is then in no file any more."""
        with self.database.write() as sql:
            for (pk,) in sql.execute("SELECT pk FROM collections").fetchall():
                keywords.optimize(sql, pk)
        self.database.empty_log()

    def _found(self, where: str, values: tuple[object, ...]) -> list[Found]:
        with self.database.read() as sql:
            rows = sql.execute(
                f"SELECT k.pk, d.pk, {_CHUNK} FROM chunks k JOIN documents d ON d.pk = k.document_pk WHERE {where}",
                values,
            )
            return [Found(row[0], row[1], Chunk(*row[2:])) for row in rows]


def _collection(sql: sqlite3.Connection, name: str) -> CollectionRow:
    row = sql.execute("SELECT pk, name, generation FROM collections WHERE name = ?", (name,)).fetchone()
    if row is None:
        names = [known for (known,) in sql.execute("SELECT name FROM collections ORDER BY name LIMIT 20")]
        raise UnknownCollectionError(f"no collection {name!r}; there are {', '.join(names)}")
    return CollectionRow(*row)


def _create_collection(sql: sqlite3.Connection, name: str) -> None:
    created = sql.execute("INSERT OR IGNORE INTO collections(name, created_at) VALUES(?, ?)", (name, time.time()))
    if created.rowcount:
        keywords.create(sql, _key(created.lastrowid))


def _delete_document(sql: sqlite3.Connection, collection_pk: int, document_pk: int) -> None:
    keywords.remove_document(sql, collection_pk, document_pk)
    sql.execute("DELETE FROM documents WHERE pk = ?", (document_pk,))  # its chunks and vectors go with it


def _touch(sql: sqlite3.Connection, collection_pk: int) -> None:
    sql.execute("UPDATE collections SET generation = generation + 1 WHERE pk = ?", (collection_pk,))


def _info(row: tuple[Any, ...]) -> DocumentInfo:
    *origin, metadata, chunks, characters, created_at = row
    document_id, collection, title, filename, media_type, sha256 = origin
    return DocumentInfo(
        document_id,
        collection,
        title,
        filename,
        media_type,
        sha256,
        json.loads(metadata),
        chunks,
        characters,
        created_at,
    )


def _keys(pks: Collection[int]) -> str:
    """Keys for json_each: any number of them, unlike bound variables."""
    return json.dumps([int(pk) for pk in pks])


def _key(pk: int | None) -> int:
    assert pk is not None  # lastrowid after an INSERT
    return pk
