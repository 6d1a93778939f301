"""A ``BlendModel`` over vLLM's paged cache: the model's own decoder layers, run on chosen rows of one request.

Every contiguous run of rows is presented to the attention backend as a sequence of its own with the request's block
table and ``seq_len = last row + 1``, so each row sees exactly the rows up to itself, with any backend and no mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata

from blend.errors import UnsupportedModelError
from blend.model import Observed
from blend.rope import Rope, check_tables
from kernels.select_rows import runs
from store.types import KVLayout


@dataclass(frozen=True)
class Step:
    """What depends on the rows only: their positions, slots, and the backend's metadata by layer name."""

    positions: Tensor
    slots: dict[str, Tensor]
    metadata: dict[str, Any]


class Worker:
    """The worker's model, seen as decoder layers and their attentions. One per worker process, made once."""

    def __init__(self, runner: Any, layout: KVLayout, rope: Rope) -> None:
        self.runner = runner
        self.layout = layout
        self.rope = rope
        self.device = runner.device
        inner = runner.get_model().model
        self.inner = inner
        self.layers = list(inner.layers)
        self.attentions = [_only_attention(layer) for layer in self.layers]
        self.names = [a.layer_name for a in self.attentions]
        self.scale = float(self.attentions[0].impl.scale)
        groups = runner.kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise UnsupportedModelError(f"the model has {len(groups)} KV cache groups; blending needs one")
        self.block_size = int(groups[0].kv_cache_spec.block_size)
        blocks = runner.input_batch.block_table[0]
        if int(blocks.block_size) != self.block_size:
            raise UnsupportedModelError(
                f"attention kernel blocks of {blocks.block_size} rows in cache blocks of {self.block_size} rows "
                "are not supported"
            )
        self._check_heads()
        self._check_rope()

    def _check_heads(self) -> None:
        """vLLM's model must have the heads the config tells of: some of its models do not read ``head_dim``."""
        for a in self.attentions:
            if (a.num_kv_heads, a.head_size, a.head_size_v) != (
                self.layout.heads,
                self.layout.head_dim,
                self.layout.head_dim,
            ):
                raise UnsupportedModelError(
                    f"config fields num_key_value_heads, head_dim say {self.layout.heads} x {self.layout.head_dim}, "
                    f"vLLM's model has {a.num_kv_heads} x {a.head_size} (values {a.head_size_v})"
                )

    def _check_rope(self) -> None:
        """Compare our angles with the cos|sin table the model multiplies by (an independent computation)."""
        table = next(m for m in self.layers[0].modules() if hasattr(m, "cos_sin_cache"))
        if not table.is_neox_style:
            raise UnsupportedModelError("interleaved RoPE (is_neox_style=False) is not supported yet")
        cache = table.cos_sin_cache
        positions = torch.tensor([0, 1, 17, 1000, cache.shape[0] - 1]).clamp(max=cache.shape[0] - 1)
        cos, sin = cache[positions.to(cache.device)].float().cpu().chunk(2, dim=-1)
        # float32 angles lose 2^-24 of the angle itself, so far positions need room; bf16 tables round to 2^-9
        room = 1e-2 if cache.dtype != torch.float32 else 1e-4 + float(positions.max()) * 2.0**-22
        check_tables(self.rope, positions, cos, sin, room)

    def request(self, block_ids: Sequence[int]) -> PagedModel:
        return PagedModel(self, torch.tensor(list(block_ids), dtype=torch.int32))


class PagedModel:
    """One request's rows in the paged cache (a ``BlendModel``)."""

    def __init__(self, worker: Worker, blocks: Tensor) -> None:
        self.worker = worker
        self.blocks = blocks
        self.layout = worker.layout
        self.rope = worker.rope
        self.scale = worker.scale
        self._seen: Observed | None = None

    def slots(self, rows: Tensor) -> Tensor:
        """[R] int64 slots of ``rows`` in the paged cache, on the model's device."""
        size = self.worker.block_size
        return (self.blocks[rows // size].long() * size + rows % size).to(self.worker.device)

    def prepare(self, rows: Tensor) -> Step:
        device = self.worker.device
        segments = torch.tensor(runs(rows), dtype=torch.int32).reshape(-1, 2)
        lengths = segments[:, 1] - segments[:, 0]
        starts = torch.zeros(len(segments) + 1, dtype=torch.int32)
        torch.cumsum(lengths, 0, out=starts[1:])
        slots = self.slots(rows)
        ends = segments[:, 1].contiguous()
        positions = rows.to(device)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=ends.to(device),
            seq_lens_cpu_upper_bound=ends,
            num_reqs=len(segments),
            num_actual_tokens=len(rows),
            max_query_len=int(lengths.max()),
            max_seq_len=int(ends.max()),
            block_table_tensor=self.blocks.to(device).expand(len(segments), -1).contiguous(),
            slot_mapping=slots,
            causal=True,
            is_prefilling=torch.ones(len(segments), dtype=torch.bool),
            positions=positions,
        )
        metadata = {}
        for group in self.worker.runner.attn_groups[0]:
            built = group.get_metadata_builder().build(0, common)
            metadata.update(dict.fromkeys(group.layer_names, built))
        return Step(positions, dict.fromkeys(self.worker.names, slots), metadata)

    def embed(self, token_ids: Tensor) -> Tensor:
        hidden: Tensor = self.worker.inner.embed_input_ids(token_ids.to(self.worker.device))
        return hidden

    def write_kv(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        attention = self.worker.attentions[layer]
        device = self.worker.device
        attention.impl.do_kv_cache_update(
            attention,
            k.to(device).contiguous(),
            v.to(device).contiguous(),
            attention.kv_cache,
            self.slots(rows),
        )

    def forward_layer(self, layer: int, hidden: Tensor, step: Step) -> Tensor:
        with (
            set_forward_context(
                step.metadata,
                self.worker.runner.vllm_config,
                num_tokens=len(step.positions),
                slot_mapping=step.slots,
            ),
            self._watching(self.worker.attentions[layer]),
        ):
            out, residual = self.worker.layers[layer](step.positions, hidden, None)
        merged: Tensor = out + residual
        return merged

    def observe(self) -> Observed:
        assert self._seen is not None, "observe() follows forward_layer()"
        return self._seen

    @contextmanager
    def _watching(self, attention: Any) -> Iterator[None]:
        """Keep what the attention module is called with: q, k, v after RoPE."""

        def keep(_: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
            q, k, v = args[:3]
            a = attention
            self._seen = Observed(
                q.view(-1, a.num_heads, a.head_size),
                k.view(-1, a.num_kv_heads, a.head_size),
                v.view(-1, a.num_kv_heads, a.head_size_v),
            )

        # Only while the walk runs: the engine's own (compiled) forward never carries the hook.
        handle = attention.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()


def _only_attention(layer: Any) -> Any:
    found = [m for m in layer.modules() if isinstance(m, Attention)]
    if len(found) != 1:
        raise UnsupportedModelError(f"a decoder layer has {len(found)} attention modules; blending needs exactly one")
    return found[0]
