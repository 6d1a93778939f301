"""Neighbours: the nearest by vector, kept until one of them goes, and then everyone concerned is told."""

import itertools
import random
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retriever import database
from retriever.embed import HashEmbedder
from retriever.errors import IndexMismatchError, UnknownCollectionError, UnknownDocumentError
from retriever.ingest import dense_text
from retriever.parse import from_text
from retriever.retriever import Retriever
from retriever.types import Chunk, Document

from .conftest import count_words

WORDS = ("apple", "boat", "cloud", "door", "eagle", "farm", "glass", "house", "iron", "jade")


def open_at(folder: Path) -> Retriever:
    return Retriever.open(folder, HashEmbedder(), count_words, chunk_tokens=20)


def made(name: str, *paragraphs: str, title: str = "t") -> Document:
    """One chunk per paragraph: each is filled up to more than half a chunk with a word of its own."""
    return from_text(
        "\n\n".join(p + f" {name}{n}" * (15 - len(p.split())) for n, p in enumerate(paragraphs)),
        title=title,
        document_id=name,
    )


def corpus(seed: int, documents: int = 12) -> list[Document]:
    rng = random.Random(seed)
    return [
        made(f"d{n}", *(" ".join(rng.choices(WORDS, k=9)) for _ in range(rng.randint(1, 3)))) for n in range(documents)
    ]


def near(retriever: Retriever, collection: str = "default") -> dict[str, list[str]]:
    """Chunk id -> ids of its neighbours, of every chunk."""
    found: dict[str, list[str]] = {}
    for document in retriever.documents(collection):
        hood = retriever.neighbourhood(document.id, collection)
        found |= {c.id: [n.id for n in ns] for c, ns in zip(hood.chunks, hood.neighbours, strict=True)}
    return found


def by_hand(retriever: Retriever, count: int, collection: str = "default") -> dict[str, list[str]]:
    """The same by embedding every chunk again and comparing all with all."""
    titles = {d.id: d.title for d in retriever.documents(collection)}
    chunks = list(retriever.all_chunks(collection))
    vectors = HashEmbedder().embed([dense_text(titles[c.document_id], c) for c in chunks])
    cosines = np.round((vectors.astype(np.float64) @ vectors.T.astype(np.float64)), 6)
    found: dict[str, list[str]] = {}
    for i, own in enumerate(chunks):
        order = sorted(range(len(chunks)), key=lambda j: (-cosines[i, j], chunks[j].id))
        texts: dict[str, str] = {}
        for j in order:
            if chunks[j].text.strip() != own.text.strip():
                texts.setdefault(chunks[j].text.strip(), chunks[j].id)
        found[own.id] = list(texts.values())[:count]
    return found


@pytest.mark.parametrize("count", [1, 3, 16])
def test_neighbours_are_the_nearest_by_vector_and_never_the_chunk_itself(retriever: Retriever, count: int) -> None:
    retriever.ingest("default", corpus(1))
    report = retriever.assign_neighbours("default", count)
    chunks = list(retriever.all_chunks())
    assert report.chunks == report.changed == len(chunks) > count
    assert near(retriever) == by_hand(retriever, count)
    assert all(len(ids) == count and own not in ids for own, ids in near(retriever).items())
    assert retriever.check() == []


def test_the_order_of_ingestion_and_equal_distances_do_not_matter(tmp_path: Path) -> None:
    same = [" ".join(words) for words in itertools.permutations(WORDS[:4])]  # 24 texts with one vector
    documents = [from_text(text, title="same", document_id=f"same{n}") for n, text in enumerate(same)] + corpus(2)
    found: list[dict[str, list[str]]] = []
    for seed in range(3):
        random.Random(seed).shuffle(documents)
        with open_at(tmp_path / str(seed)) as retriever:
            for document in documents:
                retriever.ingest("default", [document])
            retriever.assign_neighbours("default", 4)
            found.append(near(retriever))
            assert found[-1] == by_hand(retriever, 4)
    assert found[0] == found[1] == found[2]


