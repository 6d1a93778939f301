"""Counters of one service, in a registry of its own: two services in one process never share a number."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from blend.types import BlendStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MOST_COLLECTIONS = 100  # clients make collections: further ones share the label "other"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """The service's metrics; names are part of its contract."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = r = registry or CollectorRegistry()
        self.requests = Counter("ragblend_requests", "Answered HTTP requests.", ["route", "status"], registry=r)
        self.ttft = Histogram(
            "ragblend_ttft_seconds", "Request to first token.", ["path"], buckets=_SECONDS, registry=r
        )
        self.context = Counter("ragblend_context_tokens", "Context rows by what happened.", ["kind"], registry=r)
        self.lookups = Counter(
            "ragblend_chunk_lookups", "Chunks looked up in the store.", ["tier", "result"], registry=r
        )
        self.documents = Counter("ragblend_ingest_documents", "Documents ingested, by result.", ["result"], registry=r)
        self.invalid_citations = Counter(
            "ragblend_invalid_citations", "Citation markers of no passage, removed.", registry=r
        )
        self.store_bytes = Gauge("ragblend_store_bytes", "Payload bytes in the KV store.", registry=r)
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
        return generate_latest(self.registry).decode()
