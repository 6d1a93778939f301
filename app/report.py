"""What an answer says about itself: results, cache accounting, citations, usage."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from app.citations import Citation
from app.intake import Call
from app.rag import Retrieved
from app.schema.answer import (
    Annotation,
    Cache,
    CacheChunk,
    LayoutSegment,
    PromptTokensDetails,
    Rag,
    Result,
    UrlCitation,
    Usage,
)
from blend.engines import EngineInfo
from blend.types import BlendStats, Delta, TokenLogprob
from store.base import KVStore


def fingerprint(info: EngineInfo) -> str:
    """OpenAI's ``system_fingerprint``: changes when the same request may give another answer."""
    text = f"{info.name}|{info.version}|{info.layout.digest.hex()}|{info.tokenizer}"
    return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:12]


def rag_report(call: Call, stats: BlendStats | None, ttft_ms: float | None) -> Rag | None:
    """The ``rag`` object of a call with retrieval."""
    if call.grounding is None:
        return None
    timings = dict(call.grounding.timings_ms)
    if stats is not None:
        timings |= {"kv_load": round(stats.load_s * 1000, 3), "blend": round(stats.blend_s * 1000, 3)}
    if ttft_ms is not None:
        timings["ttft"] = ttft_ms
    rag = Rag(timings_ms=timings, cache=_cache(stats, call.guarded) if stats else None)
    if call.body.rag is None or call.body.rag.include_results:
        rag.results = [_result(r) for r in call.grounding.results]
        rag.dropped = [_result(r) for r in call.grounding.dropped]
    return rag


def layout_report(call: Call, store: KVStore) -> list[LayoutSegment]:
    """Segments of the prompt and which of them the store could serve now (dry run)."""
    return [
        LayoutSegment(
            kind=s.kind,
            chunk_id=s.name or None,
            start=s.start,
            stop=s.stop,
            cached=None if s.key is None else store.contains(s.key),
        )
        for s in call.prompt.segments
    ]


def annotation(citation: Citation) -> Annotation:
    p = citation.passage
    return Annotation(
        url_citation=UrlCitation(start_index=citation.start, end_index=citation.stop, title=p.title, url=p.url),
        file_id=p.document_id,
        chunk_id=p.chunk_id,
        filename=p.filename,
        score=p.score,
        quote=citation.quote,
        page=p.page,
    )


def usage(call: Call, completion_tokens: int, stats: BlendStats | None, cached: int | None) -> Usage:
    """Cached tokens are the reused rows; without retrieval, what the engine's own prefix cache spared."""
    prompt = len(call.prompt.token_ids)
    reused = stats.reused if stats is not None else cached or 0
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion_tokens,
        total_tokens=prompt + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=reused),
    )


def logprobs(delta: Delta) -> list[dict[str, Any]]:
    """OpenAI's ``logprobs.content`` entries."""
    return [
        _token(t.text, t.logprob) | {"top_logprobs": [_token(text, value) for _, text, value in _top(t)]}
        for t in delta.logprobs
    ]


def _top(token: TokenLogprob) -> Sequence[tuple[int, str, float]]:
    return token.top


def _token(text: str, value: float) -> dict[str, Any]:
    # JSON has no -inf; OpenAI's own smallest value stands for it.
    return {"token": text, "logprob": max(value, -9999.0), "bytes": list(text.encode("utf-8", "replace"))}


def _cache(stats: BlendStats, guarded: str | None) -> Cache:
    return Cache(
        mode=stats.mode,
        why="; ".join(w for w in (guarded, stats.why) if w) or None,
        selector=stats.selector,
        tokens=stats.tokens,
        reused=stats.reused,
        recomputed=stats.recomputed,
        missing=stats.missing,
        computed_share=round(stats.computed_share, 6),
        chunks=[
            CacheChunk(
                chunk_id=c.name,
                tokens=c.tokens,
                tier=c.tier,
                reused=c.reused,
                recomputed=c.recomputed,
                missing=c.missing,
                miss_reason=c.miss_reason,
            )
            for c in stats.chunks
        ],
    )


def _result(r: Retrieved) -> Result:
    p = r.passage
    return Result(
        chunk_id=p.chunk_id,
        file_id=p.document_id,
        filename=p.filename,
        title=p.title,
        collection=r.collection,
        score=p.score,
        text=p.text,
        tokens=r.tokens,
        ordinal=r.ordinal,
        start=r.start,
        stop=r.stop,
        page=p.page,
        heading=p.heading,
        url=p.url,
    )
