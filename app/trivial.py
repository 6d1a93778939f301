"""An engine without a model: bytes are tokens, the answer is the first sentence of the context.

It keeps the whole contract of ``blend.engines.Engine`` (streaming, stop, limits, abort, honest accounting with a real
store), so everything around an engine can be tested in milliseconds, and the service's own overhead measured.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import torch

from blend.certificate import Certificate
from blend.decide import decide, full_stats
from blend.engines.base import EngineInfo
from blend.errors import EngineError, PromptTooLongError
from blend.select import open_selector
from blend.types import (
    BlendOptions,
    BlendStats,
    ChunkStats,
    CompileJob,
    CompileResult,
    Delta,
    Prompt,
    Request,
    Sampling,
    TokenLogprob,
)
from store.base import KVStore, Miss, StoreStats
from store.check import read_whole
from store.types import ChunkKV, KVKey, KVLayout, Want

LAYOUT = KVLayout(model="trivial-1", layers=1, heads=1, head_dim=2, dtype="float32", rope="none")
TOKENIZER = "bytes-1"
_SPECIAL = ("<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_SPECIAL_IDS = {text: 256 + i for i, text in enumerate(_SPECIAL)}
_SPLIT = re.compile("(" + "|".join(re.escape(s) for s in _SPECIAL) + ")")
_SENTENCE = re.compile(r"\S.*?(?:[.!?](?=\s|$)|$)", re.DOTALL)
_PIECES = re.compile(r"\s*\S+|\s+$")


class ByteTokenizer:
    """One token per UTF-8 byte, five control tokens; the part of a Hugging Face tokenizer that is used here."""

    chat_template = "trivial"
    vocab_size = 256 + len(_SPECIAL)

    def __call__(
        self, text: str, *, add_special_tokens: bool = False, split_special_tokens: bool = False
    ) -> dict[str, list[int]]:
        ids: list[int] = []
        for part in [text] if split_special_tokens else _SPLIT.split(text):
            special = None if split_special_tokens else _SPECIAL_IDS.get(part)
            ids.extend([special] if special is not None else part.encode("utf-8", "replace"))
        return {"input_ids": ids}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without control tokens."""
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **_: Any) -> str:
        """``<|bos|>`` and ``<|role|>content<|end|>`` for each message, then the assistant's opening."""
        roles = {"developer": "system"}
        turns = "".join(f"<|{roles.get(m['role'], m['role'])}|>{m['content']}<|end|>" for m in messages)
        return f"<|bos|>{turns}<|assistant|>"


