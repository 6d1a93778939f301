"""Training batches: contexts of documents, several questions of every task each, blind to one another."""

import random

import torch
from torch import Tensor

from app.demo.documents import MOST_PER_KIND
from app.demo.questions import aggregation_questions, comparison_questions, questions_of, two_hop_questions
from app.demo.world import KINDS, distract, make_documents, repeat
from scripts.demo_training.layout import HEADS, Sequence, Vocabulary, chat_sequence, lay_out
from scripts.demo_training.model import AttentionTarget
from scripts.demo_training.stages import Stage

PADDING = -1
MOST_POSITIONS = 8000

# Shares of contexts and of questions in training.
CONTEXTS = {"plain": 0.3, "bridges": 0.55, "distractors": 0.15}
QUESTIONS = {"one-hop": 0.3, "two-hop": 0.4, "comparison": 0.12, "aggregation": 0.18}
REPEATED = 0.15


def training_sequence(
    vocabulary: Vocabulary,
    stage: Stage,
    rng: random.Random,
    documents: int,
    chunks: int,
    chunk_tokens: tuple[int, int],
    gap: int,
) -> Sequence:
    """One context of any form with questions of every task that it allows."""
    form = rng.choices(list(CONTEXTS), list(CONTEXTS.values()))[0] if documents > 2 else "plain"
    shape = {"documents": documents, "chunks": chunks, "chunk_tokens": chunk_tokens}
    if form == "distractors":
        made = distract(rng, kind=rng.choice(KINDS), **shape)
    else:
        mixed = form == "bridges" or documents > MOST_PER_KIND or (documents > 3 and rng.random() < 0.3)
        kind = None if mixed else rng.choice(KINDS)
        made = make_documents(rng, kind=kind, bridges=form == "bridges", **shape)
    pools = {
        "one-hop": questions_of(made, rng, wordings=stage.wordings),
        "two-hop": two_hop_questions(made, rng, wordings=stage.wordings),
        "comparison": comparison_questions(made, rng),
        "aggregation": aggregation_questions(made, rng),
    }
    for pool in pools.values():
        rng.shuffle(pool)
    questions = []
    while len(questions) < stage.questions and any(pools.values()):
        task = rng.choices(list(pools), [QUESTIONS[t] if pools[t] else 0.0 for t in pools])[0]
        questions.append(pools[task].pop())
    runs = [[(d, c) for c in range(chunks)] for d in range(documents)]
    if rng.random() < REPEATED:
        runs = repeat(rng, runs, asked=(questions[0].document, questions[0].chunk))
    context = [place for run in runs for place in run]
    return lay_out(vocabulary, made, context, questions, rng, gap)


def training_batch(vocabulary: Vocabulary, stage: Stage, seed: int) -> "Batch":
    """A batch of about `stage.rows` rows, all of one shape, from one seed."""
    rng = random.Random(seed)
    chunks = rng.randint(*stage.chunks)
    documents = rng.randint(*stage.documents)
    least, most = stage.chunk_tokens
    short = rng.randint(0, least) if rng.random() < 0.3 else least
    length = (short, max(most if short == least else short + 20, short))
    rows = documents * chunks * max(35, sum(length) // 2)
    sequences = []
    for _ in range(max(1, stage.rows // (rows + 16 * stage.questions))):
        room = max(0, MOST_POSITIONS - rows * 5 // 4) // (documents * chunks + 1)
        gap = rng.randint(0, min(stage.gap, 2 * room)) if rng.random() < 0.5 else 0
        sequences.append(training_sequence(vocabulary, stage, rng, documents, chunks, length, gap))
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
        self.label_at, self.labels = _flat([s.labels for s in lists], rows)
        self.named, self.name = _flat([s.subject for s in lists], rows)
        self.kinds, self.kind = _flat([s.attribute for s in lists], rows)
        targets = [_target(*place, [s.looks[name] for s in lists], rows) for name, place in HEADS.items()]
        self.targets = [t for t in targets if t is not None]

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
            {row(r): v for r, v in s.labels.items()},
            {n: {row(r): [row(g) for g in at] for r, at in looks.items()} for n, looks in s.looks.items()},
            {row(r): v for r, v in s.subject.items()},
            {row(r): v for r, v in s.attribute.items()},
        )

    def mask(self) -> Tensor:
        """[batch, 1, rows, rows] bool: which row sees which. Question rows see the context and their own question."""
        rows = self.ids.shape[1]
        causal = torch.ones(rows, rows, dtype=torch.bool).tril()
        block = self.block
        return ((block[:, :, None] == block[:, None, :]) | (block[:, None, :] == 0))[:, None] & causal


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
