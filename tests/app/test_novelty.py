"""The novelty benchmark asks what it says it asks, and reports nothing when an answer was wrong or a chunk missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from app.bench.novelty import Novelty, NoveltySetup, Quarter, verdict
from app.bench.shot import BenchError
from app.bench.ttft import Setup, make_arms, run_ttft
from app.trivial import ByteTokenizer, TrivialEngine
from blend.types import CompileJob, CompileResult, Request
from store import StoreConfig, open_store

# A token of the trivial engine has 16 bytes of KV: the pool has 12 x 64 x 16 bytes and the prefix; memory, a third.
SETUP = NoveltySetup(queries=16, chunks=4, chunk=64, pool=12, check_every=5, selector="none", ratio=0.0)
RAM = 4096


class Watched(TrivialEngine):
    """Keeps every request that was blended from the store."""

    def __init__(self, path: Path, ram_bytes: int = RAM) -> None:
        super().__init__(open_store(StoreConfig(path=path, ram_bytes=ram_bytes)))
        self.asked: list[Request] = []

    def generate(self, request: Request):  # type: ignore[no-untyped-def]
        self.asked.append(request)
        return super().generate(request)


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of letters: an answer needs something to say."""
    letters = [i for i in range(ByteTokenizer.vocab_size) if not ord("a") <= i <= ord("z")]
    monkeypatch.setattr(ByteTokenizer, "all_special_ids", letters, raising=False)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Watched]:
    made = Watched(tmp_path / "kv")
    yield made
    made.store.close()


async def run(engine: TrivialEngine, setup: NoveltySetup = SETUP) -> list[Quarter]:
    return await Novelty(engine, engine.tokenizer, setup).run(lambda _: None)


async def test_every_query_has_its_number_of_distinct_chunks_in_an_order_of_its_own(engine: Watched) -> None:
    quarters = await run(engine)
    assert [len(q.seconds) for q in quarters] == [4, 4, 4, 4]
    timed = [r for r in engine.asked if r.blend.mode == "blend" and r.blend.recompute_ratio == 0.0]
    orders = [tuple(s.key for s in r.prompt.segments if s.kind == "chunk") for r in timed]
    assert len(orders) == 16
    assert all(len(set(order)) == 4 for order in orders)
    assert sum(q.new_orders for q in quarters) == len(set(orders))


async def test_chunks_are_stored_once_however_they_are_ordered(engine: Watched) -> None:
    quarters = await run(engine)
    assert verdict(quarters)["bytes_per_chunk_constant"] is True
    assert engine.store.stats().entries == 13  # the pool and the prefix
    assert {tier for q in quarters for tier in q.tiers} <= {"ram", "ssd"}


async def test_outputs_are_checked_on_the_way_and_a_wrong_one_ends_it(engine: Watched) -> None:
    await run(engine)
    checks = [r for r in engine.asked if r.blend.mode == "full"]
    assert len(checks) == 4  # queries 0, 5, 10 and 15

    class Wrong(Watched):
        def _answer(self, prompt):  # type: ignore[no-untyped-def]
            said = super()._answer(prompt)
            return said[::-1] if self.asked[-1].blend.recompute_ratio >= 1.0 else said

    wrong = Wrong(engine.store.config.path.parent / "other")  # type: ignore[attr-defined]
    try:
        with pytest.raises(BenchError, match="outputs differ"):
            await run(wrong)
    finally:
        wrong.store.close()


async def test_a_chunk_that_is_missing_ends_it(tmp_path: Path) -> None:
    class Forgetful(Watched):
        async def compile(self, job: CompileJob) -> CompileResult:
            result = await super().compile(job)
            self.store.delete(job.keys[0])
            return result

    engine = Forgetful(tmp_path / "kv", ram_bytes=64)
    try:
        with pytest.raises(BenchError, match="must be smaller than the pool"):
            await run(engine)  # nothing is stored at all
    finally:
        engine.store.close()


async def test_memory_that_holds_the_whole_pool_is_refused(tmp_path: Path) -> None:
    engine = Watched(tmp_path / "kv", ram_bytes=1 << 20)
    try:
        with pytest.raises(BenchError, match="--ram-mib"):
            await run(engine)
    finally:
        engine.store.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"queries": 4}, "queries is 4"), ({"chunks": 13}, "chunks 13"), ({"chunk": 0}, "chunk"), ({"ratio": 2.0}, "2.0")],
)
def test_a_setup_that_cannot_be_is_refused_with_its_value(change: dict[str, float], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        replace(SETUP, **change)


def test_a_decaying_gain_and_growing_copies_are_seen() -> None:
    quarters = [Quarter(seconds=[1.0, s], bytes_per_chunk=b) for s, b in ((1.0, 10), (1.0, 10), (2.0, 10), (3.0, 20))]
    found = verdict(quarters)
    assert found["last_over_second"] == 2.0
    assert found["bytes_per_chunk_constant"] is False
    assert found["all_orders_new"] is False


class TestTiers:
    SETUP = Setup(context=256, chunk=64, ratios=(0.25,), repeats=2, tiers=("ram", "ssd"))

    async def test_each_arm_is_timed_with_its_chunks_where_it_says(self, tmp_path: Path) -> None:
        engine = Watched(tmp_path / "kv", ram_bytes=1 << 20)
        try:
            arms = make_arms("full-eager", self.SETUP, prefix_hit=False)
            await run_ttft(engine, engine.tokenizer, arms, self.SETUP)
            found = {(a.name, a.tier): a.report()["outputs_checked"] for a in arms if a.name in ("reuse", "auto")}
            assert found == dict.fromkeys([(n, t) for n in ("reuse", "auto") for t in ("ram", "ssd")], True)
        finally:
            engine.store.close()

    async def test_chunks_from_elsewhere_leave_an_arm_without_times(self, tmp_path: Path) -> None:
        class Stuck(Watched):
            async def cool(self, keys):  # type: ignore[no-untyped-def]
                return 0

        engine = Stuck(tmp_path / "kv", ram_bytes=1 << 20)
        try:
            arms = [
                a for a in make_arms("full-eager", self.SETUP, prefix_hit=False) if a.name in ("full-eager", "reuse")
            ]
            await run_ttft(engine, engine.tokenizer, arms, self.SETUP)
            problems = {a.tier: a.problem for a in arms if a.name == "reuse"}
            assert problems["ram"] is None
            assert "came from ram, not from ssd" in str(problems["ssd"])
        finally:
            engine.store.close()

    async def test_memory_that_is_too_small_is_said(self, tmp_path: Path) -> None:
        engine = Watched(tmp_path / "kv", ram_bytes=1024)
        try:
            arms = make_arms("full-eager", self.SETUP, prefix_hit=False)
            with pytest.raises(BenchError, match=r"store\.ram_gib"):
                await run_ttft(engine, engine.tokenizer, arms, self.SETUP)
        finally:
            engine.store.close()

    def test_an_unknown_tier_is_named(self) -> None:
        with pytest.raises(BenchError, match="tier 'tape' is unknown; choose among ram, ssd"):
            Setup(tiers=("ram", "tape"))


def test_a_shot_of_the_same_arm_in_two_tiers_has_two_labels() -> None:
    from app.bench.ttft import Arm, label

    labels = {label(Arm("auto", "blend", "auto", 0.1, tier).report()) for tier in (None, "ram", "ssd")}
    assert labels == {"auto@0.1", "auto@0.1/ram", "auto@0.1/ssd"}
