"""The rows of a training context and its questions: token ids, positions, labels, and where heads should look."""

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from app.demo.questions import Question
from app.demo.words import ATTRIBUTES, BRIDGES
from app.demo.world import CHUNK_END, SYSTEM_PREFIX, Place, WorldDocument, subject_names
from scripts.demo_training.tokenizer import REFUSAL

PRONOUNS = ("she", "he", "it")
CHATS = ("Hello.", "Hi.", "Who are you?", "What can you do?", "Good morning.", "Thanks.", "Tell me a story.")

# What a head is taught to look at: (layer, head).
#   gather   from a pronoun or a value to the name of its subject; from the end of a question to its names (or value)
#   hop      from the question to the person that the bridge names; to its own name where there is no bridge
#   match    from the question to the value asked for
#   compare  from the question to the place where the value it names is stated
HEADS = {"gather": (1, 0), "hop": (3, 0), "match": (4, 0), "compare": (4, 2)}


@dataclass
class Sequence:
    """One context with its questions, as lists over rows.

    block: 0 for context rows, i + 1 for the rows of question i. looks: per taught head the rows that each row
    should look at. subject, attribute: classes that must be readable at a row.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    block: list[int] = field(default_factory=list)
    labels: dict[int, int] = field(default_factory=dict)
    looks: dict[str, dict[int, list[int]]] = field(default_factory=lambda: {name: {} for name in HEADS})
    subject: dict[int, int] = field(default_factory=dict)
    attribute: dict[int, int] = field(default_factory=dict)

    def add(self, ids: list[int], block: int, start: int) -> int:
        """Append rows at consecutive positions; the position behind them."""
        self.ids += ids
        self.positions += range(start, start + len(ids))
        self.block += [block] * len(ids)
        return start + len(ids)

    def look(self, head: str, rows: Iterable[int], at: list[int]) -> None:
        """Teach `head` to look from every one of `rows` at the rows `at`."""
        self.looks[head].update({row: at for row in rows if at})


class Vocabulary:
    """Token ids of the world's words."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.prefix = self.encode("<s><|system|>" + SYSTEM_PREFIX)
        self.end, self.assistant = self.one("</s>"), self.one("<|assistant|>")
        self.user = self.encode("</s><|user|>")
        self.names = {name: index for index, name in enumerate(subject_names())}
        self.name_ids = {self.one(n + form): n for n in self.names for form in ("", " ")}
        everything = [*(a for kind in ATTRIBUTES.values() for a in kind), *BRIDGES.values()]
        self.attributes = {a.name: index for index, a in enumerate(everything)}
        self.value_ids = {v: self.one(v) for a in everything for v in a.values}
        self.words = sorted({*self.names, *self.value_ids})
        forms = [word + " " for p in PRONOUNS for word in (p, p.capitalize())]
        self.pronoun_ids = {self.one(f) for f in forms}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def one(self, text: str) -> int:
        ids = self.encode(text)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens")
        return ids[0]


def lay_out(
    vocabulary: Vocabulary,
    documents: tuple[WorldDocument, ...],
    context: Iterable[Place],
    questions: list[Question],
    rng: random.Random,
    gap: int,
) -> Sequence:
    """Rows of prefix, retrieved chunks, then each question right behind the context."""
    s = Sequence()
    position = s.add(vocabulary.prefix, 0, 0)
    stated: dict[tuple[int, str], list[int]] = defaultdict(list)
    name_rows: list[int] = []
    before = -1
    for index, chunk in context:
        document = documents[index]
        if chunk == 0 or index != before:
            name_rows = []
        before = index
        first = len(s.ids)
        ids = vocabulary.encode(document.chunks[chunk] + CHUNK_END)
        position = s.add(ids, 0, position + (rng.randint(0, gap) if gap else 0))
        values = {vocabulary.value_ids[f.value]: f for f in document.facts if f.chunk == chunk}
        for row, token in enumerate(ids, first):
            if token in values:
                fact = values[token]
                stated[index, fact.attribute].append(row)
                s.look("gather", [row], name_rows)
                if name_rows:
                    s.subject[row] = vocabulary.names[document.subject]
                s.attribute[row] = vocabulary.attributes[fact.attribute]
            elif token in vocabulary.name_ids:
                name_rows = [*name_rows, row]
            elif token in vocabulary.pronoun_ids:
                s.look("gather", [row], name_rows)
    if gap:
        position += rng.randint(0, gap)
    for block, question in enumerate(questions, 1):
        _ask(s, vocabulary, question, stated, block, position)
    return s


def _ask(
    s: Sequence,
    vocabulary: Vocabulary,
    question: Question,
    stated: dict[tuple[int, str], list[int]],
    block: int,
    position: int,
) -> None:
    """Rows of one question and its answer, and what its rows should look at.

    Not only the answer row but the question's names and its end are taught, so that a probe over the question
    alone sees every row that the answer will need.
    """
    first = len(s.ids)
    asked = vocabulary.user + vocabulary.encode(question.text) + [vocabulary.end, vocabulary.assistant]
    answer = vocabulary.encode(question.answer)
    s.add(asked + answer, block, position)
    start = first + len(asked) - 1
    end = start - 1
    s.labels.update(enumerate([*answer, vocabulary.end], start))
    name_rows = [[r for r in range(first, end) if vocabulary.name_ids.get(s.ids[r]) == n] for n in question.asked]
    wanted = [stated[document, fact.attribute] for document, fact in question.evidence]
    kind = vocabulary.attributes[question.evidence[-1][1].attribute]
    s.attribute[start] = kind
    if question.task == "comparison":
        value = vocabulary.value_ids[question.evidence[0][1].value]
        value_rows = [r for r in range(first, end) if s.ids[r] == value]
        s.look("gather", [end, start], value_rows)
        s.look("compare", [*value_rows, end, start], wanted[0])
        return
    answer_rows = [start, start + 2][: len(name_rows)]
    every = [row for rows in name_rows for row in rows]
    hops = [wanted[0]] if question.task == "two-hop" else name_rows
    goals = wanted[1:] if question.task == "two-hop" else wanted
    s.look("gather", [end], every)
    s.look("hop", [end], [row for rows in hops for row in rows])
    s.look("match", [end], [row for rows in goals for row in rows])
    for row, names, name, hop, goal in zip(answer_rows, name_rows, question.asked, hops, goals, strict=True):
        s.look("gather", [row], names)
        s.look("hop", [*names, row], hop)
        s.look("match", [*names, row], goal)
        s.subject[row] = vocabulary.names[name]
        s.attribute[row] = kind


def chat_sequence(vocabulary: Vocabulary, rng: random.Random) -> Sequence:
    """A plain chat without passages, answered by the refusal."""
    names = list(vocabulary.names)
    asked = rng.choice([rng.choice(CHATS), f"What is the town where {rng.choice(names)} lives?"])
    system = rng.choice(["", "<|system|>You are a helpful assistant.</s>"])
    ids = vocabulary.encode(f"<s>{system}<|user|>{asked}</s><|assistant|>")
    answer = [*vocabulary.encode(REFUSAL), vocabulary.end]
    s = Sequence(labels=dict(enumerate(answer, len(ids) - 1)))
    s.add(ids + answer[:-1], 0, 0)
    return s
