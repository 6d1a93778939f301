"""An entry held in memory in its stored form, and how it is read."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import xxhash
from torch import Tensor

from store.check import check_target
from store.codec import Bytes, Codec
from store.entry import Header, check_plane, decode_header, decode_plane, encode
from store.errors import CorruptEntryError, LostError
from store.types import ChunkKV

# A copied block is hashed while it is still in the core's own cache (1 MiB at least on any server core).
BLOCK = 256 << 10
ALIGN = 64


@dataclass(frozen=True, eq=False)
class Held:
    """``blob`` is the encoded header, ``planes`` [n] uint8 each as its codec wrote them; nobody may change them.

    ``generation`` names the write on the tier below that it is a copy of.
    """

    blob: bytes
    header: Header
    planes: tuple[Bytes, ...]
    generation: int = 0

    @property
    def size(self) -> int:
        return self.header.payload_bytes

    @classmethod
    def of(cls, chunk: ChunkKV, codec: Codec) -> Held:
        blob, planes = encode(chunk, codec)
        return cls.made(blob, _together(planes))

    @classmethod
    def made(cls, blob: bytes, planes: list[Bytes]) -> Held:
        """Take over what ``encode`` made. Raises ``CorruptEntryError`` if the header is not sound."""
        for plane in planes:
            plane.flags.writeable = False
        return cls(blob, decode_header(blob), tuple(planes))

    def recoded(self, codec: Codec) -> Held:
        """The same chunk as ``codec`` writes it. Raises ``CorruptEntryError`` if it cannot be decoded."""
        header, layout = self.header, self.header.layout
        shape = (layout.layers, header.tokens, layout.heads, layout.head_dim)
        k, v = torch.empty(shape, dtype=layout.torch_dtype), torch.empty(shape, dtype=layout.torch_dtype)
        for layer, plane in enumerate(self.planes):
            decode_plane(header, layer, plane, k[layer], v[layer])
        ids = tuple(header.token_ids.tolist())
        chunk = ChunkKV(header.key, layout, ids, k, v, header.k_position, header.source, header.tokenizer, header.owner)
        return Held.of(chunk, codec)

    def check(self) -> None:
        """Raises ``CorruptEntryError`` unless every byte is as it was written."""
        header = decode_header(self.blob)
        if len(self.planes) != len(header.sizes):
            raise CorruptEntryError(f"{len(self.planes)} planes, the header says {len(header.sizes)}")
        for layer, plane in enumerate(self.planes):
            check_plane(header, layer, plane)

    def is_intact(self) -> bool:
        try:
            self.check()
        except CorruptEntryError:
            return False
        return True


class HeldFound:
    """``Found`` of an entry in memory. ``dropped`` is called with what is wrong when a plane turns out damaged."""

    def __init__(self, held: Held, dropped: Callable[[Held, CorruptEntryError], None], *, tier: str = "ram") -> None:
        self.header = held.header
        self.tier = tier
        self._held = held
        self._dropped = dropped

    def read(self, layer: int, k: Tensor, v: Tensor) -> None:
        header, plane = self.header, self._held.planes[layer]
        check_target(header, k, v)
        try:
            if header.codec.direct:
                _copy_checked(header, layer, plane, _memory_of(k), _memory_of(v))
            else:
                decode_plane(header, layer, plane, k, v)
        except CorruptEntryError as error:
            self._dropped(self._held, error)
            raise LostError("checksum_failed", f"{header.key.hex}: {error}") from error

    def advise(self) -> None:
        return None


def _together(planes: list[Bytes]) -> list[Bytes]:
    """The same planes in one piece of memory, for which numpy asks for huge pages (from 4 MiB on)."""
    starts = list(accumulate((-(-plane.size // ALIGN) * ALIGN for plane in planes), initial=0))
    buffer = np.empty(starts[-1], np.uint8)
    together = [buffer[at : at + plane.size] for at, plane in zip(starts, planes, strict=False)]
    for to, plane in zip(together, planes, strict=True):
        to[:] = plane
    return together


def _memory_of(x: Tensor) -> Bytes:
    """The memory of a contiguous tensor as [n] uint8, which does not keep it alive. Raises ``ValueError`` unless it is
    on the CPU."""
    # By address: a chain of torch views takes 10 to 20 microseconds when 256 KiB have just gone through the caches.
    if not x.is_cpu:
        raise ValueError(f"a plane is read into memory on the CPU, not on {x.device}")
    size = x.nbytes
    if not size:
        return np.empty(0, np.uint8)
    raw: Bytes = np.frombuffer(memoryview((ctypes.c_char * size).from_address(x.data_ptr())), np.uint8)
    return raw


def _copy_checked(header: Header, layer: int, plane: Bytes, k: Bytes, v: Bytes) -> None:
    """Copy ``plane`` into ``k`` and ``v`` and check the copies. Raises ``CorruptEntryError``."""
    if plane.size != k.size + v.size or plane.size != header.sizes[layer]:
        raise CorruptEntryError(f"plane {layer} has {plane.size} bytes for tensors of {k.size} and {v.size}")
    hasher = xxhash.xxh3_128()
    at = 0
    for target in (k, v):
        for start in range(0, target.size, BLOCK):
            block = target[start : start + BLOCK]
            block[:] = plane[at : at + block.size]
            hasher.update(block)
            at += block.size
    if hasher.digest() != header.checksums[layer]:
        raise CorruptEntryError(f"the checksum of plane {layer} does not match")
