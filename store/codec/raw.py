"""``raw``: the bytes as they are. Lossless, and read without a copy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from store.codec.base import Bytes
from store.errors import CorruptEntryError
from store.types import KVLayout


class Raw:
    """The bytes of K [T, H, D], then those of V."""

    name = "raw"
    version = 1
    lossless = True
    direct = True

    def encode(self, k: Tensor, v: Tensor, *, depth: float) -> Bytes:
        return np.concatenate((flat_bytes(k), flat_bytes(v)))

    def decode(self, plane: Bytes, k: Tensor, v: Tensor) -> None:
        to_k, to_v = flat_bytes(k), flat_bytes(v)
        if plane.size != to_k.size + to_v.size:
            raise CorruptEntryError(f"a raw plane has {plane.size} bytes, not {to_k.size + to_v.size}")
        np.copyto(to_k, plane[: to_k.size])
        np.copyto(to_v, plane[to_k.size :])

    def plane_bytes(self, layout: KVLayout, tokens: int) -> int:
        return tokens * layout.token_bytes // layout.layers


def flat_bytes(x: Tensor) -> Bytes:
    """The bytes of ``x`` as [n] uint8; its own memory if it is contiguous."""
    # numpy has no bfloat16: the bytes go through torch's own view.
    raw: Bytes = x.detach().contiguous().flatten().view(torch.uint8).numpy()
    return raw
