"""The protocol of every codec: one layer's K and V of one chunk to bytes and back."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from store.types import KVLayout

Bytes = npt.NDArray[np.uint8]


class Codec(Protocol):
    """One way to write a plane: K and V [T, H, D] of one layer of one chunk, on the CPU in the layout's dtype.

    A plane says everything needed to decode it but the shape, dtype and codec, which the entry's header has. Codecs
    have no state and are thread-safe. ``version`` changes whenever the bytes do: an entry of another version is a miss.
    """

    name: str
    version: int
    lossless: bool
    direct: bool  # a plane is the bytes of K, then those of V: it can be read from a file straight into the tensors

    def encode(self, k: Tensor, v: Tensor, *, depth: float) -> Bytes:
        """The plane [n] uint8, new memory. Any strides. ``depth`` is 0 for the first layer, 1 for the last.

        A lossy codec raises ``ValueError`` for values that it does not take: not finite, too large.
        """
        ...

    def decode(self, plane: Bytes, k: Tensor, v: Tensor) -> None:
        """Write K and V into ``k`` and ``v`` [T, H, D], contiguous, of the dtype they were encoded from.

        Raises ``CorruptEntryError`` if the plane cannot be one of that shape; a sound checksum has been seen before.
        """
        ...

    def plane_bytes(self, layout: KVLayout, tokens: int) -> int:
        """Size of a plane; of codecs whose size depends on the values, what is to be expected."""
        ...
