"""Exactness: invariants 1 to 4 of the design with this model's own weights, on the engine that will serve it.

Nothing here compares the blend with itself: the truth is the engine's full prefill, and KV that the engine computed at
the very place and behind the very tokens. Only the engine's protocol and its store are used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.demo.world import EVAL_SEEDS, make_example
from blend.certificate import Check
from blend.engines import Engine
from blend.errors import CertificateError
from blend.keys import CompileContext, KeyMaker
from blend.load import load
from blend.prompt import ChunkRef, PromptLayout
from blend.rope import Rope, rope_from_config
from blend.support import head_dim
from blend.types import BlendOptions, CompileJob, Mode, Prompt, Request, Sampling
from store.base import Miss
from store.types import ChunkKV, KVLayout, Want

# Nats by which log-probabilities of likely tokens may differ, and the share of the largest K by which a rotated K may:
# what rounding does over a whole model. Measured on the demo model: 0.24 nats (vLLM in bfloat16, all at once and layer
# by layer) and 0.008 of K. Stale rows were off by 1.3 nats, mixed-up rows by 6.8, one position too many by 1.1 of K.
LOGPROB_NOISE = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.5}
K_NOISE = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 3e-2}
LIKELY = math.log(1e-3)
_CHUNK = (64, 100)  # words, about: the longest prompt then fits a context of 2,048 tokens
_ANSWER_TOKENS = 8
_TOP = 20
_WORST = 1e9  # stands for what is no number

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Said:
    """A greedy answer: its tokens, the top log-probabilities at each, and the context rows it took from the store."""

    tokens: tuple[int, ...]
    tops: tuple[dict[int, float], ...]
    reused: int

    def distance(self, other: Said) -> float:
        """Largest difference of a likely token's log-probability, up to where the answers part.

        Where they part the two tokens have changed places, so their difference is at least half the gap between them:
        only a near tie parts within the noise.
        """
        worst = 0.0
        for here, mine, theirs, there in zip(self.tokens, self.tops, other.tops, other.tokens, strict=False):
            floor = min(theirs.values(), default=-_WORST)
            for token, value in mine.items():
                if not value < LIKELY or token == there:  # nor a value that is no number
                    worst = max(worst, _number(abs(value - theirs.get(token, min(floor, value)))))
            if here != there:
                break
        return worst


class Ground:
    """What the checks stand on: an engine, the chunks of two documents, and a question about them."""

    def __init__(self, engine: Engine, tokenizer: Any, *, seed: int) -> None:
        self.engine, self.layout = engine, PromptLayout(tokenizer)
        example = make_example(EVAL_SEEDS.start + seed, task="cross-chunk", documents=2, chunk_tokens=_CHUNK)
        self.documents = [[self.layout.chunk_ids(c) for c in d.chunks] for d in example.documents]
        self.question = example.question.text
        self._asked = 0

    @property
    def kv(self) -> KVLayout:
        return self.engine.info.layout

    @cached_property
    def rope(self) -> Rope:
        """The model's RoPE, from its config."""
        config = json.loads((Path(self.engine.info.model) / "config.json").read_text("utf-8"))
        return rope_from_config(config, head_dim(config))

    def keys(self, context: CompileContext, salt: str = "") -> KeyMaker:
        """Keys of their own for every ``salt``: what one compiled, another does not find."""
        info = self.engine.info
        secret = hashlib.sha256(f"ragblend certify {salt}".encode()).digest()
        room = info.max_context - len(self.layout.prefix) - 1
        return KeyMaker(info.layout, info.tokenizer, secret, self.layout.prefix, context, room)

    async def compile(self, keys: KeyMaker, *documents: Sequence[tuple[int, ...]]) -> list[ChunkRef]:
        """References of the documents' chunks, compiled like the prefix in front of them."""
        refs: list[ChunkRef] = []
        await self.engine.compile(keys.prefix_job())
        for n, chunks in enumerate(documents):
            found = keys.document([f"{n}.{i}" for i in range(len(chunks))], chunks)
            for job in keys.jobs(found):
                await self.engine.compile(job)
            refs += found
        return refs

    async def planes(self, job: CompileJob) -> tuple[Tensor, Tensor]:
        """Compile the one chunk of ``job`` and read it back: K, V [L, T, H, D] as the engine computed them."""
        await self.engine.compile(job)
        found = self.stored(ChunkRef("", job.chunks[0], job.keys[0], job.sources[0]))
        return found.k, found.v

    def stored(self, ref: ChunkRef) -> ChunkKV:
        """What the store holds. Raises ``CertificateError`` if a chunk that was just compiled is not there."""
        tokenizer = self.engine.info.tokenizer
        found = self.engine.store.get(Want(ref.key, self.kv, ref.token_ids, ref.source, tokenizer))
        if isinstance(found, Miss):
            raise CertificateError(f"chunk {ref.name} was compiled and is not in the store: {found.reason}")
        return found

    def prompt(self, keys: KeyMaker, refs: Sequence[ChunkRef]) -> Prompt:
        return self.layout.build(refs, [{"role": "user", "content": self.question}], keys.prefix_ref())

    async def ask(self, keys: KeyMaker, prompt: Prompt, mode: Mode, ratio: float = 0.0) -> Said:
        self._asked += 1
        sampling = Sampling(max_tokens=_ANSWER_TOKENS, temperature=0.0, logprobs=_TOP)
        options = BlendOptions(mode, "all" if ratio >= 1.0 else "none", ratio)
        request = Request(f"certify-{self._asked}", prompt, sampling, options, keys.tenant_salt)
        deltas = [d async for d in self.engine.generate(request)]
        logprobs = [x for d in deltas for x in d.logprobs]
        if not logprobs:
            raise CertificateError(f"{self.engine.info.name} gave no log-probabilities; there is nothing to compare")
        return Said(
            tuple(t for d in deltas for t in d.token_ids),
            tuple({token: value for token, _, value in x.top} | {x.token_id: x.logprob} for x in logprobs),
            next(d.stats.reused for d in deltas if d.stats),
        )


