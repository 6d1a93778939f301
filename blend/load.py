"""Load: read each segment's stored KV, turn its K to its place in this prompt, write it into the engine's cache.

Layer by layer: reader threads run ahead (``store.loader``), and the walk asks for each layer right before it runs it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from blend.errors import ChunksLostError
from blend.model import BlendModel
from blend.types import Prompt
from kernels.rotate import angles, rotate_
from kernels.select_rows import runs
from store.base import Found, KVStore, Miss
from store.errors import StoreError
from store.loader import LoadCounts, Loading, Place, PlacesLostError, Reading
from store.threads import roam
from store.types import KVLayout, MissReason, Want

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where a segment's KV came from: the store's ``tier``, or the reason it was missing."""

    tier: str | None
    miss_reason: MissReason | None


class Staging(NamedTuple):
    """``k``, ``v`` [L, N, H, D] on the CPU, views of ``memory`` [n] uint8."""

    k: Tensor
    v: Tensor
    memory: Tensor


class Loader:
    """What an engine keeps for loading: how its contexts are read (``Reading``), and memory to read them into.

    Up to ``keep_bytes`` of staging memory are kept from one request to the next: the first touch of new memory takes
    longer than copying into it. Thread-safe.
    """

    def __init__(self, reading: Reading | None = None, *, keep_bytes: int = 0) -> None:
        self.reading = reading if reading is not None else Reading()
        self._keep_bytes = keep_bytes
        self._spare: Tensor | None = None
        self._lock = threading.Lock()

    @classmethod
    def start(cls, *, threads: int, timeout_s: float | None = None, keep_bytes: int = 1 << 30) -> Loader:
        """One with ``threads`` of its own (0: requests read for themselves), to be closed."""
        pool = ThreadPoolExecutor(threads, "kv-load", roam) if threads else None
        return cls(Reading(threads, timeout_s, pool), keep_bytes=keep_bytes)

    def borrow(self, layout: KVLayout, rows: int) -> Staging:
        """Staging for a context of ``rows``. It holds anything, KV of other requests too."""
        shape = (layout.layers, rows, layout.heads, layout.head_dim)
        half = rows * layout.token_bytes // 2
        with self._lock:
            spare, self._spare = self._spare, None
        # Not in inference mode, in which vLLM calls: elsewhere such tensors cannot be written to.
        with torch.inference_mode(mode=False):
            enough = spare is not None and spare.numel() >= 2 * half
            memory = spare if spare is not None and enough else torch.empty(2 * half, dtype=torch.uint8)
            k, v = (memory[i * half : (i + 1) * half].view(layout.torch_dtype).view(shape) for i in range(2))
        return Staging(k, v, memory)

    def give_back(self, staging: Staging) -> None:
        """Nobody uses it any more."""
        with self._lock:
            held = -1 if self._spare is None else self._spare.numel()
            if held < staging.memory.numel() <= self._keep_bytes:
                self._spare = staging.memory

    def close(self) -> None:
        """End the threads; a read under way is not waited for."""
        self._spare = None
        if isinstance(self.reading.executor, ThreadPoolExecutor):
            self.reading.executor.shutdown(wait=False, cancel_futures=True)


