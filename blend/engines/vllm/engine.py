"""The front end of the vLLM engine: turns our requests into vLLM's and vLLM's outputs into ours."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from blend.certificate import Certificate
from blend.decide import decide, full_stats
from blend.engines.base import EngineConfig, EngineInfo
from blend.engines.vllm.compat import prepare_environment
from blend.engines.vllm.start import start
from blend.engines.vllm.wire import PENDING, pack_blend, pack_compile, unpack_stats, unpack_store_stats
from blend.errors import BlendError, EngineError, NonFiniteError, PromptTooLongError, UnsupportedModelError
from blend.fingerprint import model_fingerprint, tokenizer_fingerprint
from blend.rope import rope_from_config
from blend.select import open_selector
from blend.support import check_supported, head_dim, kv_heads
from blend.types import BlendStats, CompileJob, CompileResult, Delta, Mode, Prompt, Request, Sampling, TokenLogprob
from store import open_store
from store.base import KVStore, StoreStats
from store.errors import StoreFullError, StoreIOError
from store.types import KVKey, KVLayout

_HUNG_AFTER_S = 60.0
_COMPILE_ERRORS = {e.__name__: e for e in (StoreFullError, StoreIOError, NonFiniteError)}
_WRITTEN_POLL_S = 0.01
_COMPILE_PRIORITY = 10  # higher is later: people's requests go first


class VllmEngine:
    """An ``Engine`` over ``AsyncLLM``. Make it with ``open``."""

    def __init__(self, llm: Any, info: EngineInfo, store: KVStore | None, min_context_tokens: int) -> None:
        self.certificate: Certificate | None = None
        self._llm = llm
        self._info = info
        self._store = store
        self._min_context_tokens = min_context_tokens
        self._running = 0
        self._progress = time.monotonic()
        self._stopped = False

    @classmethod
    async def open(cls, config: EngineConfig) -> VllmEngine:
        """Check the model, start vLLM, attach the worker. Raises ``UnsupportedModelError``, ``EngineError``."""
        folder = Path(config.model)
        if not (folder / "config.json").is_file():
            raise EngineError(f"model folder {config.model!r} has no config.json; give a Hugging Face model folder")
        hf = json.loads((folder / "config.json").read_text())
        check_supported(hf)
        rope = rope_from_config(hf, head_dim(hf))
        version = prepare_environment()
        llm = start(config)
        try:
            vllm_config = llm.vllm_config
            layout = KVLayout(
                model=model_fingerprint(folder),
                layers=int(hf["num_hidden_layers"]),
                heads=kv_heads(hf),
                head_dim=head_dim(hf),
                dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
                rope=rope.signature,
            )
            tokenizer = tokenizer_fingerprint(folder)
            error = await _call(
                llm,
                "ragblend_attach",
                {**hf, "ragblend_tokenizer": tokenizer},
                head_dim(hf),
                dict(vars(layout)),
                config.store.to_wire(),
                {"threads": config.load_threads, "timeout_s": config.load_timeout_s},
            )
            if error:
                kind = UnsupportedModelError if error.startswith("UnsupportedModelError") else EngineError
                raise kind(error.partition(": ")[2])
            most = int(vllm_config.model_config.max_logprobs)  # -1: no limit
            info = EngineInfo(
                name="vllm",
                version=version,
                model=config.model,
                device=str(vllm_config.device_config.device_type),
                layout=layout,
                tokenizer=tokenizer,
                max_context=int(vllm_config.model_config.max_model_len),
                vocab_size=int(hf["vocab_size"]),
                max_logprobs=int(hf["vocab_size"]) if most < 0 else most,
            )
            store = open_store(replace(config.store, ram_bytes=0)) if config.store.path else None
        except BaseException:
            llm.shutdown()
            raise
        engine = cls(llm, info, store, int((config.options or {}).get("min_context_tokens", 64)))
        del llm  # asyncio keeps this frame alive; see stop()
        return engine

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def store(self) -> KVStore:
        if self._store is None:
            raise EngineError("this engine keeps its store in the worker's memory; give it a folder to look into it")
        return self._store

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        self._admit(request)
        # What is wrong with a selector fails here, not in the worker.
        open_selector(request.blend.selector, layers=self.info.layout.layers)
        stats: BlendStats | None = None
        params: dict[str, Any] | None = None
        mode, why = await self._decide(request)
        wire_id = f"{request.id}-{secrets.token_hex(4)}"
        salt = request.tenant_salt
        if mode != "full":
            params = pack_blend(wire_id, request.prompt, replace(request.blend, mode=mode))
            # Blended rows are approximate: under a salt of their own no other request can find them in vLLM's exact
            # prefix cache. A salt shared by equal requests would let the second one start from half-repaired blocks
            # and select other rows than the first: the same question must get the same answer.
            salt = hashlib.sha256(salt + wire_id.encode()).digest()
        prompt = {"prompt_token_ids": list(request.prompt.token_ids), "cache_salt": salt.hex()}
        sampling = _sampling(request.sampling, params)
        stream = self._llm.generate(prompt, sampling, wire_id, priority=request.priority)
        self._running += 1
        self._progress = time.monotonic()
        try:
            async for output in _translated(stream):
                self._progress = time.monotonic()
                delta = _delta(output, request.sampling.logprobs or 0)
                if stats is None:
                    cached = int(output.num_cached_tokens or 0)
                    stats = await self._stats(wire_id, request.prompt, mode, why, cached)
                    delta = replace(delta, stats=stats, cached_tokens=stats.reused)
                yield delta
        finally:
            self._running -= 1
            await stream.aclose()  # aborts the request in the engine if it still runs

    async def compile(self, job: CompileJob) -> CompileResult:
        if job.tokens + 1 > self._info.max_context:
            raise PromptTooLongError(
                f"compiling needs {job.tokens} tokens in one pass, the model holds {self._info.max_context}; "
                "lower compile.budget or chunk_tokens"
            )
        begin = time.perf_counter()
        wire_id = f"compile-{job.id}-{secrets.token_hex(4)}"
        ids = [*job.context, *(t for c in job.chunks for t in c)]
        # vLLM computes the last row itself, so the prompt ends with one row nobody needs.
        prompt = {"prompt_token_ids": [*ids, ids[-1]], "cache_salt": secrets.token_hex(32)}
        params = pack_compile(replace(job, id=wire_id))
        stream = self._llm.generate(
            prompt, _sampling(Sampling(max_tokens=1, ignore_eos=True), params), wire_id, priority=_COMPILE_PRIORITY
        )
        async for _ in _translated(stream):
            self._progress = time.monotonic()
        result = await self._rpc("ragblend_result", wire_id)
        while result == PENDING:  # computed, and being written behind the engine's back
            await asyncio.sleep(_WRITTEN_POLL_S)
            result = await self._rpc("ragblend_result", wire_id)
        if result is None:
            raise EngineError(f"compile job {job.id} did not run")
        if "error" in result:
            raise _COMPILE_ERRORS.get(result["kind"], StoreIOError)(result["error"])
        seconds = time.perf_counter() - begin
        return CompileResult(len(job.chunks), job.tokens, result["bytes"], seconds, result["refused"])

    async def warm(self, keys: Sequence[KVKey]) -> int:
        return int(await self._rpc("ragblend_move", [k.hex for k in keys], True))

    async def cool(self, keys: Sequence[KVKey]) -> int:
        return int(await self._rpc("ragblend_move", [k.hex for k in keys], False))

    async def store_stats(self) -> StoreStats:
        return unpack_store_stats(await self._rpc("ragblend_store_stats"))

    async def check(self) -> None:
        if self._stopped:
            raise EngineError("the engine is stopped")
        if self._llm.errored:
            raise EngineError(f"the engine is dead: {self._llm.dead_error}")
        silent = time.monotonic() - self._progress
        if self._running and silent > _HUNG_AFTER_S:
            raise EngineError(f"the engine made no progress for {silent:.0f} s with {self._running} requests running")

    async def metrics(self) -> str:
        from prometheus_client import REGISTRY, generate_latest

        if self._stopped:
            return ""
        await self._llm.do_log_stats()
        return generate_latest(REGISTRY).decode()

    async def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        llm, self._llm = self._llm, None
        with suppress(EngineError):  # a dead engine has nothing left to close
            await _call(llm, "ragblend_close")
        llm.shutdown()
        del llm
        gc.collect()  # left to the interpreter's end, its finaliser would fail there, loudly
        if self._store is not None:
            self._store.close()

    # -- helpers --------------------------------------------------------------------------------------------------

    async def _rpc(self, method: str, *args: Any) -> Any:
        """Call our worker extension; there is one worker."""
        if self._stopped:
            raise EngineError("the engine is stopped")
        return await _call(self._llm, method, *args)

    def _admit(self, request: Request) -> None:
        if self._stopped:
            raise EngineError("the engine is stopped")
        need = len(request.prompt.token_ids) + request.sampling.max_tokens
        if need > self._info.max_context:
            raise PromptTooLongError(
                f"prompt of {len(request.prompt.token_ids)} tokens and answer of {request.sampling.max_tokens} "
                f"need {need}, the model holds {self._info.max_context}; ask for fewer chunks or a shorter answer"
            )

    async def _decide(self, request: Request) -> tuple[Mode, str | None]:
        contains = self._store.contains if self._store else await self._worker_contains(request.prompt)
        return decide(
            request.prompt, request.blend, contains,
            min_context_tokens=self._min_context_tokens, certificate=self.certificate,
        )  # fmt: skip

    async def _worker_contains(self, prompt: Prompt) -> Callable[[KVKey], bool]:
        """Look-up of the prompt's keys in a store that only the worker's memory holds."""
        keys = [s.key for s in prompt.segments if s.key is not None]
        found = await self._rpc("ragblend_contains", [k.hex for k in keys])
        return dict(zip(keys, found, strict=True)).__getitem__

    async def _stats(self, id: str, prompt: Prompt, mode: str, why: str | None, cached: int) -> BlendStats:
        if mode == "full":
            return full_stats(prompt, cached=min(cached, prompt.context_tokens), why=why)
        wire = await self._rpc("ragblend_result", id)
        if wire is not None:
            return replace(unpack_stats(wire), why=why)
        hit = full_stats(prompt, cached=prompt.context_tokens)
        return replace(hit, mode=mode, why="the same blended prompt was in the engine's prefix cache")


async def _call(llm: Any, method: str, *args: Any) -> Any:
    """One worker's answer to ``method``. vLLM forgets calls that wait when its core dies, so we look for ourselves."""
    with _ours():
        answer = asyncio.ensure_future(llm.collective_rpc(method, args=args))
        while not (await asyncio.wait([answer], timeout=1.0))[0]:
            if llm.errored:
                answer.cancel()
                raise EngineError(f"vLLM died: {llm.dead_error}")
        return answer.result()[0]


