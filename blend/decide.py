"""Decide: blend this prompt, or prefill it in full? The same answer on every engine."""

from __future__ import annotations

from collections.abc import Callable

from blend.types import BlendOptions, BlendStats, ChunkStats, Mode, Prompt
from store.errors import StoreError
from store.types import KVKey

MIN_CONTEXT_TOKENS = 64


def decide(prompt: Prompt, options: BlendOptions, contains: Callable[[KVKey], bool], *,
           min_context_tokens: int = MIN_CONTEXT_TOKENS) -> tuple[Mode, str | None]:  # fmt: skip
    """``full``, ``blend`` or ``reuse``, and why if that is not what was asked for.

    ``auto`` blends when the store holds at least one chunk of a context of ``min_context_tokens`` or more; the prefix
    alone does not count. A prompt without context is always ``full``.
    """
    n = prompt.context_tokens
    if options.mode == "full":
        return "full", None
    if n == 0:
        return "full", "no context"
    if options.mode != "auto":
        return options.mode, None
    if n < min_context_tokens:
        return "full", f"context of {n} tokens is below {min_context_tokens}"
    keys = [s.key for s in prompt.segments if s.kind == "chunk" and s.key is not None]
    try:
        known = any(contains(key) for key in keys)
    except StoreError as e:
        return "full", f"the store cannot be read: {e}"
    return ("blend", None) if known else ("full", "no chunk is in the store")


def full_stats(prompt: Prompt, cached: int = 0, why: str | None = None) -> BlendStats:
    """Accounting of a full prefill of which the first ``cached`` rows came from the engine's exact prefix cache."""
    chunks = []
    for s in prompt.segments:
        if s.kind != "question":
            reused = min(max(cached - s.start, 0), s.tokens)
            chunks.append(ChunkStats(s.name, s.tokens, reused=reused, recomputed=s.tokens - reused, missing=0))
    n = prompt.context_tokens
    reused = min(cached, n)
    return BlendStats("full", n, reused, n - reused, 0, why=why, chunks=tuple(chunks))
