"""What may be served: only an intact entry that is exactly what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from store.base import Miss
from store.codec import Bytes, CorruptEntryError, Header, decode_header, decode_planes
from store.types import ChunkKV, KVKey, KVLayout, MissReason

Planes = Sequence[bytes | memoryview | Bytes | None]


@dataclass(frozen=True)
class Request:
    """The arguments of ``KVStore.get``."""

    key: KVKey
    layout: KVLayout
    token_ids: tuple[int, ...]
    source: bytes
    tokenizer: str


def read_header(key: KVKey, blob: bytes | memoryview) -> Header:
    """The header of the entry found under ``key``. Raises ``CorruptEntryError``, also if another's."""
    header = decode_header(blob)
    if header.key != key:
        raise CorruptEntryError(f"the entry under {key.hex} is that of {header.key.hex}")
    return header


def read_entry(request: Request, blob: bytes | memoryview, planes: Callable[[Header], Planes]) -> ChunkKV | Miss:
    """The chunk asked for, from its stored bytes; ``planes`` is called only if the header fits the request.

    A header that is intact but not what was asked for is a miss: the address says otherwise, but an address
    is a claim and the header is the fact. Raises ``CorruptEntryError``.
    """
    header = read_header(request.key, blob)
    if header.layout != request.layout:
        return Miss("model_changed")
    if header.tokenizer != request.tokenizer:
        return Miss("tokenizer_changed")
    if not np.array_equal(header.token_ids, np.asarray(request.token_ids, dtype=np.int64)):
        return Miss("checksum_failed")
    k, v = decode_planes(header, planes(header))
    return ChunkKV(
        key=request.key,
        layout=request.layout,
        token_ids=request.token_ids,
        k=k,
        v=v,
        k_position=header.k_position,
        source=header.source,
        tokenizer=header.tokenizer,
    )


def absence(request: Request, *, evicted: bool, known: Iterable[tuple[bytes, str]]) -> MissReason:
    """Why there is no entry: ``known`` are the (layout digest, tokenizer) pairs of its source."""
    if evicted:
        return "evicted"
    pairs = set(known)
    if not pairs or (request.layout.digest, request.tokenizer) in pairs:
        # The same source, model and tokenizer: its text or its compile context is new.
        return "never_precomputed"
    if any(layout == request.layout.digest for layout, _ in pairs):
        return "tokenizer_changed"
    return "model_changed"
