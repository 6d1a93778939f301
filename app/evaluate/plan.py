"""What is compared on which questions: arms, compile contexts, and where the questions come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from app.demo.world import EXAMPLE_CHUNK_TOKENS, TASKS
from app.evaluate.dataset import Dataset
from app.evaluate.errors import EvaluationError
from app.evaluate.items import Generated, Source
from blend.keys import CompileContext
from blend.select import open_selector
from blend.types import BlendOptions, Mode

FULL = "full"
REUSE = "reuse"

Compile = Literal["prefix", "document", "neighbours", "random-neighbours", "repeated-self"]
COMPILES: tuple[Compile, ...] = get_args(Compile)
PROMPTS = ("chat", "plain")


@dataclass(frozen=True)
class Arm:
    """One way to answer. ``name`` is how the report calls it."""

    name: str
    mode: Mode
    selector: str = "none"
    ratio: float = 0.0

    @property
    def options(self) -> BlendOptions:
        return BlendOptions(mode=self.mode, selector=self.selector, recompute_ratio=self.ratio)


@dataclass(frozen=True)
class Trial:
    """One arm on KV of one compile context (full prefill uses none). ``key`` is its name in the results on disk."""

    arm: Arm
    compile: Compile | None
    name: str

    @property
    def key(self) -> str:
        if self.compile is None:
            return FULL
        return f"{self.compile} {REUSE if self.arm.mode == 'reuse' else f'{self.arm.selector}@{self.arm.ratio!r}'}"


def make_arms(selectors: Sequence[str], ratios: Sequence[float]) -> tuple[Arm, ...]:
    """``full``, ``reuse`` and every selector (spec) at every ratio; with several ratios the name is ``selector@ratio``.

    Raises ``UnknownSelectorError``, ``EvaluationError``.
    """
    arms = [Arm(FULL, "full"), Arm(REUSE, "reuse")]
    for selector in dict.fromkeys(selectors):
        open_selector(selector)
        for ratio in dict.fromkeys(ratios):
            if not 0.0 <= ratio <= 1.0:
                raise EvaluationError(f"ratio {ratio} is not within 0..1")
            name = selector if len(set(ratios)) == 1 else f"{selector}@{ratio:g}"
            arms.append(Arm(name, "blend", selector, ratio))
    return tuple(arms)


@dataclass(frozen=True)
class Plan:
    """What to ask: ``questions`` per task from number ``first`` on, by default generated ones, held out by ``seed``.

    Generated contexts have ``documents`` x ``chunks`` chunks of ``chunk_tokens`` (least, most). With ``data`` the
    file's questions are asked instead. ``compile`` is one compile context or several: full prefill answers once, the
    other arms once for each. ``neighbours``: chunks in front, for the contexts that have them. ``max_tokens`` of an
    answer default to the prompt style's.
    """

    arms: tuple[Arm, ...]
    seed: int = 0
    questions: int = 100
    documents: int = 3
    compile: Compile | tuple[Compile, ...] = "prefix"
    tasks: tuple[str, ...] = TASKS
    max_tokens: int | None = None
    chunks: int = 2
    chunk_tokens: tuple[int, int] = EXAMPLE_CHUNK_TOKENS
    first: int = 0
    neighbours: int = 3
    data: Dataset | None = None
    prompt: str = "chat"

    def __post_init__(self) -> None:
        for name in ("questions", "documents", "chunks", "neighbours", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvaluationError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.seed < 1_000_000:
            raise EvaluationError(f"seed {self.seed} is not within 0..999999")
        if not 0 <= self.first < 1_000_000:
            raise EvaluationError(f"first is {self.first}; it must be within 0..999999")
        if not 0 <= self.chunk_tokens[0] <= self.chunk_tokens[1]:
            raise EvaluationError(f"chunk_tokens {self.chunk_tokens} must be the least and the most tokens of a chunk")
        for task in self.tasks:
            if task not in TASKS:
                raise EvaluationError(f"task {task!r} is unknown; choose from {', '.join(TASKS)}")
        for compile in self.compiles:
            if compile not in COMPILES:
                raise EvaluationError(f"compile context {compile!r} is unknown; choose from {', '.join(COMPILES)}")
        if self.prompt not in PROMPTS:
            raise EvaluationError(f"prompt {self.prompt!r} is unknown; choose from {', '.join(PROMPTS)}")
        if not self.arms or self.arms[0].mode != "full":
            raise EvaluationError("the first arm must be full prefill: all others are compared with it")
        if self.data is not None and self.first >= len(self.data.items):
            raise EvaluationError(f"{self.data.path} has {len(self.data.items)} questions; first is {self.first}")

    @property
    def compiles(self) -> tuple[Compile, ...]:
        return tuple(dict.fromkeys((self.compile,) if isinstance(self.compile, str) else self.compile))

    @property
    def source(self) -> Source:
        if self.data is not None:
            return self.data
        return Generated(self.tasks, self.seed, self.documents, self.chunks, self.chunk_tokens)

    @property
    def indices(self) -> range:
        size = self.source.size
        stop = self.first + self.questions
        return range(self.first, stop if size is None else min(stop, size))

    @property
    def longest(self) -> int:
        """Tokens an answer may have."""
        return self.source.style.max_tokens if self.max_tokens is None else self.max_tokens

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Full prefill, then every other arm on every compile context; with several the name is ``arm/context``."""
        several = len(self.compiles) > 1
        trials = [Trial(arm, None, arm.name) for arm in self.arms if arm.mode == "full"]
        for compile in self.compiles:
            for arm in self.arms:
                if arm.mode != "full":
                    trials.append(Trial(arm, compile, f"{arm.name}/{compile}" if several else arm.name))
        return tuple(trials)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for results to belong to one run; questions, arms and contexts may be added to it."""
        return {
            **self.source.identity,
            "prompt": self.prompt,
            "max_tokens": self.longest,
            "neighbours": self.neighbours,
        }


def key_context(compile: Compile) -> CompileContext:
    """The key maker's context behind a compile context or a control."""
    return compile if compile in ("prefix", "document") else "neighbours"
