"""What travels with a request from the front end through vLLM's scheduler to the worker: plain dicts and lists.

It goes as ``SamplingParams.extra_args["kv_transfer_params"]``; only this engine sets it, clients never can.
"""

from __future__ import annotations

from typing import Any, Final

from blend.types import BlendOptions, BlendStats, ChunkStats, CompileJob, Prompt, Segment
from store.base import StoreStats, TierStats
from store.types import KVKey

PENDING: Final[dict[str, Any]] = {"pending": True}
"""A compile job's result while what it computed is still being written."""


def pack_blend(id: str, prompt: Prompt, options: BlendOptions) -> dict[str, Any]:
    return {
        "op": "blend",
        "id": id,
        "context": prompt.context_tokens,
        "options": [options.mode, options.selector, options.recompute_ratio],
        "segments": [
            [s.kind, s.start, s.stop, s.key.hex if s.key else "", s.source.hex(), s.name, s.lacking]
            for s in prompt.segments
        ],
    }


def unpack_blend(wire: dict[str, Any], token_ids: tuple[int, ...]) -> tuple[Prompt, BlendOptions]:
    segments = tuple(
        Segment(kind, start, stop, KVKey.from_hex(key) if key else None, bytes.fromhex(source), name, lacking)
        for kind, start, stop, key, source, name, lacking in wire["segments"]
    )
    return Prompt(token_ids, segments), BlendOptions(*wire["options"])


def pack_compile(job: CompileJob) -> dict[str, Any]:
    return {
        "op": "compile",
        "id": job.id,
        "context": len(job.context),
        "sizes": [len(c) for c in job.chunks],
        "keys": [k.hex for k in job.keys],
        "sources": [s.hex() for s in job.sources],
        "owner": job.owner,
    }


def unpack_compile(wire: dict[str, Any], token_ids: tuple[int, ...]) -> CompileJob:
    at = wire["context"]
    chunks = []
    for size in wire["sizes"]:
        chunks.append(token_ids[at : at + size])
        at += size
    return CompileJob(
        id=wire["id"],
        context=token_ids[: wire["context"]],
        chunks=tuple(chunks),
        keys=tuple(KVKey.from_hex(k) for k in wire["keys"]),
        sources=tuple(bytes.fromhex(s) for s in wire["sources"]),
        owner=wire["owner"],
    )


def pack_stats(stats: BlendStats) -> dict[str, Any]:
    fields = dict(vars(stats))
    fields["chunks"] = [dict(vars(c)) for c in stats.chunks]
    return fields


def pack_store_stats(stats: StoreStats) -> dict[str, Any]:
    return {**vars(stats), "counters": dict(stats.counters), "tiers": [dict(vars(t)) for t in stats.tiers]}


def unpack_store_stats(wire: dict[str, Any]) -> StoreStats:
    return StoreStats(**{**wire, "tiers": tuple(TierStats(**t) for t in wire["tiers"])})


def unpack_stats(wire: dict[str, Any]) -> BlendStats:
    return BlendStats(**{**wire, "chunks": tuple(ChunkStats(**c) for c in wire["chunks"])})