def test_a_text_comes_once_however_often_it_is_stored(retriever: Retriever) -> None:
    twins = [from_text("apple boat cloud door", title="t", document_id=f"twin{n}") for n in range(40)]
    others = [from_text(text, title="t", document_id=text[-4:]) for text in ("apple boat", "boat cloud", "apple farms")]
    retriever.ingest("default", [*twins, *others])
    retriever.assign_neighbours("default", 3)
    assert near(retriever) == by_hand(retriever, 3)
    for document in retriever.documents():
        hood = retriever.neighbourhood(document.id)
        texts = [c.text for c in hood.neighbours[0]]
        assert len(set(texts)) == len(texts) == 3, "forty twins are one neighbour, and to one another none"
        assert hood.chunks[0].text not in texts


def test_neighbours_are_of_the_same_collection_only(retriever: Retriever) -> None:
    retriever.create_collection("other")
    retriever.ingest("default", corpus(3, 4))
    retriever.ingest("other", [replace(d, id="foreign-" + d.id) for d in corpus(3, 4)])
    retriever.ingest("other", [made("lone", "apple")])
    for name in ("default", "other"):
        retriever.assign_neighbours(name, 16)
    own = {c.id for c in retriever.all_chunks("default")}
    for chunk, ids in near(retriever).items():
        assert chunk in own
        assert set(ids) < own
    assert all(not set(ids) & own for ids in near(retriever, "other").values())
    with pytest.raises(UnknownCollectionError):
        retriever.assign_neighbours("nowhere", 3)


def test_an_assigned_chunk_keeps_its_neighbours_while_the_collection_grows(retriever: Retriever) -> None:
    first, later = corpus(4)[:6], corpus(4)[6:]
    retriever.ingest("default", first)
    retriever.assign_neighbours("default", 3)
    before = near(retriever)
    versions = {d.id: retriever.version(d.id) for d in retriever.documents()}
    retriever.ingest("default", later)
    assert not any(near(retriever)[c.id] for d in later for c in retriever.chunks(d.id)), "not assigned by ingesting"
    report = retriever.assign_neighbours("default", 3)
    after = near(retriever)
    assert {own: after[own] for own in before} == before
    assert report.chunks == len(after) - len(before)
    assert {d: retriever.version(d) for d in versions} == versions
    assert retriever.assign_neighbours("default", 3).chunks == 0

    refreshed = retriever.assign_neighbours("default", 3, refresh=True)
    assert near(retriever) == by_hand(retriever, 3) != after
    assert refreshed.chunks == len(after)
    assert refreshed.changed == sum(after[own] != ids for own, ids in near(retriever).items())
    assert retriever.assign_neighbours("default", 3, refresh=True).changed == 0


def test_another_number_of_neighbours_is_another_assignment(retriever: Retriever) -> None:
    retriever.ingest("default", corpus(5))
    retriever.assign_neighbours("default", 2)
    retriever.forget_stale(retriever.stale()[0])
    assert retriever.assign_neighbours("default", 4).changed == len(near(retriever))
    assert near(retriever) == by_hand(retriever, 4)
    assert set(retriever.stale()[1]) == set(near(retriever)), "each was somebody's work with two neighbours"
    for wrong in (0, 17, -1):
        with pytest.raises(ValueError, match="must be 1 to 16"):
            retriever.assign_neighbours("default", wrong)


