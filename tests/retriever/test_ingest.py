"""ingest, replace, delete, reopen: what was acknowledged is there, what was deleted is gone, nothing is half done."""

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retriever.embed import HashEmbedder, Vectors
from retriever.errors import (
    CatalogueError,
    EmptyDocumentError,
    IndexMismatchError,
    UnknownCollectionError,
    UnknownDocumentError,
    UnreadableDocumentError,
)
from retriever.parse import from_text
from retriever.retriever import Retriever
from retriever.types import Document


def count_words(text: str) -> int:
    return len(text.split())


def reopen(path: Path, **changes: int) -> Retriever:
    return Retriever.open(path, HashEmbedder(), count_words, **{"chunk_tokens": 20, **changes})


def everything(retriever: Retriever) -> tuple[object, ...]:
    hits = [
        retriever.search(["default"], query, k=50, mode=mode)
        for query in ("she", "Bob Paris", "neutron")
        for mode in ("hybrid", "dense", "text")
    ]
    return retriever.documents(), list(retriever.all_chunks()), hits


def test_ingest_reports_documents_chunks_and_progress(retriever: Retriever, people: list[Document]) -> None:
    steps: list[tuple[str, int, int]] = []
    results = retriever.ingest("default", people, progress=lambda *step: steps.append(step))
    assert [result.document.id for result in results] == ["ada", "bob", "carla"]
    assert not any(result.unchanged for result in results)
    chunks = sum(len(result.chunks) for result in results)
    for stage, total in (("chunking", 3), ("embedding", chunks), ("indexing", 3)):
        done = [done for name, done, all_ in steps if name == stage and all_ == total]
        assert done == sorted(done)
        assert done[-1] == total
    assert [s for s, _, _ in steps] == sorted((s for s, _, _ in steps), key=["chunking", "embedding", "indexing"].index)
    [default] = retriever.collections()
    assert (default.name, default.documents, default.chunks) == ("default", 3, chunks)
    assert retriever.check() == []


def test_what_is_stored_can_be_read_back(retriever: Retriever, people: list[Document]) -> None:
    results = retriever.ingest("default", people)
    for document, result in zip(people, results, strict=True):
        assert retriever.document(document.id) == result.document
        assert result.document.metadata == document.metadata
        assert result.document.characters == len(document.text)
        assert retriever.document_text(document.id) == document.text
        assert retriever.chunks(document.id) == list(result.chunks)
        assert [retriever.chunk(chunk.id) for chunk in result.chunks] == list(result.chunks)
    assert list(retriever.all_chunks("default")) == [chunk for result in results for chunk in result.chunks]
    assert [info.id for info in retriever.documents("default")] == ["ada", "bob", "carla"]


def test_the_same_document_again_is_unchanged_and_costs_nothing(tmp_path: Path, people: list[Document]) -> None:
    class Counting(HashEmbedder):
        texts = 0

        def embed(self, texts: Sequence[str]) -> Vectors:
            self.texts += len(texts)
            return super().embed(texts)

    embedder = Counting()
    with Retriever.open(tmp_path, embedder, count_words, chunk_tokens=20) as retriever:
        first = retriever.ingest("default", people)
        embedded = embedder.texts
        again = retriever.ingest("default", people)
        assert all(result.unchanged for result in again)
        assert [r.chunks for r in again] == [r.chunks for r in first]
        assert embedder.texts == embedded
    with Retriever.open(tmp_path, embedder, count_words, chunk_tokens=10) as smaller:
        assert not smaller.ingest("default", people)[0].unchanged, "another chunk size is another result"
    with Retriever.open(tmp_path, embedder, lambda text: 2 * len(text.split()), chunk_tokens=10) as other:
        assert not other.ingest("default", people)[0].unchanged, "another tokenizer is another result"
        assert other.check() == []


def test_new_content_replaces_the_old_everywhere(retriever: Retriever, people: list[Document]) -> None:
    before = retriever.ingest("default", people)[1]
    changed = replace(people[1], text="Bob moved to Oslo.")
    after = retriever.ingest("default", [changed])[0]
    assert not after.unchanged
    assert after.document.created_at == before.document.created_at
    assert [chunk.text for chunk in retriever.chunks("bob")] == ["Bob moved to Oslo."]
    for mode in ("hybrid", "dense", "text"):
        texts = [hit.chunk.text for hit in retriever.search(["default"], "Bob Paris Oslo tourists", k=50, mode=mode)]
        assert texts[0] == "Bob moved to Oslo."
        assert not any("Paris" in text for text in texts)
    with pytest.raises(UnknownDocumentError, match="replaced or deleted"):
        retriever.chunk(before.chunks[0].id)
    assert retriever.check() == []


