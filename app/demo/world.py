"""A deterministic synthetic world in plain English: people, places and works with facts to ask about.

The first chunk of a document names its subject; every later chunk only says she, he or it. A question asks by
name, so a `cross-chunk` question (its fact stands in a later chunk) needs that chunk to have read an earlier one.
All documents of one context state the same attributes, so the attribute alone never gives the answer away.
Used by the demo collection, by `ragblend eval quality`, and by the training of the demo model.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from app.demo.words import (
    ATTRIBUTES,
    FILLER_ADJECTIVES,
    FILLER_NOUNS,
    FILLER_SEASONS,
    FILLER_TEMPLATES,
    MEN,
    NAMED_OPENINGS,
    PLACES,
    PRONOUN_FILLERS,
    WOMEN,
    WORKS,
    Attribute,
)

TRAIN_SEEDS = range(1 << 40)
EVAL_SEEDS = range(1 << 40, 1 << 41)
TASKS = ("same-chunk", "cross-chunk")
KINDS = ("person", "place", "work")

# Tokens of a chunk without its closing blank line; two neighbours never fit into 128 tokens together.
CHUNK_TOKENS = (66, 124)
FACTS_PER_CHUNK = 2
BY_PRONOUN_IN_FIRST_CHUNK = 0.3

SYSTEM_PREFIX = "Answer the question from the passages.\n\n"
CHUNK_END = "\n\n"
WORD_PATTERN = r"[^\W\d_]+ ?|\d{1,3} ?|(?:[^\w\s]|_)+ ?|\s+"
_WORDS = re.compile(WORD_PATTERN)


@dataclass(frozen=True)
class Fact:
    """One stated fact; `chunk` is the index of the stating chunk in its document."""

    attribute: str
    value: str
    sentence: str
    by_name: bool
    chunk: int


@dataclass(frozen=True)
class WorldDocument:
    """One document: `kind` is person, place or work; the subject is named in chunk 0 only."""

    id: str
    title: str
    subject: str
    kind: str
    chunks: tuple[str, ...]
    facts: tuple[Fact, ...]

    @property
    def text(self) -> str:
        """The whole document, chunks separated by blank lines."""
        return CHUNK_END.join(self.chunks)


@dataclass(frozen=True)
class Question:
    """A question by name; the fact stands in chunk `chunk` of document `document`."""

    text: str
    answer: str
    task: str
    document: int
    chunk: int


@dataclass(frozen=True)
class Example:
    """A context of documents (chunks in reading order) and one question about it."""

    documents: tuple[WorldDocument, ...]
    question: Question


def count_tokens(text: str) -> int:
    """Tokens of a text of this world: each word with the space after it is one token of the demo tokenizer."""
    return len(_WORDS.findall(text))


def make_documents(
    rng: random.Random,
    *,
    documents: int,
    chunks: int = 2,
    kind: str | None = None,
    chunk_tokens: tuple[int, int] = CHUNK_TOKENS,
) -> tuple[WorldDocument, ...]:
    """Documents with different subjects and, per attribute, different values.

    Args:
        rng: source of every choice.
        documents: how many, at most 24 (each attribute has 24 values).
        chunks: chunks per document, 1 to 3.
        kind: person, place or work; None mixes kinds, but every kind that occurs occurs at least twice.
        chunk_tokens: least and most tokens of a chunk. (0, 0) leaves the filler out.
    """
    if not 1 <= documents <= 24:
        raise ValueError(f"documents must be 1 to 24, got {documents}")
    if not 1 <= chunks <= 3:
        raise ValueError(f"chunks must be 1 to 3, got {chunks}")
    if kind is None:
        mixed = rng.sample(KINDS, min(3, max(1, documents // 2)))
        kinds = [mixed[i % len(mixed)] for i in range(documents)]
    elif kind in KINDS:
        kinds = [kind] * documents
    else:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    rng.shuffle(kinds)
    subjects = {k: iter(rng.sample(_subjects(k), kinds.count(k))) for k in sorted(set(kinds))}
    stated = {k: rng.sample(ATTRIBUTES[k], chunks * FACTS_PER_CHUNK) for k in sorted(set(kinds))}
    values = {a.name: iter(rng.sample(a.values, documents)) for k in stated for a in stated[k]}
    return tuple(
        _make_document(rng, next(subjects[k]), k, [(a, next(values[a.name])) for a in stated[k]], chunk_tokens)
        for k in kinds
    )


def questions_of(documents: Sequence[WorldDocument], rng: random.Random, *, wordings: int | None = 3) -> list[Question]:
    """One question for every fact of every document, in document order, in one of its first `wordings` wordings."""
    questions = []
    for index, document in enumerate(documents):
        asking = {a.name: a.wordings[:wordings] for a in ATTRIBUTES[document.kind]}
        for fact in document.facts:
            text = rng.choice(asking[fact.attribute]).format(s=document.subject)
            task = TASKS[0] if fact.chunk == 0 else TASKS[1]
            questions.append(Question(text, fact.value, task, index, fact.chunk))
    return questions


def make_example(
    seed: int,
    *,
    documents: int = 3,
    task: str,
    chunks: int = 2,
    kind: str | None = None,
    chunk_tokens: tuple[int, int] = CHUNK_TOKENS,
) -> Example:
    """The example of a seed: a context of `documents` x `chunks` chunks and one question of the given task.

    Use seeds of EVAL_SEEDS for evaluation; the demo model was trained on seeds of TRAIN_SEEDS only. Without `kind`
    a context of up to three documents has one kind, drawn from the seed.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}")
    if task == TASKS[1] and chunks < 2:
        raise ValueError("cross-chunk questions need at least 2 chunks per document")
    rng = random.Random(seed)
    made = make_documents(rng, documents=documents, chunks=chunks, kind=kind, chunk_tokens=chunk_tokens)
    question = rng.choice([q for q in questions_of(made, rng) if q.task == task])
    return Example(made, question)


