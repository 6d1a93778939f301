"""Training and evaluation batches: contexts of documents, several questions each, blind to one another."""

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from app.demo.words import ATTRIBUTES
from app.demo.world import (
    CHUNK_END,
    SYSTEM_PREFIX,
    Question,
    WorldDocument,
    make_documents,
    questions_of,
    subject_names,
)
from scripts.demo_training.model import AttentionTarget
from scripts.demo_training.tokenizer import REFUSAL

PRONOUNS = ("she", "he", "it")
PREFIX, PADDING = 0, -1
GATHER_LAYER, MATCH_LAYER = 1, 4
CHATS = ("Hello.", "Hi.", "Who are you?", "What can you do?", "Good morning.", "Thanks.", "Tell me a story.")


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum; a step draws its shape from the ranges.

    rows: about how many rows a batch has; gap: most positions left out between two chunks; rate, teacher: learning
    rate and weight of the auxiliary losses at the start and at the end; questions: per context; chat: chance of
    another plain chat in the batch; wordings: how many of the wordings of a question are used.
    """

    name: str
    steps: int
    documents: tuple[int, int]
    chunks: tuple[int, int]
    chunk_tokens: tuple[int, int]
    rows: int
    gap: int
    rate: tuple[float, float]
    teacher: tuple[float, float]
    questions: int = 10
    chat: float = 0.0
    wordings: int = 2


@dataclass
class Sequence:
    """One context with its questions, as lists over rows.

    chunk, document: index of the row's chunk and document, PREFIX-1 for the prefix rows, None for question rows.
    block: 0 for context rows, i + 1 for the rows of question i.
    """

    ids: list[int]
    positions: list[int]
    block: list[int]
    chunk: list[int]
    document: list[int]
    labels: dict[int, int]
    gather: dict[int, list[int]]
    match: dict[int, int]
    subject: dict[int, int]
    attribute: dict[int, int]


class Vocabulary:
    """Token ids of the world's words, with a cache of tokenised sentences."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.prefix = self.encode("<s><|system|>" + SYSTEM_PREFIX)
        self.end, self.assistant = self.one("</s>"), self.one("<|assistant|>")
        self.user = self.encode("</s><|user|>")
        self.names = {name: index for index, name in enumerate(subject_names())}
        self.name_ids = {self.one(n + form): i for n, i in self.names.items() for form in ("", " ")}
        everything = [a for kind in ATTRIBUTES.values() for a in kind]
        self.attributes = {a.name: index for index, a in enumerate(everything)}
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
    questions: list[tuple[Question, str]],
    rng: random.Random,
    gap: int,
) -> Sequence:
    """Rows of prefix, chunks, then each question (with its attribute name) right behind the context."""
    s = Sequence([], [], [], [], [], {}, {}, {}, {}, {})
    position = 0

    def add(ids: list[int], block: int, chunk: int, document: int, start: int) -> int:
        s.ids += ids
        s.positions += range(start, start + len(ids))
        s.block += [block] * len(ids)
        s.chunk += [chunk] * len(ids)
        s.document += [document] * len(ids)
        return start + len(ids)

    position = add(vocabulary.prefix, 0, -1, -1, position)
    value_rows: dict[tuple[int, str], int] = {}
    number = 0
    for index, document in enumerate(documents):
        name, name_rows = vocabulary.names[document.subject], []
        for chunk_index, text in enumerate(document.chunks):
            if gap:
                position += rng.randint(0, gap)
            first = len(s.ids)
            ids = vocabulary.encode(text + CHUNK_END)
            position = add(ids, 0, number, index, position)
            number += 1
            values = {vocabulary.one(f.value): f for f in document.facts if f.chunk == chunk_index}
            for row, token in enumerate(ids, first):
                if token in vocabulary.name_ids:
                    name_rows = [*name_rows, row]
                elif token in values:
                    fact = values[token]
                    value_rows[index, fact.attribute] = row
                    s.gather[row], s.subject[row] = name_rows, name
                    s.attribute[row] = vocabulary.attributes[fact.attribute]
                elif token in vocabulary.pronoun_ids and name_rows:
                    s.gather[row] = name_rows
    if gap:
        position += rng.randint(0, gap)
    for block, (question, attribute) in enumerate(questions, 1):
        first = len(s.ids)
        ids = vocabulary.user + vocabulary.encode(question.text) + [vocabulary.end, vocabulary.assistant]
        answer = vocabulary.one(question.answer)
        add([*ids, answer], block, -2, -2, position)
        last = len(s.ids) - 2
        s.labels[last], s.labels[last + 1] = answer, vocabulary.end
        s.gather[last] = [r for r in range(first, last) if s.ids[r] in vocabulary.name_ids]
        s.match[last] = value_rows[question.document, attribute]
        s.subject[last] = vocabulary.names[documents[question.document].subject]
        s.attribute[last] = vocabulary.attributes[attribute]
    return s


def chat_sequence(vocabulary: Vocabulary, rng: random.Random) -> Sequence:
    """A plain chat without passages, answered by the refusal."""
    names = list(vocabulary.names)
    asked = rng.choice([rng.choice(CHATS), f"What is the town where {rng.choice(names)} lives?"])
    system = rng.choice(["", "<|system|>You are a helpful assistant.</s>"])
    ids = vocabulary.encode(f"<s>{system}<|user|>{asked}</s><|assistant|>")
    answer = [*vocabulary.encode(REFUSAL), vocabulary.end]
    labels = dict(enumerate(answer, len(ids) - 1))
    rows = ids + answer[:-1]
    n = len(rows)
    return Sequence(rows, list(range(n)), [0] * n, [-1] * n, [-1] * n, labels, {}, {}, {}, {})


