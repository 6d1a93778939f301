"""The seam between the service and an engine. One implementation per engine, chosen in ``blend.engines``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from blend.certificate import Certificate
from blend.types import CompileJob, CompileResult, Delta, Request
from store.base import KVStore, StoreStats
from store.config import StoreConfig
from store.types import KVKey, KVLayout


@dataclass(frozen=True)
class EngineConfig:
    """What an engine needs to start.

    ``model`` is a Hugging Face model folder; ``store`` what the store is opened with (default: in memory). A request
    waits for its chunks' KV up to ``load_timeout_s`` (``None``: as long as it takes) and computes what is late;
    ``load_threads`` read it. ``None`` for ``dtype``, ``max_context`` and ``kv_cache_gib`` means the model's own or the
    engine's default. ``options`` are the engine's own arguments, and ``min_context_tokens`` for ``blend.decide``.
    """

    model: str
    store: StoreConfig = field(default_factory=StoreConfig)
    dtype: str | None = None
    max_context: int | None = None
    kv_cache_gib: float | None = None
    load_timeout_s: float | None = None
    load_threads: int = 2
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
        """The engine's store, for look-ups, control and reports. With vLLM it is this process's view of the disk: the
        memory in front of it is the worker's, see ``warm``, ``cool`` and ``store_stats``."""
        ...

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        """Stream the answer. Closing the iterator aborts the request and frees what it held.

        Raises ``PromptTooLongError``, ``EngineError``.
        """
        ...

    async def compile(self, job: CompileJob) -> CompileResult:
        """Run ``job`` and write its chunks to the store. Raises ``StoreError``, ``NonFiniteError``, ``EngineError``."""
        ...

    async def warm(self, keys: Sequence[KVKey]) -> int:
        """Bring entries into the fastest tier of the process that blends; how many are there after it."""
        ...

    async def cool(self, keys: Sequence[KVKey]) -> int:
        """Drop entries from that tier, they stay in the next; how many were there."""
        ...

    async def store_stats(self) -> StoreStats:
        """What the store of the process that blends holds, tier by tier."""
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
