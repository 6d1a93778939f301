"""The objects of the store: what a cached chunk is, and what an engine's cache looks like.

L layers, H key-value heads, D head dimension, T tokens of the chunk.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

FORMAT_VERSION = 2
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

MissReason = Literal[
    "never_precomputed",
    "evicted",
    "model_changed",
    "tokenizer_changed",
    "checksum_failed",
    "load_timeout",
    "disabled",
]


@dataclass(frozen=True)
class KVLayout:
    """Shape and identity of one model's key-value cache.

    ``model`` and ``rope`` are hex fingerprints (weights; RoPE kind and parameters), ``dtype`` one of
    ``DTYPES``. Two layouts that differ in any field never share an entry.
    """

    model: str
    layers: int
    heads: int
    head_dim: int
    dtype: str
    rope: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"KV dtype {self.dtype!r} is not supported; choose one of {sorted(DTYPES)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token over all layers."""
        return 2 * self.layers * self.heads * self.head_dim * self.torch_dtype.itemsize

    @property
    def digest(self) -> bytes:
        """32 bytes that identify the layout."""
        text = "|".join(str(x) for x in (self.model, self.layers, self.heads, self.head_dim, self.dtype, self.rope))
        return hashlib.sha256(text.encode()).digest()


@dataclass(frozen=True, order=True)
class KVKey:
    """256-bit content address of one chunk's KV (see ``store.key.make_key``)."""

    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != 32:
            raise ValueError(f"a KV key has 32 bytes, not {len(self.digest)}")

    @property
    def hex(self) -> str:
        return self.digest.hex()

    @classmethod
    def from_hex(cls, text: str) -> KVKey:
        return cls(bytes.fromhex(text))


@dataclass(frozen=True)
class Want:
    """What a reader asks for: only an entry that is exactly this is served (fields as in ``ChunkKV``)."""

    key: KVKey
    layout: KVLayout
    token_ids: tuple[int, ...]
    source: bytes
    tokenizer: str


@dataclass(frozen=True, eq=False)
class ChunkKV:
    """The KV of one chunk, as compiled.

    ``token_ids`` [T] int; ``k`` and ``v`` [L, T, H, D] on the CPU in ``layout.dtype``; K is rotated for the
    positions ``k_position .. k_position + T - 1``. ``source`` (32 bytes) names the chunk independently of
    model and tokenizer, so that a later miss can say *why* (``model_changed``, ``tokenizer_changed``);
    ``tokenizer`` is the hex fingerprint of the tokenizer that made ``token_ids``; ``owner`` (a tenant) is whose share
    of the store it counts against.
    """

    key: KVKey
    layout: KVLayout
    token_ids: tuple[int, ...]
    k: torch.Tensor
    v: torch.Tensor
    k_position: int
    source: bytes
    tokenizer: str
    owner: str = "default"

    def __post_init__(self) -> None:
        shape = (self.layout.layers, len(self.token_ids), self.layout.heads, self.layout.head_dim)
        for name, x in (("k", self.k), ("v", self.v)):
            if tuple(x.shape) != shape or x.dtype != self.layout.torch_dtype:
                raise ValueError(
                    f"{name} is {tuple(x.shape)} {x.dtype}, the layout needs {shape} {self.layout.torch_dtype}"
                )
        if len(self.source) != 32:
            raise ValueError(f"source has 32 bytes, not {len(self.source)}")
