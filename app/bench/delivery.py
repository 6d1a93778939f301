"""The ways that ``ragblend bench store`` times: what is read or copied from where to where."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from app.bench.pagecache import drop_page_cache, resident
from app.bench.shot import BenchError
from store import ChunkKV, KVKey, KVLayout, KVStore, Miss, StoreConfig, Want
from store.codec import CODECS
from store.ssd import SsdStore
from store.ssd.files import Buffer, Files
from store.tiered import TieredStore

BLOCK = 8 << 20
POISON = 0xA5
Memory = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class StoreSetup:
    """``mib`` of raw KV in chunks of ``chunk`` tokens of a model with these ``layers``, ``heads`` (of K and V) and
    ``head_dim``, bfloat16. The defaults are Llama-3.1-8B's."""

    mib: int = 512
    layers: int = 32
    heads: int = 8
    head_dim: int = 128
    chunk: int = 512
    codecs: tuple[str, ...] = tuple(CODECS)
    threads: tuple[int, ...] = (1, 2)
    repeats: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("mib", "layers", "heads", "head_dim", "chunk", "repeats"):
            if getattr(self, name) < 1:
                raise BenchError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.threads or min(self.threads) < 1:
            raise BenchError(f"threads are {list(self.threads)}; each must be at least 1")
        for codec in self.codecs:
            if codec not in CODECS:
                raise BenchError(f"codec {codec!r} is unknown; choose among {', '.join(CODECS)}")

    @property
    def layout(self) -> KVLayout:
        return KVLayout("bench", self.layers, self.heads, self.head_dim, "bfloat16", "bench")

    @property
    def chunks(self) -> int:
        return max(1, (self.mib << 20) // (self.chunk * self.layout.token_bytes))


@dataclass
class StoreArm:
    """One way to deliver the bytes. ``reference`` names the arm it is compared with."""

    name: str
    state: str
    threads: int
    run: Callable[[], None]
    wrong: Callable[[], str | None]
    reference: str = ""
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    problem: str | None = None

    @property
    def label(self) -> str:
        return f"{self.name}/{self.state}/{self.threads}"


class Delivery:
    """Stores, destination and arms of one run."""

    def __init__(self, setup: StoreSetup, folder: Path) -> None:
        self.setup = setup
        self.folder = folder
        layout, tokens = setup.layout, setup.chunk * setup.chunks
        self.total = tokens * layout.token_bytes
        chunks = [make_chunk(setup, number) for number in range(setup.chunks)]
        self.files = Counting()
        self.ssd = SsdStore(StoreConfig(path=folder), files=self.files)
        self.ssd.put_many(chunks)
        self.ssd.flush()
        self.wants = [Want(c.key, c.layout, c.token_ids, c.source, c.tokenizer) for c in chunks]
        self.segments = sorted(folder.glob("segments/*.seg"))
        self.file_bytes = sum(path.stat().st_size for path in self.segments)
        if not self.segments:
            self.ssd.close()
            raise BenchError(f"chunks of {self.total // setup.chunks} bytes lie in the index: take a larger --chunk")
        self.tiers = TieredStore(StoreConfig(path=folder, ram_bytes=2 * self.total), self.ssd)
        if self.tiers.warm([want.key for want in self.wants]) < setup.chunks:
            self.tiers.close()
            raise BenchError(f"{self.total} bytes could not be brought into memory")
        # From numpy, which asks for huge pages; every page is touched before anything is timed.
        self.memory: Memory = np.empty(max(self.total, self.file_bytes), np.uint8)
        self.source: Memory = np.random.default_rng(setup.seed).integers(0, 256, self.total, np.uint8)
        shape = (layout.layers, tokens, layout.heads, layout.head_dim)
        self.k, self.v = (_as_kv(half, shape) for half in np.split(self.memory[: self.total], 2))
        self.views = [self._views(number) for number in range(setup.chunks)]
        self._expect(chunks)
        self.pools = {n: ThreadPoolExecutor(n) for n in setup.threads}

    def _expect(self, chunks: Sequence[ChunkKV]) -> None:
        """What the destination must hold after each kind of run."""
        for chunk, views in zip(chunks, self.views, strict=True):
            for layer, (k, v) in enumerate(views):
                k.copy_(chunk.k[layer])
                v.copy_(chunk.v[layer])
        self.kv_sum = _sum(self.memory[: self.total])
        hasher = xxhash.xxh3_128()
        for path in self.segments:
            hasher.update(path.read_bytes())
        self.file_sum = hasher.digest()
        self.source_sum = _sum(self.source)
        for out, start in self._pieces(range(self.setup.chunks)):
            out[:] = self.source[start : start + out.size]
        self.pieces_sum = _sum(self.memory[: self.total])

    def _views(self, number: int) -> list[tuple[Tensor, Tensor]]:
        span = slice(number * self.setup.chunk, (number + 1) * self.setup.chunk)
        return [(self.k[layer, span], self.v[layer, span]) for layer in range(self.setup.layers)]

    def arms(self) -> list[StoreArm]:
        made = []
        for n in self.setup.threads:
            for state in ("cold", "warm"):
                made.append(StoreArm("plain", state, n, partial(self._plain, n), self._wrong_file))
                made.append(
                    StoreArm(
                        "ssd", state, n, partial(self.read_chunks, self.ssd, n), self._wrong_kv, f"plain/{state}/{n}"
                    )
                )
            made += [
                StoreArm("memcpy", "chunks", n, partial(self._copy, n), self._wrong_copy),
                StoreArm("memcpy", "pieces", n, partial(self._copy_pieces, n), self._wrong_pieces),
                StoreArm("memcpy", "whole", n, partial(self._copy, n, whole=True), self._wrong_copy),
                StoreArm("ram", "", n, partial(self.read_chunks, self.tiers, n), self._wrong_kv, f"memcpy/chunks/{n}"),
            ]
        return made

    def time(self, arm: StoreArm, *, keep: bool) -> None:
        """Run it once; its seconds count if ``keep`` and its bytes are right."""
        if arm.problem is not None:
            return
        self.memory.fill(POISON)
        if arm.state == "cold":
            drop_page_cache(self.folder)
            cached = max(map(resident, self.segments))
            if cached > 0.02:
                arm.problem = f"{cached:.0%} of a segment file stays in the page cache"
                return
        elif arm.state == "warm":
            for path in self.segments:
                with path.open("rb", buffering=0) as file:
                    while file.read(BLOCK):
                        pass
        begin, cpu = time.perf_counter(), time.process_time()
        arm.run()
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        arm.problem = arm.wrong()
        if keep and arm.problem is None:
            arm.seconds.append(seconds)
            arm.cpu_seconds.append(cpu)

    def close(self) -> None:
        for pool in self.pools.values():
            pool.shutdown()
        self.tiers.close()  # and what is below it

    def read_chunks(self, store: KVStore, threads: int) -> None:
        """All chunks, each thread its part of them in order."""

        def work(numbers: range) -> None:
            found = [store.find(self.wants[number]) for number in numbers]
            for i, number in enumerate(numbers):
                this = found[i]
                if isinstance(this, Miss):
                    raise BenchError(f"chunk {number} was not found: {this.reason}")
                ahead = found[i + 1] if i + 1 < len(found) else None
                if i == 0:
                    this.advise()
                if ahead is not None and not isinstance(ahead, Miss):
                    ahead.advise()
                for layer, (k, v) in enumerate(self.views[number]):
                    this.read(layer, k, v)

        self._share(threads, self.setup.chunks, work)

    def _plain(self, threads: int) -> None:
        blocks: list[tuple[Path, int, int]] = []
        at = 0
        for path in self.segments:
            size = path.stat().st_size
            blocks += [(path, start, at + start) for start in range(0, size, BLOCK)]
            at += size
        opened = {path: os.open(path, os.O_RDONLY) for path in self.segments}

        def work(numbers: range) -> None:
            for path, start, to in (blocks[number] for number in numbers):
                end = min(to + BLOCK, at)
                os.preadv(opened[path], [self.memory[to:end].data], start)

        try:
            self._share(threads, len(blocks), work)
        finally:
            for descriptor in opened.values():
                os.close(descriptor)

    def _copy(self, threads: int, *, whole: bool = False) -> None:
        size = self.total if whole and threads == 1 else self.total // self.setup.chunks
        if whole:
            size = self.total // threads

        def work(numbers: range) -> None:
            for number in numbers:
                span = slice(number * size, min((number + 1) * size, self.total))
                self.memory[span] = self.source[span]

        self._share(threads, -(-self.total // size), work)

    def _pieces(self, numbers: range) -> list[tuple[Memory, int]]:
        """K and V of every layer of these chunks: where they go, and where in ``source`` they come from."""
        chunk = self.total // self.setup.chunks
        half, layers = chunk // self.setup.layers // 2, self.setup.layers
        row = half * self.setup.chunks  # one layer of K (or V) of all chunks
        out = []
        for number in numbers:
            for layer in range(layers):
                for part in range(2):
                    to = part * (self.total // 2) + layer * row + number * half
                    out.append((self.memory[to : to + half], number * chunk + (2 * layer + part) * half))
        return out

    def _copy_pieces(self, threads: int) -> None:
        def work(numbers: range) -> None:
            for out, start in self._pieces(numbers):
                out[:] = self.source[start : start + out.size]

        self._share(threads, self.setup.chunks, work)

    def _share(self, threads: int, count: int, work: Callable[[range], None]) -> None:
        """``work`` on ``count`` things, split among threads that begin together."""
        parts = [range(count * i // threads, count * (i + 1) // threads) for i in range(threads)]
        if threads == 1:
            work(parts[0])
            return
        together = threading.Barrier(threads)

        def begin(part: range) -> None:
            together.wait()
            work(part)

        list(self.pools[threads].map(begin, parts))

    def _wrong_kv(self) -> str | None:
        return None if _sum(self.memory[: self.total]) == self.kv_sum else "K and V are not what was stored"

    def _wrong_file(self) -> str | None:
        return None if _sum(self.memory[: self.file_bytes]) == self.file_sum else "the file was not read as it is"

    def _wrong_copy(self) -> str | None:
        return None if _sum(self.memory[: self.total]) == self.source_sum else "the copy is not the source"

    def _wrong_pieces(self) -> str | None:
        return None if _sum(self.memory[: self.total]) == self.pieces_sum else "the pieces are not where they belong"


class Counting(Files):
    """Counts the bytes that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def read(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> int:
        got = super().read(descriptor, buffers, offset)
        self.bytes += got
        return got


def make_chunk(setup: StoreSetup, number: int, *, values: bool = False) -> ChunkKV:
    """Random bytes, or ``values`` that a codec takes: normal ones."""
    layout = setup.layout
    generator = np.random.default_rng((setup.seed, number))
    shape = (layout.layers, setup.chunk, layout.heads, layout.head_dim)
    size = int(np.prod(shape))
    if values:
        k, v = (torch.from_numpy(generator.standard_normal(size, np.float32)).bfloat16().view(shape) for _ in range(2))
    else:  # any bits do: nothing computes with them
        k, v = (_as_kv(generator.integers(0, 256, 2 * size, np.uint8), shape) for _ in range(2))
    digest = xxhash.xxh3_128_digest(f"{setup.seed} {number}".encode()) * 2
    return ChunkKV(KVKey(digest), layout, tuple(range(setup.chunk)), k, v, 0, digest, "bench")


def _as_kv(memory: Memory, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(memory).view(torch.bfloat16).view(shape)


def _sum(memory: Memory) -> bytes:
    digest: bytes = xxhash.xxh3_128_digest(memory)
    return digest
