"""Load: read each segment's stored KV, turn its K to its place in this prompt, write it into the engine's cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from blend.model import BlendModel
from blend.types import Prompt, Segment
from kernels.rotate import rotate
from store.base import KVStore, Miss
from store.errors import StoreError
from store.types import ChunkKV, KVLayout, MissReason

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """Where a segment's KV came from: the store's ``tier``, or the reason it was missing."""

    tier: str | None
    miss_reason: MissReason | None


@dataclass
class Loaded:
    """The fused context of one request.

    ``k``, ``v`` [L, N, H, D] rotated to the prompt's positions, on the CPU (rows of missing segments are zero);
    ``present`` [N] bool; ``found`` one per segment; ``missing_rows`` [M] int64 that must be computed.
    """

    k: Tensor
    v: Tensor
    present: Tensor
    found: tuple[Found, ...]
    missing_rows: Tensor


def load(model: BlendModel, prompt: Prompt, store: KVStore, *, tokenizer: str, computed: int = 0) -> Loaded:
    """Fetch, re-rotate and write the KV of every segment that has a key; rows below ``computed`` are not written."""
    lay = model.layout
    n = prompt.context_tokens
    k = torch.zeros(lay.layers, n, lay.heads, lay.head_dim, dtype=lay.torch_dtype)
    v = torch.zeros_like(k)
    present = torch.zeros(n, dtype=torch.bool)
    found = []
    for segment in prompt.segments:
        if segment.key is None:
            found.append(Found(None, None))
            continue
        ids = prompt.token_ids[segment.start : segment.stop]
        chunk = _fetch(store, segment, lay, ids, tokenizer)
        if isinstance(chunk, Miss):
            found.append(Found(None, chunk.reason))
            continue
        found.append(Found(store.tier, None))
        part = slice(segment.start, segment.stop)
        delta = segment.start - chunk.k_position
        rope = model.rope
        k[:, part] = rotate(chunk.k, delta, rope.inv_freq.float(), interleaved=rope.interleaved) if delta else chunk.k
        v[:, part] = chunk.v
        present[part] = True
    missing = (~present).nonzero().flatten()
    loaded = Loaded(k, v, present, tuple(found), missing[missing >= computed])
    rows = present.nonzero().flatten()
    write(model, loaded, rows[rows >= computed])
    return loaded


def write(model: BlendModel, loaded: Loaded, rows: Tensor) -> None:
    """Put our copy of the KV of ``rows`` [R] int64 into the engine's cache."""
    if not rows.numel():
        return
    whole = rows.numel() == loaded.present.numel()
    for layer in range(model.layout.layers):
        k, v = loaded.k[layer], loaded.v[layer]
        model.write_kv(layer, rows, k if whole else k[rows], v if whole else v[rows])


def _fetch(store: KVStore, segment: Segment, layout: KVLayout, ids: tuple[int, ...], tokenizer: str) -> ChunkKV | Miss:
    """The stored chunk; a store that cannot be read costs this request time, never its answer."""
    assert segment.key is not None
    try:
        return store.get(segment.key, layout, ids, source=segment.source, tokenizer=tokenizer)
    except StoreError as e:
        log.warning("chunk %s cannot be read and is recomputed: %s", segment.name, e)
        return Miss("checksum_failed")