async def _translated(stream: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """``stream`` with vLLM's errors as ours."""
    with _ours():
        async for output in stream:
            yield output


@contextmanager
def _ours() -> Iterator[None]:
    """vLLM's errors as ours, at the seam and only here."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except (EngineDeadError, EngineGenerateError) as e:
        raise EngineError(f"vLLM failed: {e}") from e
    except ValueError as e:
        raise BlendError(f"vLLM refused the request: {e}") from e


def _sampling(sampling: Sampling, params: dict[str, Any] | None) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop=list(sampling.stop) or None,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logprobs=sampling.logprobs,
        ignore_eos=sampling.ignore_eos,
        output_kind=RequestOutputKind.DELTA,
        extra_args={"kv_transfer_params": params} if params else None,
    )


def _delta(output: Any, most: int) -> Delta:
    """vLLM's output as ours, with the ``most`` likely tokens in order: its tables begin with the sampled one."""
    one = output.outputs[0]
    ids = tuple(int(t) for t in one.token_ids)
    logprobs = []
    for token, table in zip(ids, one.logprobs or (), strict=False):
        best = sorted(((i, lp) for i, lp in table.items() if lp.rank <= most), key=lambda entry: entry[1].rank)
        top = tuple((int(i), lp.decoded_token or "", float(lp.logprob)) for i, lp in best)
        own = table[token]
        logprobs.append(TokenLogprob(token, own.decoded_token or "", float(own.logprob), top))
    return Delta(one.text, ids, tuple(logprobs), one.finish_reason)
