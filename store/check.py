"""What may be served: only an intact entry that is exactly what was asked for."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from store.base import Entry, Found, Miss
from store.entry import Header, decode_header
from store.errors import CorruptEntryError
from store.types import ChunkKV, KVKey, MissReason, Want


def read_header(key: KVKey, blob: bytes | memoryview) -> Header:
    """The header of the entry found under ``key``. Raises ``CorruptEntryError``, also if another's."""
    header = decode_header(blob)
    if header.key != key:
        raise CorruptEntryError(f"the entry under {key.hex} is that of {header.key.hex}")
    return header


def listed(
    header: Header, *, bytes: int, pinned: bool, created: float = 0.0, used: float = 0.0, frequency: float = 0.0
) -> Entry:
    """The entry of ``header`` as a listing shows it; the rest is what its tier knows of it (see ``Entry``)."""
    return Entry(
        key=header.key,
        tokens=header.tokens,
        bytes=bytes,
        layout=header.layout.digest.hex(),
        tokenizer=header.tokenizer,
        source=header.source,
        codec=header.codec.name,
        raw_bytes=header.raw_bytes,
        owner=header.owner,
        pinned=pinned,
        created=created,
        used=used,
        frequency=frequency,
    )


def mismatch(want: Want, header: Header) -> MissReason | None:
    """Why an entry that is intact is not what was asked for, or None.

    The address says otherwise, but an address is a claim and the header is the fact.
    """
    if header.layout != want.layout:
        return "model_changed"
    if header.tokenizer != want.tokenizer:
        return "tokenizer_changed"
    if not np.array_equal(header.token_ids, np.asarray(want.token_ids, dtype=np.int64)):
        return "checksum_failed"
    return None


def check_target(header: Header, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raises ``ValueError`` unless a layer of the entry can be written into ``k`` and ``v`` (see ``Found.read``)."""
    shape = (header.tokens, header.layout.heads, header.layout.head_dim)
    for x in (k, v):
        # What is not contiguous would be written into a copy, and be lost.
        if x.shape != shape or x.dtype != header.layout.torch_dtype or not x.is_contiguous():
            raise ValueError(
                f"a layer of this entry needs contiguous tensors {shape} of {header.layout.dtype}, not "
                f"{tuple(x.shape)} of {x.dtype}, strides {x.stride()}"
            )


def read_whole(found: Found | Miss, want: Want) -> ChunkKV:
    """All layers of what was found, in memory of their own. Raises ``LostError``."""
    assert not isinstance(found, Miss)
    header, layout = found.header, want.layout
    shape = (layout.layers, header.tokens, layout.heads, layout.head_dim)
    k, v = torch.empty(shape, dtype=layout.torch_dtype), torch.empty(shape, dtype=layout.torch_dtype)
    for layer in range(layout.layers):
        found.read(layer, k[layer], v[layer])
    return ChunkKV(
        key=want.key,
        layout=layout,
        token_ids=want.token_ids,
        k=k,
        v=v,
        k_position=header.k_position,
        source=header.source,
        tokenizer=header.tokenizer,
        owner=header.owner,
    )


def absence(want: Want, *, evicted: bool, known: Iterable[tuple[bytes, str]]) -> MissReason:
    """Why there is no entry: ``known`` are the (layout digest, tokenizer) pairs of its source."""
    if evicted:
        return "evicted"
    pairs = set(known)
    if not pairs or (want.layout.digest, want.tokenizer) in pairs:
        # The same source, model and tokenizer: its text or its compile context is new.
        return "never_precomputed"
    if any(layout == want.layout.digest for layout, _ in pairs):
        return "tokenizer_changed"
    return "model_changed"
