"""An engine outside the service: the prompt layout and keys of its model, and what has been compiled so far."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app.bench.layout import Layout, PromptLayout
from app.settings import Settings
from blend.engines import Engine, EngineConfig, open_engine
from blend.keys import CompileContext, KeyMaker
from blend.prompt import ChunkRef
from blend.support import head_dim, kv_heads
from blend.types import Prompt
from store.codec import open_codec
from store.types import KVKey, KVLayout

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


def store_folder(engine: Engine) -> Path:
    """The folder of ``engine``'s store on disk."""
    store: Any = engine.store
    return Path(store.config.path)


def stored_bytes(model: str, settings: Settings, tokens: int) -> int:
    """About how many bytes the store takes for ``tokens`` of the model folder ``model``, before an engine is open."""
    config = json.loads((Path(model) / "config.json").read_text())
    dtype = settings.dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    layout = KVLayout("", int(config["num_hidden_layers"]), kv_heads(config), head_dim(config), dtype, "")
    codec = open_codec("raw" if settings.store.codec == "auto" else settings.store.codec)
    return layout.layers * codec.plane_bytes(layout, tokens)


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
    codec: str | None = None,
) -> AsyncIterator[Engine]:
    """The engine of ``settings`` with a store in a temporary folder; both are gone afterwards.

    ``in_memory``: the store is in memory and drops the least recently used at the setting ``store.max_gib``, by default
    at 4 GiB. ``codec``: another than the setting ``store.codec``.
    """
    limit = int((settings.store.max_gib or MEMORY_GIB) * 2**30)
    with tempfile.TemporaryDirectory(prefix="ragblend-") as folder:
        changes: dict[str, Any] = {"path": Path(folder), "codec": codec or settings.store.codec}
        if in_memory:
            changes |= {"path": None, "max_bytes": limit, "ram_bytes": 0, "policy": "lru", "admission": False}
        config = EngineConfig(
            model=model or settings.model,
            store=replace(settings.store_config, **changes),
            dtype=settings.dtype,
            max_context=settings.max_context,
            kv_cache_gib=settings.kv_cache_gib,
            load_threads=settings.store.load_threads,
            device=settings.device,
            options=options,
        )
        engine = await open_engine(settings.engine, config)
        try:
            yield engine
        finally:
            await engine.stop()
