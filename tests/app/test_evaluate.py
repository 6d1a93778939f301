"""The evaluation asks paired questions, resumes, and measures what it says."""

from __future__ import annotations

import json
import math
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from app.evaluate.log import EvaluationError, ResultLog
from app.evaluate.measures import is_right, kl_lower_bound, mean_and_interval
from app.evaluate.quality import Plan, make_arms, run_quality
from app.trivial import TrivialEngine
from blend.errors import UnknownSelectorError
from blend.types import CompileJob, CompileResult, Delta, Request
from store import MemoryStore


@pytest.fixture
def engine() -> Iterator[TrivialEngine]:
    engine = TrivialEngine(MemoryStore())
    yield engine
    engine.store.close()


def plan(**changes: object) -> Plan:
    return replace(Plan(make_arms(["heads", "auto"], [0.1]), questions=3, max_tokens=200), **changes)  # type: ignore[arg-type]


async def test_the_report_has_the_documented_shape(engine: TrivialEngine) -> None:
    report = await run_quality(engine, engine.tokenizer, plan())
    assert set(report["tasks"]) == {"same-chunk", "cross-chunk"}
    for arms in report["tasks"].values():
        assert list(arms) == ["full", "reuse", "heads", "auto"]
        for figures in arms.values():
            assert set(figures) == {"accuracy", "n", "ci95", "agreement", "kl_first"}
            assert figures["n"] == 3
            assert 0 <= figures["ci95"][0] <= figures["accuracy"] <= figures["ci95"][1] <= 1
            assert figures["agreement"] == 1.0  # the trivial engine says the same under every arm
            assert figures["kl_first"] == 0.0
    json.dumps(report)


async def test_every_arm_sees_the_same_prompt(engine: TrivialEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []
    generate = engine.generate

    def watched(request: Request) -> AsyncIterator[Delta]:
        seen.append(request)
        return generate(request)

    monkeypatch.setattr(engine, "generate", watched)
    await run_quality(engine, engine.tokenizer, plan(questions=1, tasks=("cross-chunk",)))
    assert len({r.prompt for r in seen}) == 1
    assert [r.blend.mode for r in seen] == ["full", "reuse", "blend", "blend"]
    assert sum(s.kind == "chunk" for s in seen[0].prompt.segments) == 6


async def test_contexts_are_held_out_and_depend_on_the_seed() -> None:
    from app.demo.world import TRAIN_SEEDS

    assert plan(seed=0).example("same-chunk", 0) == plan(seed=0).example("same-chunk", 0)
    assert plan(seed=0).example("same-chunk", 0) != plan(seed=1).example("same-chunk", 0)
    assert plan().example("same-chunk", 4).documents == plan().example("cross-chunk", 4).documents
    assert (1 << 40) + 5 not in TRAIN_SEEDS


async def test_chunks_that_are_not_stored_void_the_comparison(
    engine: TrivialEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(job: CompileJob) -> CompileResult:
        return CompileResult(len(job.chunks), job.tokens, 0, 0.0)

    monkeypatch.setattr(engine, "compile", nothing)
    with pytest.raises(EvaluationError, match="not in the store"):
        await run_quality(engine, engine.tokenizer, plan())


async def test_an_interrupted_run_goes_on_and_gives_the_same_report(engine: TrivialEngine, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    whole = await run_quality(engine, engine.tokenizer, plan(), out=out)
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 6
    out.write_bytes(b"".join(lines[:3]) + lines[3][:17])  # died within a line
    asked: list[str] = []
    again = await run_quality(engine, engine.tokenizer, plan(), out=out, progress=asked.append)
    assert again == whole
    assert out.read_bytes().splitlines(keepends=True) == lines
    assert len(asked) == 6
    longer = await run_quality(engine, engine.tokenizer, plan(questions=4), out=out)
    assert longer["tasks"]["same-chunk"]["full"]["n"] == 4


async def test_results_of_another_run_are_not_mixed_in(engine: TrivialEngine, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    await run_quality(engine, engine.tokenizer, plan(questions=1), out=out)
    with pytest.raises(EvaluationError, match="another run"):
        await run_quality(engine, engine.tokenizer, plan(questions=1, seed=1), out=out)
    other = tmp_path / "notes.txt"
    other.write_text("not ours")
    with pytest.raises(EvaluationError, match="does not hold results"):
        ResultLog.open(other, {})
    assert other.read_text() == "not ours"


def test_arms_are_named_after_selector_and_ratio() -> None:
    assert [a.name for a in make_arms(["auto"], [0.1])] == ["full", "reuse", "auto"]
    assert [a.name for a in make_arms(["auto"], [0.1, 0.25])] == ["full", "reuse", "auto@0.1", "auto@0.25"]
    with pytest.raises(UnknownSelectorError, match=r"nonsense.*deviation"):
        make_arms(["nonsense"], [0.1])
    with pytest.raises(EvaluationError, match=r"1\.5"):
        make_arms(["auto"], [1.5])


@pytest.mark.parametrize(
    ("answer", "right"),
    [("The pear.", True), ("PEAR", True), (" pear\n", True), ("pearl", False), ("", False), ("a red pear tree", True)],
)
def test_an_answer_is_right_when_it_holds_the_words(answer: str, right: bool) -> None:
    assert is_right(answer, "pear") is right


def test_the_interval_holds_the_mean_and_shrinks_with_n() -> None:
    few, many = mean_and_interval([1.0, 0.0] * 5), mean_and_interval([1.0, 0.0] * 500)
    assert few[0] == many[0] == 0.5
    assert few[1][0] < many[1][0] < 0.5 < many[1][1] < few[1][1]
    assert mean_and_interval([1.0] * 9)[1] == (1.0, 1.0)


def test_kl_is_exact_when_the_lists_hold_everything() -> None:
    p, q = {1: math.log(0.75), 2: math.log(0.25)}, {1: math.log(0.5), 2: math.log(0.5)}
    assert kl_lower_bound(p, q) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kl_lower_bound(p, p) == 0.0


def test_kl_of_truncated_lists_never_exceeds_the_truth() -> None:
    rng = random.Random(0)
    for _ in range(200):
        p, q = ([rng.expovariate(1) ** 3 + 1e-9 for _ in range(60)] for _ in range(2))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        truth = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        tops = [{i: math.log(d[i]) for i in sorted(range(60), key=lambda i: -d[i])[:20]} for d in (p, q)]
        assert -1e-12 <= kl_lower_bound(*tops) <= truth + 1e-9