class Loaded:
    """The fused context of one request, as far as it was asked for.

    ``present`` [N] bool; ``found`` one per segment; ``missing_rows`` [M] int64 that must be computed. Leave the context
    when the request is done.

    A chunk that cannot be read to its end becomes a missing one: whatever asks for a layer may raise
    ``ChunksLostError``. Then what was selected and computed so far is to be done again; all layers are as loaded.
    """

    def __init__(self, model: BlendModel, prompt: Prompt, origins: list[Origin], places: Mapping[int, Place], *,
                 computed: int, loader: Loader) -> None:  # fmt: skip
        n = prompt.context_tokens
        self._model, self._segments, self._computed, self._loader = model, prompt.segments, computed, loader
        self._origins = origins
        self._at = list(places)  # segments of the loading's places
        self.present = torch.zeros(n, dtype=torch.bool)
        for i in self._at:
            self.present[self._rows(i)] = True
        self._staging = loader.borrow(model.layout, n)
        self._turn = _Turn(model, prompt, places)
        self._turned: set[int] = set()
        self._written: set[int] = set()
        self._replaced: dict[int, tuple[Tensor, Tensor]] = {}
        self._count_rows()
        self._loading = Loading(list(places.values()), self._staging.k, self._staging.v, loader.reading)

    @property
    def found(self) -> tuple[Origin, ...]:
        return tuple(self._origins)

    @property
    def counts(self) -> LoadCounts:
        return self._loading.counts

    @property
    def k(self) -> Tensor:
        """[L, N, H, D] of all layers as loaded, rotated to the prompt's positions, on the CPU. Rows that are not
        ``present`` hold anything, and may change: nothing may depend on them."""
        self.finish()
        return self._staging.k

    @property
    def v(self) -> Tensor:
        """Like ``k``."""
        self.finish()
        return self._staging.v

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V [N, H, D] of one layer (see ``k``), or what took their place."""
        self.need(layer)
        return self._now(layer)

    def need(self, layer: int) -> None:
        """Wait until ``layer`` is loaded, turned and in the engine's cache. Raises ``ChunksLostError``."""
        if layer in self._written:
            return
        try:
            self._loading.wait(layer)
        except PlacesLostError as error:
            self._lose({self._at[place]: reason for place, reason in error.lost.items()})
            raise ChunksLostError(str(error)) from error
        if layer not in self._turned:
            self._turn(self._staging.k[layer])
            self._turned.add(layer)
        self._write(layer, self._write_rows)
        self._written.add(layer)

    def finish(self) -> None:
        """``need`` every layer."""
        for layer in range(self._model.layout.layers):
            self.need(layer)

    def restore(self, rows: Tensor) -> None:
        """Put our copy of the KV of ``rows`` [R] int64 back into the engine's cache, in every layer."""
        for layer in range(self._model.layout.layers):
            self.need(layer)
            self._write(layer, rows)

    def replace(self, layer: int, rows: slice, k: Tensor, v: Tensor) -> None:
        """Let our copy of ``rows`` of ``layer`` be ``k``, ``v`` [R, H, D], as the engine's cache already is.

        If chunks are lost later, it is as loaded again.
        """
        mine = self.layer(layer)
        if layer not in self._replaced:
            # In memory of its own: a read of a lost chunk that is still under way writes into the staging.
            mine = self._replaced[layer] = (mine[0].clone(), mine[1].clone())
        mine[0][rows], mine[1][rows] = k, v

    def close(self) -> None:
        """Read no more."""
        # With a timeout the request has promised not to wait: a read that hangs keeps the memory it writes to.
        if self._loading.cancel(quiet=self._loader.reading.timeout_s is None):
            self._loader.give_back(self._staging)

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _rows(self, segment: int) -> slice:
        return slice(self._segments[segment].start, self._segments[segment].stop)

    def _count_rows(self) -> None:
        there, rows = self.present.clone(), torch.arange(self.present.numel())
        self.missing_rows = rows[self._computed :][~there[self._computed :]]
        self._write_rows = rows[self._computed :][there[self._computed :]]

    def _lose(self, lost: Mapping[int, MissReason]) -> None:
        """The segments ``lost`` are missing; every layer is to be written anew, as it was loaded."""
        for i, reason in lost.items():
            segment = self._segments[i]
            log.warning("chunk %s was lost while it was loaded (%s) and is recomputed", segment.name, reason)
            self._origins[i] = Origin(None, reason)
            self.present[self._rows(i)] = False
        self._count_rows()
        self._replaced.clear()
        self._written.clear()

    def _now(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._replaced.get(layer) or (self._staging.k[layer], self._staging.v[layer])

    def _write(self, layer: int, rows: Tensor) -> None:
        if not rows.numel():
            return
        k, v = self._now(layer)
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == rows.numel():  # they ascend: one run, no copy
            part = slice(first, last + 1)
            self._model.write_kv(layer, rows, k[part], v[part])
        else:
            self._model.write_kv(layer, rows, k[rows], v[rows])


def load(model: BlendModel, prompt: Prompt, store: KVStore, *, tokenizer: str, computed: int = 0,
         loader: Loader | None = None) -> Loaded:  # fmt: skip
    """Find the KV of every segment that has a key and begin to load it; rows below ``computed`` are not written.

    Without a ``loader``: with threads and memory of its own, and no timeout.
    """
    origins: list[Origin] = []
    places: dict[int, Place] = {}
    for i, segment in enumerate(prompt.segments):
        if segment.key is None:
            origins.append(Origin(None, None))
            continue
        ids = prompt.token_ids[segment.start : segment.stop]
        found = _find(store, Want(segment.key, model.layout, ids, segment.source, tokenizer), segment.name)
        if isinstance(found, Miss):
            origins.append(Origin(None, found.reason))
            continue
        origins.append(Origin(found.tier, None))
        places[i] = Place(found, segment.start)
    return Loaded(model, prompt, origins, places, computed=computed, loader=loader or Loader())


def _find(store: KVStore, want: Want, name: str) -> Found | Miss:
    """The stored chunk; a store that cannot be read costs this request time, never its answer."""
    try:
        return store.find(want)
    except StoreError as e:
        log.warning("chunk %s cannot be read and is recomputed: %s", name, e)
        return Miss("checksum_failed")


class _Turn:
    """Turns one layer's K [N, H, D] from the positions of compilation to the prompt's, in place.

    The angles of all rows are made once, for all layers, and neighbouring chunks are turned together: with many small
    chunks the calls would take longer than the work.
    """

    def __init__(self, model: BlendModel, prompt: Prompt, places: Mapping[int, Place]) -> None:
        parts = []  # (first row, rows, positions to go)
        for i, place in places.items():
            delta = prompt.segments[i].start - place.found.header.k_position
            if delta and prompt.segments[i].tokens:
                parts.append((place.start, prompt.segments[i].tokens, delta))
        self._interleaved = model.rope.interleaved
        self._runs: list[tuple[int, int, Tensor, Tensor]] = []
        if not parts:
            return
        deltas = torch.tensor([delta for _, _, delta in parts])
        sizes = torch.tensor([size for _, size, _ in parts])
        cos, sin = (
            x.repeat_interleave(sizes, dim=0)
            for x in angles(deltas, model.rope.inv_freq.float(), model.layout.torch_dtype)
        )
        rows = torch.cat([torch.arange(start, start + size) for start, size, _ in parts])
        at = 0
        for first, stop in runs(rows):
            part = slice(at, at + stop - first)
            self._runs.append((first, stop, cos[part], sin[part]))
            at = part.stop

    def __call__(self, k: Tensor) -> None:
        for first, stop, cos, sin in self._runs:
            rotate_(k[first:stop], cos, sin, interleaved=self._interleaved)
