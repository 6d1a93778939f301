"""An engine outside the service: the prompt layout and keys of its model, and what has been compiled so far."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.bench.layout import Layout, PromptLayout
from app.settings import Settings
from blend.engines import Engine, EngineConfig, open_engine
from blend.keys import CompileContext, KeyMaker
from blend.prompt import ChunkRef
from blend.types import Prompt
from store.types import KVKey

MEMORY_GIB = 4.0


@dataclass
class Workbench:
    """Compiles chunks and builds prompts for ``engine``."""

    engine: Engine
    layout: Layout
    keys: KeyMaker
    compiled: set[KVKey] = field(default_factory=set)

    @classmethod
    def of(
        cls, engine: Engine, tokenizer: Any, *, salt: bytes, compile: CompileContext, layout: Layout | None = None
    ) -> Workbench:
        """``layout`` defaults to the service's, by the tokenizer's chat template."""
        layout = layout or PromptLayout(tokenizer)
        info = engine.info
        budget = min(KeyMaker.budget, info.max_context - len(layout.prefix))
        keys = KeyMaker(info.layout, info.tokenizer, salt, layout.prefix, context=compile, budget=budget)
        return cls(engine, layout, keys)

    async def compile(
        self,
        names: Sequence[str],
        chunks: Sequence[tuple[int, ...]],
        *,
        neighbours: Sequence[Sequence[tuple[int, ...]]] | None = None,
        wanted: Sequence[bool] | None = None,
    ) -> list[ChunkRef]:
        """References of one document's chunks; the ``wanted`` ones (default: all) compiled if they were not.

        ``neighbours``: see ``KeyMaker.document``.
        """
        if self.keys.prefix_ref().key not in self.compiled:
            await self.engine.compile(self.keys.prefix_job())
            self.compiled.add(self.keys.prefix_ref().key)
        refs = self.keys.document(names, chunks, neighbours)
        need = [r.key not in self.compiled and (wanted is None or wanted[i]) for i, r in enumerate(refs)]
        for job in self.keys.jobs(refs, need):
            await self.engine.compile(job)
            self.compiled.update(job.keys)
        return refs

    def forget(self) -> None:
        """Drop what was compiled, the prefix excepted. vLLM's store is its worker's: there it becomes the oldest."""
        gone = self.compiled - {self.keys.prefix_ref().key}
        self.compiled.difference_update(gone)
        if self.engine.info.name != "vllm":
            for key in gone:
                self.engine.store.delete(key)

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
    settings: Settings,
    *,
    model: str | None = None,
    options: dict[str, Any] | None = None,
    in_memory: bool = False,
) -> AsyncIterator[Engine]:
    """The engine of ``settings`` with a store in a temporary folder; both are gone afterwards.

    ``in_memory``: the store is in memory and drops the least recently used at the setting ``store.max_gib``, by default
    at 4 GiB.
    """
    with tempfile.TemporaryDirectory(prefix="ragblend-") as folder:
        config = EngineConfig(
            model=model or settings.model,
            store=None if in_memory else Path(folder),
            dtype=settings.dtype,
            max_context=settings.max_context,
            kv_cache_gib=settings.kv_cache_gib,
            max_store_bytes=int((settings.store.max_gib or MEMORY_GIB) * 2**30) if in_memory else None,
            device=settings.device,
            options=options,
        )
        engine = await open_engine(settings.engine, config)
        try:
            yield engine
        finally:
            await engine.stop()
