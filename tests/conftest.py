"""What every test runs under: no network for models, no settings of the developer's own, no colours."""

from __future__ import annotations

import importlib.util
import os

import pytest

for _name in [name for name in os.environ if name.startswith("RAGBLEND_")]:
    del os.environ[_name]
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    NO_COLOR="1",
    COLUMNS="120",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is not None:
        return
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason="vllm is not installed"))
