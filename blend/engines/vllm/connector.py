"""The vLLM KV connector: claims the rows we fill, and fills them before the step's forward.

Scheduler side: a request that carries our plan has all prompt rows but the last claimed as external, so vLLM allocates
their blocks and computes only the last row (which yields the first token). Worker side: ``start_load_kv`` runs the
method over those blocks. Compile jobs travel the same way, which gives them blocks, fairness and cancellation for free.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from blend.engines.vllm.compat import die_with_parent
from blend.engines.vllm.wire import PENDING, pack_stats, unpack_blend, unpack_compile
from blend.errors import NonFiniteError
from blend.method import blend, compile_into
from blend.writing import Writing
from store.errors import StoreError

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from blend.engines.vllm.paged import Worker
    from blend.load import Loader
    from store.base import KVStore

Result = dict[str, Any] | Writing
_KEPT_RESULTS = 4096


@dataclass
class Load:
    """One request's work for this step: its wire plan, prompt, blocks, and rows already in the cache."""

    wire: dict[str, Any]
    token_ids: list[int]
    block_ids: list[int]
    computed: int


@dataclass
class Loads(KVConnectorMetadata):
    """What the scheduler side hands the worker side for one step."""

    loads: list[Load] = field(default_factory=list)


class BlendConnector(KVConnectorBase_V1):
    """Both sides; vLLM makes one object per side, with ``role``."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        die_with_parent()  # the scheduler side lives in vLLM's engine core, the worker side in its worker
        self._pending: list[Load] = []
        self.worker: Worker | None = None
        self.store: KVStore | None = None
        self.loader: Loader | None = None
        self.tokenizer = ""
        self.results: OrderedDict[str, Result] = OrderedDict()

    # -- scheduler side -------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        wire = request.kv_transfer_params
        if not wire or num_computed_tokens >= _filled_by_us(wire, request):
            return 0, False
        return request.num_prompt_tokens - 1 - num_computed_tokens, False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        wire = request.kv_transfer_params
        if not wire or num_external_tokens == 0:
            return
        assert request.prompt_token_ids is not None
        self._pending.append(
            Load(
                wire=wire,
                token_ids=list(request.prompt_token_ids),
                block_ids=list(blocks.get_block_ids()[0]),
                computed=request.num_prompt_tokens - 1 - num_external_tokens,
            )
        )

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        loads, self._pending = self._pending, []
        return Loads(loads)

    # -- worker side ----------------------------------------------------------------------------------------------

    def attach(self, worker: Worker, store: KVStore, loader: Loader, tokenizer: str) -> None:
        """Hand over the model and the store; called once through the worker extension after start-up."""
        self.worker, self.store, self.loader, self.tokenizer = worker, store, loader, tokenizer

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        for load in metadata.loads:
            if load.wire["op"] == "compile":
                result: Result = self._compile(load)
            else:
                result = self._blend(load)
            self.results[load.wire["id"]] = result
            while len(self.results) > _KEPT_RESULTS:  # a client that left never asks for its result
                self.results.popitem(last=False)

    def _blend(self, load: Load) -> dict[str, Any]:
        assert self.worker is not None and self.store is not None
        prompt, options = unpack_blend(load.wire, tuple(load.token_ids))
        stats = blend(
            self.worker.request(load.block_ids),
            prompt,
            options,
            self.store,
            tokenizer=self.tokenizer,
            loader=self.loader,
            computed=load.computed,
            stop=len(load.token_ids) - 1,
        )
        return pack_stats(stats)

    def _compile(self, load: Load) -> Result:
        """Compile, and write behind; a store that is full or failing is the job's result, not the engine's end."""
        assert self.worker is not None and self.store is not None
        job = unpack_compile(load.wire, tuple(load.token_ids))
        model = self.worker.request(load.block_ids)
        try:
            return compile_into(model, job, self.store, tokenizer=self.tokenizer)
        except (StoreError, NonFiniteError) as e:
            return _failure(e)

    def take_result(self, id: str) -> dict[str, Any] | None:
        """See ``BlendExtension.ragblend_result``."""
        result = self.results.pop(id, None)
        if not isinstance(result, Writing):
            return result
        if not result.done():
            self.results[id] = result
            return PENDING
        try:
            return dict(vars(result.result()))
        except StoreError as e:
            return _failure(e)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: ``start_load_kv`` returns when the rows are in the cache."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to save: KV enters the store by compile jobs only, never from a user's prompt."""

    def wait_for_save(self) -> None:
        """See ``save_kv_layer``."""

    def shutdown(self) -> None:
        if self.loader is not None:
            self.loader.close()
            self.loader = None
        if self.store is not None:
            self.store.close()
            self.store = None


def _failure(error: Exception) -> dict[str, Any]:
    return {"error": str(error), "kind": type(error).__name__}


def _filled_by_us(wire: dict[str, Any], request: Request) -> int:
    """Rows that vLLM's own prefix cache must hold for us to have nothing to do: the context (all of it to compile)."""
    return int(wire["context"]) if wire["op"] == "blend" else request.num_prompt_tokens - 1
