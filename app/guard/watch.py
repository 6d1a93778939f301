"""A sampled answer: what it said, without its client noticing; and its comparison with full prefill."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

from app.evaluate.measures import kl_lower_bound
from app.guard.levels import Comparison
from blend.types import BlendOptions, BlendStats, Delta, Request

if TYPE_CHECKING:
    from blend.engines import Engine

PRIORITY = 20  # higher is later: after chat (0) and compile passes (10)
TOP = 20  # log-probabilities of the first token that are compared


class Seen:
    """The beginning of an answer: its first ``limit`` token ids, and the top log-probabilities of the first one."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tokens: tuple[int, ...] = ()
        self.top: dict[int, float] = {}
        self.stats: BlendStats | None = None
        self.ended = False

    def take(self, delta: Delta) -> None:
        if delta.logprobs and not self.tokens:
            self.top = {token: value for token, _, value in delta.logprobs[0].top}
        self.tokens = (*self.tokens, *delta.token_ids)[: self.limit]
        self.stats = self.stats or delta.stats
        self.ended = self.ended or delta.finish_reason is not None or len(self.tokens) == self.limit


class Watch:
    """One sampled answer. Greedy answers are compared by their first ``tokens`` ids, others by divergence only.

    Longer comparisons would cost more and say less: after the first other token two answers are two texts, and on a
    batching engine even two full prefills part somewhere.

    ``request`` asks the engine for what the comparison needs and is generated in place of the client's own;
    ``take`` gives its deltas back as the client asked for them. ``counts``: the server chose how to blend, so the
    comparison is a verdict on its choice; ``at``: when, on the levels' clock.
    """

    def __init__(
        self, asked: Request, *, tokens: int, top: int, collections: tuple[str, ...], counts: bool, at: float
    ) -> None:
        self.asked, self.collections, self.counts, self.at = asked, collections, counts, at
        self.greedy = asked.sampling.temperature == 0.0
        self.top = max(top, asked.sampling.logprobs or 0)
        self.request = dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, logprobs=self.top))
        self.seen = Seen(tokens if self.greedy else 1)

    def take(self, delta: Delta) -> Delta:
        """Note ``delta``; returns it with the log-probabilities that the client asked for."""
        if not self.seen.ended:
            self.seen.take(delta)
        count = self.asked.sampling.logprobs
        if count is None:
            return dataclasses.replace(delta, logprobs=())
        return dataclasses.replace(
            delta, logprobs=tuple(dataclasses.replace(t, top=t.top[:count]) for t in delta.logprobs)
        )

    @property
    def ready(self) -> bool:
        """Whether enough was seen, and there is something to compare: a full prefill is its own truth."""
        return self.seen.ended and self.seen.stats is not None and self.seen.stats.mode != "full"

    async def compare(self, engine: Engine, max_kl: float) -> Comparison:
        """Prefill the prompt in full and compare. Raises what ``engine.generate`` raises.

        Full prefill under the tenant's own salt: the rows it leaves in the engine's prefix cache are exact.
        """
        sampling = dataclasses.replace(
            self.request.sampling, max_tokens=min(self.seen.limit, self.asked.sampling.max_tokens)
        )
        request = dataclasses.replace(
            self.request, id=f"{self.asked.id}-guard", blend=BlendOptions(mode="full"), sampling=sampling,
            priority=PRIORITY,
        )  # fmt: skip
        truth = Seen(self.seen.limit)
        deltas: AsyncIterator[Delta] = engine.generate(request)
        async with aclosing(deltas):  # type: ignore[type-var]
            async for delta in deltas:
                truth.take(delta)
        return compare(truth, self.seen, greedy=self.greedy, max_kl=max_kl)


def compare(truth: Seen, served: Seen, *, greedy: bool, max_kl: float) -> Comparison:
    """Greedy answers agree if their tokens do; sampled ones if the first token's KL is at most ``max_kl`` nats.

    Raises ``ValueError`` for sampled answers without finite log-probabilities: there is nothing to compare.
    """
    known = truth.top and served.top and all(map(math.isfinite, (*truth.top.values(), *served.top.values())))
    kl = kl_lower_bound(truth.top, served.top) if known else None
    if greedy:
        return Comparison(truth.tokens == served.tokens, kl)
    if kl is None:
        raise ValueError("the engine gave no finite log-probabilities to compare a sampled answer by")
    return Comparison(kl <= max_kl, kl)