def test_only_the_documents_asked_for_are_assigned_and_whoever_lost_a_neighbour(retriever: Retriever) -> None:
    documents = corpus(6)
    retriever.ingest("default", documents)
    retriever.assign_neighbours("default", 2, documents=["d0", "d1"])
    assert {own for own, ids in near(retriever).items() if ids} == {
        c.id for d in ("d0", "d1") for c in retriever.chunks(d)
    }
    gone = next(n for ns in retriever.neighbourhood("d0").neighbours for n in ns if n.document_id not in ("d0", "d1"))
    retriever.delete_document(gone.document_id)
    lost = {
        own for d in ("d0", "d1") for own in near(retriever) if own in _ids(retriever, d) and not near(retriever)[own]
    }
    assert lost
    report = retriever.assign_neighbours("default", 2, documents=["d5"])
    assert {c for ids in report.again.values() for c in ids} == lost
    assert set(report.again) <= {"d0", "d1"}
    assert all(near(retriever)[own] for own in lost)


def _ids(retriever: Retriever, document: str) -> set[str]:
    return {c.id for c in retriever.chunks(document)}


def test_deleting_takes_back_exactly_the_neighbourhoods_it_was_part_of(retriever: Retriever) -> None:
    retriever.ingest("default", corpus(7))
    retriever.assign_neighbours("default", 3)
    before = near(retriever)
    versions = {d.id: retriever.version(d.id) for d in retriever.documents()}
    retriever.forget_stale(retriever.stale()[0])
    gone = _ids(retriever, "d3")
    retriever.delete_document("d3")
    after = near(retriever)
    losing = {own for own, ids in before.items() if set(ids) & gone} - gone
    assert losing
    assert losing < set(after)
    assert after == {own: [] if own in losing else ids for own, ids in before.items() if own not in gone}
    assert set(retriever.stale()[1]) == losing | gone
    changed = {c.document_id for c in retriever.all_chunks() if c.id in losing}
    assert {d for d, v in versions.items() if d != "d3" and retriever.version(d) != v} == changed
    assert retriever.check() == []
    report = retriever.assign_neighbours("default", 3)
    assert report.chunks == report.changed == len(losing)
    assert {c for ids in report.again.values() for c in ids} == losing
    # Who lost one is assigned as if it were new; nobody else is touched.
    assert near(retriever) == {own: by_hand(retriever, 3)[own] if own in losing else ids for own, ids in after.items()}


def test_an_edit_concerns_only_those_who_had_the_edited_chunk_as_neighbour(retriever: Retriever) -> None:
    documents = corpus(8)
    long = made("long", *("zebra quilt " * 6 + word for word in WORDS[:6]))
    retriever.ingest("default", [*documents, long])
    retriever.assign_neighbours("default", 3)
    retriever.forget_stale(retriever.stale()[0])
    before, chunks = near(retriever), retriever.chunks("long")
    assert len(chunks) == 6
    old = next(c for c in chunks if any(c.id in before[other.id] for other in chunks))
    edited = replace(long, text=long.text.replace(old.text, old.text.replace("zebra", "storm")))
    retriever.ingest("default", [edited])
    after = near(retriever)
    assert old.id not in after
    losing = {own for own, ids in before.items() if old.id in ids}
    assert losing & {c.id for c in chunks}, "of its own document too"
    kept = {own: [] if own in losing else ids for own, ids in before.items() if own != old.id}
    new = retriever.chunks("long")[old.ordinal].id
    assert after == kept | {new: []}
    assert set(retriever.stale()[1]) == losing | {c.id for c in chunks}
    assert {c for ids in retriever.assign_neighbours("default", 3).again.values() for c in ids} == losing
    assert retriever.check() == []


def test_a_document_whose_text_stays_stays_everybodys_neighbour(retriever: Retriever) -> None:
    documents = corpus(9)
    retriever.ingest("default", documents)
    retriever.assign_neighbours("default", 3)
    before = near(retriever)
    for document in documents:
        assert not retriever.ingest("default", [replace(document, metadata={"read": True})])[0].unchanged
    assert near(retriever) == before
    assert retriever.assign_neighbours("default", 3).chunks == 0
    assert retriever.check() == []


