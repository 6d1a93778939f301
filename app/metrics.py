"""Counters of one service, in a registry of its own: two services in one process never share a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from app.saving import PrefillRate
from app.store_metrics import StoreMetrics
from blend.types import BlendStats
from store.types import MissReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MOST_COLLECTIONS = 100  # clients make collections: further ones share the label "other"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120)
_LOAD_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The service's metrics; names are part of its contract."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = r = registry or CollectorRegistry()
        self.store = StoreMetrics(r)
        self.prefill = PrefillRate()
        self.requests = Counter("ragblend_requests", "Answered HTTP requests.", ["route", "status"], registry=r)
        self.ttft = Histogram(
            "ragblend_ttft_seconds", "Request to first token.", ["path"], buckets=_SECONDS, registry=r
        )
        self.context = Counter("ragblend_context_tokens", "Context rows by what happened.", ["kind"], registry=r)
        self.lookups = Counter(
            "ragblend_chunk_lookups", "Chunks looked up in the store.", ["tier", "result"], registry=r
        )
        self.loaded_bytes = Counter(
            "ragblend_kv_loaded_bytes", "KV read for requests, as the model computes with it.", ["tier"], registry=r
        )
        self.load_seconds = Histogram(
            "ragblend_kv_load_seconds",
            "Loading the KV of one request, which goes on while its first layers are computed; by the tier that had it "
            "(mixed: several).",
            ["tier"], buckets=_LOAD_SECONDS, registry=r,
        )  # fmt: skip
        self.wait_seconds = Histogram(
            "ragblend_kv_wait_seconds", "The part of it that computing stood still for.", ["tier"],
            buckets=_LOAD_SECONDS, registry=r,
        )  # fmt: skip
        self.saved_seconds = Counter(
            "ragblend_saved_prefill_seconds",
            "Estimate: reused tokens times ragblend_prefill_seconds_per_token, minus what was waited for their KV; "
            "requests for which that is negative count as ragblend_lost_prefill_seconds.",
            registry=r,
        )
        self.lost_seconds = Counter(
            "ragblend_lost_prefill_seconds",
            "Estimate, as ragblend_saved_prefill_seconds: by how much waiting was longer than prefill would have been.",
            registry=r,
        )
        self._prefill_rate = Gauge(
            "ragblend_prefill_seconds_per_token",
            "Median of the last full prefills that ran alone; until there is one, of the last compile passes.",
            registry=r,
        )
        self.documents = Counter("ragblend_ingest_documents", "Documents ingested, by result.", ["result"], registry=r)
        self.invalid_citations = Counter(
            "ragblend_invalid_citations", "Citation markers of no passage, removed.", registry=r
        )
        self.jobs = Gauge("ragblend_jobs", "Ingest jobs that have not ended.", registry=r)
        self.running = Gauge("ragblend_running_generations", "Generations in the engine now.", registry=r)
        self.guard_comparisons = Counter(
            "ragblend_guard_comparisons",
            "Answers compared with full prefill, by result and by who chose how to blend.",
            ["result", "chosen_by"],
            registry=r,
        )
        self._guard_agreement = Gauge(
            "ragblend_guard_agreement", "Share of the last comparisons that agreed.", ["collection"], registry=r
        )
        self._guard_kl = Gauge(
            "ragblend_guard_kl", "First token's mean KL of the last comparisons, nats.", ["collection"], registry=r
        )
        self._guard_level = Gauge(
            "ragblend_guard_level", "Least recompute ratio; 0: as asked, 1: full prefill.", ["collection"], registry=r
        )
        self._guard_switches = Counter(
            "ragblend_guard_switches", "Changes of the least recompute ratio.", ["collection", "direction"], registry=r
        )
        self._guarded: set[str] = set()
        for kind in ("reused", "recomputed", "missing"):
            self.context.labels(kind)  # a rate over a series that does not exist yet is no answer
        for reason in get_args(MissReason):
            self.lookups.labels("none", reason)
        for result in ("agree", "differ", "failed", "dropped"):
            for by in ("server", "client"):
                self.guard_comparisons.labels(result, by)

    def count_blend(self, stats: BlendStats) -> None:
        """Account for one request's context."""
        self.context.labels("reused").inc(stats.reused)
        self.context.labels("recomputed").inc(stats.recomputed)
        self.context.labels("missing").inc(stats.missing)
        for chunk in stats.chunks if stats.mode != "full" else ():  # a full prefill looks nothing up
            result = "hit" if chunk.tier else chunk.miss_reason or "miss"
            self.lookups.labels(chunk.tier or "none", result).inc()
        if stats.mode != "full":
            self._count_load(stats)

    def _count_load(self, stats: BlendStats) -> None:
        loaded: dict[str, int] = {}
        for chunk in stats.chunks:
            if chunk.tier:
                loaded[chunk.tier] = loaded.get(chunk.tier, 0) + chunk.reused + chunk.recomputed
        if not loaded:
            return
        for tier, tokens in loaded.items():
            self.loaded_bytes.labels(tier).inc(stats.loaded_bytes * tokens / max(1, sum(loaded.values())))
        tier = "mixed" if len(loaded) > 1 else next(iter(loaded))
        self.load_seconds.labels(tier).observe(stats.load_s)
        self.wait_seconds.labels(tier).observe(stats.wait_s)
        if (rate := self.prefill.seconds_per_token) is not None:
            saved = stats.reused * rate - stats.wait_s
            (self.saved_seconds if saved >= 0 else self.lost_seconds).inc(abs(saved))

    def show_guard(self, figures: Mapping[str, tuple[float | None, float | None, float]]) -> None:
        """Agreement, KL and least ratio of every guarded collection; of those that share a label, the worst."""
        for gauge in (self._guard_agreement, self._guard_kl, self._guard_level):
            gauge.clear()
        shown: dict[str, list[tuple[float | None, float | None, float]]] = {}
        for name, one in figures.items():
            shown.setdefault(self._collection(name), []).append(one)
        for label, found in shown.items():
            agreements, kls = [a for a, _, _ in found if a is not None], [k for _, k, _ in found if k is not None]
            if agreements:
                self._guard_agreement.labels(label).set(min(agreements))
            if kls:
                self._guard_kl.labels(label).set(max(kls))
            self._guard_level.labels(label).set(max(ratio for _, _, ratio in found))

    def guard_switched(self, collection: str, direction: str) -> None:
        """A collection's least ratio went ``up`` or ``down``."""
        self._guard_switches.labels(self._collection(collection), direction).inc()

    def _collection(self, name: str) -> str:
        if name not in self._guarded and len(self._guarded) >= _MOST_COLLECTIONS:
            return "other"
        self._guarded.add(name)
        return name

    def text(self) -> str:
        """Prometheus text format."""
        self._prefill_rate.set(self.prefill.seconds_per_token or float("nan"))
        return generate_latest(self.registry).decode()
