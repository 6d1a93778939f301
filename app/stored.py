"""Stored KV as operators see it: the same data over HTTP and on the command line."""

from __future__ import annotations

from typing import Any

from app.choose import PREFIX, Row
from app.control import Changed
from app.store_metrics import tiers_of
from store.base import StoreStats

REMEDY = "ragblend cache verify --repair makes the index anew"


def entry_view(row: Row) -> dict[str, Any]:
    """One stored chunk. ``file_id`` ``null``: no document of today has it (or it is the prefix)."""
    e, c = row.entry, row.chunk
    return {
        "object": "cache.chunk",
        "key": e.key.hex,
        "chunk_id": PREFIX if row.is_prefix else c and c.id,
        "file_id": c and c.document_id,
        "collection": c and c.collection,
        "title": c and c.title,
        "filename": c and c.filename,
        "ordinal": c and c.ordinal,
        "tokens": e.tokens,
        "bytes": e.bytes,
        "raw_bytes": e.raw_bytes,
        "codec": e.codec,
        "owner": e.owner,
        "pinned": e.pinned,
        "frequency": round(e.frequency, 3),
        "used_at": int(e.used) or None,
        "created_at": int(e.created) or None,
        "layout": e.layout,
        "tokenizer": e.tokenizer,
    }


def stats_view(stats: StoreStats) -> dict[str, Any]:
    """The store's own figures."""
    return {
        "entries": stats.entries,
        "bytes": stats.bytes,
        "raw_bytes": stats.raw_bytes,
        "pinned": stats.pinned,
        "tiers": [
            {
                "tier": t.tier,
                "entries": t.entries,
                "bytes": t.bytes,
                "held_bytes": t.held_bytes,
                "limit_bytes": t.limit_bytes,
            }
            for t in tiers_of(stats)
        ],
        "counters": dict(sorted(stats.counters.items())),
    }


def changed_view(done: Changed) -> dict[str, Any]:
    """``chunks`` selected, ``entries`` stored of them, how many were changed and how many kept as they were."""
    return {
        "chunks": done.chosen.chunks,
        "entries": len(done.chosen.entries),
        "bytes": done.chosen.bytes,
        "changed": done.changed,
        "kept": done.kept,
    }
