"""Start vLLM: its arguments, its child processes."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

import torch

from blend.engines.base import EngineConfig
from blend.engines.vllm.compat import must_run_eagerly
from blend.errors import EngineError

log = logging.getLogger(__name__)
CPU_KV_CACHE_GIB = 2.0  # vLLM's own default on the CPU is half of the machine's memory


def start(config: EngineConfig) -> Any:
    """``AsyncLLM`` with our connector and worker extension; raises ``EngineError``."""
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    options = {k: v for k, v in (config.options or {}).items() if k != "min_context_tokens"}
    if must_run_eagerly() and not options.get("enforce_eager"):
        log.warning("no C++ compiler (g++) found: vLLM runs uncompiled, full prefill is about a tenth slower")
        options["enforce_eager"] = True
    room = config.kv_cache_gib
    if room is None and not torch.cuda.is_available():
        room = CPU_KV_CACHE_GIB
    try:
        args = AsyncEngineArgs(
            model=config.model,
            dtype=config.dtype or "auto",
            max_model_len=config.max_context,
            seed=config.seed,
            kv_cache_memory_bytes=None if room is None else int(room * 2**30),
            enable_prefix_caching=True,
            scheduling_policy="priority",
            worker_extension_cls="blend.engines.vllm.extension.BlendExtension",
            kv_transfer_config=KVTransferConfig(
                kv_connector="BlendConnector",
                kv_connector_module_path="blend.engines.vllm.connector",
                kv_role="kv_both",
            ),
            **options,
        )
        with _children_spared_ctrl_c():
            return AsyncLLM.from_engine_args(args)
    except (ValueError, TypeError, RuntimeError, OSError) as e:
        raise EngineError(f"vLLM did not start with model {config.model!r}: {e}") from e


@contextmanager
def _children_spared_ctrl_c() -> Iterator[None]:
    """Processes started inside inherit a blocked SIGINT: a terminal sends it to all, and only we know what to finish.

    A Ctrl-C meanwhile arrives at the end.
    """
    resource_tracker.ensure_running()  # started later, it would unblock the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
