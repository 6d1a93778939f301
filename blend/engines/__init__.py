"""Engines: ``await open_engine("vllm" | "transformers" | "auto", config)``."""

from __future__ import annotations

import importlib.util

from blend.engines.base import Engine, EngineConfig, EngineInfo
from blend.errors import EngineError

__all__ = ["CHOICES", "Engine", "EngineConfig", "EngineInfo", "open_engine"]

CHOICES = ("auto", "vllm", "transformers")


async def open_engine(kind: str, config: EngineConfig) -> Engine:
    """Start an engine and wait until it can serve. ``auto`` is vLLM where it is installed, else transformers.

    Raises ``UnsupportedModelError`` naming the config field, ``EngineError`` otherwise.
    """
    if kind not in CHOICES:
        raise EngineError(f"engine {kind!r} is unknown; choose one of {', '.join(CHOICES)}")
    if kind == "auto":
        kind = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if kind == "vllm":
        from blend.engines.vllm import open_vllm

        return await open_vllm(config)
    from blend.engines.transformers import open_transformers

    return await open_transformers(config)
