"""The benchmark checks outputs before it times, and times nothing that did not do what it claims."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from app.bench.shot import BenchError, Shot, differs
from app.bench.synthetic import Shape, make_synthetic_model
from app.bench.ttft import Setup, make_arms, ratios_to_full, run_ttft
from app.trivial import ByteTokenizer, TrivialEngine
from blend.types import CompileJob, CompileResult, Delta, Request
from store.memory import MemoryStore

SETUP = Setup(context=300, chunk=128, ratios=(0.1, 0.5), repeats=3)


class Letters(ByteTokenizer):
    """Bytes of which only the small letters are words, so that random tokens are text."""

    all_special_ids = tuple(i for i in range(ByteTokenizer.vocab_size) if not ord("a") <= i <= ord("z"))


class Engine(TrivialEngine):
    """The trivial engine, with faults to switch on and a record of requests."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())
        self.tokenizer = Letters()
        self.requests: list[Request] = []
        self.lies = False
        self.forgets = False

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        self.requests.append(request)
        async for delta in super().generate(request):
            if self.lies and request.blend.selector == "deviation" and delta.token_ids:
                delta = replace(delta, token_ids=tuple(i ^ 1 for i in delta.token_ids))
            yield delta

    async def compile(self, job: CompileJob) -> CompileResult:
        if self.forgets:
            return CompileResult(len(job.chunks), job.tokens, 0, 0.0)
        return await super().compile(job)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.store.close()


async def test_all_arms_are_checked_and_timed(engine: Engine) -> None:
    arms = make_arms("full-eager", SETUP, prefix_hit=False)
    await run_ttft(engine, engine.tokenizer, arms, SETUP)
    reports = [arm.report() for arm in arms]
    names = [(r["name"], r["ratio"]) for r in reports]
    assert names == [
        ("full-eager", None),
        ("reuse", 0.0),
        ("deviation", 0.1),
        ("deviation", 0.5),
        ("auto", 0.1),
        ("auto", 0.5),
    ]
    for report in reports:
        assert set(report) == {"name", "ratio", "tier", "ttft_median_s", "ttft_p10_s", "ttft_p90_s", "outputs_checked"}
        assert report["outputs_checked"] is True
        assert 0 < report["ttft_p10_s"] <= report["ttft_median_s"] <= report["ttft_p90_s"]
    assert all(len(arm.seconds) == SETUP.repeats for arm in arms)
    assert ratios_to_full(reports)["full-eager"] == 1.0
    json.dumps(reports)


async def test_an_arm_with_wrong_output_gets_no_times(engine: Engine) -> None:
    engine.lies = True
    arms = make_arms("full-eager", SETUP, prefix_hit=False)
    await run_ttft(engine, engine.tokenizer, arms, SETUP)
    by_name = {(a.name, a.ratio): a for a in arms}
    wrong = by_name["deviation", 0.1]
    assert wrong.problem
    assert "greedy token 1" in wrong.problem
    assert wrong.report()["ttft_median_s"] is None
    assert wrong.report()["outputs_checked"] is False
    assert by_name["auto", 0.1].report()["outputs_checked"] is True


async def test_an_arm_whose_chunks_are_missing_gets_no_times(engine: Engine) -> None:
    engine.forgets = True
    arms = make_arms("full-eager", SETUP, prefix_hit=False)
    await run_ttft(engine, engine.tokenizer, arms, SETUP)
    assert [a.name for a in arms if a.problem is None] == ["full-eager"]
    assert "not found" in str(arms[1].problem)


async def test_a_prefix_hit_that_hits_nothing_gets_no_times(engine: Engine) -> None:
    arms = make_arms("full-compiled", SETUP, prefix_hit=True)
    await run_ttft(engine, engine.tokenizer, arms, SETUP)
    hit = next(a for a in arms if a.name == "prefix-hit")
    assert "prefix cache" in str(hit.problem)


async def test_nothing_is_cached_by_accident(engine: Engine) -> None:
    await run_ttft(engine, engine.tokenizer, make_arms("full-eager", SETUP, prefix_hit=False), SETUP)
    timed = [r for r in engine.requests if r.sampling.max_tokens == 1 and r.blend.mode == "full"]
    assert len(timed) == SETUP.repeats
    assert len({r.tenant_salt for r in timed}) == SETUP.repeats
    assert len({r.prompt.token_ids for r in timed}) == SETUP.repeats
    sizes = [s.tokens for s in timed[0].prompt.segments if s.kind == "chunk"]
    assert sizes == [128, 128, 44]


async def test_two_engines_are_checked_against_each_other(engine: Engine) -> None:
    reference = await run_ttft(
        engine, engine.tokenizer, make_arms("full-compiled", SETUP, prefix_hit=False)[:1], replace(SETUP, repeats=1)
    )
    other = replace(reference, token_ids=tuple(i ^ 1 for i in reference.token_ids))
    for given, right in ((reference, True), (other, False)):
        [arm] = make_arms("full-eager", SETUP, prefix_hit=False)[:1]
        await run_ttft(engine, engine.tokenizer, [arm], replace(SETUP, repeats=1), reference=given)
        assert arm.report()["outputs_checked"] is right


def test_greedy_tokens_may_part_at_a_tie_only() -> None:
    def shot(*ids: int) -> Shot:
        return Shot(1.0, ids, ({1: -1.0, 2: -1.01, 3: -3.0}, {4: -0.1}), None, 0)

    assert differs(shot(1, 4), shot(1, 4), tie=0.1) is None
    assert differs(shot(1, 4), shot(2, 9), tie=0.1) is None
    assert differs(shot(1, 4), shot(3, 4), tie=0.1)
    assert differs(shot(1, 4), shot(7, 4), tie=0.1)
    assert differs(shot(1, 4), shot(1), tie=0.1)


@pytest.mark.parametrize("bad", [{"chunk": 0}, {"chunk": 999}, {"repeats": 0}, {"ratios": (0.0,)}, {"ratios": (2.0,)}])
def test_a_bad_setup_shows_its_value(bad: dict[str, object]) -> None:
    [value] = bad.values()
    shown = str(list(value)) if isinstance(value, tuple) else str(value)
    with pytest.raises(BenchError) as e:
        replace(SETUP, **bad)  # type: ignore[arg-type]
    assert shown in str(e.value)


async def test_a_context_the_model_cannot_hold_is_refused() -> None:
    engine = TrivialEngine(MemoryStore(), max_context=200)
    with pytest.raises(BenchError, match="smaller --context"):
        await run_ttft(engine, engine.tokenizer, make_arms("full-eager", SETUP, prefix_hit=False), SETUP)


def test_a_synthetic_model_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    demo = Path(__file__).resolve().parents[2] / "models" / "demo"
    shape = Shape(hidden=64, layers=2, heads=2, kv_heads=1, intermediate=128, max_positions=256, dtype="float32")
    parameters = make_synthetic_model(tmp_path / "m", shape, demo)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert sum(p.numel() for p in model.parameters()) == parameters
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = torch.tensor([tokenizer("Where does she live?")["input_ids"]])
    assert model(ids).logits.isfinite().all()
    again = make_synthetic_model(tmp_path / "n", shape, demo)
    assert again == parameters
    first, second = load_file(tmp_path / "m/model.safetensors"), load_file(tmp_path / "n/model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_shape_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="heads 3"):
        Shape(hidden=64, heads=3)
