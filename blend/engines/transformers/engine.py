"""The engine: requests take turns on one worker thread, token by token, by priority and then in the order they came.

A request is a coroutine that asks the worker for its next token and yields it; nothing runs ahead of the client, and
closing the iterator simply stops asking. What a request holds (its KV) dies with the coroutine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import torch
import transformers

from blend.certificate import Certificate
from blend.decide import MIN_CONTEXT_TOKENS, decide, full_stats
from blend.engines.base import EngineConfig, EngineInfo
from blend.engines.transformers.decoding import Answer
from blend.engines.transformers.model import RowModel, Weights, load_weights
from blend.engines.transformers.turns import Turns
from blend.errors import EngineError, PromptTooLongError
from blend.fingerprint import tokenizer_fingerprint
from blend.load import Loader
from blend.method import blend, compile_into, walk
from blend.select import open_selector
from blend.types import BlendStats, CompileJob, CompileResult, Delta, Request
from blend.writing import Writing
from store import open_store
from store.base import KVStore, StoreStats
from store.types import KVKey

_T = TypeVar("_T")
_OPTIONS = ("min_context_tokens",)
_MAX_OPEN = 16  # requests that hold KV at once, the others wait
_STALL_S = 600.0


async def open_transformers(config: EngineConfig) -> TransformersEngine:
    """Load the model and open the store.

    ``options``: ``min_context_tokens`` (``auto`` does not blend shorter contexts). Raises ``UnsupportedModelError``
    naming the config field, ``EngineError``, ``store.errors.StoreError``.
    """
    return await asyncio.to_thread(_open, config)


def _open(config: EngineConfig) -> TransformersEngine:
    options = config.options or {}
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise EngineError(f"engine option {unknown[0]!r} is unknown; transformers takes {', '.join(_OPTIONS)}")
    weights = load_weights(config)
    longest = config.max_context or weights.max_positions
    if longest > weights.max_positions:
        raise EngineError(f"max_context {longest} is more than the model's own limit of {weights.max_positions}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, local_files_only=True)
    except (ValueError, KeyError, OSError) as e:
        raise EngineError(f"the tokenizer in {config.model} cannot be loaded: {e}") from e
    info = EngineInfo(
        name="transformers",
        version=transformers.__version__,
        model=config.model,
        device=str(weights.device),
        layout=weights.layout,
        tokenizer=tokenizer_fingerprint(config.model),
        max_context=longest,
        vocab_size=weights.vocab_size,
        max_logprobs=weights.vocab_size,
    )
    store = open_store(config.store)
    return TransformersEngine(config, weights, tokenizer, store, info)


class TransformersEngine:
    """``Engine`` on transformers. ``store`` is open to tests and tools; everything else goes through the protocol."""

    def __init__(self, config: EngineConfig, weights: Weights, tokenizer: Any, store: KVStore, info: EngineInfo):
        self.info = info
        self.store = store
        self.certificate: Certificate | None = None
        self._weights: Weights | None = weights
        self._tokenizer = tokenizer
        self._eos = _eos_ids(weights.net, tokenizer)
        self._min_context = int((config.options or {}).get("min_context_tokens", MIN_CONTEXT_TOKENS))
        self._seeds = torch.Generator().manual_seed(config.seed)
        self._loader = Loader.start(threads=config.load_threads, timeout_s=config.load_timeout_s)
        self._worker = ThreadPoolExecutor(1, "ragblend-model")
        self._turns = Turns(1)  # on the worker
        self._open = Turns(_slots(config, info))
        self._queued = 0
        self._progress = time.monotonic()
        self._stopped = False

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        self._admit(request)
        async with self._open.take(request.priority):
            run = await self._do(lambda weights: self._start(weights, request), request.priority)
            stats: BlendStats | None = run.stats
            while not run.answer.finished:
                delta = await self._do(lambda _: run.step(), request.priority)
                if stats is not None:
                    delta, stats = replace(delta, stats=stats, cached_tokens=stats.reused), None
                yield delta

    async def compile(self, job: CompileJob) -> CompileResult:
        self._fits(job.tokens, 0)
        begin = time.perf_counter()
        writing = await self._do(lambda weights: self._compile(weights, job))
        written = await asyncio.to_thread(writing.result)  # the next pass may run meanwhile
        return CompileResult(len(job.chunks), job.tokens, written.bytes, time.perf_counter() - begin, written.refused)

    async def warm(self, keys: Sequence[KVKey]) -> int:
        return await asyncio.to_thread(self.store.warm, keys)

    async def cool(self, keys: Sequence[KVKey]) -> int:
        return await asyncio.to_thread(self.store.cool, keys)

    async def store_stats(self) -> StoreStats:
        return await asyncio.to_thread(self.store.stats)

    async def check(self) -> None:
        if self._stopped:
            raise EngineError("the engine is stopped")
        idle = time.monotonic() - self._progress
        if self._queued and idle > _STALL_S:
            raise EngineError(f"the engine made no progress for {idle:.0f} s with {self._queued} steps queued")

    async def metrics(self) -> str:
        return ""

    async def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        await asyncio.to_thread(self._worker.shutdown)
        self._weights = None
        self._loader.close()
        self.store.close()

    # -- on the worker thread -------------------------------------------------------------------------------------

    def _start(self, weights: Weights, request: Request) -> _Run:
        """Everything before the first token: the whole prompt but its last row, which makes the first logits."""
        prompt, sampling = request.prompt, request.sampling
        seed = int(torch.randint(1 << 62, (), generator=self._seeds))
        answer = Answer(sampling, self._tokenizer, self._eos, seed)
        model = RowModel(weights, len(prompt.token_ids) + sampling.max_tokens)
        last = len(prompt.token_ids) - 1
        mode, why = decide(
            prompt, request.blend, self.store.contains,
            min_context_tokens=self._min_context, certificate=self.certificate,
        )  # fmt: skip
        if mode == "full":
            walk(model, torch.tensor(prompt.token_ids), torch.arange(last))
            stats = full_stats(prompt, why=why)
        else:
            stats = blend(
                model, prompt, request.blend, self.store,
                tokenizer=self.info.tokenizer, stop=last, loader=self._loader,
            )  # fmt: skip
        return _Run(model, answer, last, prompt.token_ids[-1], stats)

    def _compile(self, weights: Weights, job: CompileJob) -> Writing:
        return compile_into(RowModel(weights, job.tokens), job, self.store, tokenizer=self.info.tokenizer)

    # -- helpers --------------------------------------------------------------------------------------------------

    async def _do(self, work: Callable[[Weights], _T], priority: int = 0) -> _T:
        """Run ``work`` on the worker thread when its turn has come; torch's own failures become ``EngineError``."""

        def task() -> _T:
            assert self._weights is not None  # stop() waits for the worker before it lets go of them
            try:
                with torch.no_grad():
                    return work(self._weights)
            except (RuntimeError, MemoryError) as e:
                raise EngineError(f"the model failed: {e}") from e
            finally:
                self._progress = time.monotonic()

        if self._stopped:
            raise EngineError("the engine is stopped")
        if self._queued == 0:
            self._progress = time.monotonic()
        self._queued += 1
        try:
            async with self._turns.take(priority):
                if self._stopped:  # while it waited
                    raise EngineError("the engine is stopped")
                return await asyncio.get_running_loop().run_in_executor(self._worker, task)
        finally:
            self._queued -= 1

    def _admit(self, request: Request) -> None:
        """Refuse what cannot run before it holds anything."""
        prompt, sampling = request.prompt, request.sampling
        open_selector(request.blend.selector, layers=self.info.layout.layers)
        self._fits(len(prompt.token_ids), sampling.max_tokens)
        if sampling.max_tokens < 1:
            raise EngineError(f"max_tokens is {sampling.max_tokens}; an answer has at least one token")
        if not 0 <= min(prompt.token_ids) <= max(prompt.token_ids) < self.info.vocab_size:
            raise EngineError(f"the prompt has token ids outside the vocabulary of {self.info.vocab_size}")

    def _fits(self, prompt: int, answer: int) -> None:
        if prompt + answer > self.info.max_context:
            raise PromptTooLongError(
                f"{prompt} prompt tokens and {answer} answer tokens do not fit the context of {self.info.max_context}"
            )


