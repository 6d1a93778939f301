"""The SQLite file of a data folder: opening, schema, transactions. What is in the tables is `catalogue.py`'s matter."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from retriever.errors import CatalogueError, IndexMismatchError

SCHEMA_VERSION = 2
_APPLICATION_ID = 0x7261_6762  # "ragb"
_BUSY_SECONDS = 30.0
# AUTOINCREMENT: a key is never used twice, so "newer than the last key I saw" finds every addition.
_VERSION_1 = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE collections(
    pk INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, created_at REAL NOT NULL,
    generation INTEGER NOT NULL DEFAULT 0  -- counts the changes, so that another process notices them
);
CREATE TABLE documents(
    pk INTEGER PRIMARY KEY AUTOINCREMENT,
    collection_pk INTEGER NOT NULL REFERENCES collections(pk) ON DELETE CASCADE,
    id TEXT NOT NULL, title TEXT NOT NULL, filename TEXT NOT NULL, media_type TEXT NOT NULL,
    sha256 TEXT NOT NULL, metadata TEXT NOT NULL, chunks INTEGER NOT NULL, characters INTEGER NOT NULL,
    created_at REAL NOT NULL, fingerprint TEXT NOT NULL, text TEXT NOT NULL,
    UNIQUE(collection_pk, id)
);
CREATE INDEX documents_by_id ON documents(id);
CREATE TABLE chunks(
    pk INTEGER PRIMARY KEY AUTOINCREMENT,
    collection_pk INTEGER NOT NULL REFERENCES collections(pk) ON DELETE CASCADE,
    document_pk INTEGER NOT NULL REFERENCES documents(pk) ON DELETE CASCADE,
    id TEXT NOT NULL, ordinal INTEGER NOT NULL, text TEXT NOT NULL,
    start INTEGER NOT NULL, stop INTEGER NOT NULL, page INTEGER, heading TEXT,
    UNIQUE(document_pk, ordinal)
);
CREATE INDEX chunks_by_id ON chunks(id);
CREATE INDEX chunks_by_collection ON chunks(collection_pk, pk);
CREATE TABLE vectors(
    chunk_pk INTEGER PRIMARY KEY REFERENCES chunks(pk) ON DELETE CASCADE, vector BLOB NOT NULL
);
"""
# What these hold is `neighbours.py`'s matter. chunks.assigned: how many neighbours were asked for when they were
# assigned; NULL never, 0 taken back. documents.revision counts the changes of its chunks' neighbours.
_VERSION_2 = """
ALTER TABLE documents ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
ALTER TABLE chunks ADD COLUMN assigned INTEGER;
CREATE INDEX chunks_by_assigned ON chunks(collection_pk, assigned);
CREATE TABLE neighbours(
    chunk_pk INTEGER NOT NULL REFERENCES chunks(pk) ON DELETE CASCADE,
    place INTEGER NOT NULL,  -- 0 is the nearest
    neighbour_pk INTEGER NOT NULL REFERENCES chunks(pk) ON DELETE CASCADE,
    PRIMARY KEY(chunk_pk, place)
) WITHOUT ROWID;
CREATE INDEX neighbours_by_neighbour ON neighbours(neighbour_pk);
CREATE TABLE stale_chunks(pk INTEGER PRIMARY KEY AUTOINCREMENT, chunk_id TEXT NOT NULL);
"""
_MIGRATIONS = (_VERSION_1, _VERSION_2)  # a new folder runs them all, an old one those it lacks


class Database:
    """One connection behind a lock. Statements outside `read` and `write` are not possible, so none is half seen."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._lock = threading.RLock()
        self._writing = False

    @classmethod
    def open(cls, file: Path) -> "Database":
        """Opens or creates. `CatalogueError` when SQLite cannot, `IndexMismatchError` for a foreign schema."""
        with _translated():
            connection = sqlite3.connect(file, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                _configure(connection)
                database = cls(connection)
                database._create_or_check(file)
            except BaseException:
                connection.close()
                raise
        return database

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """One consistent snapshot, whatever other processes commit meanwhile. Reads nest."""
        with self._lock, _translated():
            if self._connection.in_transaction:
                yield self._connection
                return
            with self._transaction("BEGIN"):
                yield self._connection

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and on disk when it returns. Waits for other writers up to 30 s. Writes do not nest."""
        with self._lock, self._transaction("BEGIN IMMEDIATE"):
            yield self._connection

    def empty_log(self) -> None:
        """Moves everything out of the write-ahead log, which may still hold what was deleted since."""
        with self._lock, _translated():
            busy, _, _ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise CatalogueError("the catalogue is in use by another process; purge again when it is idle")

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        with _translated():
            self._connection.execute(begin)
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _create_or_check(self, file: Path) -> None:
        with self.write() as sql:  # the lock keeps two processes from creating the schema twice
            version = sql.execute("PRAGMA user_version").fetchone()[0]
            tables = sql.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            ours = sql.execute("PRAGMA application_id").fetchone()[0] == _APPLICATION_ID and version > 0
            if not (ours or version == tables == 0) or version > SCHEMA_VERSION:
                raise IndexMismatchError(
                    f"{file.name}: schema version {version}, this program reads {SCHEMA_VERSION}; "
                    "use another data folder or ingest again"
                )
            for migration in _MIGRATIONS[version:]:
                for statement in migration.split(";"):
                    sql.execute(statement)
            if version < SCHEMA_VERSION:
                sql.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                sql.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def claim(database: Database, embedder_name: str, dimension: Callable[[], int]) -> int:
    """The dimension of the stored vectors. The embedder is asked only for a new folder: that loads its model."""
    with database.read() as sql:
        meta = dict(sql.execute("SELECT key, value FROM meta").fetchall())
    if not meta:
        asked = dimension()  # outside the transaction: loading takes seconds
        with database.write() as sql:
            sql.execute("INSERT OR IGNORE INTO meta VALUES('embedder', ?)", (embedder_name,))
            sql.execute("INSERT OR IGNORE INTO meta VALUES('dimension', ?)", (str(asked),))
            meta = dict(sql.execute("SELECT key, value FROM meta").fetchall())
    if meta["embedder"] != embedder_name:
        raise IndexMismatchError(
            f"the data folder was made with the embedder {meta['embedder']!r}, not {embedder_name!r}; "
            "set that embedder, or ingest the documents again into a new folder"
        )
    return int(meta["dimension"])


def _configure(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # deleted text is overwritten, not only forgotten
    _retry_locked(lambda: connection.execute("PRAGMA journal_mode = WAL").fetchone())
    connection.execute("PRAGMA synchronous = FULL")


def _retry_locked(step: Callable[[], object]) -> None:
    """Switching a new file to WAL does not wait for another process doing the same; SQLite's timeout is not asked."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            step()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        advice = {
            "SQLITE_FULL": "free some disk space and try again",
            "SQLITE_BUSY": "another process is writing; try again",
            "SQLITE_CANTOPEN": "check that the data folder exists and is writable",
            "SQLITE_READONLY": "check that the data folder is writable",
            "SQLITE_NOTADB": "the file is not a catalogue",
            "SQLITE_CORRUPT": "the file is damaged; restore it from a backup",
        }.get(getattr(error, "sqlite_errorname", ""), "nothing was changed")
        raise CatalogueError(f"catalogue: {error}; {advice}") from error
