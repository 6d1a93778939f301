"""Chunks by name: all of them, without their texts, of what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from retriever import catalogue
from retriever.embed import HashEmbedder
from retriever.errors import UnknownCollectionError
from retriever.retriever import Retriever
from retriever.types import ChunkName


@pytest.fixture
def retriever(tmp_path: Path) -> Iterator[Retriever]:
    opened = Retriever.open(tmp_path, HashEmbedder(), len)
    opened.create_collection("other")
    opened.ingest_chunks("default", ["one", "two", "three"], document_id="a", title="A", filename="a.txt")
    opened.ingest_chunks("default", ["four"], document_id="b")
    opened.ingest_chunks("other", ["one", "two"], document_id="a")
    yield opened
    opened.close()


def test_names_are_those_of_all_chunks_in_order(retriever: Retriever) -> None:
    names = list(retriever.chunk_names())
    assert [n.id for n in names] == [c.id for c in retriever.all_chunks()]
    assert names[1] == ChunkName(retriever.chunks("a", "default")[1].id, 1, "a", "default", "A", "a.txt")
    assert [(n.collection, n.document_id, n.ordinal) for n in names] == [
        ("default", "a", 0), ("default", "a", 1), ("default", "a", 2), ("default", "b", 0),
        ("other", "a", 0), ("other", "a", 1),
    ]  # fmt: skip


def test_they_can_be_narrowed_down(retriever: Retriever) -> None:
    assert [n.document_id for n in retriever.chunk_names("default", ["b", "none"])] == ["b"]
    assert len(list(retriever.chunk_names(documents=["a"]))) == 5
    assert len(list(retriever.chunk_names("other"))) == 2
    assert list(retriever.chunk_names(documents=[])) == []
    with pytest.raises(UnknownCollectionError, match="atlantis"):
        list(retriever.chunk_names("atlantis"))


def test_none_is_lost_between_blocks(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(retriever.chunk_names())
    after = catalogue.Catalogue.names_after
    monkeypatch.setattr(catalogue.Catalogue, "names_after", lambda self, pk, c, d, limit: after(self, pk, c, d, 2))
    assert list(retriever.chunk_names()) == whole
