"""Methods mixed into vLLM's worker (``worker_extension_cls``) and called by ``collective_rpc``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group

from blend.engines.vllm.compat import check_config
from blend.errors import BlendError
from blend.rope import rope_from_config
from store import open_store
from store.errors import StoreError
from store.types import KVKey, KVLayout


class BlendExtension:
    """``self`` is the worker; names are prefixed because the mixin must not shadow any of its attributes."""

    def ragblend_attach(
        self, config: dict[str, Any], head_dim: int, layout: dict[str, Any], store: str | None, max_bytes: int | None
    ) -> str | None:
        """Give our connector the model and the store; an error comes back as its message, the worker lives on."""
        from blend.engines.vllm.paged import Worker  # needs an initialised worker

        runner = self.model_runner  # type: ignore[attr-defined]
        try:
            check_config(runner.vllm_config)
            worker = Worker(runner, KVLayout(**layout), rope_from_config(config, head_dim))
            opened = open_store(Path(store) if store else None, max_bytes=max_bytes)
        except (BlendError, StoreError) as e:
            return f"{type(e).__name__}: {e}"
        self._ragblend().attach(worker, opened, config["ragblend_tokenizer"])
        return None

    def ragblend_result(self, id: str) -> dict[str, Any] | None:
        """Take the result of one blend or compile; None if it never ran (vLLM's prefix cache had every row)."""
        result: dict[str, Any] | None = self._ragblend().results.pop(id, None)
        return result

    def ragblend_contains(self, keys: list[str]) -> list[bool]:
        store = self._ragblend().store
        return [store.contains(KVKey.from_hex(k)) for k in keys]

    def ragblend_close(self) -> None:
        self._ragblend().shutdown()

    def _ragblend(self) -> Any:
        return get_kv_transfer_group()
