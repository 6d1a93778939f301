"""GET /livez, /readyz, /metrics; what the guard found."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from app.certify.lookup import for_report
from app.errors import NotReadyError, failure
from app.metrics import CONTENT_TYPE
from app.routes.cache import store_stats
from app.routes.common import ServiceOf
from app.service import Service
from store.errors import StoreError

CHECK_S = 10.0
router = APIRouter()
log = logging.getLogger(__name__)


@router.get("/livez")
async def livez() -> dict[str, str]:
    """The process answers. Says nothing about what it can do: that is ``/readyz``."""
    return {"status": "alive"}


@router.get("/readyz")
async def readyz(service: ServiceOf) -> Response:
    """Every part, each asked to do something; 503 if one cannot."""
    info = service.engine.info
    parts = {
        "engine": await _part(service.engine.check(), name=info.name, version=info.version, device=info.device),
        "store": await _part(asyncio.to_thread(_store, service)),
        "index": await _part(asyncio.to_thread(_index, service)),
    }
    broken = [name for name, part in parts.items() if not part["ok"]]
    if not broken:
        certificate = for_report(service.engine.certificate)
        return JSONResponse(
            {"status": "ready", "model": service.settings.served_name, "certificate": certificate, "parts": parts}
        )
    failed = failure(NotReadyError(f"not ready: {', '.join(broken)}"))
    return JSONResponse(failed.body | {"status": "not ready", "parts": parts}, failed.status, failed.headers)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: ServiceOf) -> Response:
    """Prometheus text: the service's own, then the engine's."""
    own = service.metrics
    own.jobs.set(service.jobs.running if service.jobs else 0)
    own.running.set(service.traffic.running)
    try:
        own.store.show(await store_stats(service))
    except StoreError as e:
        log.warning("the store gave no figures: %s", e)
    text = own.text() + await service.engine.metrics()
    return PlainTextResponse(text, media_type=CONTENT_TYPE)


@router.get("/guard")
async def guard(service: ServiceOf) -> dict[str, Any]:
    """Every collection whose answers were compared with full prefill, and how much of it is recomputed at least."""
    return {"object": "list", "data": service.guard.view()}


@router.delete("/guard/{collection:path}")
async def reset_guard(service: ServiceOf, collection: str) -> dict[str, Any]:
    """Forget what the guard found about a collection: it is served as asked again."""
    await service.guard.reset(collection)
    return {"collection": collection, "object": "guard.reset"}


async def _part(check: Awaitable[dict[str, Any] | None], **details: Any) -> dict[str, Any]:
    try:
        found = await asyncio.wait_for(check, CHECK_S)
    except Exception as e:  # whatever is wrong with a part, the others are still reported
        log.warning("readiness: %s", e or type(e).__name__)
        return {"ok": False, "error": type(e).__name__, **details}
    return {"ok": True, **details, **(found or {})}


def _store(service: Service) -> dict[str, Any]:
    stats = service.engine.store.stats()
    return {"tier": stats.tier, "entries": stats.entries, "bytes": stats.bytes}


def _index(service: Service) -> dict[str, Any]:
    collections = service.retriever.collections()
    return {"collections": len(collections), "chunks": sum(c.chunks for c in collections)}
