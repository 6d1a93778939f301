"""Which chunks are assigned to a chunk as its neighbours, and who must be told when one of them goes.

Assignments are kept, not searched for anew, so that whatever rests on them can be found again. They are taken back in
the transaction that deletes or changes a neighbour, through the reverse index, and only then. A neighbour is a text,
not what was made of it, so a change reaches those who have it as neighbour and nobody behind them.
A chunk's state is `chunks.assigned`: NULL (never assigned), 0 (taken back) or the number asked for.

`stale_chunks` lists the chunks that were deleted, replaced or given other neighbours: what somebody derived from them
and keeps elsewhere may rest on text that is gone. Whoever keeps such things reads the list and clears it.
"""

import json
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

_AMONG = "IN (SELECT value FROM json_each(?))"


@dataclass(frozen=True)
class Kept:
    """What stays valid while a document is replaced. Keys are those of the old rows."""

    ids: Mapping[int, str]  # chunk key -> chunk id
    assigned: Mapping[int, int | None]
    rows: Sequence[tuple[int, int, int]]  # of `neighbours`


def pending(
    sql: sqlite3.Connection, collection_pk: int, count: int, documents: Collection[str] | None, *, refresh: bool
) -> list[tuple[int, int | None]]:
    """(key, state) of the chunks that need `count` neighbours: all whose were taken back, and those of `documents`
    (default: of all) that have none or were assigned another number; with `refresh` whatever they have."""
    return sql.execute(
        """SELECT k.pk, k.assigned FROM chunks k JOIN documents d ON d.pk = k.document_pk WHERE k.collection_pk = ?1
           AND (k.assigned = 0 OR (?4 OR k.assigned IS NOT ?2)
                AND (?3 IS NULL OR d.id IN (SELECT value FROM json_each(?3))))
           ORDER BY k.pk""",
        (collection_pk, count, None if documents is None else json.dumps(sorted(documents)), refresh),
    ).fetchall()


def assign(sql: sqlite3.Connection, chunk_pk: int, near: Sequence[int], count: int) -> bool:
    """`near` are the chunk's neighbours from now on, nearest first, of `count` asked for. True if that is a change."""
    rows = sql.execute("SELECT neighbour_pk FROM neighbours WHERE chunk_pk = ? ORDER BY place", (chunk_pk,))
    changed = [pk for (pk,) in rows] != list(near)
    if changed:
        if sql.execute("SELECT assigned FROM chunks WHERE pk = ?", (chunk_pk,)).fetchone()[0]:
            _mark_stale(sql, [chunk_pk])
        _clear(sql, [chunk_pk])
        sql.executemany("INSERT INTO neighbours VALUES(?, ?, ?)", [(chunk_pk, n, pk) for n, pk in enumerate(near)])
    sql.execute("UPDATE chunks SET assigned = ? WHERE pk = ?", (count, chunk_pk))
    return changed


def of_document(sql: sqlite3.Connection, document_pk: int) -> dict[int, list[int]]:
    """Chunk key -> the keys of its neighbours, nearest first; of the document's chunks that have any."""
    found: dict[int, list[int]] = {}
    for chunk_pk, neighbour_pk in sql.execute(
        """SELECT n.chunk_pk, n.neighbour_pk FROM neighbours n JOIN chunks k ON k.pk = n.chunk_pk
           WHERE k.document_pk = ? ORDER BY n.chunk_pk, n.place""",
        (document_pk,),
    ):
        found.setdefault(chunk_pk, []).append(neighbour_pk)
    return found


def revision(sql: sqlite3.Connection, document_pk: int) -> int:
    """How often the neighbours of the document's chunks have changed."""
    return int(sql.execute("SELECT revision FROM documents WHERE pk = ?", (document_pk,)).fetchone()[0])


def release(sql: sqlite3.Connection, document_pk: int, staying: Collection[str] = ()) -> Kept:
    """Before a document's rows are deleted: whoever has one of its chunks as a neighbour loses all neighbours, except
    for chunks whose ids are `staying` in the version that takes its place. All its chunks are stale."""
    rows = sql.execute("SELECT pk, id, assigned FROM chunks WHERE document_pk = ?", (document_pk,)).fetchall()
    _mark_stale(sql, [pk for pk, _, _ in rows])
    gone = json.dumps([pk for pk, chunk_id, _ in rows if chunk_id not in staying])
    found = sql.execute(f"SELECT DISTINCT chunk_pk FROM neighbours WHERE neighbour_pk {_AMONG}", (gone,))
    losing = [pk for (pk,) in found]
    _mark_stale(sql, losing)
    _clear(sql, losing)
    ids = {pk: chunk_id for pk, chunk_id, _ in rows if chunk_id in staying}
    keys = json.dumps(list(ids))
    assigned = dict(sql.execute(f"SELECT pk, assigned FROM chunks WHERE pk {_AMONG}", (keys,)).fetchall())
    links = sql.execute(
        f"""SELECT * FROM neighbours WHERE (chunk_pk {_AMONG} OR neighbour_pk {_AMONG})
            AND chunk_pk NOT IN (SELECT value FROM json_each(?))""",
        (keys, keys, gone),
    ).fetchall()
    return Kept(ids, assigned, links)


