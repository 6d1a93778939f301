"""The seam between the service and an engine. One implementation per engine, chosen in ``blend.engines``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from blend.certificate import Certificate
from blend.types import CompileJob, CompileResult, Delta, Request
from store.base import KVStore
from store.types import KVLayout


@dataclass(frozen=True)
class EngineConfig:
    """What an engine needs to start.

    ``model`` is a Hugging Face model folder; ``store`` the store's folder (``None``: memory, for tests). ``None`` for
    ``dtype``, ``max_context`` and ``kv_cache_gib`` means the model's own or the engine's default. ``options`` are the
    engine's own arguments, and ``min_context_tokens`` for ``blend.decide``.
    """

    model: str
    store: Path | None
    dtype: str | None = None
    max_context: int | None = None
    kv_cache_gib: float | None = None
    max_store_bytes: int | None = None
    device: str = "auto"
    seed: int = 0
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class EngineInfo:
    """Identity of a running engine. Fingerprints are hex. ``max_logprobs``: top log-probabilities it can return."""

    name: str
    version: str
    model: str
    device: str
    layout: KVLayout
    tokenizer: str
    max_context: int
    vocab_size: int
    max_logprobs: int = 20


class Engine(Protocol):
    """A model that can generate from blended prompts and compile chunks into the store.

    ``certificate``: what ``auto`` goes by, set by whoever opened the engine; without one ``auto`` prefills in full.
    """

    certificate: Certificate | None

    @property
    def info(self) -> EngineInfo: ...

    @property
    def store(self) -> KVStore:
        """The engine's store, for look-ups and reports (with vLLM a read-only view: its worker writes)."""
        ...

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        """Stream the answer. Closing the iterator aborts the request and frees what it held.

        Raises ``PromptTooLongError``, ``EngineError``.
        """
        ...

    async def compile(self, job: CompileJob) -> CompileResult:
        """Run ``job`` and write its chunks to the store. Raises ``StoreError``, ``NonFiniteError``, ``EngineError``."""
        ...

    async def check(self) -> None:
        """Raise ``EngineError`` if the engine is dead or has made no progress while work is queued."""
        ...

    async def metrics(self) -> str:
        """The engine's own metrics in Prometheus text format, or an empty string."""
        ...

    async def stop(self) -> None:
        """Finish, close the store, release the device. May be called twice."""
        ...
