"""An engine outside the service: the prompt layout and keys of its model, and what has been compiled so far."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.settings import Settings
from blend.engines import Engine, EngineConfig, open_engine
from blend.keys import CompileContext, KeyMaker
from blend.prompt import ChunkRef, PromptLayout
from blend.types import Prompt
from store.types import KVKey


@dataclass
class Workbench:
    """Compiles chunks and builds prompts for ``engine``."""

    engine: Engine
    layout: PromptLayout
    keys: KeyMaker
    compiled: set[KVKey] = field(default_factory=set)

    @classmethod
    def of(cls, engine: Engine, tokenizer: Any, *, salt: bytes, compile: CompileContext) -> Workbench:
        layout = PromptLayout(tokenizer)
        info = engine.info
        return cls(engine, layout, KeyMaker(info.layout, info.tokenizer, salt, layout.prefix, context=compile))

    async def compile(self, names: Sequence[str], chunks: Sequence[tuple[int, ...]]) -> list[ChunkRef]:
        """References of one document's chunks, compiled if they were not."""
        if self.keys.prefix_ref().key not in self.compiled:
            await self.engine.compile(self.keys.prefix_job())
            self.compiled.add(self.keys.prefix_ref().key)
        refs = self.keys.document(names, chunks)
        for job in self.keys.jobs(refs, [r.key not in self.compiled for r in refs]):
            await self.engine.compile(job)
            self.compiled.update(job.keys)
        return refs

    def prompt(self, refs: Sequence[ChunkRef], question: str) -> Prompt:
        """Canonical prefix, ``refs`` in this order, then ``question`` as the user's message."""
        return self.layout.build(refs, [{"role": "user", "content": question}], self.keys.prefix_ref())


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model folder. Raises ``OSError`` or ``ValueError`` if there is none."""
    from transformers import AutoTokenizer

    if not Path(model).exists() and (model.startswith((".", "/")) or model.count("/") != 1):
        raise FileNotFoundError(f"there is no model folder {model}")
    return AutoTokenizer.from_pretrained(model)


def resolve_engine(kind: str) -> str:
    """``vllm`` or ``transformers`` for ``auto``, as ``blend.engines.open_engine`` decides it."""
    if kind != "auto":
        return kind
    return "vllm" if importlib.util.find_spec("vllm") else "transformers"


@asynccontextmanager
async def throwaway_engine(
    settings: Settings, *, model: str | None = None, options: dict[str, Any] | None = None
) -> AsyncIterator[Engine]:
    """The engine of ``settings`` with a store in a temporary folder; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ragblend-") as folder:
        config = EngineConfig(
            model=model or settings.model,
            store=Path(folder),
            dtype=settings.dtype,
            max_context=settings.max_context,
            kv_cache_gib=settings.kv_cache_gib,
            device=settings.device,
            options=options,
        )
        engine = await open_engine(settings.engine, config)
        try:
            yield engine
        finally:
            await engine.stop()
