"""Full prefill, reuse and selectors answer the same held-out questions on the same engine, one question at a time.

For each question: chunks of its documents -> keys -> compile -> one greedy answer per arm. Results go to a JSON-lines
file as they come, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.bench.workbench import Workbench
from app.demo.world import EVAL_SEEDS, TASKS, Example, make_example
from app.evaluate.log import EvaluationError, ResultLog
from app.evaluate.measures import is_right, kl_lower_bound, mean_and_interval
from blend.engines import Engine
from blend.errors import UnknownSelectorError
from blend.keys import CompileContext
from blend.prompt import ChunkRef
from blend.select import NAMES
from blend.types import BlendOptions, Mode, Request, Sampling

FULL = "full"
REUSE = "reuse"
TOP_LOGPROBS = 20
FORMAT = 1

Progress = Callable[[str], None]


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
class Plan:
    """What to ask: ``questions`` per task with contexts of ``documents`` documents, held out by ``seed``."""

    arms: tuple[Arm, ...]
    seed: int = 0
    questions: int = 100
    documents: int = 3
    compile: CompileContext = "prefix"
    tasks: tuple[str, ...] = TASKS
    max_tokens: int = 16

    def __post_init__(self) -> None:
        for name in ("questions", "documents", "max_tokens"):
            if getattr(self, name) < 1:
                raise EvaluationError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 1_000_000:
            raise EvaluationError(f"seed {self.seed} is not within 0..999999")

    def example(self, task: str, index: int) -> Example:
        """Question ``index`` of ``task``; one index has the same documents in every task."""
        return make_example(EVAL_SEEDS.start + self.seed * 1_000_000 + index, documents=self.documents, task=task)


def make_arms(selectors: Sequence[str], ratios: Sequence[float]) -> tuple[Arm, ...]:
    """``full``, ``reuse`` and every selector at every ratio; with several ratios the name is ``selector@ratio``."""
    arms = [Arm(FULL, "full"), Arm(REUSE, "reuse")]
    for selector in dict.fromkeys(selectors):
        if selector not in NAMES:
            raise UnknownSelectorError(f"selector {selector!r} is unknown; choose from {', '.join(NAMES)}")
        for ratio in dict.fromkeys(ratios):
            if not 0.0 <= ratio <= 1.0:
                raise EvaluationError(f"ratio {ratio} is not within 0..1")
            name = selector if len(set(ratios)) == 1 else f"{selector}@{ratio:g}"
            arms.append(Arm(name, "blend", selector, ratio))
    return tuple(arms)


@dataclass(frozen=True)
class Answer:
    """What one arm said. ``first`` are the top log-probabilities of its first token, token id -> logprob."""

    text: str
    token_ids: tuple[int, ...]
    first: dict[int, float]
    missing: int


async def run_quality(
    engine: Engine, tokenizer: Any, plan: Plan, *, out: Path | None = None, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Ask every question of ``plan`` and return ``{"tasks": {task: {arm: {...}}}, "seed": ...}``.

    ``out``: results are appended there and those already in it are not asked again. ``progress`` is called once per
    question. Raises ``EvaluationError`` if ``out`` belongs to another run.
    """
    salt = hashlib.sha256(b"ragblend evaluation").digest()
    bench = Workbench.of(engine, tokenizer, salt=salt, compile=plan.compile)
    with ResultLog.open(out, _identity(engine, plan)) as log:
        for index in range(plan.questions):
            for task in plan.tasks:
                record = log.find(task, index)
                if record is None:
                    record = await _ask(bench, plan, task, index)
                    log.add(record)
                right = record["arms"][FULL]["right"]
                progress(f"{task}: full {'right' if right else 'wrong'}")
        return _report(engine, plan, log)


async def answer(bench: Workbench, plan: Plan, arm: Arm, refs: Sequence[ChunkRef], question: str, name: str) -> Answer:
    """One greedy answer. Raises ``EvaluationError`` if compiled chunks were not found: the comparison would be void."""
    request = Request(
        id=name,
        prompt=bench.prompt(refs, question),
        sampling=Sampling(max_tokens=plan.max_tokens, temperature=0.0, logprobs=TOP_LOGPROBS),
        blend=arm.options,
        tenant_salt=bench.keys.tenant_salt,
    )
    text, first, missing = "", dict[int, float](), 0
    ids: tuple[int, ...] = ()
    async for delta in bench.engine.generate(request):
        if delta.logprobs and not ids:
            first = {token: logprob for token, _, logprob in delta.logprobs[0].top}
        text, ids = text + delta.text, ids + delta.token_ids
        if delta.stats and arm.mode != "full":
            missing = delta.stats.missing
    if missing:
        raise EvaluationError(f"{name}: {missing} compiled rows were not in the store")
    return Answer(text, ids, first, missing)


async def _ask(bench: Workbench, plan: Plan, task: str, index: int) -> dict[str, Any]:
    example = plan.example(task, index)
    refs: list[ChunkRef] = []
    for n, document in enumerate(example.documents):
        names = [f"{index}.{n}.{i}" for i in range(len(document.chunks))]
        refs += await bench.compile(names, [bench.layout.chunk_ids(c) for c in document.chunks])
    arms: dict[str, Any] = {}
    full: Answer | None = None
    for arm in plan.arms:
        got = await answer(bench, plan, arm, refs, example.question.text, f"eval-{task}-{index}-{arm.name}")
        full = full or got
        kl = kl_lower_bound(full.first, got.first) if full.first and got.first else None
        arms[arm.name] = {
            "right": is_right(got.text, example.question.answer),
            "agrees": got.token_ids == full.token_ids,
            "kl_first": kl,
            "text": got.text,
        }
    return {"task": task, "index": index, "expected": example.question.answer, "arms": arms}


def _identity(engine: Engine, plan: Plan) -> dict[str, Any]:
    """What must be equal for two results to belong to one run (the number of questions may grow)."""
    info = engine.info
    identity = asdict(plan)
    del identity["questions"]
    return {"format": FORMAT, "engine": info.name, "model": info.layout.digest.hex(), **identity}


def _report(engine: Engine, plan: Plan, log: ResultLog) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for task in plan.tasks:
        records = [r for i in range(plan.questions) if (r := log.find(task, i)) is not None]
        tasks[task] = {arm.name: _summary([r["arms"][arm.name] for r in records]) for arm in plan.arms}
    return {
        "tasks": tasks,
        "seed": plan.seed,
        "ratio": sorted({arm.ratio for arm in plan.arms if arm.mode == "blend"}),
        "documents": plan.documents,
        "compile": plan.compile,
        "model": engine.info.model,
        "engine": f"{engine.info.name} {engine.info.version}",
    }


def _summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    accuracy, interval = mean_and_interval([float(r["right"]) for r in results])
    kls = [r["kl_first"] for r in results if r["kl_first"] is not None]
    return {
        "accuracy": round(accuracy, 4),
        "n": len(results),
        "ci95": [round(x, 4) for x in interval],
        "agreement": round(sum(r["agrees"] for r in results) / len(results), 4),
        "kl_first": round(sum(kls) / len(kls), 6) if kls else None,
    }
