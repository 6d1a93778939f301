"""Documents of the demo world: a subject named in the first chunk, facts by name or pronoun, filler between them."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from app.demo.filler import (
    FILLER_ADJECTIVES,
    FILLER_NOUNS,
    FILLER_SEASONS,
    FILLER_TEMPLATES,
    NAMED_OPENINGS,
    PRONOUN_FILLERS,
)
from app.demo.words import ATTRIBUTES, BRIDGES, MEN, PLACES, WOMEN, WORKS, Attribute

KINDS = ("person", "place", "work")
NOTES = "notes"

# Tokens of a chunk without its closing blank line; two neighbours never fit into 128 tokens together.
CHUNK_TOKENS = (66, 124)
FACTS_PER_CHUNK = 2
BY_PRONOUN_IN_FIRST_CHUNK = 0.3
BRIDGE_IN_LATER_CHUNK = 0.7
MOST_PER_KIND = 24
BRIDGE_NAMES = frozenset(a.name for a in BRIDGES.values())

CHUNK_END = "\n\n"
WORD_PATTERN = r"[^\W\d_]+ ?|\d{1,3} ?|(?:[^\w\s]|_)+ ?|\s+"
_WORDS = re.compile(WORD_PATTERN)
_WOMEN_SET = frozenset(WOMEN)
_SUBJECTS = {"person": WOMEN + MEN, "place": PLACES, "work": WORKS}


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
    """One document: `kind` is person, place, work or notes; the subject is named in chunk 0 only.

    Notes have no subject ("") and no facts.
    """

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

    @property
    def bridge(self) -> Fact | None:
        """The fact whose value is a person, if the document has one."""
        return next((f for f in self.facts if f.attribute in BRIDGE_NAMES), None)


def count_tokens(text: str) -> int:
    """Tokens of a text of this world: each word with the space after it is one token of the demo tokenizer."""
    return len(_WORDS.findall(text))


def subject_names() -> tuple[str, ...]:
    """Every name that a document can be about."""
    return WOMEN + MEN + PLACES + WORKS


def make_documents(
    rng: random.Random,
    *,
    documents: int,
    chunks: int = 2,
    kind: str | None = None,
    chunk_tokens: tuple[int, int] = CHUNK_TOKENS,
    bridges: bool = False,
) -> tuple[WorldDocument, ...]:
    """Documents with different subjects and, per attribute, different values.

    Args:
        rng: source of every choice.
        documents: how many, at most 24 of a kind (an attribute has 24 values).
        chunks: chunks per document, 1 to 3.
        kind: person, place or work; None mixes kinds, but every kind that occurs occurs at least twice.
        chunk_tokens: least and most tokens of a chunk. (0, 0) leaves the filler out.
        bridges: half of the documents are about persons, and each of the others (of `kind`, or of a kind that is
            drawn) names one of those persons as the value of its bridge. Needs at least 3 documents.
    """
    if not 1 <= chunks <= 3:
        raise ValueError(f"chunks must be 1 to 3, got {chunks}")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    kinds = _bridged_kinds(rng, documents, kind) if bridges else _kinds(rng, documents, kind)
    if not documents or max(kinds.count(k) for k in kinds) > MOST_PER_KIND:
        raise ValueError(f"documents must be 1 to {MOST_PER_KIND} of one kind, got {documents} ({sorted(set(kinds))})")
    rng.shuffle(kinds)
    subjects = {k: iter(rng.sample(_SUBJECTS[k], kinds.count(k))) for k in sorted(set(kinds))}
    stated = {k: rng.sample(ATTRIBUTES[k], chunks * FACTS_PER_CHUNK) for k in sorted(set(kinds))}
    values = {a.name: iter(rng.sample(a.values, kinds.count(k))) for k in stated for a in stated[k]}
    named = [next(subjects[k]) for k in kinds]
    persons = _cycle(rng, [s for s, k in zip(named, kinds, strict=True) if k == "person"]) if bridges else None
    made = []
    for subject, k in zip(named, kinds, strict=True):
        facts = [(a, next(values[a.name])) for a in stated[k]]
        facts = rng.sample(facts, len(facts))
        if persons and k != "person":
            facts = _with_bridge(rng, facts, (BRIDGES[k], next(persons)))
        made.append(_make_document(rng, subject, k, facts, chunk_tokens))
    return tuple(made)


def make_notes(
    rng: random.Random, *, documents: int, chunks: int, chunk_tokens: tuple[int, int]
) -> tuple[WorldDocument, ...]:
    """Documents of filler sentences only."""
    made = []
    for index in range(documents):
        texts = tuple(_fill(rng, [filler_sentence(rng)], [], (), chunk_tokens) for _ in range(chunks))
        made.append(WorldDocument(f"{NOTES}-{index}", f"Notes {index + 1}", "", NOTES, texts, ()))
    return tuple(made)


def _kinds(rng: random.Random, documents: int, kind: str | None) -> list[str]:
    if kind is not None:
        return [kind] * documents
    mixed = rng.sample(KINDS, min(3, max(1, documents // 2)))
    return [mixed[i % len(mixed)] for i in range(documents)]


def _bridged_kinds(rng: random.Random, documents: int, kind: str | None) -> list[str]:
    if documents < 3:
        raise ValueError(f"bridges need at least 3 documents, got {documents}")
    if kind == "person":
        raise ValueError("kind must be one of ('place', 'work') with bridges, got 'person'")
    bridged = documents // 2
    return [kind or rng.choice(("place", "work"))] * bridged + ["person"] * (documents - bridged)


def _cycle(rng: random.Random, names: list[str]) -> Iterator[str]:
    """Names in random order; never exhausted."""
    while True:
        yield from rng.sample(names, len(names))


def _with_bridge(
    rng: random.Random, facts: list[tuple[Attribute, str]], bridge: tuple[Attribute, str]
) -> list[tuple[Attribute, str]]:
    """`facts` with the bridge in place of one of them, more often in a later chunk."""
    later = len(facts) > FACTS_PER_CHUNK and rng.random() < BRIDGE_IN_LATER_CHUNK
    place = rng.randrange(FACTS_PER_CHUNK, len(facts)) if later else rng.randrange(FACTS_PER_CHUNK)
    return [*facts[:place], bridge, *facts[place + 1 :]]


def _pronoun(subject: str, kind: str) -> str:
    if kind != "person":
        return "it"
    return "she" if subject in _WOMEN_SET else "he"


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _make_document(
    rng: random.Random,
    subject: str,
    kind: str,
    facts: list[tuple[Attribute, str]],
    chunk_tokens: tuple[int, int],
) -> WorldDocument:
    """A document that states `facts` in order, FACTS_PER_CHUNK to a chunk, and names itself in chunk 0 only."""
    pronoun = _pronoun(subject, kind)
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
        asides = tuple(_capital(text.format(s=pronoun)) for text in PRONOUN_FILLERS[kind])
        chunks.append(_fill(rng, opening, sentences, asides, chunk_tokens))
    identity = f"{kind}-{subject.lower()}"
    return WorldDocument(identity, subject, subject, kind, tuple(chunks), tuple(stated))


def _fill(
    rng: random.Random,
    opening: list[str],
    facts: list[str],
    asides: tuple[str, ...],
    chunk_tokens: tuple[int, int],
) -> str:
    """Facts in order with filler and up to two asides between them, as long as a target from `chunk_tokens`."""
    least, most = chunk_tokens
    target = rng.randint(least, most)
    used = sum(count_tokens(s) for s in opening + facts)
    fillers: list[str] = []
    personal = rng.sample(asides, min(2, len(asides)))
    while used < target:
        sentence = personal.pop() if personal and rng.random() < 0.25 else filler_sentence(rng)
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


def filler_sentence(rng: random.Random) -> str:
    """A sentence about nothing that is asked."""
    noun, other = rng.sample(FILLER_NOUNS, 2)
    adjective, second = rng.sample(FILLER_ADJECTIVES, 2)
    template = rng.choice(FILLER_TEMPLATES)
    return template.format(
        noun=noun, other=other, adjective=adjective, second=second, season=rng.choice(FILLER_SEASONS)
    )
