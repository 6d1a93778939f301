"""Content addresses: what makes two cached chunks the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from store.types import FORMAT_VERSION, KVKey, KVLayout


def make_key(
    *,
    layout: KVLayout,
    tokenizer: str,
    tenant_salt: bytes,
    context: bytes,
    token_ids: Sequence[int],
) -> KVKey:
    """The address of the KV of ``token_ids`` compiled behind ``context`` by one model, for one tenant.

    BLAKE2b-256 keyed with ``tenant_salt`` (32 secret bytes): without the salt nobody can tell whether a
    tenant holds a given text, and equal texts of two tenants have unrelated keys. Every field is
    length-prefixed, so that no two different inputs encode alike. How an entry is encoded is not part of its address:
    that may change from tier to tier. ``context`` is ``context_hash`` of the compile context (32 bytes).

    Raises ``ValueError`` for a salt or context of another size, or a token id outside int32.
    """
    if len(context) != 32:
        raise ValueError(f"context is a hash of 32 bytes, not {len(context)}")
    hasher = _keyed(tenant_salt, b"ragblend key")
    for field in (
        FORMAT_VERSION.to_bytes(4, "little"),
        layout.digest,
        tokenizer.encode(),
        context,
        _token_bytes(token_ids),
    ):
        hasher.update(len(field).to_bytes(8, "little"))
        hasher.update(field)
    return KVKey(hasher.digest())


def context_hash(token_ids: Sequence[int]) -> bytes:
    """32 bytes that identify a compile context (the tokens a chunk was prefilled behind)."""
    return hashlib.sha256(b"ragblend context" + _token_bytes(token_ids)).digest()


def source_of(tenant_salt: bytes, name: str) -> bytes:
    """32 bytes that name a chunk independently of model and tokenizer; ``name`` is unique in the tenant."""
    hasher = _keyed(tenant_salt, b"ragblend source")
    hasher.update(name.encode())
    return hasher.digest()


def _keyed(tenant_salt: bytes, purpose: bytes) -> hashlib.blake2b:
    if len(tenant_salt) != 32:
        raise ValueError(f"tenant_salt has 32 bytes, not {len(tenant_salt)}")
    return hashlib.blake2b(digest_size=32, key=tenant_salt, person=purpose)


def _token_bytes(token_ids: Sequence[int]) -> bytes:
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.size and not (ids.min() >= -(2**31) and ids.max() < 2**31):
        raise ValueError(f"token ids must be int32, not {ids.min()}..{ids.max()}")
    return ids.astype("<i4").tobytes()
