"""What /metrics says of the store: the store's own counters as they stand, and estimates one can check by hand."""

from __future__ import annotations

import asyncio
import math
from typing import Any, get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.metrics import Metrics
from app.saving import PrefillRate
from blend.errors import EngineError
from blend.types import BlendStats, ChunkStats
from store.base import GcReport, StoreStats, TierStats, VerifyReport
from store.config import StoreConfig
from store.memory import MemoryStore
from store.types import KVKey, MissReason
from tests.app.conftest import Kit, OpenKit

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


async def scraped(kit: Kit) -> Samples:
    answer = await kit.client.get("/metrics")
    assert answer.status_code == 200
    return samples(answer.text)


def blended(*, tiers: tuple[str | None, ...], load_s: float = 0.5, wait_s: float = 0.0, missed: int = 0) -> BlendStats:
    """100 tokens of each tier, 90 of them reused; ``None`` is a miss."""
    chunks = tuple(
        ChunkStats(f"c{n}", 100, 90, 10, 0, tier=tier)
        if tier
        else ChunkStats(f"c{n}", 100, 0, 0, 100, miss_reason="evicted")
        for n, tier in enumerate(tiers)
    )
    hits = sum(t is not None for t in tiers)
    tokens = 100 * len(tiers)
    return BlendStats(
        mode="blend", tokens=tokens, reused=90 * hits, recomputed=10 * hits, missing=100 * (len(tiers) - hits),
        load_s=load_s, wait_s=wait_s, loaded_bytes=1000 * hits, chunks=chunks,
    )  # fmt: skip


class TestLoading:
    def test_bytes_and_seconds_go_to_the_tier_that_had_them(self) -> None:
        metrics = Metrics()
        metrics.count_blend(blended(tiers=("ram", "ram", None), load_s=0.002))
        metrics.count_blend(blended(tiers=("ram", "ssd", "ssd", "ssd"), load_s=0.25, wait_s=0.125))
        found = samples(metrics.text())
        assert value(found, "ragblend_kv_loaded_bytes_total", tier="ram") == 3000
        assert value(found, "ragblend_kv_loaded_bytes_total", tier="ssd") == 3000
        assert value(found, "ragblend_kv_load_seconds_sum", tier="ram") == 0.002
        assert value(found, "ragblend_kv_load_seconds_sum", tier="mixed") == 0.25
        assert value(found, "ragblend_kv_wait_seconds_sum", tier="mixed") == 0.125
        assert value(found, "ragblend_chunk_lookups_total", tier="ssd", result="hit") == 3
        assert value(found, "ragblend_chunk_lookups_total", tier="none", result="evicted") == 1

    def test_every_miss_reason_is_there_from_the_start(self) -> None:
        found = samples(Metrics().text())
        for reason in get_args(MissReason):
            assert value(found, "ragblend_chunk_lookups_total", tier="none", result=reason) == 0

    def test_nothing_loaded_is_no_observation(self) -> None:
        metrics = Metrics()
        metrics.count_blend(blended(tiers=(None, None)))
        assert not any(name.startswith("ragblend_kv_load_seconds_count") for name, _ in samples(metrics.text()))


class TestSavedSeconds:
    def test_they_are_reused_tokens_times_the_learned_rate_less_the_wait(self) -> None:
        metrics = Metrics()
        metrics.prefill.saw_full(1000, 2.0)
        metrics.count_blend(blended(tiers=("ssd", "ssd"), wait_s=0.06))
        found = samples(metrics.text())
        assert value(found, "ragblend_prefill_seconds_per_token") == pytest.approx(0.002)
        assert value(found, "ragblend_saved_prefill_seconds_total") == pytest.approx(180 * 0.002 - 0.06)
        assert value(found, "ragblend_lost_prefill_seconds_total") == 0

    def test_a_request_that_lost_counts_as_lost(self) -> None:
        metrics = Metrics()
        metrics.prefill.saw_full(1000, 0.1)
        metrics.count_blend(blended(tiers=("ssd",), wait_s=0.5))
        found = samples(metrics.text())
        assert value(found, "ragblend_saved_prefill_seconds_total") == 0
        assert value(found, "ragblend_lost_prefill_seconds_total") == pytest.approx(0.5 - 90 * 0.0001)

    def test_nothing_is_claimed_before_anything_was_measured(self) -> None:
        metrics = Metrics()
        metrics.count_blend(blended(tiers=("ssd",)))
        found = samples(metrics.text())
        assert math.isnan(value(found, "ragblend_prefill_seconds_per_token"))
        assert value(found, "ragblend_saved_prefill_seconds_total") == 0

    def test_full_prefills_count_before_compile_passes_and_slow_ones_do_not_matter(self) -> None:
        rate = PrefillRate()
        assert rate.seconds_per_token is None
        rate.saw_compile(1000, 9.0)
        rate.saw_full(8, 9.0)  # too short to tell
        assert rate.seconds_per_token == 0.009
        for seconds in (1.0, 1.1, 60.0):
            rate.saw_full(1000, seconds)
        assert rate.seconds_per_token == pytest.approx(0.0011)

    async def test_a_server_learns_from_compiling_and_from_full_prefills(self, kit: Kit) -> None:
        compiled = kit.service.metrics.prefill.seconds_per_token
        assert compiled is not None
        kit.engine.delay_s = 0.05
        assert (await kit.chat(rag={"blend": {"mode": "full"}})).status_code == 200
        learned = value(await scraped(kit), "ragblend_prefill_seconds_per_token")
        assert learned != compiled
        tokens = 400  # of the prompt, about
        assert 0.05 / tokens / 3 < learned < 3.0 / tokens * 3

    async def test_requests_side_by_side_teach_nothing(self, kit: Kit) -> None:
        kit.engine.delay_s = 0.05
        before = kit.service.metrics.prefill.seconds_per_token
        await asyncio.gather(*(kit.chat(rag={"blend": {"mode": "full"}}) for _ in range(2)))
        assert kit.service.metrics.prefill.seconds_per_token == before


