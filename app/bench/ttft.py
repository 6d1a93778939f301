"""Time to first token: arms interleaved on fresh random contexts, after the outputs have been checked.

Each repeat draws new chunks and new tenant salts, so nothing is cached that the arm does not claim to cache: full
prefill has a salt of its own, chunks are compiled outside the timing, and ``prefix-hit`` is the full request again.
An arm whose check fails is reported without times. With tiers, every blending arm is timed with its chunks in memory
(``ram``) and on the device (``ssd``: dropped from memory, and from the kernel's page cache, before each request).
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from app.bench.pagecache import drop_page_cache
from app.bench.shot import CHECK_TOKENS, QUESTION, TIES, BenchError, Shot, differs, fire, plain_words
from app.bench.workbench import Workbench, store_folder
from blend.engines import Engine
from blend.prompt import ChunkRef
from blend.types import BlendOptions, Mode, Request, Sampling

PREFIX_HIT, REUSE = "prefix-hit", "reuse"
SELECTORS = ("deviation", "auto")
TIERS = ("ram", "ssd")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """``context`` tokens in chunks of ``chunk``; every ratio is an arm of each selector, in each of ``tiers``."""

    context: int = 2048
    chunk: int = 256
    ratios: tuple[float, ...] = (0.15,)
    repeats: int = 5
    seed: int = 0
    tiers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := set(self.tiers) - set(TIERS):
            raise BenchError(f"tier {sorted(unknown)[0]!r} is unknown; choose among {', '.join(TIERS)}")
        if not 1 <= self.chunk <= self.context:
            raise BenchError(f"chunk {self.chunk} is not within 1..{self.context} (the context)")
        if self.repeats < 1:
            raise BenchError(f"repeats is {self.repeats}; it must be at least 1")
        if not self.ratios or not all(0.0 < r <= 1.0 for r in self.ratios):
            raise BenchError(f"ratios {list(self.ratios)} are not within 0..1 (ratio 0 is the arm reuse)")

    @property
    def sizes(self) -> list[int]:
        """Tokens of each chunk; the last one takes what is left over."""
        whole, rest = divmod(self.context, self.chunk)
        return [self.chunk] * whole + [rest] * (rest > 0)


@dataclass
class Arm:
    """One way to the first token, and what was measured of it. ``problem`` says why there are no times."""

    name: str
    mode: Mode
    selector: str = "none"
    ratio: float | None = None
    tier: str | None = None
    seconds: list[float] = field(default_factory=list)
    problem: str | None = None
    checked: bool = False

    @property
    def options(self) -> BlendOptions:
        return BlendOptions(self.mode, self.selector, self.ratio or 0.0)

    def report(self) -> dict[str, Any]:
        ok = self.checked and self.problem is None and bool(self.seconds)
        p10, median, p90 = np.quantile(self.seconds, [0.1, 0.5, 0.9]).tolist() if ok else (None, None, None)
        return {
            "name": self.name,
            "ratio": self.ratio,
            "tier": self.tier,
            "ttft_median_s": median,
            "ttft_p10_s": p10,
            "ttft_p90_s": p90,
            "outputs_checked": ok,
        }


def make_arms(full: str, setup: Setup, *, prefix_hit: bool) -> list[Arm]:
    """``full`` is the name of the full-prefill arm; the rest are reuse and each selector at each ratio."""
    arms = [Arm(full, "full")]
    if prefix_hit:
        arms.append(Arm(PREFIX_HIT, "full"))
    tiers = setup.tiers or (None,)
    arms += [Arm(REUSE, "reuse", ratio=0.0, tier=tier) for tier in tiers]
    return arms + [Arm(s, "blend", s, ratio, tier) for s in SELECTORS for ratio in setup.ratios for tier in tiers]


async def run_ttft(
    engine: Engine,
    tokenizer: Any,
    arms: list[Arm],
    setup: Setup,
    *,
    reference: Shot | None = None,
    progress: Progress = lambda _: None,
) -> Shot:
    """Check and time ``arms`` on ``engine``; they are filled in.

    Returns full prefill's answer to the first context, which depends on the seed alone: as ``reference`` of a run on
    another engine it is what full prefill must say there.
    """
    run = _Run(engine, tokenizer, setup)
    context = await run.fresh_context()
    salt = secrets.token_bytes(32)
    full = await run.shoot(Arm("full", "full"), context, salt=salt, tokens=CHECK_TOKENS)
    for arm in arms:
        arm.problem = await run.check(arm, context, full, salt, reference or full)
        arm.checked = arm.problem is None
        progress(f"{arm.name}: {arm.problem or 'outputs checked'}")
    rng = random.Random(setup.seed)
    for repeat in range(setup.repeats):
        context = await run.fresh_context()
        order = [arm for arm in arms if arm.problem is None and arm.name != PREFIX_HIT]
        rng.shuffle(order)
        for arm in order:
            hit = next((a for a in arms if a.name == PREFIX_HIT and a.problem is None), None)
            salt = secrets.token_bytes(32)  # one salt for full prefill and its repetition, new each time
            shot = await run.shoot(arm, context, salt=salt)
            arm.problem = run.fault(arm, shot)
            arm.seconds.append(shot.seconds)
            if arm.mode == "full" and hit:
                hit.seconds.append((await run.shoot(hit, context, salt=salt)).seconds)
            progress(f"repeat {repeat + 1}: {arm.name} {shot.seconds:.3f} s")
    return full


@dataclass(frozen=True)
class _Context:
    """One random context: compiled chunks and their keys' owner."""

    bench: Workbench
    refs: tuple[ChunkRef, ...]


