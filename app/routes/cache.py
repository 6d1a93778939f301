"""The stored KV: GET /cache/summary and /cache/chunks, and what operators do to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from app.choose import Chosen, Selection
from app.control import Sort
from app.routes.common import ServiceOf, json_bytes, json_schema
from app.schema.body import read_body, warning_header
from app.schema.cache import GcRequest, MoveRequest, SelectRequest, VerifyRequest
from app.service import Service
from app.stored import changed_view, entry_view, stats_view
from blend.errors import EngineError
from store.base import StoreStats
from store.errors import StoreError
from store.types import KVKey

STATS_S = 2.0
_Given = Annotated[list[str] | None, Query(max_length=1000)]
router = APIRouter()
log = logging.getLogger(__name__)


@router.get("/cache/summary")
async def cache_summary(service: ServiceOf) -> dict[str, Any]:
    """What is stored, tier by tier; what was evicted, refused and found corrupt so far; what was pinned; upkeep."""
    settings = service.settings.store
    pinned = await asyncio.to_thread(service.control.pins.read)
    return {
        "object": "cache.summary",
        **stats_view(await store_stats(service)),
        "settings": settings.model_dump(mode="json"),
        "pins": {
            "all": pinned.everything,
            "collections": sorted(pinned.collections),
            "files": [{"collection": c, "file_id": d} for c, d in sorted(pinned.documents)],
            "chunk_ids": sorted(pinned.chunks),
        },
        "upkeep": service.upkeep.view(),
    }


@router.get("/cache/chunks")
async def cache_chunks(
    service: ServiceOf,
    collection: _Given = None,
    file_id: _Given = None,
    chunk_id: _Given = None,
    pinned: bool | None = None,
    codec: Annotated[str | None, Query(max_length=64)] = None,
    sort: Sort = "key",
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    after: Annotated[str | None, Query(max_length=256)] = None,
) -> dict[str, Any]:
    """Stored chunks, highest ``sort`` value first. ``next`` of a page is ``after`` for the next one."""
    chosen = Selection(tuple(collection or ()), tuple(file_id or ()), tuple(chunk_id or ()))
    found = await asyncio.to_thread(
        service.control.listing, chosen, pinned=pinned, codec=codec, sort=sort, limit=limit, after=after
    )
    return {
        "object": "list",
        "data": [entry_view(row) for row in found.rows],
        "total": found.total,
        "bytes": found.bytes,
        "has_more": found.next is not None,
        "next": found.next,
    }


@router.post("/cache/pin", openapi_extra=json_schema(SelectRequest))
async def cache_pin(request: Request, service: ServiceOf) -> Response:
    """Keep from eviction and expiry: what is stored of the selection, and what will be compiled for it."""
    layout = service.engine.info.layout.digest.hex()
    return await _change(request, service, "pin", lambda chosen: service.control.pin(chosen, layout=layout))


@router.post("/cache/unpin", openapi_extra=json_schema(SelectRequest))
async def cache_unpin(request: Request, service: ServiceOf) -> Response:
    """No longer. ``kept``: entries that stay pinned because something wider is."""
    return await _change(request, service, "unpin", service.control.unpin)


@router.post("/cache/evict", openapi_extra=json_schema(SelectRequest))
async def cache_evict(request: Request, service: ServiceOf) -> Response:
    """Delete stored KV. ``kept``: pinned entries stay."""
    return await _change(request, service, "evict", service.control.evict)


@router.post("/cache/warm", openapi_extra=json_schema(SelectRequest))
async def cache_warm(request: Request, service: ServiceOf) -> Response:
    """Bring stored KV into the memory of the process that blends."""
    body, unknown = read_body(await json_bytes(request), SelectRequest, strict=service.settings.strict)
    return await _move(service, body.selection, "ram", unknown)


@router.post("/cache/move", openapi_extra=json_schema(MoveRequest))
async def cache_move(request: Request, service: ServiceOf) -> Response:
    """Bring stored KV into that memory (``ram``), or drop it from there (``ssd``): it stays on disk."""
    body, unknown = read_body(await json_bytes(request), MoveRequest, strict=service.settings.strict)
    return await _move(service, body.selection, body.tier, unknown)


@router.post("/cache/verify", openapi_extra=json_schema(VerifyRequest))
async def cache_verify(request: Request, service: ServiceOf, wait: bool = True) -> Response:
    """Read every stored byte and check it. 202 if that takes longer than a request may, or with ``wait=false``: it
    goes on, and ``/cache/summary`` has its report."""
    body, unknown = read_body(await json_bytes(request), VerifyRequest, strict=service.settings.strict)
    report = await service.upkeep.verify(repair=body.repair, patience_s=_patience(service, wait))
    return _report("cache.verify", report, unknown)


@router.post("/cache/gc", openapi_extra=json_schema(GcRequest))
async def cache_gc(request: Request, service: ServiceOf, wait: bool = True) -> Response:
    """Expire, evict down to the limit, give dead bytes back to the device. 202 as for ``/cache/verify``."""
    body, unknown = read_body(await json_bytes(request), GcRequest, strict=service.settings.strict)
    report = await service.upkeep.gc(full=body.full, patience_s=_patience(service, wait))
    return _report("cache.gc", report, unknown)


async def store_stats(service: Service) -> StoreStats:
    """Of the process that blends, or what this process sees of the store if that one does not answer soon."""
    try:
        return await asyncio.wait_for(service.engine.store_stats(), STATS_S)
    except (TimeoutError, EngineError, StoreError) as e:
        log.warning("the engine gave no figures of its store: %s", e or type(e).__name__)
        return await asyncio.to_thread(service.engine.store.stats)


async def _change(request: Request, service: Service, what: str, change: Callable[[Selection], Any]) -> Response:
    body, unknown = read_body(await json_bytes(request), SelectRequest, strict=service.settings.strict)
    done = await asyncio.to_thread(change, body.selection)
    return JSONResponse({"object": f"cache.{what}", **changed_view(done)}, headers=warning_header(unknown))


async def _move(service: Service, selection: Selection, tier: str, unknown: list[str]) -> Response:
    layout = service.engine.info.layout.digest.hex()
    chosen: Chosen = await asyncio.to_thread(service.control.choose, selection, layout=layout)
    keys: list[KVKey] = chosen.keys
    changed = await (service.engine.warm(keys) if tier == "ram" else service.engine.cool(keys))
    view = {"object": "cache.move", "tier": tier, "chunks": chosen.chunks, "entries": len(keys), "changed": changed}
    return JSONResponse(view | {"bytes": chosen.bytes}, headers=warning_header(unknown))


def _patience(service: Service, wait: bool) -> float:
    return service.settings.limits.request_s if wait else 0.0


def _report(kind: str, report: dict[str, Any] | None, unknown: list[str]) -> Response:
    view = {"object": kind, "state": "running" if report is None else "completed", **(report or {})}
    return JSONResponse(view, 202 if report is None else 200, headers=warning_header(unknown))