async def check_exactness(engine: Engine, tokenizer: Any, *, seed: int, progress: Progress) -> tuple[Check, ...]:
    """All checks; the names of those that fail say which invariant the engine breaks with this model."""
    ground = Ground(engine, tokenizer, seed=seed)
    found: list[Check] = []
    for check in CHECKS:
        found += await check(ground)
        progress(f"{found[-1].name} {'holds' if found[-1].passed else 'FAILS'}")
    return tuple(found)


async def full_recompute(ground: Ground) -> list[Check]:
    """Invariant 1: recomputing every row is full prefill, in any order and number of chunks."""
    keys = ground.keys("prefix")
    a, b, c, d = await ground.compile(keys, *ground.documents)
    worst, left = 0.0, 0
    orders = ([a, b, c, d], [d, c, b, a], [c, a], [b], [a, b, a])
    for order in orders:
        prompt = ground.prompt(keys, order)
        full = await ground.ask(keys, prompt, "full")
        again = await ground.ask(keys, prompt, "blend", 1.0)
        worst, left = max(worst, full.distance(again)), max(left, again.reused)
    detail = f"nats between ratio 1.0 and full prefill, {len(orders)} prompts"
    return [
        _check("every-row", float(left), 0.0, "context rows that ratio 1.0 did not recompute"),
        _check("full-recompute", worst, LOGPROB_NOISE[ground.kv.dtype], detail),
    ]


async def compiled_place(ground: Ground) -> list[Check]:
    """Invariant 2: KV that stands where it was compiled is served as stored, and answers like full prefill."""
    nats, bits = 0.0, 0.0
    for context, chunks in (("prefix", 1), ("document", 2)):
        keys = ground.keys("prefix" if context == "prefix" else "document", "place")
        refs = await ground.compile(keys, ground.documents[0][:chunks])
        before = [ground.stored(r) for r in refs]
        prompt = ground.prompt(keys, refs)
        reused = await ground.ask(keys, prompt, "reuse")
        if reused.reused != prompt.context_tokens:
            raise CertificateError(f"of {prompt.context_tokens} rows just compiled, {reused.reused} were found again")
        nats = max(nats, (await ground.ask(keys, prompt, "full")).distance(reused))
        k, v = _fused(ground, prompt)
        for was, ref, s in zip(before, refs, prompt.segments[1:], strict=False):
            now, part = ground.stored(ref), slice(s.start, s.stop)
            pairs = [(was.k, now.k), (was.v, now.v), (was.k, k[:, part]), (was.v, v[:, part])]
            bits = max([bits, *(_difference(x, y) for x, y in pairs)])
    return [
        _check("stored-bytes", bits, 0.0, "largest difference between stored K, V and the same where it was compiled"),
        _check("compiled-place", nats, LOGPROB_NOISE[ground.kv.dtype], "nats between ratio 0 and full prefill there"),
    ]


