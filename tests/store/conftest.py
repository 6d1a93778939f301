"""Chunks to store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from store import (
    ChunkKV,
    KVLayout,
    KVStore,
    Miss,
    StoreConfig,
    Want,
    context_hash,
    make_key,
    open_store,
    source_of,
)

SALT = b"s" * 32
LAYOUT = KVLayout(model="ab12", layers=3, heads=2, head_dim=8, dtype="float32", rope="cd34")


@dataclass(frozen=True)
class Make:
    """Makes a chunk from a number; the same number, the same chunk."""

    layout: KVLayout = LAYOUT
    tokenizer: str = "ef56"
    tokens: int = 16
    salt: bytes = field(default=SALT)

    def __call__(self, number: int) -> ChunkKV:
        generator = torch.Generator().manual_seed(number)
        shape = (self.layout.layers, self.tokens, self.layout.heads, self.layout.head_dim)
        k, v = (
            torch.randn(shape, generator=generator).to(self.layout.torch_dtype),
            torch.randn(shape, generator=generator).to(self.layout.torch_dtype),
        )
        token_ids = tuple(range(number, number + self.tokens))
        key = make_key(
            layout=self.layout,
            tokenizer=self.tokenizer,
            tenant_salt=self.salt,
            context=context_hash((1, 2, 3)),
            token_ids=token_ids,
        )
        source = source_of(self.salt, f"chunk {number}")
        return ChunkKV(key, self.layout, token_ids, k, v, 7 + number, source, self.tokenizer)


def want_of(chunk: ChunkKV) -> Want:
    """What an engine asks for when it wants this chunk."""
    return Want(chunk.key, chunk.layout, chunk.token_ids, chunk.source, chunk.tokenizer)


@pytest.fixture
def want() -> Callable[[ChunkKV], Want]:
    return want_of


@pytest.fixture
def make() -> Make:
    return Make()


@pytest.fixture
def make_with() -> Callable[..., Make]:
    return Make


@pytest.fixture
def get() -> Callable[[KVStore, ChunkKV], ChunkKV | Miss]:
    """Ask a store for a chunk as the engine would."""

    def ask(store: KVStore, chunk: ChunkKV) -> ChunkKV | Miss:
        return store.get(want_of(chunk))

    return ask


@pytest.fixture
def same() -> Callable[[object, ChunkKV], bool]:
    """Whether what a store returned is the chunk, to the bit."""

    def equal(got: object, want: ChunkKV) -> bool:
        return (
            isinstance(got, ChunkKV)
            and torch.equal(got.k.view(torch.uint8), want.k.contiguous().view(torch.uint8))
            and torch.equal(got.v.view(torch.uint8), want.v.contiguous().view(torch.uint8))
            and (got.key, got.layout, got.token_ids) == (want.key, want.layout, want.token_ids)
            and (got.k_position, got.source, got.tokenizer) == (want.k_position, want.source, want.tokenizer)
        )

    return equal


@pytest.fixture(params=["memory", "ssd", "tiered"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KVStore]:
    """Each kind of store, empty."""
    configs = {
        "memory": StoreConfig(),
        "ssd": StoreConfig(path=tmp_path / "kv"),
        "tiered": StoreConfig(path=tmp_path / "kv", ram_bytes=64 << 20),
    }
    made = open_store(configs[request.param])
    yield made
    made.close()
