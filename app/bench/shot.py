"""One request of a measurement: the clock stops at its first token; its words are compared with full prefill's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from blend.engines import Engine
from blend.types import BlendStats, Request

QUESTION = "What do the passages say about this?"
CHECK_TOKENS = 8
# Greedy tokens of two computations may part where their best candidates are this close (nats): noise of the dtype.
TIES = {"float32": 0.001, "bfloat16": 0.15, "float16": 0.05}


class BenchError(Exception):
    """The measurement cannot be made as asked."""


@dataclass(frozen=True)
class Shot:
    """One timed request. ``tops`` are the candidates of each token, id -> logprob."""

    seconds: float
    token_ids: tuple[int, ...]
    tops: tuple[dict[int, float], ...]
    stats: BlendStats | None
    cached: int


async def fire(engine: Engine, request: Request) -> Shot:
    """Send ``request`` and time its first delta with a token. Raises ``BenchError`` if there is none."""
    seconds: float | None = None
    stats: BlendStats | None = None
    ids: tuple[int, ...] = ()
    tops: list[dict[int, float]] = []
    cached = 0
    begin = time.perf_counter()
    async for delta in engine.generate(request):
        if seconds is None and delta.token_ids:
            seconds = time.perf_counter() - begin
        ids += delta.token_ids
        tops += [{token: p for token, _, p in t.top} for t in delta.logprobs]
        stats, cached = delta.stats or stats, delta.cached_tokens or cached
    if seconds is None:
        raise BenchError(f"the engine answered {request.id} without a token")
    return Shot(seconds, ids, tuple(tops), stats, cached)


def plain_words(engine: Engine, tokenizer: Any) -> list[int]:
    """Token ids that random chunks are made of: all but the special ones."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    size = min(engine.info.vocab_size, getattr(tokenizer, "vocab_size", engine.info.vocab_size))
    return [i for i in range(size) if i not in special]


def differs(full: Shot, other: Shot, *, tie: float) -> str | None:
    """How the greedy tokens of ``other`` part from ``full``'s, or None.

    Where they part, full's two candidates may differ by at most ``tie`` nats; after a tie nothing can be compared.
    """
    for i, (a, b) in enumerate(zip(full.token_ids, other.token_ids, strict=False)):
        if a == b:
            continue
        top = full.tops[i] if i < len(full.tops) else {}
        if a in top and b in top and abs(top[a] - top[b]) <= tie:
            return None
        return f"greedy token {i + 1} is {b}, full prefill gives {a}"
    if len(full.token_ids) != len(other.token_ids):
        return f"{len(other.token_ids)} greedy tokens, full prefill gives {len(full.token_ids)}"
    return None
