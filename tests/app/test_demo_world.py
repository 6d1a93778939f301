"""The demo world is deterministic, fair and made for the demo tokenizer."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from app.demo.words import ATTRIBUTES, BRIDGES
from app.demo.world import (
    CHUNK_END,
    CHUNK_TOKENS,
    EVAL_SEEDS,
    EXAMPLE_CHUNK_TOKENS,
    NOTES,
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


def examples(*tasks: str, **world: object) -> list[Example]:
    """Examples of the held-out seeds, of all tasks unless some are named."""
    return [make_example(seed, task=task, **world) for seed in SEEDS for task in tasks or TASKS]


def prompt(example: Example) -> str:
    """What was retrieved, as one text."""
    return CHUNK_END.join(example.documents[d].chunks[c] for d, c in example.context)


def statements(example: Example, value: str) -> list[tuple[int, str]]:
    """Every (document, attribute) that states a value."""
    return [(i, f.attribute) for i, d in enumerate(example.documents) for f in d.facts if f.value == value]


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
        index, fact = question.evidence[-1] if question.task == "two-hop" else question.evidence[0]
        assert (index, fact.chunk) == (question.document, question.chunk)
        for index, fact in question.evidence:
            document = example.documents[index]
            assert fact in document.facts
            assert fact.sentence in document.chunks[fact.chunk]
        assert all(name in question.text for name in question.asked)


def test_same_chunk_facts_stand_beside_the_name_and_cross_chunk_facts_do_not() -> None:
    for example in examples("same-chunk", "cross-chunk"):
        question = example.question
        document = example.documents[question.document]
        assert (question.task == "same-chunk") == (document.subject in document.chunks[question.chunk])


def test_all_evidence_was_retrieved() -> None:
    for example in examples():
        assert {(i, f.chunk) for i, f in example.question.evidence} <= set(example.context)


def test_the_context_holds_existing_chunks_in_reading_order_and_once_unless_repeated() -> None:
    for example in examples(chunks=3):
        every = {(d, c) for d, document in enumerate(example.documents) for c in range(len(document.chunks))}
        assert set(example.context) <= every
        if example.question.task == "antecedent-missing":
            assert every - set(example.context) == {(example.question.document, 0)}
        elif example.question.task != "repeated":
            assert example.context == tuple(sorted(every))


def test_a_two_hop_question_names_neither_the_person_nor_the_document_of_its_answer() -> None:
    by_pronoun = 0
    for example in examples("two-hop"):
        question = example.question
        (first, bridge), (second, fact) = question.evidence
        assert first != second
        assert bridge.attribute in {a.name for a in BRIDGES.values()}
        assert example.documents[second].subject == bridge.value
        assert bridge.value not in question.text
        assert example.documents[first].subject in question.text
        assert question.answer == fact.value
        assert question.answer not in example.documents[first].text
        by_pronoun += not bridge.by_name
    assert by_pronoun > len(SEEDS) / 2


def test_a_compared_fact_is_true_of_one_of_the_two_and_both_orders_are_asked() -> None:
    places = Counter()
    for example in examples("comparison"):
        question = example.question
        ((index, fact),) = question.evidence
        assert question.answer == example.documents[index].subject
        assert set(question.asked) <= {d.subject for d in example.documents if d.kind == example.documents[index].kind}
        assert len(set(question.asked)) == 2
        assert statements(example, fact.value) == [(index, fact.attribute)]
        places[question.asked.index(question.answer)] += 1
    assert min(places[0], places[1]) > len(SEEDS) / 4


def test_an_aggregation_lists_the_values_in_the_order_of_the_names() -> None:
    for example in examples("aggregation"):
        question = example.question
        facts = [fact for _, fact in question.evidence]
        assert question.answer == ", ".join(f.value for f in facts)
        assert [example.documents[i].subject for i, _ in question.evidence] == list(question.asked)
        assert facts[0].attribute == facts[1].attribute
        assert question.text.index(question.asked[0]) < question.text.index(question.asked[1])


def test_distractors_say_nothing_about_the_asked_attribute_and_are_most_of_the_context() -> None:
    for example in examples("distractors"):
        question = example.question
        attribute = question.evidence[0][1].attribute
        saying = [d for d in example.documents if attribute in {f.attribute for f in d.facts}]
        kinds = Counter(d.kind for d in example.documents)
        assert len(saying) == kinds[example.documents[question.document].kind] == 2
        assert len(example.documents) == 8
        assert kinds[NOTES] == 3
        assert not any(n in c for d in example.documents if d.kind == NOTES for c in d.chunks for n in subject_names())


def test_the_asked_chunk_stands_twice_and_every_repeated_pronoun_follows_its_own_name() -> None:
    apart = 0
    for example in examples("repeated", chunks=3):
        question = example.question
        counts = Counter(example.context)
        assert counts[question.document, question.chunk] == 2
        assert set(counts.values()) == {1, 2}
        for before, (document, chunk) in pairwise(((-1, -1), *example.context)):
            assert chunk == 0 or before in {(document, chunk - 1), (document, chunk)}
        first = example.context.index((question.document, question.chunk))
        apart += example.context[first + 1] != (question.document, question.chunk)
    assert 0 < apart < len(SEEDS)


def test_the_antecedent_is_really_missing() -> None:
    for example in examples("antecedent-missing"):
        question = example.question
        document = example.documents[question.document]
        assert question.chunk > 0
        assert document.subject not in prompt(example)
        assert document.subject in document.text


def test_only_the_first_chunk_names_its_subject_and_no_chunk_names_another_but_by_a_bridge() -> None:
    for example in examples(documents=6, chunks=3):
        for document in example.documents:
            named = [{n for n in subject_names() if n in chunk} for chunk in document.chunks]
            bridge = document.bridge
            if bridge is not None:
                named[bridge.chunk] -= {bridge.value}
            assert named == [{document.subject} - {""}, set(), set()]
            assert all(not f.by_name for f in document.facts if f.chunk > 0)


def test_each_question_has_one_right_answer() -> None:
    for example in examples():
        question = example.question
        once = 2 if question.task == "repeated" else 1
        for value in {f.value for i, f in question.evidence if question.task != "two-hop" or i == question.document}:
            assert prompt(example).count(f" {value}.") == once
            assert len(statements(example, value)) == 1
        if question.task != "comparison":
            assert question.answer not in question.text
        subjects = [d.subject for d in example.documents if d.kind != NOTES]
        assert len(set(subjects)) == len(subjects)


def test_all_documents_of_a_kind_state_the_same_attributes() -> None:
    for example in examples("same-chunk", "cross-chunk", documents=3):
        assert len({frozenset(f.attribute for f in d.facts) for d in example.documents}) == 1


def test_chunks_keep_their_length() -> None:
    least, most = EXAMPLE_CHUNK_TOKENS
    for example in examples():
        for chunk in (c for d in example.documents for c in d.chunks):
            assert 64 <= least <= count_tokens(chunk) < count_tokens(chunk + CHUNK_END) <= most + 1 == 256


def test_two_chunks_of_the_collection_never_fit_together() -> None:
    least, most = CHUNK_TOKENS
    for document in demo_collection():
        counts = [count_tokens(chunk + CHUNK_END) for chunk in document.chunks]
        assert all(64 <= count <= 128 and least <= count - 1 <= most for count in counts)
        assert all(a + b > 128 for a, b in pairwise(counts))


@pytest.mark.parametrize("task", TASKS)
def test_sixty_four_chunks_can_be_asked_about(task: str) -> None:
    example = make_example(EVAL_SEEDS[3], task=task, documents=32, chunk_tokens=(64, 110))
    assert len(example.documents) == 32
    assert len(example.context) == {"antecedent-missing": 63}.get(task, len(example.context)) >= 63


def test_no_filler_means_facts_only() -> None:
    example = make_example(EVAL_SEEDS[0], task="cross-chunk", chunk_tokens=(0, 0))
    document = example.documents[0]
    assert document.chunks[1] == " ".join(f.sentence for f in document.facts if f.chunk == 1)


def test_values_belong_to_one_attribute_and_are_no_subjects() -> None:
    values = [v for kind in ATTRIBUTES.values() for a in kind for v in a.values]
    assert all(len(a.values) == 24 for kind in ATTRIBUTES.values() for a in kind)
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
        ({"task": "cross-chunk", "chunks": 1}, "cross-chunk questions need at least 2 chunks per document, got 1"),
        ({"task": "antecedent-missing", "chunks": 1}, "at least 2 chunks per document, got 1"),
        ({"task": "two-hop", "documents": 2}, "two-hop questions need at least 3 documents, got 2"),
        ({"task": "distractors", "documents": 2}, "at least 3 documents, got 2"),
        ({"task": "comparison", "documents": 1}, "at least 2 documents, got 1"),
        ({"task": "two-hop", "kind": "person"}, "kind must be one of"),
        ({"task": "same-chunk", "documents": 0}, "at least 1 documents, got 0"),
        ({"task": "same-chunk", "documents": 25, "kind": "work"}, "documents must be 1 to 24 of one kind, got 25"),
        ({"task": "cross-chunk", "documents": 73}, "documents must be 1 to 24 of one kind, got 73"),
        ({"task": "same-chunk", "chunks": 4}, "chunks must be 1 to 3"),
        ({"task": "same-chunk", "kind": "planet"}, "kind must be one of"),
    ],
)
def test_bad_requests_are_named(world: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_example(EVAL_SEEDS[0], **world)


def test_the_tokenizer_counts_like_the_world(tokenizer: Tokenizer) -> None:
    for example in examples(chunks=3):
        text = example.question.text
        assert len(tokenizer.encode(text).ids) == count_tokens(text)
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
