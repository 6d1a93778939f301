"""The curriculum: short contexts without filler, then filled ones, then long ones; the teacher fades."""

from dataclasses import dataclass

NO_FILLER = (0, 0)
FILLED = (64, 160)


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
    questions: int = 16
    chat: float = 0.0
    wordings: int = 2


STAGES = (
    Stage(
        name="short",
        steps=500,
        documents=(3, 5),
        chunks=(2, 2),
        chunk_tokens=NO_FILLER,
        rows=8000,
        gap=0,
        rate=(2e-3, 2e-3),
        teacher=(1.0, 0.8),
    ),
    Stage(
        name="filled",
        steps=300,
        documents=(3, 7),
        chunks=(2, 3),
        chunk_tokens=(64, 160),
        rows=9000,
        gap=400,
        rate=(2e-3, 1.6e-3),
        teacher=(0.7, 0.5),
        questions=20,
    ),
    Stage(
        name="long",
        steps=350,
        documents=(3, 9),
        chunks=(2, 3),
        chunk_tokens=(64, 255),
        rows=8500,
        gap=800,
        rate=(1.5e-3, 5e-4),
        teacher=(0.4, 0.15),
        questions=24,
        chat=0.2,
        wordings=4,
    ),
    Stage(
        name="longest",
        steps=200,
        documents=(3, 32),
        chunks=(2, 2),
        chunk_tokens=(64, 160),
        rows=8500,
        gap=800,
        rate=(5e-4, 1e-5),
        teacher=(0.15, 0.0),
        questions=24,
        chat=0.3,
        wordings=4,
    ),
)