def test_a_deleted_collection_is_stale_as_a_whole(retriever: Retriever) -> None:
    retriever.create_collection("other")
    retriever.ingest("other", corpus(10))
    retriever.assign_neighbours("other", 3)
    ids = set(near(retriever, "other"))
    retriever.delete_collection("other")
    assert set(retriever.stale()[1]) == ids
    assert retriever.check() == []


def test_what_is_stale_is_forgotten_up_to_the_mark_only(retriever: Retriever) -> None:
    retriever.ingest("default", [made("a", "apple"), made("b", "boat")])
    assert retriever.stale() == (0, [])
    a, b = (retriever.chunks(d)[0].id for d in "ab")
    retriever.delete_document("a")
    mark, ids = retriever.stale()
    assert ids == [a]
    retriever.delete_document("b")
    retriever.forget_stale(mark)
    mark, ids = retriever.stale()
    assert ids == [b]
    retriever.forget_stale(mark)
    assert retriever.stale() == (0, [])


def test_the_holders_of_a_chunk_are_found_in_every_collection(retriever: Retriever) -> None:
    retriever.create_collection("other")
    for name in ("default", "other"):
        retriever.ingest(name, [made("a", "apple")])
    retriever.ingest("default", [made("b", "boat")])
    [chunk] = retriever.chunks("a", "other")
    assert {(d.id, d.collection) for d in retriever.documents_with([chunk.id])} == {("a", "default"), ("a", "other")}
    assert retriever.documents_with(["nothing"]) == []
    with pytest.raises(UnknownDocumentError):
        retriever.neighbourhood("b", "other")
    with pytest.raises(UnknownDocumentError):
        retriever.version("c")


