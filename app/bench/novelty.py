"""Sustained novelty: every query a new order of chunks, drawn Zipf from a pool larger than the memory tier.

Caches keyed by prefix decay under this: each new order stores every chunk again, the copies flood the fast tier, and
the gain falls from 4.48x to 1.07x within ninety queries (LMCache #4663). A content-addressed store must show the same
time to first token in the last quarter as in the second (the first is warm-up), and the same bytes per distinct chunk.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median
from typing import Any

from app.bench.pagecache import drop_page_cache
from app.bench.shot import CHECK_TOKENS, QUESTION, TIES, BenchError, Shot, differs, fire, plain_words
from app.bench.workbench import Workbench, store_folder
from blend.engines import Engine
from blend.prompt import ChunkRef
from blend.types import BlendOptions, Mode, Request, Sampling

Progress = Callable[[str], None]


@dataclass(frozen=True)
class NoveltySetup:
    """``queries`` of ``chunks`` distinct chunks of ``chunk`` tokens, out of ``pool`` ones.

    ``zipf``: their popularity is 1 / rank^zipf. ``check_every``: so many queries apart, the query is asked again with
    everything recomputed and in full. ``cold``: the kernel's page cache is dropped before each query, so that what is
    not in memory comes from the device.
    """

    queries: int = 500
    chunks: int = 14
    chunk: int = 128
    pool: int = 200
    zipf: float = 1.0
    ratio: float = 0.1
    selector: str = "auto"
    seed: int = 0
    check_every: int = 100
    cold: bool = False

    def __post_init__(self) -> None:
        if self.queries < 8:
            raise BenchError(f"queries is {self.queries}; quarters need at least 8")
        if not 1 <= self.chunks <= self.pool:
            raise BenchError(f"chunks {self.chunks} is not within 1..{self.pool} (the pool)")
        if self.chunk < 1 or self.check_every < 1:
            raise BenchError("chunk and check_every must be at least 1")
        if not 0.0 <= self.ratio <= 1.0 or self.zipf < 0.0:
            raise BenchError(f"ratio {self.ratio} must be within 0..1 and zipf {self.zipf} not negative")


@dataclass
class Quarter:
    """What a quarter of the queries measured. ``tiers`` counts looked-up chunks by where they were; ``new_orders`` says
    how many of its queries had an order never asked before; ``bytes_per_chunk`` is of the whole store at its end."""

    seconds: list[float] = field(default_factory=list)
    tiers: Counter[str] = field(default_factory=Counter)
    new_orders: int = 0
    bytes_per_chunk: float = 0.0

    def report(self) -> dict[str, Any]:
        looked_up = sum(self.tiers.values())
        return {
            "queries": len(self.seconds),
            "new_orders": self.new_orders,
            "ttft_median_s": median(self.seconds),
            "tiers": {tier: count / looked_up for tier, count in sorted(self.tiers.items())},
            "bytes_per_chunk": self.bytes_per_chunk,
        }


class Novelty:
    """One run on ``engine``, whose store is on disk with memory in front of it."""

    def __init__(self, engine: Engine, tokenizer: Any, setup: NoveltySetup) -> None:
        self.engine, self.tokenizer, self.setup = engine, tokenizer, setup
        self._rng = random.Random(f"{setup.seed} novelty")
        self._bench = Workbench.of(engine, tokenizer, salt=secrets.token_bytes(32), compile="prefix")
        self._pool: list[ChunkRef] = []
        self._asked = 0

    async def run(self, progress: Progress) -> list[Quarter]:
        """The four quarters. Raises ``BenchError`` if an output is wrong or a chunk was missing."""
        await self._fill(progress)
        quarters, seen = [Quarter() for _ in range(4)], set[tuple[int, ...]]()
        for i in range(self.setup.queries):
            quarter = quarters[4 * i // self.setup.queries]
            order = self._draw()
            quarter.new_orders += order not in seen
            seen.add(order)
            refs = [self._pool[n] for n in order]
            if self.setup.cold:
                await asyncio.to_thread(drop_page_cache, store_folder(self.engine))
            shot = await self._ask(refs, "blend", self.setup.ratio)
            self._count(quarter, shot)
            if i % self.setup.check_every == 0:
                await self._check(refs)
            quarter.bytes_per_chunk = await self._bytes_per_chunk()
            progress(f"query {i + 1}: {shot.seconds:.3f} s")
        return quarters

    async def _fill(self, progress: Progress) -> None:
        """Compile the pool: random tokens, one document per chunk."""
        vocabulary = plain_words(self.engine, self.tokenizer)
        for n in range(self.setup.pool):
            ids = tuple(self._rng.choices(vocabulary, k=self.setup.chunk))
            self._pool += await self._bench.compile([f"pool-{n}"], [ids])
            progress(f"chunk {n + 1} compiled")
        longest = len(self._bench.prompt(self._pool[: self.setup.chunks], QUESTION).token_ids) + CHECK_TOKENS
        if longest > self.engine.info.max_context:
            raise BenchError(
                f"{self.setup.chunks} chunks of {self.setup.chunk} tokens need room for {longest}; the model has "
                f"{self.engine.info.max_context}: ask for a smaller --chunk or fewer --chunks"
            )
        stats = await self.engine.store_stats()
        ram, held = [t for t in stats.tiers if t.tier == "ram"], stats.bytes
        if not ram or ram[0].limit_bytes is None or ram[0].limit_bytes >= held:
            limit = ram[0].limit_bytes if ram else 0
            raise BenchError(
                f"the pool has {held} bytes and the memory tier holds {limit}: it must be smaller than the pool, and "
                "not zero; set --ram-mib"
            )

    def _draw(self) -> tuple[int, ...]:
        """Distinct chunks by Zipf popularity, in a random order."""
        weights = [1.0 / (rank + 1) ** self.setup.zipf for rank in range(self.setup.pool)]
        cumulative = list(accumulate(weights))
        picked: dict[int, None] = {}
        while len(picked) < self.setup.chunks:
            picked.setdefault(self._rng.choices(range(self.setup.pool), cum_weights=cumulative)[0])
        order = list(picked)
        self._rng.shuffle(order)  # otherwise the popular ones would stand first
        return tuple(order)

    async def _ask(self, refs: list[ChunkRef], mode: Mode, ratio: float, tokens: int = 1) -> Shot:
        self._asked += 1
        selector = "all" if ratio >= 1.0 else self.setup.selector
        request = Request(
            id=f"novelty-{self._asked}",
            prompt=self._bench.prompt(refs, QUESTION),
            sampling=Sampling(max_tokens=tokens, ignore_eos=True, logprobs=20 if tokens > 1 else None),
            blend=BlendOptions(mode, selector, ratio),
            # Full prefill under a salt of its own: it must not be served from vLLM's prefix cache.
            tenant_salt=secrets.token_bytes(32) if mode == "full" else self._bench.keys.tenant_salt,
        )
        return await fire(self.engine, request)

    def _count(self, quarter: Quarter, shot: Shot) -> None:
        stats = shot.stats
        if stats is None or stats.mode != "blend" or stats.missing:
            found = "no account" if stats is None else f"mode {stats.mode}, {stats.missing} rows missing"
            raise BenchError(f"a query was not blended from the store: {found}")
        quarter.seconds.append(shot.seconds)
        quarter.tiers.update(c.tier or "none" for c in stats.chunks)

    async def _check(self, refs: list[ChunkRef]) -> None:
        """The stored chunks, in this order, with everything recomputed, say what full prefill says."""
        full = await self._ask(refs, "full", 0.0, CHECK_TOKENS)
        exact = await self._ask(refs, "blend", 1.0, CHECK_TOKENS)
        if wrong := differs(full, exact, tie=TIES[self.engine.info.layout.dtype]):
            raise BenchError(f"outputs differ, nothing is reported: {wrong}")

    async def _bytes_per_chunk(self) -> float:
        stats = await self.engine.store_stats()
        return stats.bytes / len(self._bench.compiled)


def verdict(quarters: list[Quarter]) -> dict[str, Any]:
    """The two claims: last quarter's median over the second's, and whether bytes per distinct chunk stayed the same."""
    sizes = {quarter.bytes_per_chunk for quarter in quarters}
    return {
        "last_over_second": median(quarters[3].seconds) / median(quarters[1].seconds),
        "bytes_per_chunk_constant": len(sizes) == 1,
        "all_orders_new": all(q.new_orders == len(q.seconds) for q in quarters),
    }
