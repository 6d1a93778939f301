"""Is a data folder sound? Compares everything derived with what it was derived from."""

import numpy as np

from retriever import keywords, neighbours
from retriever.catalogue import Catalogue
from retriever.index import Indexes


def check(catalogue: Catalogue, indexes: Indexes) -> list[str]:
    """Problems in words, [] when sound. Reads everything once; slow on large folders."""
    # One write transaction: it excludes other writers, and FTS5's integrity check is an INSERT.
    with catalogue.database.write() as sql:
        problems = [f"sqlite: {row[0]}" for row in sql.execute("PRAGMA integrity_check") if row[0] != "ok"]
        problems += [f"dangling row in {row[0]}" for row in sql.execute("PRAGMA foreign_key_check")]
        collections = [catalogue.collection(info.name) for info in catalogue.collections()]
        indexes.keep_only([row.pk for row in collections])
        for row in collections:
            stored = set(catalogue.chunk_pks(row.pk).tolist())
            for what, held in (
                ("the vector index", set(indexes.current(row).keys().tolist())),
                ("the keyword index", keywords.rowids(sql, row.pk)),
            ):
                if lost := len(stored - held):
                    problems.append(f"collection {row.name}: {lost} chunks are missing from {what}")
                if extra := len(held - stored):
                    problems.append(f"collection {row.name}: {extra} deleted chunks are still in {what}")
            if damage := keywords.integrity(sql, row.pk):
                problems.append(f"collection {row.name}: keyword index: {damage}")
            for keys, vectors in catalogue.vectors_after(row.pk, 0):
                wrong = np.abs(np.linalg.norm(vectors, axis=1) - 1.0) > 1e-3
                problems += [f"collection {row.name}: vector {key} is not of length 1" for key in keys[wrong]]
        rows = sql.execute(
            """SELECT d.id, k.ordinal FROM chunks k JOIN documents d ON d.pk = k.document_pk
               WHERE substr(d.text, k.start + 1, k.stop - k.start) <> k.text"""
        )
        problems += [
            f"document {document_id}: chunk {ordinal} is not the text at its place" for document_id, ordinal in rows
        ]
        rows = sql.execute(
            """SELECT d.id, d.chunks, count(k.pk) FROM documents d LEFT JOIN chunks k ON k.document_pk = d.pk
               GROUP BY d.pk HAVING d.chunks <> count(k.pk)"""
        )
        problems += [f"document {document_id}: has {found} chunks of {said}" for document_id, said, found in rows]
        problems += neighbours.integrity(sql)
    return problems