class TestStoreFigures:
    STATS = StoreStats(
        tier="ssd", entries=7, bytes=700, raw_bytes=1400, pinned=2,
        counters={"evicted:capacity": 3, "evicted:share": 1, "refused": 4, "corrupt": 5, "put": 20, "deleted": 6},
        tiers=(TierStats("ram", 2, 200, 210, 1000), TierStats("ssd", 7, 700, 4096)),
    )  # fmt: skip

    def test_counters_are_shown_as_the_store_has_them(self) -> None:
        metrics = Metrics()
        for _ in range(2):  # not added up scrape by scrape
            metrics.store.show(self.STATS)
            found = samples(metrics.text())
        assert value(found, "ragblend_store_evictions_total", reason="capacity") == 3
        assert value(found, "ragblend_store_evictions_total", reason="share") == 1
        assert value(found, "ragblend_store_evictions_total", reason="expired") == 0
        assert value(found, "ragblend_store_refused_total") == 4
        assert value(found, "ragblend_store_checksum_failures_total") == 5
        assert value(found, "ragblend_store_puts_total") == 20
        assert value(found, "ragblend_store_deletes_total") == 6

    def test_each_tier_has_its_bytes_and_its_limit(self) -> None:
        metrics = Metrics()
        metrics.store.show(self.STATS)
        found = samples(metrics.text())
        assert value(found, "ragblend_store_tier_bytes", tier="ram") == 200
        assert value(found, "ragblend_store_tier_held_bytes", tier="ssd") == 4096
        assert value(found, "ragblend_store_tier_limit_bytes", tier="ram") == 1000
        assert ("ragblend_store_tier_limit_bytes", frozenset({("tier", "ssd")})) not in found
        assert value(found, "ragblend_store_bytes") == 700
        assert value(found, "ragblend_store_raw_bytes") == 1400
        assert value(found, "ragblend_store_pinned_entries") == 2

    def test_verification_and_collection_are_counted(self) -> None:
        metrics = Metrics()
        metrics.store.verified(VerifyReport(10, (KVKey(bytes(32)), KVKey(b"x" * 32)), 1))
        metrics.store.collected(GcReport(100, 50, 1, 2))
        metrics.store.collected(GcReport(1, 0, 0, 0))
        found = samples(metrics.text())
        assert value(found, "ragblend_store_verified_entries_total", result="good") == 8
        assert value(found, "ragblend_store_verified_entries_total", result="bad") == 2
        assert value(found, "ragblend_store_verified_entries_total", result="repaired") == 1
        assert value(found, "ragblend_store_bad_entries") == 1
        assert value(found, "ragblend_store_gc_freed_bytes_total") == 101
        assert value(found, "ragblend_store_gc_moved_bytes_total") == 50

    async def test_a_service_shows_what_its_store_holds(self, open_kit: OpenKit) -> None:
        kit = await open_kit(store=MemoryStore(StoreConfig(max_bytes=1 << 20)))
        await kit.ingest()
        await kit.client.post("/cache/evict", json={"file_ids": ["doc-mara"]})
        await kit.chat()
        found, stats = await scraped(kit), kit.engine.store.stats()
        assert value(found, "ragblend_store_entries") == stats.entries == 3
        assert value(found, "ragblend_store_bytes") == stats.bytes > 0
        assert value(found, "ragblend_store_tier_limit_bytes", tier="ram") == 1 << 20
        assert value(found, "ragblend_store_puts_total") == 5
        assert value(found, "ragblend_chunk_lookups_total", tier="none", result="evicted") >= 1

    @pytest.mark.parametrize("trouble", ["hangs", "fails"])
    async def test_an_engine_that_gives_no_figures_does_not_hide_the_disk(
        self, kit: Kit, monkeypatch: pytest.MonkeyPatch, trouble: str
    ) -> None:
        async def store_stats() -> Any:
            if trouble == "fails":
                raise EngineError("the worker is gone")
            await asyncio.sleep(60)

        monkeypatch.setattr(kit.engine, "store_stats", store_stats)
        monkeypatch.setattr("app.routes.cache.STATS_S", 0.05)
        assert value(await scraped(kit), "ragblend_store_entries") == 5
        assert (await kit.client.get("/cache/summary")).json()["entries"] == 5
