"""Keyword search: one FTS5 table per collection, so that word statistics do not leak between collections."""

import json
import re
import sqlite3
from collections.abc import Collection

from retriever.types import Chunk

# English stemming, accents ignored. Scripts without spaces between words are found by the vectors only.
_COLUMNS = "title, heading, text, tokenize = 'porter unicode61 remove_diacritics 2'"
_WEIGHTS = "2.0, 1.5, 1.0"


def create(sql: sqlite3.Connection, collection_pk: int) -> None:
    sql.execute(f"CREATE VIRTUAL TABLE fts_{collection_pk:d} USING fts5({_COLUMNS})")


def drop(sql: sqlite3.Connection, collection_pk: int) -> None:
    sql.execute(f"DROP TABLE fts_{collection_pk:d}")


def add(sql: sqlite3.Connection, collection_pk: int, chunk_pk: int, title: str, chunk: Chunk) -> None:
    sql.execute(
        f"INSERT INTO fts_{collection_pk:d}(rowid, title, heading, text) VALUES(?, ?, ?, ?)",
        (chunk_pk, title, chunk.heading or "", chunk.text),
    )


def remove_document(sql: sqlite3.Connection, collection_pk: int, document_pk: int) -> None:
    sql.execute(
        f"DELETE FROM fts_{collection_pk:d} WHERE rowid IN (SELECT pk FROM chunks WHERE document_pk = ?)",
        (document_pk,),
    )


def optimize(sql: sqlite3.Connection, collection_pk: int) -> None:
    """Merges the table's segments; until then the words of deleted rows are still in them."""
    sql.execute(f"INSERT INTO fts_{collection_pk:d}(fts_{collection_pk:d}) VALUES('optimize')")


def rowids(sql: sqlite3.Connection, collection_pk: int) -> set[int]:
    return {row[0] for row in sql.execute(f"SELECT rowid FROM fts_{collection_pk:d}")}


def integrity(sql: sqlite3.Connection, collection_pk: int) -> str | None:
    """What FTS5 finds wrong with its own structures, or None."""
    try:
        sql.execute(f"INSERT INTO fts_{collection_pk:d}(fts_{collection_pk:d}) VALUES('integrity-check')")
    except sqlite3.DatabaseError as error:
        return str(error)
    return None


def match_words(query: str, limit: int = 64) -> str | None:
    """An FTS5 expression that matches any of the query's words, or None when it has none.

    Words are quoted one by one, so no user text is ever FTS5 syntax.
    """
    words = dict.fromkeys(re.findall(r"\w+", query.lower()))
    return " OR ".join(f'"{word}"' for word in list(words)[:limit]) or None


def match(
    sql: sqlite3.Connection, collection_pk: int, words: str, limit: int, document_pks: Collection[int] | None
) -> list[tuple[int, float]]:
    """(chunk key, bm25 >= 0), best first, within these documents when given. `words` comes from `match_words`."""
    table = f"fts_{collection_pk:d}"
    within = ""
    if document_pks is not None:
        within = """AND rowid IN (SELECT pk FROM chunks WHERE document_pk IN
                                  (SELECT value FROM json_each(:documents)))"""
    rows = sql.execute(
        f"""SELECT rowid, -bm25({table}, {_WEIGHTS}) AS score FROM {table}
            WHERE {table} MATCH :words {within} ORDER BY score DESC, rowid LIMIT :limit""",
        {"words": words, "limit": limit, "documents": json.dumps([int(pk) for pk in document_pks or ()])},
    )
    return [(pk, max(0.0, score)) for pk, score in rows]
