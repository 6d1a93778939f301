"""Affine quantisation: a value is an integer times a step, plus an offset.

Steps, and offsets of what has been centred, are stored as bfloat16: float32's range at two bytes. They are rounded
outwards and the integers are made against the rounded ones, so that nothing is ever clipped: clipping keys at 3
standard deviations multiplies the error of the attention by 7 (docs/codecs.md). Offsets of keys are float32: models
with a bias there (Qwen2) have channels whose mean is a hundred times their spread.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from store.codec.base import Bytes
from store.errors import CorruptEntryError

LARGEST = 1e15
"""Its square, summed over a chunk, is still a float32. KV of a sound model is below 1e4."""

SMALLEST_STEP = 1e-30
"""Far below any rounding of KV, far above what float32 can no longer divide by."""

BLOCK = 1 << 15
"""Values decoded at a time: what is between the passes stays in the processor's L2 cache, and torch, which splits work
above this size, stays on the calling thread. Planes are read by several threads, while the model computes."""


def rows_of(x: Tensor) -> Tensor:
    """``x`` [T, H, D] as float32 [T, H * D] to calculate with; may be its own memory. Raises ``ValueError``."""
    rows = x.detach().to(torch.float32).reshape(x.shape[0], x.shape[1] * x.shape[2])
    # A NaN fails the comparison too. One bad value would spoil the range, and so every value, of its group.
    if rows.numel() and not bool(rows.abs().amax() <= LARGEST):
        bad = (~(rows.abs() <= LARGEST)).nonzero()[0].tolist()
        raise ValueError(
            f"KV of token {bad[0]}, channel {bad[1]} is {rows[bad[0], bad[1]].item()}: a lossy codec takes finite "
            f"values up to {LARGEST:g}; use the codec raw, or a dtype in which the model does not overflow"
        )
    return rows


def down(x: Tensor) -> Tensor:
    """The largest bfloat16 not above each float32 of ``x``, as float32."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + ((bits >> 31) & 0xFFFF)) & -0x10000).view(torch.float32)  # away from zero if negative


def up(x: Tensor) -> Tensor:
    """The smallest bfloat16 not below each float32 of ``x``, as float32."""
    return -down(-x)


def quantize(x: Tensor, low: Tensor, dim: int, levels: int) -> tuple[Tensor, Tensor]:
    """``x`` float32 in integers 0 .. ``levels`` - 1 from ``low``, its least along ``dim`` or less, to its largest.

    Codes (uint8) and steps (float32 with bfloat16 values; ``dim`` kept with size 1, as in ``low``): ``codes * steps +
    low`` is within half a step of ``x``.
    """
    step = up(((x.amax(dim, keepdim=True) - low) / (levels - 1)).clamp_min(SMALLEST_STEP))
    return (x - low).div_(step).round_().clamp_(0, levels - 1).to(torch.uint8), step


def short(x: Tensor) -> Tensor:
    """``x``, whose values are bfloat16's, as the bytes of bfloat16."""
    return wide(x.to(torch.bfloat16))


def wide(x: Tensor) -> Tensor:
    """The bytes of ``x``."""
    return x.contiguous().flatten().view(torch.uint8)


def pack(*parts: Tensor) -> Bytes:
    """The bytes of ``parts`` (uint8) one after the other."""
    packed: Bytes = torch.cat([part.flatten() for part in parts]).numpy()
    return packed


class Reader:
    """Takes the parts of a plane in the order they were packed in."""

    def __init__(self, plane: Bytes) -> None:
        # torch warns of memory that it may not write.
        self._plane = torch.from_numpy(plane if plane.flags.writeable else plane.copy())
        self._at = 0

    def codes(self, *shape: int) -> Tensor:
        """The next uint8."""
        return self._take(prod(shape)).view(shape)

    def short(self, *shape: int) -> Tensor:
        """The next bfloat16, as float32."""
        return self._floats(torch.bfloat16, shape).to(torch.float32)

    def wide(self, *shape: int) -> Tensor:
        """The next float32."""
        return self._floats(torch.float32, shape)

    def done(self) -> None:
        if self._at != len(self._plane):
            raise CorruptEntryError(f"the plane has {len(self._plane)} bytes, its codec needs {self._at}")

    def _floats(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        part = self._take(dtype.itemsize * prod(shape))
        return part.clone().view(dtype).view(shape)  # parts may start at an odd byte, which torch does not view

    def _take(self, size: int) -> Tensor:
        part = self._plane[self._at : self._at + size]
        if len(part) != size:
            raise CorruptEntryError(f"the plane has only {len(self._plane)} bytes, its codec needs more")
        self._at += size
        return part


def store_rows(values: Tensor, out: Tensor) -> None:
    """Write float32 ``values`` to ``out`` in its dtype."""
    if out.dtype == torch.float16:  # half a step above the largest value may be infinite
        values.clamp_(-65504.0, 65504.0)
    out.copy_(values)


def scale_channels(codes: Tensor, step: Tensor, offset: Tensor, out: Tensor) -> None:
    """Write ``codes`` [T, C] uint8 times ``step`` [1, C] plus ``offset`` [1, C] to ``out`` [T, C]."""
    for at, part in _blocks(codes):
        torch.addcmul(offset, part, step, out=part)
        store_rows(part, out[at : at + len(part)])


def scale_tokens(codes: Tensor, step: Tensor, offset: Tensor, mean: Tensor, out: Tensor) -> None:
    """Write ``codes`` [T, C] uint8 times ``step`` plus ``offset`` [T, G, 1] plus ``mean`` [1, C] to ``out`` [T, C]."""
    groups = step.shape[1]
    for at, part in _blocks(codes):
        grouped, now = part.view(len(part), groups, -1), slice(at, at + len(part))
        grouped.mul_(step[now]).add_(offset[now])  # addcmul is not vectorised for steps that are constant in a row
        part.add_(mean)
        store_rows(part, out[now])


def _blocks(codes: Tensor) -> Iterator[tuple[int, Tensor]]:
    """``codes`` [T, C] as float32, some rows at a time in the same memory; with the number of the first row."""
    tokens, channels = codes.shape
    rows = max(1, BLOCK // channels)
    scratch = torch.empty(min(rows, tokens), channels)
    for at in range(0, tokens, rows):
        part = scratch[: min(rows, tokens - at)]
        part.copy_(codes[at : at + rows])
        yield at, part
