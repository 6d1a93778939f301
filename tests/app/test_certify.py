"""Certification passes what is exact, and fails what is not by the name of the check that found it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import blend.load
import blend.method
from app.bench.workbench import load_tokenizer
from app.certify.calibrate import asking, candidates, least_ratio, shortfalls, split
from app.certify.certify import CALIBRATION_TASKS, SEED, certify, make_plan
from app.certify.exactness import check_exactness
from app.settings import CompileSettings
from blend.certificate import Trial, read, write
from blend.engines import Engine, EngineConfig, open_engine
from blend.engines.transformers.model import ATTENTION, RowModel, _attend
from blend.select import AUTO
from blend.select.all import AllRows
from blend.select.base import Selection
from kernels.rotate import angles, rotate
from store.base import Miss
from tests.blend.tiny import write_model

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
NAMES = ["every-row", "full-recompute", "stored-bytes", "compiled-place", "causality", "rotation"]


async def start(model: Path, dtype: str = "float32") -> Engine:
    return await open_engine("transformers", EngineConfig(str(model), dtype=dtype, device="cpu"))


@pytest.fixture
async def demo() -> AsyncIterator[Engine]:
    engine = await start(DEMO)
    yield engine
    await engine.stop()


async def failing(engine: Engine) -> list[str]:
    """Names of the checks that fail."""
    said: list[str] = []
    checks = await check_exactness(engine, load_tokenizer(engine.info.model), seed=SEED, progress=said.append)
    assert [c.name for c in checks] == NAMES
    assert len(said) == 4
    return [c.name for c in checks if not c.passed]


# What certify is for: it fails --------------------------------------------------------------------------------------


async def test_the_demo_model_is_exact_where_it_must_be(demo: Engine) -> None:
    assert await failing(demo) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_rounding_is_no_failure(dtype: str) -> None:
    engine = await start(DEMO, dtype)
    try:
        assert await failing(engine) == []
    finally:
        await engine.stop()


@pytest.mark.parametrize("wrong", [lambda d: -d, lambda d: d + 1, lambda d: d * 0])
async def test_a_wrong_rotation_fails(
    demo: Engine, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor], Tensor]
) -> None:
    """Only chunks that move are turned, so all else still holds."""

    def turned(delta: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
        return angles(wrong(delta), *how)

    monkeypatch.setattr(blend.load, "angles", turned)
    assert await failing(demo) == ["rotation"]


@pytest.fixture
def leaky_mask() -> Iterator[None]:
    """Every row sees one row that comes after it, if it is there already."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _: None, *, scaling: float, blend_step: Any,
               **__: Any) -> tuple[Tensor, None]:  # fmt: skip
        blend_step.cache.q = query
        mask = (torch.arange(key.shape[2]) <= blend_step.rows[:, None] + 1)[None, None]
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=False)[0], None

    AttentionInterface.register(ATTENTION, attend)
    yield
    AttentionInterface.register(ATTENTION, _attend)


async def test_a_leaking_mask_fails(demo: Engine, leaky_mask: None) -> None:
    assert "causality" in await failing(demo)


@pytest.mark.parametrize(("stop", "fails"), [(48, ["every-row"]), (140, ["every-row", "full-recompute"])])
async def test_rows_that_are_never_recomputed_fail(
    demo: Engine, monkeypatch: pytest.MonkeyPatch, stop: int, fails: list[str]
) -> None:
    """Even a few on which no answer hangs."""
    everything = AllRows.select

    def most(self: AllRows, state: Any) -> Selection:
        rows = everything(self, state).rows
        return Selection(rows[(rows < 40) | (rows >= stop)])

    monkeypatch.setattr(AllRows, "select", most)
    assert await failing(demo) == fails