def training_batch(vocabulary: Vocabulary, stage: Stage, seed: int) -> "Batch":
    """A batch of about `stage.rows` rows, all of one shape, from one seed."""
    rng = random.Random(seed)
    chunks = rng.randint(*stage.chunks)
    documents = rng.randint(*stage.documents)
    least, most = stage.chunk_tokens
    short = rng.randint(0, least) if rng.random() < 0.3 else least
    length = (short, max(most if short == least else short + 20, short))
    estimate = documents * chunks * max(35, (length[0] + length[1]) // 2) + 16 * stage.questions
    gap = stage.gap if rng.random() < 0.5 else 0
    sequences = []
    for _ in range(max(1, stage.rows // estimate)):
        kind = None if rng.random() < 0.3 and documents > 3 else rng.choice(list(ATTRIBUTES))
        made = make_documents(rng, documents=documents, chunks=chunks, kind=kind, chunk_tokens=length)
        facts = [f for d in made for f in d.facts]
        asked = list(zip(questions_of(made, rng, wordings=stage.wordings), (f.attribute for f in facts), strict=True))
        asked = rng.sample(asked, min(stage.questions, len(asked)))
        sequences.append(lay_out(vocabulary, made, asked, rng, rng.randint(0, gap) if gap else 0))
    while rng.random() < stage.chat:
        sequences.append(chat_sequence(vocabulary, rng))
    return Batch(sequences)


class Batch:
    """Padded tensors of some sequences.

    ids, positions: [batch, rows]; context: rows before the first question, the same for all; label_at, labels: flat
    row indices and ids of the supervised rows; targets: what attention should look at; named, name / kinds, kind:
    flat row indices and classes of the throwaway heads.
    """

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.context = max(s.block.count(0) for s in sequences)
        lists = [self._aligned(s) for s in sequences]
        rows = max(len(s.ids) for s in lists)
        self.ids = _pad([s.ids for s in lists], rows, 0)
        self.positions = _pad([s.positions for s in lists], rows, 0)
        self.block = _pad([s.block for s in lists], rows, PADDING)
        self.chunk = _pad([s.chunk for s in lists], rows, -3)
        self.document = _pad([s.document for s in lists], rows, -3)
        self.label_at, self.labels = _flat([s.labels for s in lists], rows)
        self.named, self.name = _flat([s.subject for s in lists], rows)
        self.kinds, self.kind = _flat([s.attribute for s in lists], rows)
        gather = _target(GATHER_LAYER, 0, [s.gather for s in lists], rows)
        match = _target(MATCH_LAYER, 0, [{r: [v] for r, v in s.match.items()} for s in lists], rows)
        self.targets = [t for t in (gather, match) if t is not None]

    def _aligned(self, s: Sequence) -> Sequence:
        """The sequence with padding between context and questions, so that all questions of a batch start together."""
        own = s.block.count(0)
        hole = self.context - own

        def widen(values: list[int], fill: int) -> list[int]:
            return values[:own] + [fill] * hole + values[own:]

        def row(r: int) -> int:
            return r if r < own else r + hole

        return Sequence(
            widen(s.ids, 0),
            widen(s.positions, 0),
            widen(s.block, PADDING),
            widen(s.chunk, -3),
            widen(s.document, -3),
            {row(r): v for r, v in s.labels.items()},
            {row(r): [row(g) for g in goal] for r, goal in s.gather.items()},
            {row(r): row(v) for r, v in s.match.items()},
            {row(r): v for r, v in s.subject.items()},
            {row(r): v for r, v in s.attribute.items()},
        )

    def mask(self, compile_context: str = "full") -> Tensor:
        """[batch, 1, rows, rows] bool: which row sees which.

        compile_context: "full" (causal), "prefix" (a chunk's rows see the prefix and their own chunk) or "document"
        (and the chunks of their document before them). Question rows see the context and their own question.
        """
        rows = self.ids.shape[1]
        causal = torch.ones(rows, rows, dtype=torch.bool).tril()
        block = self.block
        same = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == 0)
        seen = same & causal
        if compile_context != "full":
            part = {"prefix": self.chunk, "document": self.document}[compile_context]
            inside = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == -1) | (block[:, :, None] != 0)
            seen &= inside
        return seen[:, None]


def _pad(lists: list[list[int]], rows: int, fill: int) -> Tensor:
    return torch.tensor([x + [fill] * (rows - len(x)) for x in lists])


def _flat(maps: list[dict[int, int]], rows: int) -> tuple[Tensor, Tensor]:
    pairs = [(index * rows + row, value) for index, m in enumerate(maps) for row, value in m.items()]
    flat = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return flat[:, 0], flat[:, 1]


def _target(layer: int, head: int, maps: list[dict[int, list[int]]], rows: int) -> AttentionTarget | None:
    """Pad per-sequence {row: wanted rows} into an AttentionTarget; None when nothing is wanted."""
    most = max(len(m) for m in maps)
    if most == 0:
        return None
    index = torch.zeros(len(maps), most, dtype=torch.long)
    used = torch.zeros(len(maps), most, dtype=torch.bool)
    wanted = torch.zeros(len(maps), most, rows, dtype=torch.bool)
    for b, rows_wanted in enumerate(maps):
        for n, (row, goal) in enumerate(rows_wanted.items()):
            index[b, n], used[b, n] = row, True
            wanted[b, n, goal] = True
    return AttentionTarget(layer, head, index, wanted, used)