class _Run:
    """One request on the worker: its cache, its answer, and the row that comes next."""

    def __init__(self, model: RowModel, answer: Answer, row: int, token: int, stats: BlendStats) -> None:
        self.model = model
        self.answer = answer
        self.row = row
        self.token = token
        self.stats = stats

    def step(self) -> Delta:
        token = torch.tensor([self.token])
        hidden = walk(self.model, token, torch.tensor([self.row]), hidden=self.model.embed(token))
        delta = self.answer.push(self.model.logits(hidden)[0])
        assert self.answer.last is not None
        self.row, self.token = self.row + 1, self.answer.last
        return delta


def _eos_ids(net: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, by generation config, config and tokenizer."""
    found: set[int] = set()
    for ids in (net.generation_config.eos_token_id, net.config.eos_token_id, tokenizer.eos_token_id):
        found.update(ids if isinstance(ids, list | tuple) else () if ids is None else (ids,))
    return frozenset(found)


def _slots(config: EngineConfig, info: EngineInfo) -> int:
    """Requests whose KV may be held at once: what fits ``kv_cache_gib`` at full context, at most ``_MAX_OPEN``."""
    if config.kv_cache_gib is None:
        return _MAX_OPEN
    return max(1, min(_MAX_OPEN, int(config.kv_cache_gib * 2**30 / (info.layout.token_bytes * info.max_context))))