def test_assignments_survive_reopening(tmp_path: Path) -> None:
    with open_at(tmp_path) as retriever:
        retriever.ingest("default", corpus(11))
        retriever.assign_neighbours("default", 3)
        before = near(retriever), {d.id: retriever.version(d.id) for d in retriever.documents()}
    with open_at(tmp_path) as retriever:
        assert (near(retriever), {d.id: retriever.version(d.id) for d in retriever.documents()}) == before


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 5), st.integers(0, 3)),
        st.tuples(st.just("delete"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("assign"), st.integers(1, 3), st.just(0)),
        st.tuples(st.just("refresh"), st.integers(1, 3), st.just(0)),
        st.tuples(st.just("forget"), st.just(0), st.just(0)),
    ),
    max_size=16,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_whatever_happens_nobody_keeps_a_neighbour_that_went_unnoticed(
    steps: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Someone derives something from each chunk and its neighbours after every step. Whatever it derived from a text
    that is gone is either among the stale, or has another version now."""
    with open_at(tmp_path_factory.mktemp("steps")) as retriever:
        derived: dict[str, set[tuple[str, ...]]] = {}  # chunk id -> texts it was derived from, its own first
        versions: dict[tuple[int, int], object] = {}
        for step, n, version in steps:
            if step == "put":
                retriever.ingest("default", [made(f"d{n}", "apple boat", f"{WORDS[version]} cloud", "door")])
            elif step == "delete":
                retriever.delete_document(f"d{n}")
            elif step == "forget":
                mark, ids = retriever.stale()
                current = _current(retriever)
                for chunk_id in ids:
                    derived[chunk_id] = derived.get(chunk_id, set()) & current.get(chunk_id, set())
                retriever.forget_stale(mark)
            else:
                retriever.assign_neighbours("default", n, refresh=step == "refresh")
            assert retriever.check() == []
            alive = {c.text for c in retriever.all_chunks()}
            stale = set(retriever.stale()[1])
            for chunk_id, texts in _current(retriever).items():
                derived.setdefault(chunk_id, set()).update(texts)
            for chunk_id, made_of in derived.items():
                assert chunk_id in stale or all(set(texts) <= alive for texts in made_of), (step, chunk_id)
            for document in retriever.documents():
                hood = retriever.neighbourhood(document.id)
                assert hood.version == retriever.version(document.id)
                assert versions.setdefault(hood.version, hood) == hood, "a version stands for one neighbourhood"


def _current(retriever: Retriever) -> dict[str, set[tuple[str, ...]]]:
    found: dict[str, set[tuple[str, ...]]] = {}
    for document in retriever.documents():
        hood = retriever.neighbourhood(document.id)
        for own, ns in zip(hood.chunks, hood.neighbours, strict=True):
            found.setdefault(own.id, set()).add(tuple(c.text for c in _with(own, ns)))
    return found


def _with(own: Chunk, ns: tuple[Chunk, ...]) -> Iterator[Chunk]:
    yield own
    yield from ns


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("UPDATE neighbours SET neighbour_pk = chunk_pk WHERE place = 0", "is its own neighbour"),
        ("UPDATE chunks SET assigned = NULL", "which was never assigned"),
        ("UPDATE chunks SET assigned = 1", "3 neighbours of 1 asked for"),
        ("UPDATE chunks SET collection_pk = 2 WHERE pk = 1", "is of another collection"),
    ],
)
def test_check_finds_damaged_assignments(tmp_path: Path, damage: str, message: str) -> None:
    with open_at(tmp_path) as retriever:
        retriever.create_collection("other")
        retriever.ingest("default", corpus(12))
        retriever.assign_neighbours("default", 3)
        assert retriever.check() == []
    sql = sqlite3.connect(tmp_path / "catalogue.sqlite3")
    sql.execute(damage)
    sql.commit()
    sql.close()
    with open_at(tmp_path) as retriever:
        assert any(message in problem for problem in retriever.check()), retriever.check()


def test_a_folder_of_schema_version_1_is_migrated_with_all_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = sqlite3.connect(tmp_path / "old.sqlite3")
    old.executescript(database._VERSION_1)
    old.executescript(
        f"""PRAGMA application_id = {database._APPLICATION_ID}; PRAGMA user_version = 1;
        INSERT INTO meta VALUES('embedder', 'hash-256'), ('dimension', '256');
        INSERT INTO collections VALUES(1, 'default', 0.0, 1);
        CREATE VIRTUAL TABLE fts_1 USING fts5(title, heading, text);"""
    )
    for pk, word in enumerate(WORDS[:3], start=1):
        [vector] = HashEmbedder().embed([f"t\n{word}"])
        old.execute(
            "INSERT INTO documents VALUES(?, 1, ?, 't', 'f', 'text/plain', 's', '{}', 1, ?, 0.0, 'print', ?)",
            (pk, word, len(word), word),
        )
        old.execute(f"INSERT INTO chunks VALUES({pk}, 1, {pk}, 'c-{word}', 0, '{word}', 0, {len(word)}, NULL, NULL)")
        old.execute("INSERT INTO vectors VALUES(?, ?)", (pk, vector.tobytes()))
        old.execute("INSERT INTO fts_1(rowid, text) VALUES(?, ?)", (pk, word))
    old.commit()
    old.close()
    (tmp_path / "data").mkdir()
    (tmp_path / "old.sqlite3").rename(tmp_path / "data" / "catalogue.sqlite3")
    with open_at(tmp_path / "data") as retriever:
        assert [c.text for c in retriever.all_chunks()] == list(WORDS[:3])
        assert retriever.check() == []
        retriever.assign_neighbours("default", 2)
        assert all(len(ids) == 2 for ids in near(retriever).values())
        retriever.ingest("default", [made("new", "apple")])
        retriever.delete_document("boat")
        assert set(retriever.stale()[1]) == {"c-apple", "c-boat", "c-cloud"}
        assert retriever.check() == []
    with open_at(tmp_path / "data") as retriever:
        assert len(retriever.documents()) == 3
    monkeypatch.setattr(database, "SCHEMA_VERSION", 1)
    with pytest.raises(IndexMismatchError, match="schema version 2, this program reads 1"):
        open_at(tmp_path / "data")
