"""The production engine: blending inside stock vLLM, CPU and CUDA, without a patch to it."""

from __future__ import annotations

from blend.engines.base import Engine, EngineConfig

__all__ = ["open_vllm"]


async def open_vllm(config: EngineConfig) -> Engine:
    """Start vLLM in this process (its core in a child) and attach our worker. Raises ``EngineError`` and kin."""
    from blend.engines.vllm.engine import VllmEngine

    return await VllmEngine.open(config)