@pytest.mark.parametrize("failing", ["INSERT INTO chunks", "INSERT INTO vectors", "UPDATE collections", "COMMIT"])
def test_a_replacement_that_fails_half_way_leaves_the_old_document(
    retriever: Retriever, people: list[Document], failing: str
) -> None:
    retriever.ingest("default", people)
    before = everything(retriever)
    database = retriever._catalogue.database
    real = database._connection

    class Failing:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def execute(self, statement: str, *values: object) -> object:
            if statement.lstrip().startswith(failing):
                raise sqlite3.OperationalError("database or disk is full")
            return real.execute(statement, *values)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        writes = database.write

        def failing_write() -> object:
            patch.setattr(database, "_connection", Failing())
            return writes()

        patch.setattr(database, "write", failing_write)
        with pytest.raises(CatalogueError, match="disk is full"):
            retriever.ingest("default", [replace(people[1], text="Bob moved to Oslo. " * 9)])
    assert everything(retriever) == before
    assert retriever.check() == []
    assert not retriever.ingest("default", [replace(people[1], text="Bob moved to Oslo.")])[0].unchanged


def test_reopening_gives_identical_results(tmp_path: Path, people: list[Document]) -> None:
    with reopen(tmp_path) as retriever:
        retriever.ingest("default", people)
        retriever.ingest("default", [replace(people[0], text="Ada, revised. She lived.")])
        retriever.delete_document("carla")
        before = everything(retriever)
    with reopen(tmp_path) as retriever:
        assert everything(retriever) == before
        assert retriever.check() == []


def test_deleting_removes_text_vectors_and_keywords_and_purging_every_byte(
    tmp_path: Path, people: list[Document]
) -> None:
    with reopen(tmp_path) as retriever:
        people[1] = replace(people[1], text=people[1].text + " A xylophonist helps him.")
        retriever.ingest("default", people)
        retriever.search(["default"], "warm up the index")
        assert retriever.delete_document("bob")
        assert not retriever.delete_document("bob")
        for mode in ("hybrid", "dense", "text"):
            hits = retriever.search(["default"], "Bob Paris tourists", k=50, mode=mode)
            assert "bob" not in {hit.document.id for hit in hits}
        for call in (retriever.document, retriever.chunks, retriever.document_text):
            with pytest.raises(UnknownDocumentError, match="bob"):
                call("bob")
        assert retriever.check() == []
        retriever.purge()
        held = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        assert b"neutron" in held
        assert b"tourists" not in held
        assert b"Paris" not in held
        # The keyword index holds lower-case words, sorted and without the letters shared with the word before.
        assert b"xylophonist"[2:] not in held


def test_a_document_may_stand_in_several_collections(retriever: Retriever, people: list[Document]) -> None:
    retriever.create_collection("alpha")
    retriever.ingest("default", people[:1])
    retriever.ingest("alpha", [replace(people[0], text="Another Ada.")])
    assert retriever.document("ada").collection == "alpha", "the first by name"
    assert retriever.document("ada", "default").characters == len(people[0].text)
    assert retriever.delete_document("ada", "alpha")
    assert retriever.document("ada").collection == "default"
    retriever.ingest("alpha", people[:1])
    assert retriever.delete_document("ada")
    assert retriever.documents() == []
    assert retriever.check() == []


def test_collections_are_made_once_named_strictly_and_deleted_whole(
    retriever: Retriever, people: list[Document]
) -> None:
    retriever.create_collection("a.b-c_D")
    retriever.create_collection("a.b-c_D")
    retriever.ingest("a.b-c_D", people)
    assert [c.name for c in retriever.collections()] == ["a.b-c_D", "default"]
    for name in ("", ".a", "a b", "a/b", "a" * 65, "ä", "a\n", "x;y"):
        with pytest.raises(UnknownCollectionError, match="cannot name a collection"):
            retriever.create_collection(name)
    with pytest.raises(UnknownCollectionError):
        retriever.ingest("nope", people)
    retriever.delete_collection("a.b-c_D")
    with pytest.raises(UnknownCollectionError):
        retriever.delete_collection("a.b-c_D")
    retriever.ingest("default", people)
    retriever.delete_collection("default")
    assert [(c.name, c.documents) for c in retriever.collections()] == [("default", 0)]
    assert retriever.search(["default"], "Bob") == []
    assert retriever.check() == []


