"""The evaluation asks paired questions, resumes, merges, and compares with what full prefill said."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from app.evaluate import summary
from app.evaluate.dataset import read_dataset
from app.evaluate.log import EvaluationError, ResultLog
from app.evaluate.plan import COMPILES, Plan, make_arms
from app.evaluate.quality import merge_report, run_quality
from app.evaluate.styles import find_style
from app.trivial import TrivialEngine
from blend.errors import UnknownSelectorError
from blend.types import CompileJob, CompileResult, Delta, Request
from retriever.embed import HashEmbedder
from store.memory import MemoryStore

DATA = Path(__file__).parent / "questions.jsonl"
TWO = ("same-chunk", "cross-chunk")


@pytest.fixture
def engine() -> Iterator[TrivialEngine]:
    engine = TrivialEngine(MemoryStore())
    yield engine
    engine.store.close()


def plan(**changes: object) -> Plan:
    small = Plan(make_arms(["heads", "auto"], [0.1]), questions=3, tasks=TWO, max_tokens=200, chunk_tokens=(0, 0))
    return replace(small, **changes)  # type: ignore[arg-type]


def watch(engine: TrivialEngine, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Request], list[CompileJob]]:
    """Requests and compile jobs that the engine will get."""
    requests: list[Request] = []
    jobs: list[CompileJob] = []
    generate, compile = engine.generate, engine.compile

    def watched(request: Request) -> AsyncIterator[Delta]:
        requests.append(request)
        return generate(request)

    async def compiled(job: CompileJob) -> CompileResult:
        jobs.append(job)
        return await compile(job)

    monkeypatch.setattr(engine, "generate", watched)
    monkeypatch.setattr(engine, "compile", compiled)
    return requests, jobs


async def test_the_report_has_the_documented_shape(engine: TrivialEngine) -> None:
    report = await run_quality(engine, engine.tokenizer, plan())
    assert set(report["tasks"]) == set(TWO)
    for arms in report["tasks"].values():
        assert list(arms) == ["full", "reuse", "heads", "auto"]
        for figures in arms.values():
            assert figures["n"] == 3
            assert 0 <= figures["ci95"][0] <= figures["accuracy"] <= figures["ci95"][1] <= 1
            assert figures["agreement"] == 1.0  # the trivial engine says the same under every arm
            assert figures["kl_first"] == 0.0
            assert figures["difference"] == 0.0
            assert figures["diverges_at"] is None
        assert arms["full"]["recomputed"] == arms["full"]["computed_share"] == 1.0
        assert arms["reuse"]["recomputed"] == 0.0
        assert arms["heads"]["recomputed"] == pytest.approx(0.1, abs=0.02)
    json.dumps(report)


async def test_what_blending_breaks_is_counted(engine: TrivialEngine) -> None:
    engine.faithful_ratio = 0.2  # answers blended with less come out backwards
    arms = make_arms(["heads"], [0.1, 0.5])
    of_task = (await run_quality(engine, engine.tokenizer, plan(arms=arms)))["tasks"]["same-chunk"]
    assert of_task["heads@0.5"]["agreement"] == 1.0
    for broken in ("reuse", "heads@0.1"):
        assert of_task[broken]["agreement"] == 0.0
        assert of_task[broken]["diverges_at"] == 0
        assert of_task[broken]["f1"] < of_task["full"]["f1"] or of_task["full"]["f1"] == 0
    assert of_task["reuse"]["difference"] == of_task["reuse"]["accuracy"] - of_task["full"]["accuracy"]


async def test_every_arm_sees_the_same_prompt(engine: TrivialEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, _ = watch(engine, monkeypatch)
    await run_quality(engine, engine.tokenizer, plan(questions=1, tasks=("cross-chunk",)))
    assert len({r.prompt for r in requests}) == 1
    assert [r.blend.mode for r in requests] == ["full", "reuse", "blend", "blend"]
    assert sum(s.kind == "chunk" for s in requests[0].prompt.segments) == 6


async def test_full_prefill_answers_once_for_all_compile_contexts(
    engine: TrivialEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, jobs = watch(engine, monkeypatch)
    arms = make_arms(["auto"], [0.1])
    everything = plan(arms=arms, questions=1, tasks=("cross-chunk",), compile=COMPILES, neighbours=2)
    report = await run_quality(engine, engine.tokenizer, everything, embed=HashEmbedder().embed)
    of_task = report["tasks"]["cross-chunk"]
    assert list(of_task) == ["full", *(f"{arm}/{c}" for c in COMPILES for arm in ("reuse", "auto"))]
    assert [r.blend.mode for r in requests].count("full") == 1
    assert len({r.prompt.token_ids for r in requests}) == 1
    keys = [{s.key for s in r.prompt.segments if s.kind == "chunk"} for r in requests if r.blend.mode == "reuse"]
    # The first chunks of documents have nothing before them, so `prefix` and `document` share their KV.
    assert len(keys) == len(COMPILES)
    assert not keys[2] & keys[3] and not keys[3] & keys[4] and not keys[0] & keys[4]
    assert len(keys[0] & keys[1]) == 3
    assert len({key for job in jobs for key in job.keys}) == sum(len(job.keys) for job in jobs)  # nothing twice


async def test_neighbours_are_near_random_or_the_chunk_itself(
    engine: TrivialEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, jobs = watch(engine, monkeypatch)
    texts = ["red apples grow here", "a red apple fell, red apples", "ships sail north", "old ships sail far north"]

    data = read_dataset(DATA, find_style("service"))
    item = replace(data.items[0], documents=tuple((t,) for t in texts), context=tuple((i, 0) for i in range(4)))
    one = replace(data, items=(item,))
    compiles = ("neighbours", "random-neighbours", "repeated-self")
    await run_quality(
        engine,
        engine.tokenizer,
        plan(data=one, compile=compiles, neighbours=1),
        embed=HashEmbedder().embed,
    )
    seen: dict[str, list[str]] = {text: [] for text in texts}
    for job in jobs:
        chunk = engine.tokenizer.decode(job.chunks[0]).strip()
        if chunk in seen:
            prefix = len(jobs[0].chunks[0])
            seen[chunk].append(engine.tokenizer.decode(job.context[prefix:]).strip())
    assert [seen[t][0] for t in texts] == [texts[1], texts[0], texts[3], texts[2]]
    assert all(len(near) in (2, 3) and near[-1] == text for text, near in seen.items())
    assert any(near[1] not in (near[0], text) for text, near in seen.items()), "the random ones are the nearest ones"


async def test_neighbours_without_an_embedder_are_refused(engine: TrivialEngine) -> None:
    with pytest.raises(EvaluationError, match="embedder"):
        await run_quality(engine, engine.tokenizer, plan(compile="neighbours"))


async def test_a_question_leaves_no_kv_behind(engine: TrivialEngine) -> None:
    await run_quality(engine, engine.tokenizer, plan(compile=("prefix", "document")))
    assert len(list(engine.store.entries())) == 1  # the canonical prefix


async def test_tasks_on_the_same_documents_share_what_is_compiled(
    engine: TrivialEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, jobs = watch(engine, monkeypatch)
    await run_quality(engine, engine.tokenizer, plan(questions=1))
    assert len(jobs) == 1 + 6


async def test_contexts_are_held_out_and_depend_on_the_seed() -> None:
    from app.demo.world import EVAL_SEEDS, TRAIN_SEEDS

    assert plan(seed=0).source.item("same-chunk", 0) == plan(seed=0).source.item("same-chunk", 0)
    assert plan(seed=0).source.item("same-chunk", 0) != plan(seed=1).source.item("same-chunk", 0)
    first, second = (plan().source.item(task, 4).documents for task in TWO)
    assert first == second
    assert EVAL_SEEDS.start + 5 not in TRAIN_SEEDS


async def test_chunks_that_are_not_stored_void_the_comparison(
    engine: TrivialEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(job: CompileJob) -> CompileResult:
        return CompileResult(len(job.chunks), job.tokens, 0, 0.0)

    monkeypatch.setattr(engine, "compile", nothing)
    with pytest.raises(EvaluationError, match="not in the store"):
        await run_quality(engine, engine.tokenizer, plan())


async def test_a_context_that_does_not_fit_says_what_to_do(engine: TrivialEngine) -> None:
    small = TrivialEngine(MemoryStore(), max_context=400)
    with pytest.raises(EvaluationError, match=r"same-chunk question 0: .* do not fit the model's 400; use fewer"):
        await run_quality(small, engine.tokenizer, plan())
    with pytest.raises(EvaluationError, match=r"questions.jsonl, line 1: .*--max-chunks"):
        await run_quality(small, engine.tokenizer, plan(data=read_dataset(DATA, find_style("musique"))))
    small.store.close()


class TestOnDisk:
    async def test_an_interrupted_run_goes_on_and_gives_the_same_report(
        self, engine: TrivialEngine, tmp_path: Path
    ) -> None:
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

    async def test_arms_added_later_are_compared_with_the_answers_on_disk(
        self, engine: TrivialEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, engine.faithful_ratio = tmp_path / "results.jsonl", 0.2
        fresh = await run_quality(engine, engine.tokenizer, plan(arms=make_arms(["heads", "auto"], [0.1])))
        await run_quality(engine, engine.tokenizer, plan(arms=make_arms(["heads"], [0.1])), out=out)
        requests, _ = watch(engine, monkeypatch)
        more = await run_quality(engine, engine.tokenizer, plan(), out=out)
        assert {r.blend.selector for r in requests} == {"auto"}
        assert more["tasks"] == fresh["tasks"]

    async def test_results_of_another_run_are_not_mixed_in(self, engine: TrivialEngine, tmp_path: Path) -> None:
        out = tmp_path / "results.jsonl"
        await run_quality(engine, engine.tokenizer, plan(questions=1), out=out)
        with pytest.raises(EvaluationError, match=r"another run \(seed 0 and 1\)"):
            await run_quality(engine, engine.tokenizer, plan(questions=1, seed=1), out=out)
        other = tmp_path / "notes.txt"
        other.write_text("not ours")
        with pytest.raises(EvaluationError, match="does not hold results"):
            ResultLog.open(other, {})
        assert other.read_text() == "not ours"
        other.write_text('{"run": {}}\n{"task": "same-chunk"}\n')
        with pytest.raises(EvaluationError, match="line 2: this is not an answer"):
            ResultLog.open(other, {})

    async def test_two_halves_make_the_whole(self, engine: TrivialEngine, tmp_path: Path) -> None:
        both = ("document", "prefix")
        whole = await run_quality(engine, engine.tokenizer, plan(questions=4, compile=both))
        for first in (2, 0):
            half = plan(questions=2, first=first, compile=both)
            await run_quality(engine, engine.tokenizer, half, out=tmp_path / f"{first}.jsonl")
        merged = merge_report([tmp_path / "2.jsonl", tmp_path / "0.jsonl"])
        assert [list(arms) for arms in merged["tasks"].values()] == [list(arms) for arms in whole["tasks"].values()]
        assert merged == whole
        assert summary.rows(merged) == summary.rows(whole)

    async def test_files_of_different_runs_are_not_merged(self, engine: TrivialEngine, tmp_path: Path) -> None:
        files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
        await run_quality(engine, engine.tokenizer, plan(questions=1), out=files[0])
        await run_quality(engine, engine.tokenizer, plan(questions=1, documents=4), out=files[1])
        with pytest.raises(EvaluationError, match=r"b.jsonl and .*a.jsonl .*documents 4 and 3"):
            merge_report(files)
        with pytest.raises(EvaluationError, match=r"no file .*c.jsonl"):
            merge_report([tmp_path / "c.jsonl"])

    async def test_a_question_answered_twice_must_have_one_answer(self, engine: TrivialEngine, tmp_path: Path) -> None:
        a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
        whole = await run_quality(engine, engine.tokenizer, plan(questions=1), out=a)
        b.write_bytes(a.read_bytes())
        assert merge_report([a, b]) == whole
        lines = b.read_text().splitlines()
        record = json.loads(lines[1])
        record["trials"]["full"]["ids"].append(7)
        b.write_text("\n".join([lines[0], json.dumps(record), *lines[2:]]) + "\n")
        with pytest.raises(EvaluationError, match=r"b.jsonl: same-chunk 0 has another answer"):
            merge_report([a, b])


async def test_the_markdown_table_has_a_row_for_every_arm(engine: TrivialEngine) -> None:
    report = await run_quality(engine, engine.tokenizer, plan(compile=("prefix", "document")))
    table = summary.markdown(report).splitlines()
    assert table[0].startswith("**accuracy; 3 documents of 2 chunks")
    rows = [line for line in table if line.startswith("| same-chunk |")]
    assert len(rows) == 1 + 2 * 3
    assert {line.count("|") for line in table[2:]} == {len(summary.COLUMNS) + 1}


def test_arms_are_named_after_selector_and_ratio() -> None:
    assert [a.name for a in make_arms(["auto"], [0.1])] == ["full", "reuse", "auto"]
    assert [a.name for a in make_arms(["auto"], [0.1, 0.25])] == ["full", "reuse", "auto@0.1", "auto@0.25"]
    spec = "heads(rows=1)+question"
    assert [a.name for a in make_arms([spec], [0.1])] == ["full", "reuse", spec]
    with pytest.raises(UnknownSelectorError, match=r"nonsense.*deviation"):
        make_arms(["nonsense"], [0.1])
    with pytest.raises(EvaluationError, match=r"1\.5"):
        make_arms(["auto"], [1.5])


@pytest.mark.parametrize(
    ("compiles", "ratios"), [(("prefix",), [0.1]), (("prefix", "document"), [0.1]), (("document",), [0.05, 0.1])]
)
def test_trials_read_from_disk_are_named_as_the_plan_names_them(compiles: tuple[str, ...], ratios: list[float]) -> None:
    trials = plan(arms=make_arms(["auto", "heads(rows=1)+question"], ratios), compile=compiles).trials
    assert summary.name_trials(t.key for t in trials) == {t.key: t.name for t in trials}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": ("same-chunk", "riddle")}, r"riddle.*two-hop"),
        ({"compile": "sideways"}, r"sideways.*document"),
        ({"chunk_tokens": (90, 60)}, r"\(90, 60\)"),
        ({"questions": 0}, "questions is 0"),
        ({"first": -1}, "first is -1"),
        ({"prompt": "shout"}, r"shout.*plain"),
        ({"arms": make_arms(["auto"], [0.1])[1:]}, "full prefill"),
    ],
)
def test_a_bad_plan_is_refused_with_its_value(change: dict[str, object], words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        plan(**change)


async def test_a_task_that_needs_more_documents_says_so(engine: TrivialEngine) -> None:
    with pytest.raises(EvaluationError, match="two-hop questions need at least 3 documents, got 2"):
        await run_quality(engine, engine.tokenizer, plan(documents=2, tasks=("two-hop",)))
