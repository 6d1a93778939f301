"""What the KV store says about itself, as metrics."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from store.base import GcReport, StoreStats, TierStats, VerifyReport

_COUNTERS = {
    "refused": ("ragblend_store_refused", "Chunks not admitted: worth less than what would have had to go."),
    "corrupt": ("ragblend_store_checksum_failures", "Entries whose bytes were not what was written; none was served."),
    "put": ("ragblend_store_puts", "Chunks stored."),
    "deleted": ("ragblend_store_deletes", "Chunks deleted, evicted ones not among them."),
    "promoted": ("ragblend_store_promotions", "Chunks brought from disk into memory."),
    "ram:evicted": ("ragblend_store_ram_evictions", "Chunks that left memory for others; they stay on disk."),
    "ram:refused": ("ragblend_store_ram_refused", "Chunks not kept in memory: worth less than what is there."),
}
_REASONS = ("capacity", "share", "expired", "asked")
_EVICTED = "evicted:"


class StoreMetrics:
    """Figures of the store, and of the work done on it through this service."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._shown = _Shown()
        registry.register(self._shown)
        self._verified = Counter(
            "ragblend_store_verified_entries", "Entries that a verification read.", ["result"], registry=registry
        )
        self._bad = Gauge(
            "ragblend_store_bad_entries", "Bad entries that the last verification left in place.", registry=registry
        )
        self._freed = Counter("ragblend_store_gc_freed_bytes", "Bytes given back to the device.", registry=registry)
        self._moved = Counter("ragblend_store_gc_moved_bytes", "Bytes copied for it.", registry=registry)
        for result in ("good", "bad", "repaired"):
            self._verified.labels(result)

    def show(self, stats: StoreStats) -> None:
        """``stats`` is what the next scrape shows."""
        self._shown.stats = stats

    def verified(self, report: VerifyReport) -> None:
        self._verified.labels("good").inc(report.checked - len(report.bad))
        self._verified.labels("bad").inc(len(report.bad))
        self._verified.labels("repaired").inc(report.repaired)
        self._bad.set(len(report.bad) - report.repaired)

    def collected(self, report: GcReport) -> None:
        self._freed.inc(report.freed)
        self._moved.inc(report.moved)


class _Shown(Collector):
    """The store counts for itself, over restarts: its counters are shown as they stand, not counted anew."""

    def __init__(self) -> None:
        self.stats: StoreStats | None = None

    def collect(self) -> Iterable[Metric]:
        stats = self.stats
        if stats is None:
            return
        yield _gauge("ragblend_store_entries", "Chunks in the KV store.", stats.entries)
        yield _gauge("ragblend_store_bytes", "Payload bytes in the KV store.", stats.bytes)
        yield _gauge("ragblend_store_raw_bytes", "The same uncompressed.", stats.raw_bytes)
        yield _gauge("ragblend_store_pinned_entries", "Chunks kept from eviction.", stats.pinned)
        yield from _tiers(tiers_of(stats))
        for name, (metric, text) in _COUNTERS.items():
            family = CounterMetricFamily(metric, text)
            family.add_metric([], stats.counters.get(name, 0))
            yield family
        evicted = CounterMetricFamily("ragblend_store_evictions", "Chunks evicted, by reason.", labels=["reason"])
        given = {name.removeprefix(_EVICTED) for name in stats.counters if name.startswith(_EVICTED)}
        for reason in (*_REASONS, *sorted(given - set(_REASONS))):
            evicted.add_metric([reason], stats.counters.get(_EVICTED + reason, 0))
        yield evicted


def tiers_of(stats: StoreStats) -> tuple[TierStats, ...]:
    """Its tiers; of a store that is one tier, that one."""
    return stats.tiers or (TierStats(stats.tier, stats.entries, stats.bytes, stats.bytes),)


def _gauge(name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, text)
    family.add_metric([], value)
    return family


def _tiers(tiers: Iterable[TierStats]) -> Iterable[Metric]:
    entries = GaugeMetricFamily("ragblend_store_tier_entries", "Chunks in a tier.", labels=["tier"])
    payload = GaugeMetricFamily("ragblend_store_tier_bytes", "Payload bytes in a tier.", labels=["tier"])
    held = GaugeMetricFamily("ragblend_store_tier_held_bytes", "What it takes, dead bytes too.", labels=["tier"])
    limit = GaugeMetricFamily("ragblend_store_tier_limit_bytes", "What it may take; none: no limit.", labels=["tier"])
    for tier in tiers:
        entries.add_metric([tier.tier], tier.entries)
        payload.add_metric([tier.tier], tier.bytes)
        held.add_metric([tier.tier], tier.held_bytes)
        if tier.limit_bytes is not None:
            limit.add_metric([tier.tier], tier.limit_bytes)
    yield from (entries, payload, held, limit)
