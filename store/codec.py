"""Chunk KV as bytes: one header, and one plane per layer.

Header, little-endian: magic (8), format version, JSON length, tokens, layers (4 x uint32); JSON (UTF-8,
sorted keys: codec, key, layout, tokenizer, source, k_position); token ids (int32 each); one XXH3-128 per
plane (16 each); XXH3-128 of everything before it. A plane is the bytes of K [T, H, D] of its layer, then
those of V. XXH3 finds damage, not forgery: whoever can write the store's files is trusted.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from store.errors import StoreError
from store.types import FORMAT_VERSION, ChunkKV, KVKey, KVLayout

CODEC = "raw"
MAGIC = b"ragblnKV"
_PREFIX = struct.Struct("<8s4I")

Bytes = npt.NDArray[np.uint8]


class CorruptEntryError(StoreError):
    """An entry's bytes are not what was written: the message says which. Stays inside the room."""


@dataclass(frozen=True, eq=False)
class Header:
    """Everything about a stored chunk but its KV; ``token_ids`` int32 [T], one checksum per plane."""

    key: KVKey
    layout: KVLayout
    tokenizer: str
    source: bytes
    k_position: int
    token_ids: npt.NDArray[np.int32]
    checksums: tuple[bytes, ...]

    @property
    def plane_bytes(self) -> int:
        return len(self.token_ids) * self.layout.token_bytes // self.layout.layers

    @property
    def payload_bytes(self) -> int:
        return self.plane_bytes * self.layout.layers


def encode(chunk: ChunkKV) -> tuple[bytes, list[Bytes]]:
    """The header and the planes of ``chunk``; planes are new memory, the chunk stays untouched."""
    k, v = _rows(chunk.k), _rows(chunk.v)
    planes = [np.concatenate((k[layer], v[layer])) for layer in range(chunk.layout.layers)]
    text = json.dumps(
        {
            "codec": CODEC,
            "key": chunk.key.hex,
            "layout": asdict(chunk.layout),
            "tokenizer": chunk.tokenizer,
            "source": chunk.source.hex(),
            "k_position": chunk.k_position,
        },
        sort_keys=True,
        separators=(",", ":"),
    ).encode()
    ids = np.asarray(chunk.token_ids, dtype=np.int64).astype("<i4", casting="same_kind")
    body = b"".join(
        (
            _PREFIX.pack(MAGIC, FORMAT_VERSION, len(text), len(ids), len(planes)),
            text,
            ids.tobytes(),
            *(xxhash.xxh3_128_digest(plane) for plane in planes),
        )
    )
    return body + xxhash.xxh3_128_digest(body), planes


def decode_header(blob: bytes | memoryview) -> Header:
    """Raises ``CorruptEntryError`` unless every byte is as ``encode`` wrote it."""
    body, checksum = bytes(blob[:-16]), bytes(blob[-16:])
    if len(body) < _PREFIX.size:
        raise CorruptEntryError(f"the header has only {len(blob)} bytes")
    magic, version, text_bytes, tokens, layers = _PREFIX.unpack_from(body)
    if magic != MAGIC or version != FORMAT_VERSION:
        raise CorruptEntryError(f"the header starts with {magic!r} version {version}")
    if xxhash.xxh3_128_digest(body) != checksum:
        raise CorruptEntryError("the header's checksum does not match")
    # From here the bytes are ours: anything odd was written that way and is refused just the same.
    ids_at = _PREFIX.size + text_bytes
    sums_at = ids_at + 4 * tokens
    if len(body) != sums_at + 16 * layers:
        raise CorruptEntryError(f"the header has {len(body)} bytes for {tokens} tokens and {layers} layers")
    try:
        fields = json.loads(body[_PREFIX.size : ids_at])
        header = Header(
            key=KVKey.from_hex(fields["key"]),
            layout=KVLayout(**fields["layout"]),
            tokenizer=str(fields["tokenizer"]),
            source=bytes.fromhex(fields["source"]),
            k_position=int(fields["k_position"]),
            token_ids=np.frombuffer(body, "<i4", tokens, ids_at).astype(np.int32, copy=False),
            checksums=tuple(body[at : at + 16] for at in range(sums_at, len(body), 16)),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptEntryError(f"the header's fields are not readable: {error}") from error
    if fields["codec"] != CODEC or header.layout.layers != layers:
        raise CorruptEntryError(f"codec {fields['codec']!r} with {layers} planes for {header.layout}")
    return header


def decode_planes(
    header: Header, planes: Sequence[bytes | memoryview | Bytes | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [L, T, H, D] in memory of their own; None stands for a plane that is not there.

    The checksum is taken of the copy that is returned, so that what was checked is what is served. Raises
    ``CorruptEntryError``.
    """
    layout = header.layout
    shape = (layout.layers, len(header.token_ids), layout.heads, layout.head_dim)
    k, v = torch.empty(shape, dtype=layout.torch_dtype), torch.empty(shape, dtype=layout.torch_dtype)
    to_k, to_v, half = _rows(k), _rows(v), header.plane_bytes // 2
    for layer, (plane, checksum) in enumerate(zip(planes, header.checksums, strict=True)):
        size = None if plane is None else len(plane)
        if plane is None or size != header.plane_bytes:
            raise CorruptEntryError(f"plane {layer} has {size} bytes, the header says {header.plane_bytes}")
        raw = np.frombuffer(plane, np.uint8)
        to_k[layer], to_v[layer] = raw[:half], raw[half:]
        found = xxhash.xxh3_128(to_k[layer])
        found.update(to_v[layer])
        if found.digest() != checksum:
            raise CorruptEntryError(f"the checksum of plane {layer} does not match")
    return k, v


def _rows(x: torch.Tensor) -> Bytes:
    """The bytes of ``x`` [L, ...] as uint8 [L, bytes per layer]; shared memory if ``x`` is contiguous."""
    # numpy has no bfloat16: the bytes go through torch's own view.
    raw: Bytes = x.detach().contiguous().flatten().view(torch.uint8).numpy()
    return raw.reshape(len(x), raw.size // max(1, len(x)))
