"""What the project promises about answers, on the committed demo model and held-out questions.

Small contexts, few questions: twenty of each task, so one question is 0.05 of a task. The tables are in the documents.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from app.bench.workbench import load_tokenizer
from app.evaluate.asker import Asker, Record
from app.evaluate.plan import Plan, make_arms
from app.evaluate.quality import run_quality
from blend.engines import EngineConfig, open_engine

DEMO = str(Path(__file__).parents[2] / "models/demo")
SAME, CROSS = "same-chunk", "cross-chunk"
CLAIMED = ("two-hop", "comparison", "aggregation", "distractors", "repeated")
UNKNOWABLE, KEEP = "antecedent-missing", "question(pool=1,keep=true)"
RATIOS = (0.0, 0.05, 0.1, 0.25, 1.0)
QUESTIONS = 20
OTHER_ORDERS = ((2, 0, 1), (1, 2, 0), (2, 1, 0), (1, 0, 2), (0, 2, 1))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def plan(ratios: tuple[float, ...]) -> Plan:
    arms = make_arms(["auto", "random"], ratios)
    return Plan(arms, seed=3, questions=QUESTIONS, documents=3, tasks=(SAME, CROSS), chunk_tokens=(66, 124))


@pytest.fixture(scope="module")
def tasks() -> dict[str, Any]:
    """Isolated compile, ``auto`` and ``random`` at every ratio: the report's tasks."""

    async def ask() -> dict[str, Any]:
        engine = await open_engine("transformers", EngineConfig(DEMO))
        try:
            return await run_quality(engine, load_tokenizer(DEMO), plan(RATIOS))
        finally:
            await engine.stop()

    report = asyncio.run(ask())
    found: dict[str, Any] = report["tasks"]
    return found


def test_the_questions_show_what_blending_is_for(tasks: dict[str, Any]) -> None:
    """Full prefill knows the answers; reuse loses those whose chunk has to know an earlier one, and only those."""
    assert tasks[SAME]["full"]["accuracy"] >= 0.95
    assert tasks[CROSS]["full"]["accuracy"] >= 0.9
    assert tasks[CROSS]["reuse"]["difference"] <= -0.4
    assert tasks[SAME]["reuse"]["difference"] >= -0.15


def test_a_tenth_recomputed_gives_back_what_reuse_loses(tasks: dict[str, Any]) -> None:
    """Within one question of twenty."""
    for task in (SAME, CROSS):
        auto = tasks[task]["auto@0.1"]
        assert auto["recomputed"] <= auto["computed_share"] <= 0.1
        assert auto["difference"] >= -0.05
        assert auto["agreement"] >= 0.95


def test_more_budget_never_hurts_by_more_than_noise(tasks: dict[str, Any]) -> None:
    """Noise: a question that was right by luck may be lost, so one of twenty."""
    for task in (SAME, CROSS):
        accuracy = [tasks[task][f"auto@{ratio:g}"]["accuracy"] for ratio in RATIOS]
        for i, (less, more) in enumerate(pairwise(accuracy)):
            assert more >= less - 1 / QUESTIONS - 1e-9, f"{task}: {accuracy} falls at ratio {RATIOS[i + 1]}"


def test_recomputing_everything_is_full_prefill(tasks: dict[str, Any]) -> None:
    for task in (SAME, CROSS):
        for arm in ("auto@1", "random@1"):
            everything = tasks[task][arm]
            assert everything["recomputed"] > 0.9  # all but the prefix, which is exact as it is stored
            assert everything["agreement"] == 1.0
            assert everything["kl_first"] < 1e-6


def test_recomputing_nothing_is_reuse(tasks: dict[str, Any]) -> None:
    for task in (SAME, CROSS):
        for name in ("accuracy", "agreement", "kl_first", "recomputed"):
            assert tasks[task]["auto@0"][name] == tasks[task]["reuse"][name]


