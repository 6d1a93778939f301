"""The method, on one page: load, select, recompute; and compile, which is the same walk with the KV kept.

Sources: CacheBlend (arXiv 2405.16444) for selective recompute, FusionRAG (2601.12904) and ProphetKV (2602.02579) for
asking the question what to recompute, EPIC (2410.15332) for chunk heads. The paper's names are mapped in ``README.md``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blend.errors import ChunksLostError, NonFiniteError
from blend.load import Loaded, Loader, load
from blend.model import BlendModel, Observed
from blend.select import Selection, open_selector
from blend.types import BlendOptions, BlendStats, ChunkStats, CompileJob, Prompt
from blend.writing import Writing
from store.base import KVStore
from store.types import ChunkKV

Watch = Callable[[int, Observed], None]


@dataclass
class Blend:
    """State of one request's blend; it dies with the request.

    ``computed``: rows below it are already in the engine's cache and are neither written nor recomputed. ``stop``:
    question rows up to it are computed here, the rest by the engine. ``budget``: context rows a selector may choose.
    """

    model: BlendModel
    prompt: Prompt
    loaded: Loaded
    computed: int
    stop: int
    budget: int
    ids: Tensor = field(init=False)
    row_layers: int = field(init=False, default=0)  # context rows x layers run through the model so far

    def __post_init__(self) -> None:
        self.ids = torch.tensor(self.prompt.token_ids, dtype=torch.int64)

    @property
    def question_rows(self) -> Tensor:
        """Rows of the question that are computed here, always fresh on the fused cache."""
        return torch.arange(max(self.prompt.context_tokens, self.computed), self.stop)

    def walk(self, rows: Tensor, *, first: int = 0, last: int | None = None, hidden: Tensor | None = None,
             watch: Watch | None = None, counted: Tensor | None = None) -> Tensor:  # fmt: skip
        """Run ``rows`` through layers ``first .. last - 1``, from ``hidden`` or their embeddings; returns hidden.

        ``counted``: which of the rows stand for context rows, if not those below N (``row_layers``).
        """
        context = int((rows < self.prompt.context_tokens).sum()) if counted is None else counted.numel()

        def before(layer: int) -> None:
            self.loaded.need(layer)
            self.row_layers += context

        return walk(self.model, self.ids, rows, first=first, last=last, hidden=hidden, watch=watch, before=before)


def walk(model: BlendModel, ids: Tensor, rows: Tensor, *, first: int = 0, last: int | None = None,
         hidden: Tensor | None = None, watch: Watch | None = None,
         before: Callable[[int], None] | None = None) -> Tensor:  # fmt: skip
    """The one forward path: compile, probe, recompute and full prefill all come through here.

    ``before`` is called with each layer before it runs, ``watch`` after it.
    """
    step: Any = model.prepare(rows)
    h = model.embed(ids[rows]) if hidden is None else hidden
    for layer in range(first, model.layout.layers if last is None else last):
        if before is not None:
            before(layer)
        h = model.forward_layer(layer, h, step)
        if watch is not None:
            watch(layer, model.observe())
    return h


def blend(model: BlendModel, prompt: Prompt, options: BlendOptions, store: KVStore, *, tokenizer: str,
          computed: int = 0, stop: int | None = None, loader: Loader | None = None) -> BlendStats:  # fmt: skip
    """Fuse the cached KV of ``prompt``'s segments and repair it: rows ``computed .. stop - 1`` are then in the cache.

    ``stop`` defaults to the prompt's end. ``mode="reuse"`` recomputes nothing but what is missing; a ratio whose
    budget covers the context recomputes every row, which equals full prefill. ``loader`` (the engine's) reads the KV,
    the next layers while one is computed. Raises ``UnknownSelectorError``.
    """
    n = prompt.context_tokens
    ratio = 0.0 if options.mode == "reuse" else options.recompute_ratio
    budget = n if ratio >= 1.0 else int(ratio * n)
    selector = open_selector(options.selector, layers=model.layout.layers)
    if budget >= n or ratio == 0.0:
        selector = open_selector("all" if budget >= n else "none")
    begin = time.perf_counter()
    row_layers = 0
    with load(model, prompt, store, tokenizer=tokenizer, computed=computed, loader=loader) as loaded:
        found_s = time.perf_counter() - begin
        while True:
            state = Blend(model, prompt, loaded, computed, len(prompt.token_ids) if stop is None else stop, budget)
            state.row_layers = row_layers
            try:
                chosen = selector.select(state)
                recompute(state, chosen)
                loaded.finish()
                break
            except ChunksLostError:  # what was computed may have seen them: once more, without
                row_layers = state.row_layers
    return _account(state, chosen.rows, options, selector.name, found_s, time.perf_counter() - begin)


def compile_chunks(model: BlendModel, job: CompileJob) -> list[tuple[Tensor, Tensor]]:
    """K and V [L, T, H, D] of each chunk of ``job``, computed behind its context (paper: offline stage).

    One pass over context and chunks; chunk i attends to the context and the chunks before it.
    """
    ids = torch.tensor(job.context + tuple(t for c in job.chunks for t in c), dtype=torch.int64)
    lay = model.layout
    at = len(job.context)
    k = torch.empty(lay.layers, len(ids) - at, lay.heads, lay.head_dim, dtype=lay.torch_dtype)
    v = torch.empty_like(k)

    def keep(layer: int, seen: Observed) -> None:
        k[layer].copy_(seen.k[at:])
        v[layer].copy_(seen.v[at:])

    walk(model, ids, torch.arange(len(ids)), watch=keep)
    sizes = [len(c) for c in job.chunks]
    return list(zip(k.split(sizes, dim=1), v.split(sizes, dim=1), strict=True))


def compile_into(model: BlendModel, job: CompileJob, store: KVStore, *, tokenizer: str) -> Writing:
    """Compile ``job`` and hand its chunks to the store, which writes them behind.

    Raises ``NonFiniteError``; what goes wrong with storing, ``Writing.result`` raises.
    """
    position, keys, futures = len(job.context), [], []
    for ids, key, source, (k, v) in zip(job.chunks, job.keys, job.sources, compile_chunks(model, job), strict=True):
        if not (k.isfinite().all() and v.isfinite().all()):
            raise NonFiniteError(
                f"chunk {key.hex[:16]} compiles to NaN or infinity in {model.layout.dtype}; use bfloat16"
            )
        chunk = ChunkKV(key, model.layout, ids, k, v, position, source, tokenizer, job.owner)
        keys.append(key)
        futures.append(store.put_later(chunk))
        position += len(ids)
    return Writing(store, keys, futures)


def recompute(state: Blend, chosen: Selection) -> None:
    """Missing rows, chosen rows and the question through the layers, together and in order."""
    rows = torch.cat([state.loaded.missing_rows, chosen.rows, state.question_rows]).unique()
    if rows.numel() == 0 or chosen.layer == state.model.layout.layers:
        return
    hidden = None
    if chosen.hidden is not None:  # a selector that walked every row hands over where it stopped
        assert chosen.hidden_rows is not None
        hidden = chosen.hidden[torch.searchsorted(chosen.hidden_rows, rows)]
    state.walk(rows, first=chosen.layer, hidden=hidden)


def _account(state: Blend, rows: Tensor, options: BlendOptions, selector: str, found_s: float,
             total_s: float) -> BlendStats:  # fmt: skip
    n = state.prompt.context_tokens
    recomputed = torch.zeros(n, dtype=torch.bool)
    recomputed[rows[rows < n]] = True
    missing = ~state.loaded.present
    missing[: state.computed] = False
    recomputed &= ~missing
    chunks = []
    for segment, found in zip(state.prompt.segments, state.loaded.found, strict=True):
        if segment.kind == "question":
            continue
        part = slice(segment.start, segment.stop)
        lost, again = int(missing[part].sum()), int(recomputed[part].sum())
        chunks.append(
            ChunkStats(
                name=segment.name,
                tokens=segment.tokens,
                reused=segment.tokens - lost - again,
                recomputed=again,
                missing=lost,
                tier=found.tier,
                miss_reason=found.miss_reason,
            )
        )
    lost, again = int(missing.sum()), int(recomputed.sum())
    counts = state.loaded.counts
    return BlendStats(
        mode="reuse" if options.mode == "reuse" else "blend",
        tokens=n,
        reused=n - lost - again,
        recomputed=again,
        missing=lost,
        load_s=found_s + counts.busy_s,
        wait_s=found_s + counts.waited_s,
        blend_s=total_s - found_s - counts.waited_s,
        loaded_bytes=counts.delivered,
        selector=selector,
        chunks=tuple(chunks),
        computed_share=state.row_layers / (n * state.model.layout.layers) if n else 0.0,
    )