async def test_rows_written_to_the_wrong_place_fail(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each K with the V of the row before: nothing is wrong with the store, and recomputing everything mends it.

    (K and V moved together would change nothing: attention is over a set, and K itself carries the position.)
    """
    write_kv = RowModel.write_kv

    def shifted(self: RowModel, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        write_kv(self, layer, rows, k, v.roll(1, 0))

    monkeypatch.setattr(RowModel, "write_kv", shifted)
    assert await failing(demo) == ["compiled-place"]


async def test_a_store_that_alters_what_it_holds_fails(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    find = blend.load._find

    def altered(*args: Any) -> Any:
        found = find(*args)
        if isinstance(found, Miss):
            return found

        def read(layer: int, k: Tensor, v: Tensor) -> None:
            found.read(layer, k, v)
            v.mul_(1 + 1e-6)

        return SimpleNamespace(header=found.header, tier=found.tier, read=read)

    monkeypatch.setattr(blend.load, "_find", altered)
    assert await failing(demo) == ["stored-bytes"]


async def test_keys_compiled_one_row_off_fail(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_chunks = blend.method.compile_chunks

    def off(model: Any, job: Any) -> Any:
        turn = model.rope.inv_freq.float()
        return [(rotate(k, 1, turn), v) for k, v in compile_chunks(model, job)]

    monkeypatch.setattr(blend.method, "compile_chunks", off)
    assert "compiled-place" in await failing(demo)


async def test_a_model_that_is_not_exact_is_not_calibrated(demo: Engine, leaky_mask: None) -> None:
    made = await certify(demo, load_tokenizer(str(DEMO)), small_plan(), compile="document", codec="raw")
    assert not made.passed
    assert made.profile == made.ratios == ()
    assert any(r.startswith("check causality failed: ") and "allowed 0" in r for r in made.reasons)


# Calibration --------------------------------------------------------------------------------------------------------


def small_plan(context: Any = "document", **more: Any) -> Any:
    given: dict[str, Any] = {"questions": 4, "documents": 2, "tasks": ("same-chunk", "cross-chunk")}
    return make_plan(CompileSettings(context=context), **given | more)


@pytest.fixture
async def certified_demo(demo: Engine, tmp_path: Path) -> Any:
    return await certify(
        demo, load_tokenizer(str(DEMO)), small_plan(), compile="document", codec="raw", out=tmp_path / "out.jsonl"
    )


async def test_the_demo_model_passes(demo: Engine, certified_demo: Any, tmp_path: Path) -> None:
    made = certified_demo
    assert (made.passed, made.reasons) == (True, ())
    assert made.ratio in (0.05, 0.1, 0.15, 0.25)
    made.require(demo.info.layout, demo.info.tokenizer, "document", "raw")
    assert made.selector in {t.selector for t in made.profile} == set(candidates(demo.info.layout.layers))
    whole = [t for t in made.ratios if t.task == "all"]
    assert [t.ratio for t in whole] == [0.0, 0.05, 0.1, 0.15, 0.25]
    assert {t.n for t in whole} == {6}  # of eight questions two chose the layers
    assert {t.task for t in made.ratios} == {"all", "same-chunk", "cross-chunk"}
    write(made, tmp_path / "it.json")
    assert read(tmp_path / "it.json") == made


async def test_an_interrupted_run_goes_on_and_finds_the_same(
    demo: Engine, certified_demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:4]) + lines[4][:40])  # died in the middle of a line
    again = await certify(demo, load_tokenizer(str(DEMO)), small_plan(), compile="document", codec="raw", out=out)
    assert replace(again, created="") == replace(certified_demo, created="")
    assert len(out.read_bytes().splitlines()) == len(lines)


async def test_random_weights_do_not_pass(tmp_path: Path) -> None:
    """Exact, but what it says hangs on every row: a tenth of them is not enough."""
    engine = await start(write_model(tmp_path / "tiny", "llama"))
    try:
        plan = small_plan("prefix", chunk_tokens=(20, 40), max_tokens=8)
        made = await certify(engine, load_tokenizer(engine.info.model), plan, compile="prefix", codec="raw")
    finally:
        await engine.stop()
    assert all(c.passed for c in made.checks)
    assert not made.passed
    assert made.reasons[0].startswith("agreement with full prefill is 0.")
    assert "at ratio 0.25, below 0.97" in made.reasons[0]


def trials(*figures: tuple[float, float, float]) -> list[Trial]:
    """From (ratio, agreement, score); full prefill scores 0.9, and a task of its own is always bad."""
    return [Trial("all", "s", r, 100, a, s, 0.9, None) for r, a, s in figures] + [
        Trial("some", "s", r, 100, 0.0, 0.0, 0.9, None) for r, _, _ in figures
    ]


def test_the_smallest_ratio_that_is_good_enough_is_taken() -> None:
    assert least_ratio(trials((0.0, 0.5, 0.6), (0.05, 0.97, 0.89), (0.1, 0.98, 0.9), (0.25, 1.0, 0.9)), 0.97) == 0.05


def test_reuse_alone_is_never_what_auto_means() -> None:
    assert least_ratio(trials((0.0, 1.0, 0.9), (0.05, 1.0, 0.9)), 0.97) == 0.05


def test_a_ratio_below_one_that_fails_was_lucky() -> None:
    assert least_ratio(trials((0.0, 0.98, 0.9), (0.05, 0.96, 0.9), (0.1, 0.98, 0.9)), 0.97) == 0.1


def test_what_the_largest_ratio_lacks_is_said() -> None:
    lost = trials((0.1, 0.99, 0.9), (0.25, 0.955, 0.88))
    assert least_ratio(lost, 0.97) is None
    assert shortfalls(lost, 0.97) == [
        "agreement with full prefill is 0.955 at ratio 0.25, below 0.97",
        "the score at ratio 0.25 is 0.020 below full prefill's, allowed 0.01",
    ]


def test_the_profile_covers_every_layer_in_quarters() -> None:
    assert len(candidates(32)) == len(candidates(6)) == 6
    assert candidates(6)[0] == candidates(32)[0] == AUTO
    for band in ("upper", "0-7", "8-15", "16-23", "24-31"):
        assert any(f"layers={band}" in spec for spec in candidates(32)), band
    assert asking("heads(rows=1)+question(pool=4,layers=last):0.5", "2-3") == (
        "heads(rows=1)+question(layers=2-3,pool=4):0.5"
    )
    assert asking("question(layers=last)", "all") == "question"


def test_profile_and_ratios_share_no_question() -> None:
    assert [split(n) for n in (2, 4, 32)] == [(1, 1), (1, 3), (8, 24)]


def test_certificates_are_measured_on_seeds_of_their_own() -> None:
    """Figures we publish use the seeds from 0 on."""
    assert make_plan(CompileSettings(), questions=2, documents=4).seed == SEED >= 900_000
    assert "antecedent-missing" not in CALIBRATION_TASKS