def test_ready_made_chunks_are_kept_exactly(retriever: Retriever) -> None:
    texts = ["  First chunk,\n\nwith a gap. ", "word " * 50, "Third."]
    result = retriever.ingest_chunks("default", texts, title="T", metadata={"k": 1})
    assert [chunk.text for chunk in result.chunks] == texts
    assert retriever.ingest_chunks("default", texts, title="T", metadata={"k": 1}).unchanged
    recut = retriever.ingest_chunks("default", [texts[0] + "\n\n" + texts[1], texts[2]], title="T", metadata={"k": 1})
    assert recut.document.id != result.document.id
    same_id = retriever.ingest_chunks("default", ["new"], document_id=result.document.id)
    assert [chunk.text for chunk in retriever.chunks(result.document.id)] == ["new"]
    assert not same_id.unchanged
    for wrong in ([], ["a", " "], ["\u200b"]):
        with pytest.raises(EmptyDocumentError):
            retriever.ingest_chunks("default", wrong)
    assert retriever.check() == []


def test_documents_that_parse_would_not_make_are_refused(retriever: Retriever, people: list[Document]) -> None:
    with pytest.raises(EmptyDocumentError):
        retriever.ingest("default", [people[0], replace(people[1], text=" \n")])
    whole = people[0]
    for wrong in (
        replace(whole, text="a\ud800"),
        replace(whole, text="a\r\nb"),
        replace(whole, title="\u202eevil"),
        replace(whole, id="a b"),
        replace(whole, id=""),
        replace(whole, metadata={"k": float("nan")}),
        replace(whole, metadata={"k": "\ud800"}),
        replace(whole, metadata={"k": [1]}),  # type: ignore[dict-item]
    ):
        with pytest.raises(UnreadableDocumentError):
            retriever.ingest("default", [people[1], wrong])
    assert retriever.documents() == []


def test_a_folder_belongs_to_one_embedder(tmp_path: Path) -> None:
    reopen(tmp_path).close()
    with pytest.raises(IndexMismatchError, match="made with the embedder 'hash-256', not 'hash-64'"):
        Retriever.open(tmp_path, HashEmbedder(64), count_words)
    impostor = HashEmbedder(64)
    impostor.name = "hash-256"
    with Retriever.open(tmp_path, impostor, count_words) as retriever, pytest.raises(IndexMismatchError):
        retriever.ingest("default", [from_text("x")])


def test_foreign_damaged_and_closed_files_are_typed_errors(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/catalogue.sqlite3").write_bytes(b"not a database " * 100)
    with pytest.raises(CatalogueError, match="not a database"):
        reopen(tmp_path / "a")
    reopen(tmp_path / "b").close()
    with sqlite3.connect(tmp_path / "b/catalogue.sqlite3") as sql:
        sql.execute("PRAGMA user_version = 99")
    sql.close()
    with pytest.raises(IndexMismatchError, match="schema version 99"):
        reopen(tmp_path / "b")
    retriever = reopen(tmp_path / "c")
    retriever.close()
    with pytest.raises(CatalogueError, match="closed"):
        retriever.documents()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("DELETE FROM vectors WHERE chunk_pk = 2", "1 chunks are missing from the vector index"),
        ("DELETE FROM fts_1 WHERE rowid = 2", "1 chunks are missing from the keyword index"),
        ("INSERT INTO fts_1(rowid, text) VALUES(99, 'ghost')", "1 deleted chunks are still in the keyword index"),
        ("UPDATE chunks SET text = 'other' WHERE pk = 1", "chunk 0 is not the text at its place"),
        ("DELETE FROM chunks WHERE pk = 1", "has 3 chunks of 4"),
        ("UPDATE vectors SET vector = zeroblob(1024) WHERE chunk_pk = 1", "vector 1 is not of length 1"),
    ],
)
def test_check_finds_damage(tmp_path: Path, people: list[Document], damage: str, message: str) -> None:
    with reopen(tmp_path) as retriever:
        retriever.ingest("default", people)
    sql = sqlite3.connect(tmp_path / "catalogue.sqlite3")
    sql.execute("PRAGMA foreign_keys = ON")
    sql.execute(damage)
    sql.commit()
    sql.close()
    with reopen(tmp_path) as retriever:
        assert any(message in problem for problem in retriever.check()), retriever.check()


def test_many_small_and_one_large_document_keep_their_vectors_apart(retriever: Retriever) -> None:
    documents = [from_text(f"unique{n} text", title=f"t{n}", document_id=f"d{n}") for n in range(150)]
    documents.insert(70, from_text("\n\n".join(f"large{n} " + "x " * 15 for n in range(200)), document_id="large"))
    retriever.ingest("default", documents)
    for n in (0, 69, 70, 149):
        [hit] = retriever.search(["default"], f"t{n} unique{n} text", k=1, mode="dense")
        assert hit.document.id == f"d{n}"
        assert hit.score == pytest.approx(1.0)
    index = retriever._indexes.current(retriever._catalogue.collection("default"))
    assert len(index) == len(list(retriever.all_chunks())) == 350
    assert np.array_equal(index.keys(), np.sort(index.keys()))
    assert retriever.check() == []
