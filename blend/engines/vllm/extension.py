"""Methods mixed into vLLM's worker (``worker_extension_cls``) and called by ``collective_rpc``."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group

from blend.engines.vllm.compat import check_config
from blend.engines.vllm.wire import pack_store_stats
from blend.errors import BlendError
from blend.load import Loader
from blend.rope import rope_from_config
from store import StoreConfig, open_store
from store.errors import StoreError
from store.types import KVKey, KVLayout


class BlendExtension:
    """``self`` is the worker; names are prefixed because the mixin must not shadow any of its attributes."""

    def ragblend_attach(
        self,
        config: dict[str, Any],
        head_dim: int,
        layout: dict[str, Any],
        store: dict[str, Any],
        load: dict[str, Any],
    ) -> str | None:
        """Give our connector the model and the store; an error comes back as its message, the worker lives on."""
        from blend.engines.vllm.paged import Worker  # needs an initialised worker

        runner = self.model_runner  # type: ignore[attr-defined]
        try:
            check_config(runner.vllm_config)
            worker = Worker(runner, KVLayout(**layout), rope_from_config(config, head_dim))
            opened = open_store(StoreConfig.from_wire(store))
        except (BlendError, StoreError) as e:
            return f"{type(e).__name__}: {e}"
        self._ragblend().attach(worker, opened, Loader.start(**load), config["ragblend_tokenizer"])
        return None

    def ragblend_result(self, id: str) -> dict[str, Any] | None:
        """Take the result of one blend or compile; None if it never ran (vLLM's prefix cache had every row), and
        ``PENDING`` while what was compiled is being written."""
        result: dict[str, Any] | None = self._ragblend().take_result(id)
        return result

    def ragblend_contains(self, keys: list[str]) -> list[bool]:
        store = self._ragblend().store
        return [store.contains(KVKey.from_hex(k)) for k in keys]

    def ragblend_move(self, keys: list[str], up: bool) -> int:
        """Bring entries into this worker's memory, or drop them from it; see ``KVStore.warm`` and ``cool``."""
        store = self._ragblend().store
        found = [KVKey.from_hex(k) for k in keys]
        return int(store.warm(found) if up else store.cool(found))

    def ragblend_store_stats(self) -> dict[str, Any]:
        return pack_store_stats(self._ragblend().store.stats())

    def ragblend_close(self) -> None:
        self._ragblend().shutdown()

    def _ragblend(self) -> Any:
        return get_kv_transfer_group()