def demo_collection(*, seed: int = 7, pairs_per_kind: int = 3) -> list[WorldDocument]:
    """The documents of the README demo: pairs of people, places and works, no subject and no value twice.

    The two documents of a pair state the same attributes; other pairs state others, so that a search for an
    attribute finds a few documents instead of all.
    """
    rng = random.Random(EVAL_SEEDS.start + seed)
    collection: list[WorldDocument] = []
    taken: set[str] = set()
    while len(collection) < 2 * pairs_per_kind * len(KINDS):
        pair = make_documents(rng, documents=2, kind=KINDS[len(collection) // (2 * pairs_per_kind)])
        words = {d.subject for d in pair} | {f.value for d in pair for f in d.facts}
        if not words & taken:
            taken |= words
            collection += pair
    return collection


def subject_names() -> tuple[str, ...]:
    """Every name that a document can be about."""
    return WOMEN + MEN + PLACES + WORKS


def _subjects(kind: str) -> tuple[str, ...]:
    return {"person": WOMEN + MEN, "place": PLACES, "work": WORKS}[kind]


def _pronoun(subject: str, kind: str) -> str:
    if kind != "person":
        return "it"
    return "she" if subject in _WOMEN_SET else "he"


_WOMEN_SET = frozenset(WOMEN)


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _make_document(
    rng: random.Random,
    subject: str,
    kind: str,
    facts: list[tuple[Attribute, str]],
    chunk_tokens: tuple[int, int],
) -> WorldDocument:
    """A document that states `facts` in random order, FACTS_PER_CHUNK to a chunk, and names itself in chunk 0 only."""
    pronoun = _pronoun(subject, kind)
    facts = rng.sample(facts, len(facts))
    chunks, stated = [], []
    for start in range(0, len(facts), FACTS_PER_CHUNK):
        chunk = start // FACTS_PER_CHUNK
        sentences = []
        for attribute, value in facts[start : start + FACTS_PER_CHUNK]:
            by_name = chunk == 0 and rng.random() >= BY_PRONOUN_IN_FIRST_CHUNK
            wording = rng.choice(attribute.statements)
            sentence = _capital(wording.format(s=subject if by_name else pronoun, v=value))
            sentences.append(sentence)
            stated.append(Fact(attribute.name, value, sentence, by_name, chunk))
        opening = [rng.choice(NAMED_OPENINGS[kind]).format(s=subject)] if chunk == 0 else []
        chunks.append(_fill(rng, opening, sentences, kind, pronoun, chunk_tokens))
    identity = f"{kind}-{subject.lower()}"
    return WorldDocument(identity, subject, subject, kind, tuple(chunks), tuple(stated))


def _fill(
    rng: random.Random,
    opening: list[str],
    facts: list[str],
    kind: str,
    pronoun: str,
    chunk_tokens: tuple[int, int],
) -> str:
    """Facts in order with filler sentences between them, as long as a target drawn from `chunk_tokens`."""
    least, most = chunk_tokens
    target = rng.randint(least, most)
    used = sum(count_tokens(s) for s in opening + facts)
    fillers: list[str] = []
    personal = rng.sample(PRONOUN_FILLERS[kind], 2)
    while used < target:
        if personal and rng.random() < 0.25:
            sentence = _capital(personal.pop().format(s=pronoun))
        else:
            sentence = _filler(rng)
        length = count_tokens(sentence)
        if used + length > most:
            break
        fillers.append(sentence)
        used += length
    body = fillers + facts
    places = sorted(rng.sample(range(len(body)), len(facts)))
    rest, told = iter(fillers), iter(facts)
    body = [next(told) if i in places else next(rest) for i in range(len(body))]
    return " ".join(opening + body)


def _filler(rng: random.Random) -> str:
    """A sentence about nothing that is asked."""
    noun, other = rng.sample(FILLER_NOUNS, 2)
    adjective, second = rng.sample(FILLER_ADJECTIVES, 2)
    template = rng.choice(FILLER_TEMPLATES)
    return template.format(
        noun=noun, other=other, adjective=adjective, second=second, season=rng.choice(FILLER_SEASONS)
    )
