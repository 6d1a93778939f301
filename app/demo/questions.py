"""Questions about documents of the demo world, each with its answer and the facts that it needs."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from app.demo.documents import BRIDGE_NAMES, Fact, WorldDocument
from app.demo.words import ATTRIBUTES, BRIDGES

_BY_NAME = {a.name: a for a in (*(a for kind in ATTRIBUTES.values() for a in kind), *BRIDGES.values())}


@dataclass(frozen=True)
class Question:
    """A question by name and its exact answer; the fact that is asked for stands in chunk `chunk` of `document`.

    `evidence` are the facts to be read, in order, each with the index of its document: one, or the bridge and the
    fact behind it, or the facts of two subjects. `asked` are the subjects that the question names.
    """

    text: str
    answer: str
    task: str
    document: int
    chunk: int
    asked: tuple[str, ...]
    evidence: tuple[tuple[int, Fact], ...]


def questions_of(documents: Sequence[WorldDocument], rng: random.Random, *, wordings: int | None = 3) -> list[Question]:
    """One question for every fact of every document, in document order, in one of its first `wordings` wordings."""
    questions = []
    for index, document in enumerate(documents):
        for fact in document.facts:
            text = rng.choice(_BY_NAME[fact.attribute].wordings[:wordings]).format(s=document.subject)
            task = "same-chunk" if fact.chunk == 0 else "cross-chunk"
            asked = (document.subject,)
            questions.append(Question(text, fact.value, task, index, fact.chunk, asked, ((index, fact),)))
    return questions


def two_hop_questions(
    documents: Sequence[WorldDocument], rng: random.Random, *, wordings: int | None = 3
) -> list[Question]:
    """One question for every bridge and every fact of the person it leads to."""
    persons = {d.subject: (i, d) for i, d in enumerate(documents) if d.kind == "person"}
    questions = []
    for index, document in enumerate(documents):
        bridge = document.bridge
        if bridge is None:
            continue
        second, person = persons[bridge.value]
        subject = f"the {bridge.attribute} of {document.subject}"
        for fact in person.facts:
            text = rng.choice(_BY_NAME[fact.attribute].wordings[:wordings]).format(s=subject)
            evidence = ((index, bridge), (second, fact))
            asked = (document.subject,)
            questions.append(Question(text, fact.value, "two-hop", second, fact.chunk, asked, evidence))
    return questions


def comparison_questions(documents: Sequence[WorldDocument], rng: random.Random) -> list[Question]:
    """For every fact but bridges: which of its subject and another one of the same kind it is true of."""
    questions = []
    for index, fact, _, other in _pairs(documents, rng):
        subject = documents[index].subject
        asked = tuple(rng.sample((subject, documents[other].subject), 2))
        predicate = _BY_NAME[fact.attribute].predicate.format(v=fact.value)
        text = f"Which of {asked[0]} and {asked[1]} {predicate}?"
        questions.append(Question(text, subject, "comparison", index, fact.chunk, asked, ((index, fact),)))
    return questions


def aggregation_questions(documents: Sequence[WorldDocument], rng: random.Random) -> list[Question]:
    """For every fact but bridges: its value and that of another subject of the same kind, in the order asked."""
    questions = []
    for index, fact, same, other in _pairs(documents, rng):
        asked = (documents[index].subject, documents[other].subject)
        text = _BY_NAME[fact.attribute].plural.format(s=" and ".join(asked))
        answer = f"{fact.value}, {same.value}"
        evidence = ((index, fact), (other, same))
        questions.append(Question(text, answer, "aggregation", index, fact.chunk, asked, evidence))
    return questions


def _pairs(documents: Sequence[WorldDocument], rng: random.Random) -> Iterator[tuple[int, Fact, Fact, int]]:
    """Every fact with the fact of the same attribute of another document: (document, fact, other fact, other).

    Bridges are left out: as their value is a name, the question would name three.
    """
    stated = [{f.attribute: f for f in d.facts if f.attribute not in BRIDGE_NAMES} for d in documents]
    for index, facts in enumerate(stated):
        for name, fact in facts.items():
            others = [i for i, known in enumerate(stated) if i != index and name in known]
            if others:
                other = rng.choice(others)
                yield index, fact, stated[other][name], other
