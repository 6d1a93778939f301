"""A stored chunk as bytes: one header, and one plane per layer.

Header, little-endian: magic (8), format version, JSON length, tokens, layers (4 x uint32); JSON (UTF-8, sorted keys:
codec, codec_version, key, layout, tokenizer, source, owner, k_position); token ids (int32 each); plane sizes (uint64
each); one XXH3-128 per plane (16 each); XXH3-128 of everything before it. What a plane is, its codec says. XXH3 finds
damage, not forgery: whoever can write the store's files is trusted.
"""

from __future__ import annotations

import json
import logging
import struct
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import xxhash
from torch import Tensor

from store.codec import CODECS, Bytes, Codec, open_codec
from store.errors import CorruptEntryError
from store.types import FORMAT_VERSION, ChunkKV, KVKey, KVLayout

log = logging.getLogger(__name__)

MAGIC = b"ragblnKV"
_PREFIX = struct.Struct("<8s4I")


@dataclass(frozen=True, eq=False)
class Header:
    """Everything about a stored chunk but its KV; ``token_ids`` int32 [T], a size and a checksum per plane."""

    key: KVKey
    layout: KVLayout
    tokenizer: str
    source: bytes
    owner: str
    k_position: int
    codec: Codec
    token_ids: npt.NDArray[np.int32]
    sizes: tuple[int, ...]
    checksums: tuple[bytes, ...]

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def payload_bytes(self) -> int:
        """Bytes of all planes as they are stored."""
        return sum(self.sizes)

    @property
    def raw_bytes(self) -> int:
        """Bytes of K and V in the layout's dtype."""
        return self.tokens * self.layout.token_bytes

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each plane starts when they lie one after the other; one more for their end."""
        return tuple(accumulate(self.sizes, initial=0))


def encode(chunk: ChunkKV, codec: Codec) -> tuple[bytes, list[Bytes]]:
    """The header and the planes of ``chunk``; planes are new memory, the chunk stays untouched.

    A chunk with values that a lossy ``codec`` does not take (not finite, too large) is written raw, which takes all.
    """
    try:
        planes = _planes(chunk, codec)
    except ValueError as error:
        if codec.lossless:
            raise
        log.info("%s is stored raw: %s", chunk.key.hex, error)
        codec = open_codec("raw")
        planes = _planes(chunk, codec)
    return make_header(chunk, codec, planes), planes


def _planes(chunk: ChunkKV, codec: Codec) -> list[Bytes]:
    layers = chunk.layout.layers
    return [codec.encode(chunk.k[i], chunk.v[i], depth=i / max(1, layers - 1)) for i in range(layers)]


def make_header(chunk: ChunkKV, codec: Codec, planes: list[Bytes]) -> bytes:
    """The header of ``chunk`` with these ``planes``."""
    text = json.dumps(
        {
            "codec": codec.name,
            "codec_version": codec.version,
            "key": chunk.key.hex,
            "layout": asdict(chunk.layout),
            "tokenizer": chunk.tokenizer,
            "source": chunk.source.hex(),
            "owner": chunk.owner,
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
            np.asarray([len(plane) for plane in planes], dtype="<u8").tobytes(),
            *(xxhash.xxh3_128_digest(plane) for plane in planes),
        )
    )
    checksum: bytes = xxhash.xxh3_128_digest(body)
    return body + checksum


def decode_header(blob: bytes | memoryview) -> Header:
    """Raises ``CorruptEntryError`` unless every byte is as ``encode`` wrote it and its codec is known."""
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
    sizes_at = ids_at + 4 * tokens
    sums_at = sizes_at + 8 * layers
    if len(body) != sums_at + 16 * layers:
        raise CorruptEntryError(f"the header has {len(body)} bytes for {tokens} tokens and {layers} layers")
    try:
        fields = json.loads(body[_PREFIX.size : ids_at])
        name, codec_version = str(fields["codec"]), int(fields["codec_version"])
        codec = CODECS.get(name)
        if codec is None or codec.version != codec_version:
            raise CorruptEntryError(f"codec {name!r} version {codec_version} is not known here")
        header = Header(
            key=KVKey.from_hex(fields["key"]),
            layout=KVLayout(**fields["layout"]),
            tokenizer=str(fields["tokenizer"]),
            source=bytes.fromhex(fields["source"]),
            owner=str(fields["owner"]),
            k_position=int(fields["k_position"]),
            codec=codec,
            token_ids=np.frombuffer(body, "<i4", tokens, ids_at).astype(np.int32, copy=False),
            sizes=tuple(np.frombuffer(body, "<u8", layers, sizes_at).tolist()),
            checksums=tuple(body[at : at + 16] for at in range(sums_at, len(body), 16)),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptEntryError(f"the header's fields are not readable: {error}") from error
    if header.layout.layers != layers:
        raise CorruptEntryError(f"{layers} planes for {header.layout}")
    return header


def check_plane(header: Header, layer: int, plane: Bytes) -> None:
    """Raises ``CorruptEntryError`` unless ``plane`` is what ``encode`` made of ``layer``."""
    if plane.size != header.sizes[layer]:
        raise CorruptEntryError(f"plane {layer} has {plane.size} bytes, the header says {header.sizes[layer]}")
    if xxhash.xxh3_128_digest(plane) != header.checksums[layer]:
        raise CorruptEntryError(f"the checksum of plane {layer} does not match")


def check_tensors(header: Header, layer: int, k: Bytes, v: Bytes) -> None:
    """The same for a plane of a ``direct`` codec that lies in its tensors' bytes. Raises ``CorruptEntryError``."""
    found = xxhash.xxh3_128(k)
    found.update(v)
    if found.digest() != header.checksums[layer]:
        raise CorruptEntryError(f"the checksum of plane {layer} does not match")


def decode_plane(header: Header, layer: int, plane: Bytes, k: Tensor, v: Tensor) -> None:
    """Check ``plane`` and write its K and V into ``k`` and ``v`` [T, H, D]. Raises ``CorruptEntryError``."""
    check_plane(header, layer, plane)
    header.codec.decode(plane, k, v)
