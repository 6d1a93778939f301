"""search: any text is a query, rankings are deterministic, nothing deleted or filtered out is found."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retriever.embed import HashEmbedder
from retriever.errors import FilterError, IndexMismatchError, UnknownCollectionError
from retriever.parse import from_text
from retriever.retriever import Retriever
from retriever.search import Mode
from retriever.types import Document

MODES: list[Mode] = ["hybrid", "dense", "text"]


@pytest.mark.parametrize("mode", MODES)
def test_a_chunk_that_names_nobody_is_found_by_its_title(
    retriever: Retriever, people: list[Document], mode: Mode
) -> None:
    retriever.ingest("default", people)
    best = retriever.search(["default"], "When did Lovelace die? 1852 illness", mode=mode)[0]
    assert best.chunk.text.endswith("She died in 1852 of an illness.")
    assert best.chunk.heading == "Death"
    assert best.document.id == "ada"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "query",
    [
        '"', '""', "'", "AND", "OR NOT", "a AND", "NEAR(a b)", "*", "bob*", "title:bob", "-bob", "(", "a^2", "{x}: y",
        "\x00", "🎨", "👩\u200d🎨", "\ud800", "foo_bar", "日本", "?!", "\u202e", "x" * 20000, "w " * 5000,
        "'; DROP TABLE chunks; --",
    ],
)  # fmt: skip
def test_no_query_text_is_an_error(retriever: Retriever, people: list[Document], mode: Mode, query: str) -> None:
    retriever.ingest("default", people)
    retriever.search(["default"], query, mode=mode)
    assert retriever.check() == []


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(query=st.text(max_size=30) | st.text(alphabet='"()*:^-+ANDORNEAR ', max_size=20))
def test_no_generated_query_is_an_error_and_scores_are_ordered(retriever: Retriever, query: str) -> None:
    retriever.ingest("default", [from_text("AND or not near. a b c", document_id="x"), from_text("d", document_id="y")])
    for mode in MODES:
        scores = [hit.score for hit in retriever.search(["default"], query, mode=mode)]
        assert scores == sorted(scores, reverse=True)
        assert all(0.0 <= score <= 1.0 for score in scores)


def test_blank_queries_and_wordless_text_queries_find_nothing(retriever: Retriever, people: list[Document]) -> None:
    retriever.ingest("default", people)
    assert retriever.search(["default"], " \n\u200b") == []
    assert retriever.search(["default"], "?!", mode="text") == []


def test_first_in_both_rankings_scores_one_and_the_threshold_drops(
    retriever: Retriever, people: list[Document]
) -> None:
    retriever.ingest("default", people)
    hits = retriever.search(["default"], "neutron lifetime physicist Carla Rossi")
    assert hits[0].score == pytest.approx(1.0)
    kept = retriever.search(["default"], "neutron lifetime physicist Carla Rossi", score_threshold=hits[1].score + 1e-6)
    assert kept == hits[:1]


def test_equal_scores_are_ordered_by_chunk_id(retriever: Retriever) -> None:
    retriever.ingest("default", [from_text("same words", title="t", document_id=f"d{n}") for n in range(9)])
    for mode in MODES:
        ids = [hit.chunk.id for hit in retriever.search(["default"], "same words", k=9, mode=mode)]
        assert len(ids) == 9
        if mode != "hybrid":
            assert ids == sorted(ids)
        assert ids == [hit.chunk.id for hit in retriever.search(["default"], "same words", k=9, mode=mode)]


def test_k_bounds_the_hits_and_bad_arguments_are_refused(retriever: Retriever, people: list[Document]) -> None:
    retriever.ingest("default", people)
    assert [len(retriever.search(["default"], "she lives in", k=k)) for k in (1, 2, 3)] == [1, 2, 3]
    for wrong in ({"k": 0}, {"k": 10**9}, {"mode": "magic"}, {"neighbours": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            retriever.search(["default"], "x", **wrong)
    with pytest.raises(UnknownCollectionError, match="no collection 'nope'; there are default"):
        retriever.search(["default", "nope"], "x")


@pytest.mark.parametrize("mode", MODES)
def test_filters_hold_in_every_mode(retriever: Retriever, people: list[Document], mode: Mode) -> None:
    retriever.ingest("default", people)

    def found(filters: dict[str, object]) -> set[str]:
        hits = retriever.search(["default"], "she bob ada carla lives was", k=50, mode=mode, filters=filters)
        return {hit.document.id for hit in hits}

    assert found({"type": "gte", "key": "year", "value": 1852}) == {"ada", "bob"}
    assert found({"type": "eq", "key": "living", "value": True}) == {"bob"}
    assert found({"type": "ne", "key": "field", "value": "art"}) == {"ada", "carla"}
    assert found({"type": "eq", "key": "document_id", "value": "carla"}) == {"carla"}
    assert found({"type": "eq", "key": "field", "value": "nothing"}) == set()
    with pytest.raises(FilterError):
        found({"type": "nope"})


def test_neighbours_follow_their_hit_and_nothing_comes_twice(retriever: Retriever) -> None:
    text = "\n\n".join(f"topic{n} " + "filler " * 17 + "end." for n in range(8))
    retriever.ingest("default", [from_text(text, title="t", document_id="long")])
    [own] = retriever.search(["default"], "topic4", k=1, mode="text")
    around = retriever.search(["default"], "topic4", k=1, mode="text", neighbours=2)
    assert [hit.chunk.ordinal for hit in around] == [4, 3, 5, 2, 6]
    assert around[0] == own
    assert [hit.score / own.score for hit in around] == pytest.approx([1, 0.99, 0.99, 0.99**2, 0.99**2])
    two = retriever.search(["default"], "topic4 topic5", k=2, mode="text", neighbours=1)
    ordinals = [hit.chunk.ordinal for hit in two]
    assert sorted(ordinals) == [3, 4, 5, 6]
    edge = retriever.search(["default"], "topic0", k=1, mode="text", neighbours=3)
    assert [hit.chunk.ordinal for hit in edge] == [0, 1, 2, 3]


def test_several_collections_are_ranked_together_and_a_shared_chunk_comes_once(
    retriever: Retriever, people: list[Document]
) -> None:
    retriever.create_collection("other")
    retriever.ingest("default", people[:2])
    retriever.ingest("other", people[1:])
    both = retriever.search(["default", "other"], "she lives in paris neutron", k=50)
    assert {hit.document.id for hit in both} == {"ada", "bob", "carla"}
    assert len({hit.chunk.id for hit in both}) == len(both)
    assert {hit.document.id for hit in retriever.search(["other"], "she lives ada", k=50)} == {"bob", "carla"}


def test_an_embedder_that_misbehaves_is_named(tmp_path: Path) -> None:
    class Wrong(HashEmbedder):
        def embed(self, texts: object) -> np.ndarray:
            return np.full((1, self.dimension), np.nan, dtype=np.float32)

    with Retriever.open(tmp_path, Wrong(), len) as retriever, pytest.raises(IndexMismatchError, match="hash-256"):
        retriever.search(["default"], "x")
