"""A deterministic synthetic world in plain English: people, places and works with facts to ask about.

The first chunk of a document names its subject; every later chunk only says she, he or it. A question asks by
name, so a `cross-chunk` question (its fact stands in a later chunk) needs that chunk to have read an earlier one.
All documents of a kind in one context state the same attributes, so the attribute alone never gives the answer away.
Used by the demo collection, by `ragblend eval quality`, and by the training of the demo model.
"""

import random
from dataclasses import dataclass, replace

from app.demo.documents import (
    CHUNK_END,
    CHUNK_TOKENS,
    KINDS,
    NOTES,
    WorldDocument,
    count_tokens,
    make_documents,
    make_notes,
    subject_names,
)
from app.demo.questions import (
    Question,
    aggregation_questions,
    comparison_questions,
    questions_of,
    two_hop_questions,
)

__all__ = [
    "CHUNK_END",
    "CHUNK_TOKENS",
    "EVAL_SEEDS",
    "EXAMPLE_CHUNK_TOKENS",
    "KINDS",
    "NOTES",
    "SYSTEM_PREFIX",
    "TASKS",
    "TRAIN_SEEDS",
    "Example",
    "Place",
    "Question",
    "WorldDocument",
    "count_tokens",
    "demo_collection",
    "distract",
    "make_documents",
    "make_example",
    "questions_of",
    "repeat",
    "subject_names",
]

TRAIN_SEEDS = range(1 << 40)
EVAL_SEEDS = range(1 << 40, 1 << 41)
TASKS = (
    "same-chunk",
    "cross-chunk",
    "two-hop",
    "comparison",
    "aggregation",
    "distractors",
    "repeated",
    "antecedent-missing",
)
EXAMPLE_CHUNK_TOKENS = (64, 255)
SYSTEM_PREFIX = "Answer the question from the passages.\n\n"

# Documents and chunks per document that a task needs at least.
_LEAST = {
    "cross-chunk": (1, 2),
    "two-hop": (3, 1),
    "comparison": (2, 1),
    "aggregation": (2, 1),
    "distractors": (3, 1),
    "antecedent-missing": (2, 2),
}

Place = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """Documents, the chunks of them that were retrieved, and one question.

    `context` holds (document, chunk) of every retrieved chunk in prompt order. A chunk of a document may be missing
    or stand there twice; compiling always sees whole documents.
    """

    documents: tuple[WorldDocument, ...]
    question: Question
    context: tuple[Place, ...]


def make_example(
    seed: int,
    *,
    task: str,
    documents: int = 8,
    chunks: int = 2,
    kind: str | None = None,
    chunk_tokens: tuple[int, int] = EXAMPLE_CHUNK_TOKENS,
) -> Example:
    """The example of a seed: a context of `documents` x `chunks` chunks and one question of the given task.

    Use seeds of EVAL_SEEDS for evaluation; the demo model was trained on seeds of TRAIN_SEEDS only. Without `kind`
    a context of up to three documents has one kind, drawn from the seed; with bridges (two-hop) `kind` is the
    kind of their documents.

    Tasks: `same-chunk` and `cross-chunk` ask for one fact; `two-hop` for a fact of the person that another document
    names; `comparison` which of two subjects a fact is true of; `aggregation` for a fact of two subjects;
    `distractors` for one fact of a few documents among many of other kinds and of filler; `repeated` for one fact
    whose chunk, with the chunks before it, stands twice; `antecedent-missing` for a fact of a later chunk of a
    document whose first chunk was not retrieved.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}")
    least_documents, least_chunks = _LEAST.get(task, (1, 1))
    if documents < least_documents:
        raise ValueError(f"{task} questions need at least {least_documents} documents, got {documents}")
    if chunks < least_chunks:
        raise ValueError(f"{task} questions need at least {least_chunks} chunks per document, got {chunks}")
    rng = random.Random(seed)
    if task == "distractors":
        kind = kind or rng.choice(KINDS)
        made = distract(rng, kind=kind, documents=documents, chunks=chunks, chunk_tokens=chunk_tokens)
    else:
        made = make_documents(
            rng, documents=documents, chunks=chunks, kind=kind, chunk_tokens=chunk_tokens, bridges=task == "two-hop"
        )
    question = rng.choice(_candidates(made, rng, task, kind))
    runs = [[(d, c) for c in range(chunks)] for d in range(documents)]
    if task == "repeated":
        runs = repeat(rng, runs, asked=(question.document, question.chunk))
    context = tuple(item for run in runs for item in run)
    if task == "antecedent-missing":
        context = tuple(item for item in context if item != (question.document, 0))
    return Example(made, replace(question, task=task), context)


def distract(
    rng: random.Random, *, kind: str, documents: int, chunks: int, chunk_tokens: tuple[int, int]
) -> tuple[WorldDocument, ...]:
    """A quarter of the documents (at least two) is of `kind`; among them stand documents of another kind and notes."""
    relevant = max(2, documents // 4)
    others = (documents - relevant) // 2
    made = make_documents(rng, documents=relevant, kind=kind, chunks=chunks, chunk_tokens=chunk_tokens)
    if others:
        other = rng.choice([k for k in KINDS if k != kind])
        made += make_documents(rng, documents=others, kind=other, chunks=chunks, chunk_tokens=chunk_tokens)
    made += make_notes(rng, documents=documents - len(made), chunks=chunks, chunk_tokens=chunk_tokens)
    return tuple(rng.sample(made, len(made)))


def repeat(rng: random.Random, runs: list[list[Place]], *, asked: Place) -> list[list[Place]]:
    """`runs` (the chunks of each document) with the asked chunk and those of a quarter of the documents twice.

    A chunk is repeated right behind itself, or elsewhere together with the chunks of its document before it, so that
    a pronoun still means its own subject.
    """
    others = [d for d in range(len(runs)) if d != asked[0]]
    chosen = [asked] + [rng.choice(runs[d]) for d in rng.sample(others, len(others) // 4)]
    runs = [list(run) for run in runs]
    moved = []
    for document, chunk in chosen:
        if rng.random() < 0.5:
            runs[document].insert(chunk, (document, chunk))
        else:
            moved.append([(document, c) for c in range(chunk + 1)])
    for run in moved:
        runs.insert(rng.randint(0, len(runs)), run)
    return runs


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


def _candidates(made: tuple[WorldDocument, ...], rng: random.Random, task: str, kind: str | None) -> list[Question]:
    """The questions that the task may ask."""
    if task == "two-hop":
        return two_hop_questions(made, rng)
    if task == "comparison":
        return comparison_questions(made, rng)
    if task == "aggregation":
        return aggregation_questions(made, rng)
    single = questions_of(made, rng)
    if task == "distractors":
        return [q for q in single if made[q.document].kind == kind]
    if task in ("same-chunk", "cross-chunk"):
        return [q for q in single if q.task == task]
    return single if task == "repeated" else [q for q in single if q.chunk > 0]