async def causality(ground: Ground) -> list[Check]:
    """Invariant 3: no K or V of a chunk depends on a later token, of the next chunk or of its own."""
    a, b = ground.documents[0]
    turned = b[len(b) // 2 :] + b[: len(b) // 2]  # as many tokens: the same shapes, so not even rounding may differ
    last = (*a[:-1], b[0] if b[0] != a[-1] else b[1])
    variants = [[a, b], [a, turned], [last, b]]
    planes = []
    for i, chunks in enumerate(variants):
        refs = await ground.compile(ground.keys("document", f"causality {i}"), chunks)
        found = ground.stored(refs[0])
        planes.append(torch.stack([found.k, found.v]))
    earlier = slice(0, len(a) - 1)
    worst = max(_difference(planes[0], planes[1]), _difference(planes[0][:, :, earlier], planes[2][:, :, earlier]))
    return [_check("causality", worst, 0.0, "largest difference of a row's K, V when later tokens change")]


async def rotation(ground: Ground) -> list[Check]:
    """Invariant 4: a chunk moved to another place has the layer-0 K, V that the model computes there.

    Layer-0 K and V depend on nothing but token and position, so one pass over the whole prompt is the truth.
    """
    if ground.rope.signature != ground.kv.rope:
        raise CertificateError(f"the config's RoPE is {ground.rope.signature}, the engine's is {ground.kv.rope}")
    keys = ground.keys("prefix", "rotation")
    a, b, c, d = await ground.compile(keys, *ground.documents)
    prompt = ground.prompt(keys, [d, b, a, c, d, b])
    k, v = _fused(ground, prompt)
    whole = dataclasses.replace(ground.keys("prefix", "whole"), prefix=prompt.token_ids[: prompt.context_tokens])
    true_k, true_v = await ground.planes(whole.prefix_job())
    worst = max(_difference(x[0], y[0]) / float(y[0].float().abs().max()) for x, y in ((k, true_k), (v, true_v)))
    detail = "difference of moved K, V in layer 0 from those computed there, of the largest"
    return [_check("rotation", worst, K_NOISE[ground.kv.dtype], detail)]


CHECKS = (full_recompute, compiled_place, causality, rotation)


class _Reader:
    """As much of a ``BlendModel`` as ``blend.load`` needs to fuse a context; nothing is written anywhere."""

    scale = 1.0

    def __init__(self, ground: Ground) -> None:
        self.layout, self.rope = ground.kv, ground.rope

    def write_kv(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """What is fused is read from ``Loaded``."""


def _fused(ground: Ground, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """K, V [L, N, H, D] of the context as the method fuses it from the store."""
    reader: Any = _Reader(ground)
    loaded = load(reader, prompt, ground.engine.store, tokenizer=ground.engine.info.tokenizer)
    return loaded.k, loaded.v


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; ``_WORST`` where something is no number or the shapes differ."""
    if one.shape != other.shape:
        return _WORST
    if torch.equal(one, other):
        return 0.0
    return max(_number(float((one.float() - other.float()).abs().max())), torch.finfo(torch.float32).tiny)


def _check(name: str, error: float, limit: float, detail: str) -> Check:
    return Check(name, error <= limit, error, limit, detail)


def _number(value: float) -> float:
    return value if math.isfinite(value) else _WORST


def failures(checks: Iterable[Check]) -> list[str]:
    """What failed by how much, a sentence each."""
    return [f"check {c.name} failed: {c.error:.3g}, allowed {c.limit:.3g} ({c.detail})" for c in checks if not c.passed]
