"""The demo collection in a service: ingested and precomputed, once per data folder."""

from __future__ import annotations

import asyncio
import logging

from app.demo.world import demo_collection
from app.precompute import precompute
from app.service import Service
from app.settings import Settings
from retriever.parse import from_text

COLLECTION = "default"
CHUNK_TOKENS = 128  # the demo model was trained on chunks of 66 to 124 tokens
log = logging.getLogger(__name__)


def for_demo(settings: Settings) -> Settings:
    """``settings`` with chunks as long as the demo model knows them, unless a length was set."""
    if "chunk_tokens" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"chunk_tokens": CHUNK_TOKENS})


async def load_demo(service: Service) -> None:
    """Ingest what is not there yet and compile what is not stored yet; a second call takes a moment.

    Raises as ``Retriever.ingest`` and ``precompute`` do.
    """
    documents = [
        from_text(d.text, title=d.title, filename=f"{d.id}.txt", document_id=d.id, metadata={"kind": d.kind})
        for d in demo_collection()
    ]
    results = await asyncio.to_thread(service.retriever.ingest, COLLECTION, documents)
    new = sum(not r.unchanged for r in results)
    report = await precompute(service, collection=COLLECTION)
    if report.error:
        log.warning("demo: some chunks were not precomputed: %s", report.error)
    log.info(
        "demo: %d documents (%d new), %d chunks precomputed, %d there already",
        len(results),
        new,
        report.done,
        report.skipped,
    )
