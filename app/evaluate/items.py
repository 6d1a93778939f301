"""What is asked: an item is one question with its passages; a source gives the items of a task by index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from app.demo.world import EVAL_SEEDS, make_example
from app.evaluate.errors import EvaluationError
from app.evaluate.styles import SERVICE, Style


@dataclass(frozen=True)
class Item:
    """One question. ``question`` and ``documents`` are written as they stand in the prompt.

    ``documents`` holds the chunks of whole documents, in reading order; ``context`` is (document, chunk) of what was
    retrieved, in prompt order: a chunk may be missing there or stand there twice. ``where`` is its name in errors.
    """

    question: str
    answers: tuple[str, ...]
    documents: tuple[tuple[str, ...], ...]
    context: tuple[tuple[int, int], ...]
    where: str


class Source(Protocol):
    """Where questions come from. ``identity`` says which ones: results of equal identity may be merged."""

    @property
    def style(self) -> Style: ...

    @property
    def tasks(self) -> tuple[str, ...]: ...

    @property
    def size(self) -> int | None:
        """Questions of each task, None if there is no end."""
        ...

    @property
    def identity(self) -> dict[str, Any]: ...

    def item(self, task: str, index: int) -> Item: ...


@dataclass(frozen=True)
class Generated:
    """Held-out questions of the demo world. One index has the same documents in all tasks that can share them."""

    tasks: tuple[str, ...]
    seed: int
    documents: int
    chunks: int
    chunk_tokens: tuple[int, int]
    style: Style = SERVICE
    size: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "documents": self.documents,
            "chunks": self.chunks,
            "chunk_tokens": list(self.chunk_tokens),
        }

    def item(self, task: str, index: int) -> Item:
        """Raises ``EvaluationError`` if the task cannot be asked of so few (or so many) documents."""
        try:
            example = make_example(
                EVAL_SEEDS.start + self.seed * 1_000_000 + index,
                task=task,
                documents=self.documents,
                chunks=self.chunks,
                chunk_tokens=self.chunk_tokens,
            )
        except ValueError as e:
            raise EvaluationError(str(e)) from e
        return Item(
            question=self.style.write_question(example.question.text),
            answers=(example.question.answer,),
            documents=tuple(tuple(self.style.write_passage("", c) for c in d.chunks) for d in example.documents),
            context=example.context,
            where=f"{task} question {index}",
        )
