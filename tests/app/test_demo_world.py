"""The demo world is deterministic, fair and made for the demo tokenizer."""

from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from app.demo.words import ATTRIBUTES
from app.demo.world import (
    CHUNK_END,
    CHUNK_TOKENS,
    EVAL_SEEDS,
    SYSTEM_PREFIX,
    TASKS,
    TRAIN_SEEDS,
    Example,
    count_tokens,
    demo_collection,
    make_example,
    subject_names,
)

MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"
SEEDS = EVAL_SEEDS[:40]
LEAST, MOST = CHUNK_TOKENS


def examples(**world: object) -> list[Example]:
    return [make_example(seed, task=task, **world) for seed in SEEDS for task in TASKS]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_a_seed_always_gives_the_same_example() -> None:
    assert examples() == examples()
    assert len({str(e) for e in examples()}) == len(SEEDS) * len(TASKS)


def test_training_never_sees_an_evaluation_seed() -> None:
    assert TRAIN_SEEDS.stop <= EVAL_SEEDS.start
    assert len(TRAIN_SEEDS) and len(EVAL_SEEDS)


def test_the_fact_asked_for_stands_where_the_question_says() -> None:
    for example in examples():
        question = example.question
        document = example.documents[question.document]
        facts = [f for f in document.facts if f.value == question.answer]
        assert len(facts) == 1
        assert facts[0].sentence in document.chunks[question.chunk]
        assert document.subject in question.text
        assert (question.task == "same-chunk") == (document.subject in document.chunks[question.chunk])


def test_only_the_first_chunk_names_its_subject_and_no_chunk_names_another() -> None:
    for example in examples(documents=6, chunks=3):
        for document in example.documents:
            named = [{n for n in subject_names() if n in chunk} for chunk in document.chunks]
            assert named == [{document.subject}, set(), set()]
            assert all(not f.by_name for f in document.facts if f.chunk > 0)


def test_each_question_has_one_right_answer() -> None:
    for example in examples(documents=8, chunks=2):
        text = " ".join(document.text for document in example.documents)
        assert text.count(f" {example.question.answer}.") == 1
        assert example.question.answer not in example.question.text
        assert len({d.subject for d in example.documents}) == len(example.documents)


def test_all_documents_of_a_kind_state_the_same_attributes() -> None:
    for example in examples(documents=3):
        assert len({frozenset(f.attribute for f in d.facts) for d in example.documents}) == 1


def test_chunks_keep_their_length_and_two_never_fit_together() -> None:
    for example in examples(chunks=3):
        for document in example.documents:
            counts = [count_tokens(chunk + CHUNK_END) for chunk in document.chunks]
            assert all(64 <= count <= 128 and LEAST <= count - 1 <= MOST for count in counts)
            assert all(a + b > 128 for a, b in pairwise(counts))


def test_no_filler_means_facts_only() -> None:
    example = make_example(EVAL_SEEDS[0], task="cross-chunk", chunk_tokens=(0, 0))
    document = example.documents[0]
    assert document.chunks[1] == " ".join(f.sentence for f in document.facts if f.chunk == 1)


def test_values_belong_to_one_attribute_and_are_no_subjects() -> None:
    values = [v for kind in ATTRIBUTES.values() for a in kind for v in a.values]
    assert len(values) == len(set(values))
    assert not set(values) & set(subject_names())
    assert len(subject_names()) == len(set(subject_names()))


def test_the_demo_collection_has_every_kind_and_no_subject_twice() -> None:
    documents = demo_collection()
    assert documents == demo_collection()
    assert 12 <= len(documents) <= 20
    assert len({d.subject for d in documents}) == len({d.id for d in documents}) == len(documents)
    assert {d.kind for d in documents} == set(ATTRIBUTES)


@pytest.mark.parametrize(
    ("world", "message"),
    [
        ({"task": "guess"}, "task must be one of"),
        ({"task": "cross-chunk", "chunks": 1}, "at least 2 chunks"),
        ({"task": "same-chunk", "documents": 25}, "documents must be 1 to 24"),
        ({"task": "same-chunk", "chunks": 4}, "chunks must be 1 to 3"),
        ({"task": "same-chunk", "kind": "planet"}, "kind must be one of"),
    ],
)
def test_bad_requests_are_named(world: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_example(EVAL_SEEDS[0], **world)


def test_the_tokenizer_counts_like_the_world(tokenizer: Tokenizer) -> None:
    for example in examples(chunks=3):
        for document in example.documents:
            for chunk in document.chunks:
                assert len(tokenizer.encode(chunk + CHUNK_END).ids) == count_tokens(chunk + CHUNK_END)


def test_names_and_values_are_single_tokens(tokenizer: Tokenizer) -> None:
    values = [v for kind in ATTRIBUTES.values() for a in kind for v in a.values]
    for word in [*subject_names(), *values]:
        assert len(tokenizer.encode(word).ids) == len(tokenizer.encode(word + " ").ids) == 1


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n", "  lead and trail  ", "tab\tand\r\nlines\n\n\n\n", "don't -- stop... a_b __c__ 3.14159 1234567",
     "Grüße aus Köln, naïve café", "日本語のテキスト", "مرحبا بالعالم", "हिन्दी पाठ",
     "👍🏽👨‍👩‍👧 flags 🇪🇺", "e\u0301 \u00a0\u200b\ufeff\x00 end",
     SYSTEM_PREFIX],
)  # fmt: skip
def test_any_unicode_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