class _Run:
    """One engine under measurement."""

    def __init__(self, engine: Engine, tokenizer: Any, setup: Setup) -> None:
        self.engine, self.tokenizer, self.setup = engine, tokenizer, setup
        self._rng = random.Random(f"{setup.seed} context")
        self._vocabulary = plain_words(engine, tokenizer)
        self._shots = 0

    async def fresh_context(self) -> _Context:
        """New random chunks under a new tenant salt, compiled one by one behind the prefix."""
        bench = Workbench.of(self.engine, self.tokenizer, salt=secrets.token_bytes(32), compile="prefix")
        refs: list[ChunkRef] = []
        for i, size in enumerate(self.setup.sizes):
            refs += await bench.compile([f"bench-{i}"], [tuple(self._rng.choices(self._vocabulary, k=size))])
        needed = len(bench.prompt(refs, QUESTION).token_ids) + CHECK_TOKENS
        if needed > self.engine.info.max_context:
            raise BenchError(
                f"a context of {self.setup.context} tokens needs room for {needed}; the model has "
                f"{self.engine.info.max_context}: ask for a smaller --context"
            )
        return _Context(bench, tuple(refs))

    async def shoot(self, arm: Arm, context: _Context, *, salt: bytes | None = None, tokens: int = 1) -> Shot:
        """One request; the clock stops at the first delta with a token. Full prefill goes under ``salt``."""
        self._shots += 1
        request = Request(
            id=f"bench-{self._shots}",
            prompt=context.bench.prompt(context.refs, QUESTION),
            sampling=Sampling(max_tokens=tokens, ignore_eos=True, logprobs=20 if tokens > 1 else None),
            blend=arm.options,
            tenant_salt=salt if salt and arm.mode == "full" else context.bench.keys.tenant_salt,
        )
        await self.place(arm, context)
        return await fire(self.engine, request)

    async def place(self, arm: Arm, context: _Context) -> None:
        """Bring the chunks to where ``arm`` reads them from."""
        if arm.tier is None:
            return
        keys = [context.bench.keys.prefix_ref().key, *(ref.key for ref in context.refs)]
        if arm.tier == "ram":
            if await self.engine.warm(keys) < len(keys):
                raise BenchError(f"{len(keys)} chunks do not fit in memory: raise the setting store.ram_gib")
            return
        await self.engine.cool(keys)
        await asyncio.to_thread(drop_page_cache, store_folder(self.engine))

    async def check(self, arm: Arm, context: _Context, full: Shot, salt: bytes, reference: Shot) -> str | None:
        """Why the arm's output must not be trusted, or None. It also warms the arm up.

        Full prefill must agree with ``reference``. Every other arm, with everything recomputed, must give the greedy
        tokens of ``full`` (which ran under ``salt``); as it is timed, it must find all its chunks.
        """
        if arm.name == PREFIX_HIT:
            hit = await self.shoot(arm, context, salt=salt, tokens=CHECK_TOKENS)
            if hit.cached < 0.5 * self.setup.context:
                return f"the engine's prefix cache gave {hit.cached} of {self.setup.context} tokens"
            return self._differs(full, hit)
        if arm.mode == "full":
            return self._differs(reference, full)
        exact = replace(arm, mode="blend", selector="all" if arm.mode == "reuse" else arm.selector, ratio=1.0)
        problem = self._differs(full, await self.shoot(exact, context, tokens=CHECK_TOKENS))
        return problem or self.fault(arm, await self.shoot(arm, context))

    def fault(self, arm: Arm, shot: Shot) -> str | None:
        """Why ``shot`` did not do what its arm claims, or None."""
        if arm.mode == "full":
            return "full prefill was served from a cache" if shot.cached > 0.5 * self.setup.context else None
        if shot.stats is None:
            return "the engine gave no account of the blend"
        if shot.stats.missing:
            return f"{shot.stats.missing} compiled rows were not found"
        elsewhere = {c.tier for c in shot.stats.chunks} - {arm.tier}
        if arm.tier is not None and elsewhere:
            return f"chunks came from {', '.join(map(str, elsewhere))}, not from {arm.tier}"
        if shot.stats.mode != arm.mode:
            return f"the engine chose {shot.stats.mode} ({shot.stats.why or 'no reason given'})"
        return None

    def _differs(self, full: Shot, other: Shot) -> str | None:
        tie = TIES[self.engine.info.layout.dtype]
        return differs(full, other, tie=tie)


def ratios_to_full(arms: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Median of each arm over the faster full prefill's, by ``label``."""
    times = [a["ttft_median_s"] for a in arms if a["name"].startswith("full-") and a["ttft_median_s"]]
    best = min(times, default=None)
    return {label(a): a["ttft_median_s"] / best if best and a["ttft_median_s"] is not None else None for a in arms}


def label(arm: dict[str, Any]) -> str:
    """Name of a reported arm, with its ratio where it has one above zero, and its tier."""
    name = f"{arm['name']}@{arm['ratio']:g}" if arm["ratio"] else str(arm["name"])
    return f"{name}/{arm['tier']}" if arm["tier"] else name
