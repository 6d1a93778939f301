"""An engine on a tiny model, with what an application has around it: keys, prompts, requests."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import transformers

from blend.engines import Engine, EngineConfig, open_engine
from blend.keys import KeyMaker
from blend.prompt import ChunkRef, PromptLayout
from blend.rope import rope_from_config
from blend.support import head_dim
from blend.types import BlendOptions, BlendStats, CompileResult, Prompt, Request, Sampling
from kernels.rotate import rotate
from store import Miss, StoreConfig, Want
from tests.certificates import passing

T = TypeVar("T")
TENANT, OTHER_TENANT = b"t" * 32, b"u" * 32


class Loop:
    """An event loop in a thread of its own, so that one engine serves many (synchronous) tests."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="engines", daemon=True)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(240)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@dataclass(frozen=True)
class Answer:
    """What came back; ``top`` is one ``{token: log-probability}`` per generated token."""

    tokens: list[int]
    text: str
    top: list[dict[int, float]]
    stats: BlendStats
    cached: int
    finish: str | None

    def distance(self, other: Answer) -> float:
        """Largest difference of the log-probabilities of tokens both list; infinite if the answers differ."""
        if self.tokens != other.tokens:
            return float("inf")
        return max(abs(a[t] - b[t]) for a, b in zip(self.top, other.top, strict=True) for t in a.keys() & b.keys())


class Served:
    """An engine on a tiny model, with what an application has around it."""

    def __init__(self, loop: Loop, engine: Engine, kind: str, folder: Path) -> None:
        self.loop, self.engine, self.kind, self.folder = loop, engine, kind, folder
        self.count = 0

    @cached_property
    def layout(self) -> PromptLayout:
        return PromptLayout(transformers.AutoTokenizer.from_pretrained(self.folder))

    @property
    def tolerance(self) -> float:
        """Noise of float32 in log-probabilities: other kernels, other order of summation."""
        return 2e-4 if self.engine.info.name == "transformers" else 2e-3

    def keys(self, tenant: bytes = TENANT, context: str = "prefix", budget: int = 512) -> KeyMaker:
        info = self.engine.info
        return KeyMaker(info.layout, info.tokenizer, tenant, self.layout.prefix, context, budget)

    def document(self, *texts: str, tenant: bytes = TENANT, context: str = "prefix", name: str = "doc",
                 compiled: bool = True) -> list[ChunkRef]:  # fmt: skip
        """References of a document's chunks; their KV (and the prefix's) is in the store if ``compiled``."""
        keys = self.keys(tenant, context)
        refs = keys.document([f"{name}-{i}" for i in range(len(texts))], [self.layout.chunk_ids(t) for t in texts])
        if compiled:
            for job in (keys.prefix_job(), *keys.jobs(refs)):
                self.compile(job)
        return refs

    def compile(self, job: Any) -> CompileResult:
        return self.loop.run(self.engine.compile(job))

    def prompt(self, refs: Sequence[ChunkRef], question: str = "Who built it?", tenant: bytes = TENANT) -> Prompt:
        return self.layout.build(refs, [{"role": "user", "content": question}], self.keys(tenant).prefix_ref())

    def fused(self, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [L, N, H, D] of the context: as stored, turned to their places by hand."""
        config = transformers.AutoConfig.from_pretrained(self.folder).to_dict()
        inv_freq = rope_from_config(config, head_dim(config)).inv_freq
        keys, values = [], []
        for s in prompt.segments[:-1]:
            info, ids = self.engine.info, prompt.token_ids[s.start : s.stop]
            assert s.key is not None
            chunk = self.engine.store.get(Want(s.key, info.layout, ids, s.source, info.tokenizer))
            assert not isinstance(chunk, Miss)
            keys.append(rotate(chunk.k, s.start - chunk.k_position, inv_freq))
            values.append(chunk.v)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def request(self, prompt: Prompt, mode: str = "full", *, ratio: float = 0.0, selector: str = "auto",
                tokens: int = 6, tenant: bytes = TENANT, **sampling: Any) -> Request:  # fmt: skip
        self.count += 1
        chosen = Sampling(**{"max_tokens": tokens, "logprobs": 5, "ignore_eos": True, **sampling})
        return Request(f"test-{self.count}", prompt, chosen, BlendOptions(mode, selector, ratio), tenant)

    async def collect(self, request: Request) -> Answer:
        deltas = [d async for d in self.engine.generate(request)]
        first, last = deltas[0], deltas[-1]
        assert first.stats is not None
        assert first.cached_tokens is not None
        assert all(d.stats is None and d.finish_reason is None for d in deltas[1:-1])
        logprobs = [x for d in deltas for x in d.logprobs]
        return Answer(
            [t for d in deltas for t in d.token_ids],
            "".join(d.text for d in deltas),
            [{x.token_id: x.logprob} | {t: value for t, _, value in x.top} for x in logprobs],
            first.stats,
            first.cached_tokens,
            last.finish_reason,
        )

    def ask(self, prompt: Prompt, mode: str = "full", **how: Any) -> Answer:
        return self.loop.run(self.collect(self.request(prompt, mode, **how)))

    def together(self, *requests: Request) -> list[Answer]:
        async def gather() -> list[Answer]:
            return list(await asyncio.gather(*(self.collect(r) for r in requests)))

        return self.loop.run(gather())


def open_served(
    loop: Loop, name: str, kind: str, folder: Path, path: Path | None, store: StoreConfig | None = None, **config: Any
) -> Served:
    """An engine; its store in the folder ``path`` with memory in front, or in memory only, or as ``store`` says."""
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    options: dict[str, Any] = {"min_context_tokens": 64}
    if name == "vllm" and kind != "llama":
        options["enforce_eager"] = True  # starts sooner; compiled is tested once
    store = store or StoreConfig(path=path, ram_bytes=(64 << 20) if path else 0)
    settings = {"model": str(folder), "store": store, "dtype": "float32", "max_context": 2048, "kv_cache_gib": 0.25}
    engine = loop.run(open_engine(name, EngineConfig(**{**settings, "options": options, **config})))
    engine.certificate = passing(engine.info)
    return Served(loop, engine, kind, folder)