class TrivialEngine:
    """An ``Engine`` over ``store``. ``delay_s``: pause before each piece of an answer (0: only yields to the loop).

    ``faithful_ratio``: an answer of whose context a smaller share is computed afresh comes out backwards, as if the
    blend had gone wrong, for tests of what watches over answers. Requests never wait: priorities change nothing.
    """

    def __init__(
        self, store: KVStore, *, max_context: int = 32768, delay_s: float = 0.0, faithful_ratio: float = 0.0
    ) -> None:
        self.store = store
        self.certificate: Certificate | None = None
        self.delay_s = delay_s
        self.faithful_ratio = faithful_ratio
        self.running: set[str] = set()
        self.tokenizer = ByteTokenizer()
        self._stopped = False
        self._info = EngineInfo(
            name="trivial",
            version="1",
            model="trivial",
            device="cpu",
            layout=LAYOUT,
            tokenizer=TOKENIZER,
            max_context=max_context,
            vocab_size=ByteTokenizer.vocab_size,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        """Answer with the first sentence of the first chunk, or of the question when there is no context."""
        await self.check()
        if len(request.prompt.token_ids) + request.sampling.max_tokens > self._info.max_context:
            raise PromptTooLongError(
                f"{len(request.prompt.token_ids)} prompt tokens and {request.sampling.max_tokens} new tokens do not "
                f"fit the model's {self._info.max_context}"
            )
        self.running.add(request.id)
        try:
            blended = self._blend(request.prompt, request.blend)
            stats: BlendStats | None = blended
            cached: int | None = blended.reused
            answer = self._answer(request.prompt)
            if blended.mode != "full" and blended.tokens - blended.reused < self.faithful_ratio * blended.tokens:
                answer = answer[::-1]
            text, finish = _cut(answer, request.sampling)
            for piece in _PIECES.findall(text):
                await asyncio.sleep(self.delay_s)
                yield self._delta(piece, request.sampling, stats, cached)
                stats = cached = None
            yield Delta(finish_reason=finish, stats=stats, cached_tokens=cached)
        finally:
            self.running.discard(request.id)

    async def compile(self, job: CompileJob) -> CompileResult:
        """Put each chunk's KV, a function of its ids and positions, into the store."""
        await self.check()
        await asyncio.sleep(0)
        begin, at, written = time.perf_counter(), len(job.context), 0
        for ids, key, source in zip(job.chunks, job.keys, job.sources, strict=True):
            k, v = _kv(ids, at)
            written += self.store.put(ChunkKV(key, LAYOUT, ids, k, v, at, source, TOKENIZER, job.owner))
            at += len(ids)
        return CompileResult(len(job.chunks), job.tokens, written, time.perf_counter() - begin)

    async def warm(self, keys: Sequence[KVKey]) -> int:
        return self.store.warm(keys)

    async def cool(self, keys: Sequence[KVKey]) -> int:
        return self.store.cool(keys)

    async def store_stats(self) -> StoreStats:
        return self.store.stats()

    async def check(self) -> None:
        if self._stopped:
            raise EngineError("the engine was stopped")

    async def metrics(self) -> str:
        return f"# TYPE trivial_running gauge\ntrivial_running {len(self.running)}\n"

    async def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self.store.close()

    def _blend(self, prompt: Prompt, options: BlendOptions) -> BlendStats:
        """Look up every context segment and count its rows; the first ``ratio`` of what was found is "recomputed"."""
        open_selector(options.selector, layers=LAYOUT.layers)
        mode, why = decide(prompt, options, self.store.contains, certificate=self.certificate)
        if mode == "full":
            return full_stats(prompt, why=why)
        ratio = 0.0 if mode == "reuse" else options.recompute_ratio
        begin = time.perf_counter()
        chunks = []
        for s in prompt.segments[:-1]:
            ids = prompt.token_ids[s.start : s.stop]
            assert s.key is not None
            want = Want(s.key, LAYOUT, ids, s.source, TOKENIZER)
            found = self.store.find(want)
            if isinstance(found, Miss):
                chunks.append(ChunkStats(s.name, s.tokens, 0, 0, s.tokens, miss_reason=found.reason))
                continue
            chunk = read_whole(found, want)
            if not torch.equal(chunk.k, _kv(ids, chunk.k_position)[0]):
                raise EngineError(f"the store served foreign KV for segment {s.name}")
            again = round(ratio * s.tokens)
            chunks.append(ChunkStats(s.name, s.tokens, s.tokens - again, again, 0, tier=found.tier))
        reused, tokens = sum(c.reused for c in chunks), prompt.context_tokens
        return BlendStats(
            mode=mode,
            tokens=tokens,
            reused=reused,
            recomputed=sum(c.recomputed for c in chunks),
            missing=sum(c.missing for c in chunks),
            computed_share=(tokens - reused) / tokens,
            load_s=time.perf_counter() - begin,
            selector=options.selector,
            why=why,
            chunks=tuple(chunks),
        )

    def _answer(self, prompt: Prompt) -> str:
        source = next((s for s in prompt.segments if s.kind == "chunk"), prompt.question)
        ids = list(prompt.token_ids[source.start : source.stop])
        if source.kind == "question":  # the last user turn: what stands between <|user|> and <|end|>
            start = len(ids) - ids[::-1].index(_SPECIAL_IDS["<|user|>"]) if _SPECIAL_IDS["<|user|>"] in ids else 0
            end = _SPECIAL_IDS["<|end|>"]
            ids = ids[start : ids.index(end, start)] if end in ids[start:] else ids[start:]
        found = _SENTENCE.search(self.tokenizer.decode(ids).strip())
        return found.group() if found else "I do not know."

    def _delta(self, piece: str, sampling: Sampling, stats: BlendStats | None, cached: int | None) -> Delta:
        ids = tuple(piece.encode())
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampling.logprobs is not None:
            names = [bytes([i]).decode("utf-8", "replace") for i in ids]
            logprobs = tuple(
                TokenLogprob(i, name, 0.0, ((i, name, 0.0),) if sampling.logprobs else ())
                for i, name in zip(ids, names, strict=True)
            )
        return Delta(piece, ids, logprobs, stats=stats, cached_tokens=cached)


def _kv(ids: Sequence[int], position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [1, T, 1, 2]: token id and position, negated for V."""
    k = torch.tensor([[float(i), float(position + n)] for n, i in enumerate(ids)]).reshape(1, len(ids), 1, 2)
    return k, -k


def _cut(text: str, sampling: Sampling) -> tuple[str, str]:
    """The answer up to the first stop string or the token limit, and why it ends."""
    ends = [at for at in (text.find(s) for s in sampling.stop if s) if at >= 0]
    if ends:
        text = text[: min(ends)]
    data = text.encode()
    if len(data) > sampling.max_tokens:
        return data[: sampling.max_tokens].decode("utf-8", "ignore"), "length"
    return text, "stop"
