"""Decide: blend this prompt, or prefill it in full? The same answer on every engine."""

from __future__ import annotations

from collections.abc import Callable

from blend.certificate import Certificate
from blend.types import BlendOptions, BlendStats, ChunkStats, Mode, Prompt
from store.errors import StoreError
from store.types import KVKey

MIN_CONTEXT_TOKENS = 64
DEFAULT_RATIO = 0.1  # asked for explicitly, without a certificate that knows better
UNCERTIFIED = "model is not certified; run `ragblend certify`"


def decide(prompt: Prompt, options: BlendOptions, contains: Callable[[KVKey], bool], *,
           min_context_tokens: int = MIN_CONTEXT_TOKENS,
           certificate: Certificate | None = None) -> tuple[Mode, str | None]:  # fmt: skip
    """``full``, ``blend`` or ``reuse``, and why if that is not what was asked for.

    ``auto`` blends when the model has passed its ``certificate`` and the store holds at least one chunk of a context of
    ``min_context_tokens`` or more; the prefix alone does not count. A prompt without context is always ``full``.
    """
    n = prompt.context_tokens
    if options.mode == "full":
        return "full", None
    if n == 0:
        return "full", "no context"
    if options.mode != "auto":
        return options.mode, None
    if certificate is None:
        return "full", UNCERTIFIED
    if not certificate.passed:
        return "full", f"model is not certified; {certificate.reasons[0]}"
    if n < min_context_tokens:
        return "full", f"context of {n} tokens is below {min_context_tokens}"
    keys = [s.key for s in prompt.segments if s.kind == "chunk" and s.key is not None]
    try:
        known = any(contains(key) for key in keys)
    except StoreError as e:
        return "full", f"the store cannot be read: {e}"
    return ("blend", None) if known else ("full", "no chunk is in the store")


def settle(mode: Mode, selector: str, ratio: float | None, certificate: Certificate | None) -> BlendOptions:
    """What a request means: selector ``auto`` and no ratio are the certificate's, where the model passed one."""
    passed = certificate if certificate is not None and certificate.passed else None
    if passed is not None and selector == "auto":
        selector = passed.selector
    if ratio is None:
        ratio = DEFAULT_RATIO if passed is None else passed.ratio
    return BlendOptions(mode, selector, ratio)


def full_stats(prompt: Prompt, cached: int = 0, why: str | None = None) -> BlendStats:
    """Accounting of a full prefill of which the first ``cached`` rows came from the engine's exact prefix cache."""
    chunks = []
    for s in prompt.segments:
        if s.kind != "question":
            reused = min(max(cached - s.start, 0), s.tokens)
            chunks.append(ChunkStats(s.name, s.tokens, reused=reused, recomputed=s.tokens - reused, missing=0))
    n = prompt.context_tokens
    reused = min(cached, n)
    share = (n - reused) / n if n else 0.0
    return BlendStats("full", n, reused, n - reused, 0, why=why, chunks=tuple(chunks), computed_share=share)
