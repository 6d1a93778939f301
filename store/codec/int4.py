"""``int4``: 16 levels, of K by channel in groups of tokens, of V by token in groups of channels (KIVI)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from store.codec.affine import Reader, down, pack, quantize, rows_of, scale_channels, scale_tokens, short, wide
from store.codec.base import Bytes
from store.types import KVLayout

LEVELS = 16
TOKENS = 128  # of K that share a step and an offset
CHANNELS = 64  # of V that do, at most


class Int4:
    """K: steps [ceil(T / 128), C] bfloat16, offsets of that shape float32; V: means [C], steps and offsets [T, G]
    bfloat16; the codes of K, then those of V, two in a byte: the first half of the values [T, C] in the low bits, the
    second in the high ones.

    KIVI (arXiv 2402.02750) with groups of 128 tokens for K and of at most 64 channels for V, its zero point kept as an
    offset, no recent tokens left in full (a chunk has all its tokens when it is written), and V's mean over the tokens
    taken off first, a third of its error with it (docs/codecs.md).
    """

    name = "int4"
    version = 1
    lossless = False
    direct = False

    def encode(self, k: Tensor, v: Tensor, *, depth: float) -> Bytes:
        tokens, heads, dim = k.shape
        if not tokens:
            return pack(torch.empty(0, dtype=torch.uint8))
        rows = rows_of(k)
        parts = [rows[at : at + TOKENS] for at in range(0, tokens, TOKENS)]
        k_low = torch.stack([part.amin(0, keepdim=True) for part in parts])
        made = [quantize(part, low, 0, LEVELS) for part, low in zip(parts, k_low, strict=True)]
        k_codes, k_step = (torch.cat(part) for part in zip(*made, strict=True))
        rows = rows_of(v)
        mean = rows.mean(0, keepdim=True).to(torch.bfloat16).float()
        centred = (rows - mean).view(tokens, _groups(heads * dim), -1)
        v_low = down(centred.amin(2, keepdim=True))
        v_codes, v_step = quantize(centred, v_low, 2, LEVELS)
        scales = short(k_step), wide(k_low), short(mean), short(v_step), short(v_low)
        return pack(*scales, _join(k_codes), _join(v_codes))

    def decode(self, plane: Bytes, k: Tensor, v: Tensor) -> None:
        tokens, heads, dim = k.shape
        channels = heads * dim
        reader = Reader(plane)
        if tokens:
            blocks, groups = -(-tokens // TOKENS), _groups(channels)
            k_step, k_low = reader.short(blocks, 1, channels), reader.wide(blocks, 1, channels)
            mean = reader.short(1, channels)
            v_step, v_low = (reader.short(tokens, groups, 1) for _ in range(2))
            codes, out = _split(reader, tokens, channels), k.view(tokens, channels)
            for i, (step, low) in enumerate(zip(k_step, k_low, strict=True)):
                part = slice(i * TOKENS, (i + 1) * TOKENS)
                scale_channels(codes[part], step, low, out[part])
            scale_tokens(_split(reader, tokens, channels), v_step, v_low, mean, v.view(tokens, channels))
        reader.done()

    def plane_bytes(self, layout: KVLayout, tokens: int) -> int:
        channels = layout.heads * layout.head_dim
        scales = 6 * -(-tokens // TOKENS) * channels + 2 * channels + 4 * tokens * _groups(channels)
        return scales + 2 * -(-tokens * channels // 2) if tokens else 0


def _groups(channels: int) -> int:
    """How many groups of V's channels there are: the largest divisor up to ``CHANNELS`` is their size."""
    return channels // max(n for n in range(1, min(channels, CHANNELS) + 1) if channels % n == 0)


def _join(codes: Tensor) -> Tensor:
    """Two codes in a byte: halves, not neighbours, so that both come apart in one pass over whole vectors."""
    flat = codes.flatten()
    half = -(-len(flat) // 2)
    low, high = flat[:half].clone(), flat[half:]
    low[: len(high)] |= high << 4
    return low


def _split(reader: Reader, tokens: int, channels: int) -> Tensor:
    size = tokens * channels
    half = -(-size // 2)
    packed, codes = reader.codes(half).numpy(), np.empty(size, dtype=np.uint8)
    np.bitwise_and(packed, 15, out=codes[:half])
    np.right_shift(packed[: size - half], 4, out=codes[half:])
    return torch.from_numpy(codes).view(tokens, channels)
