"""``fp8``: eight-bit floats, 4 bits of exponent and 3 of mantissa (e4m3, arXiv 2209.05433), scaled by head."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from store.codec.affine import BLOCK, SMALLEST_STEP, Reader, pack, rows_of, store_rows, wide
from store.codec.base import Bytes
from store.errors import CorruptEntryError
from store.types import KVLayout

TOP = 448.0  # the largest e4m3


class Fp8:
    """Scales of K [H] and of V [H] (float32), then K [T, H, D] and V [T, H, D] as e4m3.

    The error is relative, 2^-4 of a value at most: a scale only has to keep large values finite and small ones normal,
    so one for a head does what one for a channel would (measured: docs/codecs.md).
    """

    name = "fp8"
    version = 1
    lossless = False
    direct = False

    def encode(self, k: Tensor, v: Tensor, *, depth: float) -> Bytes:
        if not k.shape[0]:
            return pack(torch.empty(0, dtype=torch.uint8))
        scales, codes = [], []
        for x in (k, v):
            rows = rows_of(x).view(x.shape)
            scale = (rows.abs().amax((0, 2)) / TOP).clamp_min(SMALLEST_STEP)
            scales.append(wide(scale))
            # Rounding may take the largest value a hair above TOP, which e4m3 has no infinity for: it would be NaN.
            scaled = (rows / scale[:, None]).clamp_(-TOP, TOP)
            codes.append(wide(scaled.to(torch.float8_e4m3fn)))
        return pack(*scales, *codes)

    def decode(self, plane: Bytes, k: Tensor, v: Tensor) -> None:
        tokens, heads, dim = k.shape
        if plane.size != _size(tokens, heads, dim):
            raise CorruptEntryError(f"an fp8 plane has {plane.size} bytes, not {_size(tokens, heads, dim)}")
        if not tokens:
            return
        reader = Reader(plane)
        scales = [reader.wide(heads, 1) for _ in (k, v)]
        for x, scale in zip((k, v), scales, strict=True):
            _widen(reader.codes(tokens, heads, dim).view(torch.int8), scale, x)

    def plane_bytes(self, layout: KVLayout, tokens: int) -> int:
        return _size(tokens, layout.heads, layout.head_dim)


def _size(tokens: int, heads: int, dim: int) -> int:
    return 2 * heads * (4 + tokens * dim) if tokens else 0


def _widen(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write e4m3 ``codes`` [T, H, D] int8 times ``scale`` [H, 1] to ``out``.

    torch's own conversion makes 0.25 G values a second. Moved to where a float16 has these bits, exponent and mantissa
    make the same number, subnormal ones too, but for the bias of 15 instead of 7: 2^-8 of it.
    """
    tokens, heads, dim = codes.shape
    bits = codes.numpy().astype(np.int16)  # the sign fills the upper half
    bits <<= 7
    bits &= -0x4001  # all but the sign's copy in the exponent's top bit
    halves, scale = torch.from_numpy(bits).view(torch.float16), scale * 256.0
    block = max(1, BLOCK // (heads * dim))
    scratch = torch.empty(min(block, tokens), heads, dim)
    for at in range(0, tokens, block):
        part = scratch[: min(block, tokens - at)]
        part.copy_(halves[at : at + block]).mul_(scale)
        store_rows(part, out[at : at + block])