def test_random_rows_never_beat_auto(tasks: dict[str, Any]) -> None:
    for ratio in RATIOS:
        both = [
            sum(tasks[task][f"{selector}@{ratio:g}"]["accuracy"] for task in (SAME, CROSS))
            for selector in ("auto", "random")
        ]
        assert both[0] >= both[1], f"random rows are better at ratio {ratio}"
        assert sum(tasks[task][f"random@{ratio:g}"]["kl_first"] for task in (SAME, CROSS)) >= sum(
            tasks[task][f"auto@{ratio:g}"]["kl_first"] for task in (SAME, CROSS)
        )
    chosen, drawn = (tasks[CROSS][f"{selector}@0.1"]["accuracy"] for selector in ("auto", "random"))
    assert chosen - drawn >= 0.4, "the rows would not have to be chosen"


@pytest.fixture(scope="module")
def document_tasks() -> dict[str, Any]:
    """The model's other tasks, chunks compiled behind their document and alone, eight documents."""

    async def ask() -> dict[str, Any]:
        arms = make_arms(["auto", KEEP], [0.1])
        asked = Plan(
            arms, seed=3, questions=8, documents=8, tasks=(*CLAIMED, UNKNOWABLE), compile=("document", "prefix")
        )
        engine = await open_engine("transformers", EngineConfig(DEMO))
        try:
            return await run_quality(engine, load_tokenizer(DEMO), asked)
        finally:
            await engine.stop()

    found: dict[str, Any] = asyncio.run(ask())["tasks"]
    return found


def test_every_claimed_task_is_answered_by_full_prefill_and_by_auto(document_tasks: dict[str, Any]) -> None:
    """Eight questions each: one may be lost, and over all tasks two may be answered otherwise."""
    differ = 0.0
    for task in CLAIMED:
        found = document_tasks[task]
        assert found["full"]["accuracy"] >= 7 / 8, task
        for compile in ("document", "prefix"):
            auto = found[f"auto/{compile}"]
            assert auto["difference"] >= -1 / 8, (task, compile)
            differ += auto["n"] * (1 - auto["agreement"])
    assert differ <= 2 + 1e-9
    lost = sum(document_tasks[task]["reuse/prefix"]["difference"] for task in CLAIMED)
    assert lost <= -0.3 * len(CLAIMED), "reuse loses nothing here; this test shows nothing"


def test_kv_that_knows_more_than_the_prompt_answers_what_full_prefill_cannot(document_tasks: dict[str, Any]) -> None:
    found = document_tasks[UNKNOWABLE]
    assert found[f"{KEEP}/document"]["accuracy"] >= 7 / 8
    assert found[f"{KEEP}/document"]["recomputed"] > 0.05, "it kept everything, as reuse does"
    for arm in ("full", "auto/document", f"{KEEP}/prefix"):
        assert found[arm]["accuracy"] <= 0.5, arm


async def test_the_order_of_documents_matters_to_a_blend_no_more_than_to_full_prefill() -> None:
    """Answers that change when the documents are shuffled: noise is one question of twenty."""
    asked = plan((0.1,))
    trials = [t for t in asked.trials if t.arm.name in ("full", "auto")]
    engine = await open_engine("transformers", EngineConfig(DEMO))
    changed = dict.fromkeys((t.key for t in trials), 0)
    try:
        asker = Asker(engine, load_tokenizer(DEMO), asked)
        for index in range(QUESTIONS):
            item = asked.source.item(CROSS, index)
            order = OTHER_ORDERS[index % len(OTHER_ORDERS)]
            # A pronoun means the last subject named before it, so the chunks of a document stay together.
            shuffled = replace(item, context=tuple((d, c) for d in order for c in (0, 1)))
            records: list[Record] = [await asker.ask(i, CROSS, index, trials, None) for i in (item, shuffled)]
            for key in changed:
                changed[key] += len({r["trials"][key]["text"] for r in records}) - 1
    finally:
        await engine.stop()
    full, auto = (changed[t.key] for t in trials)
    assert auto <= full + 1, f"{auto} of {QUESTIONS} answers change with the order, {full} with full prefill"


@pytest.fixture(autouse=True, scope="module")
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
