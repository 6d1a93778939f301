"""``int8``: 256 levels, of K by channel over the chunk's tokens, of V by token and head."""

from __future__ import annotations

import torch
from torch import Tensor

from store.codec.affine import Reader, down, pack, quantize, rows_of, scale_channels, scale_tokens, short, wide
from store.codec.base import Bytes
from store.types import KVLayout

LEVELS = 256


class Int8:
    """K: steps [C] bfloat16, offsets [C] float32; V: means [C], steps and offsets [T, H] bfloat16; then the codes of K
    and those of V [T, C] uint8.

    C is H * D. Keys have channels that are large in every token, values have large tokens (KIVI, arXiv 2402.02750,
    section 3.1). V's mean over the tokens is taken off first: what all tokens share needs no levels in each.
    """

    name = "int8"
    version = 1
    lossless = False
    direct = False

    def encode(self, k: Tensor, v: Tensor, *, depth: float) -> Bytes:
        tokens, heads, dim = k.shape
        if not tokens:
            return pack(torch.empty(0, dtype=torch.uint8))
        rows = rows_of(k)
        k_low = rows.amin(0, keepdim=True)
        k_codes, k_step = quantize(rows, k_low, 0, LEVELS)
        rows = rows_of(v)
        mean = rows.mean(0, keepdim=True).to(torch.bfloat16).float()
        centred = (rows - mean).view(tokens, heads, dim)
        v_low = down(centred.amin(2, keepdim=True))
        v_codes, v_step = quantize(centred, v_low, 2, LEVELS)
        return pack(short(k_step), wide(k_low), short(mean), short(v_step), short(v_low), k_codes, v_codes)

    def decode(self, plane: Bytes, k: Tensor, v: Tensor) -> None:
        tokens, heads, dim = k.shape
        channels = heads * dim
        reader = Reader(plane)
        if tokens:
            k_step, k_low, mean = reader.short(1, channels), reader.wide(1, channels), reader.short(1, channels)
            v_step, v_low = (reader.short(tokens, heads, 1) for _ in range(2))
            scale_channels(reader.codes(tokens, channels), k_step, k_low, k.view(tokens, channels))
            scale_tokens(reader.codes(tokens, channels), v_step, v_low, mean, v.view(tokens, channels))
        reader.done()

    def plane_bytes(self, layout: KVLayout, tokens: int) -> int:
        channels = layout.heads * layout.head_dim
        return 8 * channels + 4 * tokens * layout.heads + 2 * tokens * channels if tokens else 0
