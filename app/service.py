"""The service: its parts, wired once, and their life cycle."""

from __future__ import annotations

from typing import Any

from app.settings import Settings
from blend.engines import Engine


class Service:
    """Everything one server holds. Open with ``await Service.open(settings)``, end with ``await service.close()``."""

    settings: Settings
    engine: Engine
    # layout: PromptLayout, keys: KeyMaker, retriever: Retriever, jobs: Jobs, metrics: Metrics, tenant_salt: bytes

    @classmethod
    async def open(
        cls, settings: Settings, *, engine: Engine | None = None, tokenizer: Any = None, embedder: Any = None,
        jobs: bool = True,
    ) -> Service:  # fmt: skip
        """Start every part. ``engine``, ``tokenizer`` and ``embedder`` may be given (tests, other programs);
        ``jobs=False`` leaves background work to the caller (offline precompute)."""
        raise NotImplementedError

    async def close(self) -> None:
        """Stop taking work, finish the current compile pass, close every part. May be called twice."""
