"""Counters of one service, in a registry of its own: two services in one process never share a number."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from blend.types import BlendStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
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
        for kind in ("reused", "recomputed", "missing"):
            self.context.labels(kind)  # a rate over a series that does not exist yet is no answer

    def count_blend(self, stats: BlendStats) -> None:
        """Account for one request's context."""
        self.context.labels("reused").inc(stats.reused)
        self.context.labels("recomputed").inc(stats.recomputed)
        self.context.labels("missing").inc(stats.missing)
        for chunk in stats.chunks if stats.mode != "full" else ():  # a full prefill looks nothing up
            result = "hit" if chunk.tier else chunk.miss_reason or "miss"
            self.lookups.labels(chunk.tier or "none", result).inc()

    def text(self) -> str:
        """Prometheus text format."""
        return generate_latest(self.registry).decode()