def restore(sql: sqlite3.Connection, kept: Kept, pks: Mapping[str, int]) -> None:
    """After a document was replaced: its staying chunks' neighbours, and those they are neighbours of. `pks`: chunk id
    -> key of the new row."""
    new = {old: pks[chunk_id] for old, chunk_id in kept.ids.items()}
    for old, assigned in kept.assigned.items():
        sql.execute("UPDATE chunks SET assigned = ? WHERE pk = ?", (assigned, new[old]))
    sql.executemany(
        "INSERT INTO neighbours VALUES(?, ?, ?)",
        [(new.get(chunk, chunk), place, new.get(neighbour, neighbour)) for chunk, place, neighbour in kept.rows],
    )


def release_collection(sql: sqlite3.Connection, collection_pk: int) -> None:
    """Before a collection's rows are deleted: nobody outside has its chunks as neighbours."""
    sql.execute("INSERT INTO stale_chunks(chunk_id) SELECT id FROM chunks WHERE collection_pk = ?", (collection_pk,))


def stale(sql: sqlite3.Connection) -> tuple[int, list[str]]:
    """(mark, chunk ids): hand `mark` to `forget_stale`; what is listed after it then stays listed."""
    rows = sql.execute("SELECT pk, chunk_id FROM stale_chunks ORDER BY pk").fetchall()
    return (rows[-1][0] if rows else 0), list(dict.fromkeys(chunk_id for _, chunk_id in rows))


def holders(sql: sqlite3.Connection, chunk_ids: Collection[str]) -> list[int]:
    """Keys of the documents, in whatever collection, that have a chunk of one of these ids."""
    rows = sql.execute(f"SELECT DISTINCT document_pk FROM chunks WHERE id {_AMONG}", (json.dumps(list(chunk_ids)),))
    return [pk for (pk,) in rows]


def forget_stale(sql: sqlite3.Connection, mark: int) -> None:
    sql.execute("DELETE FROM stale_chunks WHERE pk <= ?", (mark,))


def integrity(sql: sqlite3.Connection) -> list[str]:
    """What is wrong with the assignments, in words."""
    rows = sql.execute(
        """SELECT k.id, m.id, k.collection_pk <> m.collection_pk, k.pk = m.pk, coalesce(k.assigned, 0) = 0
           FROM neighbours n JOIN chunks k ON k.pk = n.chunk_pk JOIN chunks m ON m.pk = n.neighbour_pk"""
    )
    problems = []
    for chunk_id, neighbour_id, foreign, self_, loose in rows:
        if foreign:
            problems.append(f"chunk {chunk_id}: its neighbour {neighbour_id} is of another collection")
        if self_:
            problems.append(f"chunk {chunk_id}: is its own neighbour")
        if loose:
            problems.append(f"chunk {chunk_id}: has the neighbour {neighbour_id}, which was never assigned")
    rows = sql.execute(
        """SELECT k.id, k.assigned, count(*) FROM chunks k JOIN neighbours n ON n.chunk_pk = k.pk
           GROUP BY k.pk HAVING count(*) > k.assigned AND k.assigned > 0"""
    )
    return problems + [f"chunk {chunk_id}: {have} neighbours of {asked} asked for" for chunk_id, asked, have in rows]


def _mark_stale(sql: sqlite3.Connection, chunk_pks: Sequence[int]) -> None:
    sql.execute(f"INSERT INTO stale_chunks(chunk_id) SELECT id FROM chunks WHERE pk {_AMONG}", (json.dumps(chunk_pks),))


def _clear(sql: sqlite3.Connection, chunk_pks: Sequence[int]) -> None:
    """Takes their neighbours back; their documents are of another revision then."""
    keys = (json.dumps(chunk_pks),)
    sql.execute(f"DELETE FROM neighbours WHERE chunk_pk {_AMONG}", keys)
    sql.execute(f"UPDATE chunks SET assigned = 0 WHERE pk {_AMONG}", keys)
    sql.execute(
        f"""UPDATE documents SET revision = revision + 1
            WHERE pk IN (SELECT document_pk FROM chunks WHERE pk {_AMONG})""",
        keys,
    )
