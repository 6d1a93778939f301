"""A small request to select rows in: a prefix and four chunks, one of which is not in the store."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blend.engines.transformers.model import RowModel, Weights
from blend.load import load
from blend.method import Blend, compile_chunks
from blend.types import CompileJob, Prompt, Segment
from store import ChunkKV, KVKey
from store.memory import MemoryStore

SIZES = (6, 20, 1, 33, 12)  # the first is the prefix
MISSING = 3
CONTEXT, QUESTION = 72, 7
LOADED = frozenset(range(6, 27)) | frozenset(range(60, 72))  # chunk rows in the store

# One or more of every option. Those in PARTIAL may leave some of their budget unspent.
PARTIAL = (
    "heads(rows=2)",
    "question(anchors=0.3,pool=1)",
    "question(fast=true,anchors=0.5)",
    "question(threshold=0.4)",
    "deviation(on=k,threshold=0.5)",
    "heads(rows=1):0.5+random:0.5",
)
WHOLE = (
    "random(seed=3)",
    "deviation(filter=gradual)",
    "deviation(check=0|2,on=v)",
    "question(layers=upper)",
    "question(layers=1-2,pool=2)",
    "question(rounds=2)",
    "question(budget=chunks)",
    "question(fast=true)",
    "heads:0.2+question:0.8",
    "heads(rows=1)+question(rounds=2,layers=last)",
    "heads(rows=3):0.25+deviation(filter=gradual,check=2)",
    "deviation:0.5+question:0.5",
    "deviation:0.5+question(fast=true):0.5",
    "deviation(filter=gradual,check=3)",
    "oracle",
    "oracle(by=attention)",
    "random:0.3+oracle:0.7",
    "deviation:0.3+oracle:0.3+random",
    "oracle:0.5+deviation:0.5",
)
SPECS = WHOLE + PARTIAL


class Scene:
    """``prompt`` and ``store`` of the request on ``weights``."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.store = MemoryStore()
        generator = torch.Generator().manual_seed(5)
        ids: list[int] = []
        segments = []
        for i, size in enumerate(SIZES):
            chunk = tuple(torch.randint(6, 250, (size,), generator=generator).tolist())
            key = KVKey(bytes([i]) * 32)
            with torch.no_grad():
                job = CompileJob("job", () if i == 0 else (1, 3), (chunk,), (key,), (b"s" * 32,))
                ((k, v),) = compile_chunks(RowModel(weights, job.tokens), job)
            if i != MISSING:
                self.store.put(ChunkKV(key, weights.layout, chunk, k, v, len(job.context), b"s" * 32, "tok"))
            kind: Any = "prefix" if i == 0 else "chunk"
            segments.append(Segment(kind, len(ids), len(ids) + size, key, b"s" * 32, str(i)))
            ids += chunk
        segments.append(Segment("question", len(ids), len(ids) + QUESTION))
        self.prompt = Prompt((*ids, 1, 2, 3, 50, 60, 70, 80), tuple(segments))

    def state(self, budget: int, computed: int = 0) -> Blend:
        """A loaded request; ``computed`` rows are in the engine's cache already."""
        model = RowModel(self.weights, len(self.prompt.token_ids))
        if computed:
            model.cache.k[:, :, :computed] = 0.25
            model.cache.v[:, :, :computed] = 0.5
        loaded = load(model, self.prompt, self.store, tokenizer="tok", computed=computed)
        return Blend(model, self.prompt, loaded, computed, len(self.prompt.token_ids), budget)


def planes(state: Blend) -> tuple[Tensor, Tensor]:
    """K and V [L, rows, H, D] of the model's cache, copied."""
    cache: Any = state.model.cache  # type: ignore[attr-defined]
    return cache.k.transpose(1, 2).clone(), cache.v.transpose(1, 2).clone()


def rows_by_layer(state: Blend) -> list[Tensor]:
    """Filled while the state is walked: the context rows of each ``forward_layer``, in order."""
    seen: list[Tensor] = []
    model: Any = state.model
    plain = model.forward_layer

    def watched(layer: int, hidden: Tensor, step: Any) -> Tensor:
        seen.append(step.rows[step.rows < state.prompt.context_tokens].clone())
        out: Tensor = plain(layer, hidden, step)
        return out

    model.forward_layer = watched
    return seen
