"""``entropy``: fine steps around each channel's mean, made small by an entropy coder (after CacheGen)."""

from __future__ import annotations

import struct

import torch
import zstandard
from torch import Tensor

from store.codec.affine import SMALLEST_STEP, Reader, pack, rows_of, scale_channels, short, up
from store.codec.base import Bytes
from store.errors import CorruptEntryError
from store.types import KVLayout

_SIZES = struct.Struct("<2I")
MIDDLE = 128


class Entropy:
    """Sizes of the two streams (uint32 each), means of K, steps of K, means of V, steps of V [C] bfloat16, the streams.

    A stream is one zstd frame over codes [T, C] uint8: rounded distances from the channel's mean in steps, 128 is 0.

    CacheGen (arXiv 2310.07240, section 5.1) codes the distance from an anchor token every ten tokens, in steps that
    widen with depth, by arithmetic coding. Here the anchor is the chunk's mean: it leaves 0.7 (K) and 0.5 (V) of the
    variance that an anchor token leaves. The coder is zstd's Huffman: 1 % more bytes than rANS at 40 times its speed.
    How wide steps are is the encoder's choice; all decode alike. docs/codecs.md has the measurements.
    """

    version = 1
    lossless = False
    direct = False

    def __init__(self, name: str, *, steps: tuple[float, ...], bits: float) -> None:
        """``steps``: of a code, in standard deviations of its channel, for equal shares of the layers from first to
        last. ``bits`` a value is expected to take."""
        self.name, self.steps, self.bits = name, steps, bits

    def encode(self, k: Tensor, v: Tensor, *, depth: float) -> Bytes:
        if not k.shape[0]:
            return pack(torch.empty(0, dtype=torch.uint8))
        step_of_layer = self.steps[min(int(depth * len(self.steps)), len(self.steps) - 1)]
        scales: list[Tensor] = []
        streams: list[bytes] = []
        for x in (k, v):
            codes, step, mean = quantize_centred(rows_of(x), x.shape[1], step_of_layer)
            scales += (short(mean), short(step))
            # Level 1 is Huffman, 128 KiB at a time, and enough of a search to find a token's row again in layer 0,
            # where V knows of nothing else. Higher levels find more chance repeats, and code the rest worse for them.
            coder = zstandard.ZstdCompressor(level=1, write_content_size=False)
            streams.append(coder.compress(codes.numpy().data))
        sizes = _SIZES.pack(*(len(stream) for stream in streams))
        body = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (sizes, *streams)]
        return pack(body[0], *scales, *body[1:])

    def decode(self, plane: Bytes, k: Tensor, v: Tensor) -> None:
        tokens, heads, dim = k.shape
        reader = Reader(plane)
        if tokens:
            channels = heads * dim
            sizes = _SIZES.unpack(reader.codes(_SIZES.size).numpy().data)
            means_and_steps = [(reader.short(1, channels), reader.short(1, channels)) for _ in (k, v)]
            decompressor = zstandard.ZstdDecompressor()  # this call's own: they are not thread-safe
            for size, (mean, step), x in zip(sizes, means_and_steps, (k, v), strict=True):
                codes = _inflate(decompressor, reader.codes(size), tokens * channels).view(tokens, channels)
                scale_channels(codes, step, mean - MIDDLE * step, x.view(tokens, channels))
        reader.done()

    def plane_bytes(self, layout: KVLayout, tokens: int) -> int:
        channels = layout.heads * layout.head_dim
        return _SIZES.size + 8 * channels + int(2 * tokens * channels * self.bits / 8) if tokens else 0


def quantize_centred(rows: Tensor, heads: int, steps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``rows`` [T, C] to codes [T, C], steps and means [1, C]. ``steps``: in standard deviations."""
    exact = rows.mean(0, keepdim=True)
    spread = (rows - exact).square_().mean(0, keepdim=True).sqrt()
    mean = exact.to(torch.bfloat16).float()  # the error of this only moves the codes
    rows = rows - mean
    # Between the two optima: a step by channel (all channels look alike to the coder) and a step by head (least
    # error for the bits if every channel matters alike).
    by_head = spread.view(heads, -1)
    floor = by_head.amax(1, keepdim=True) * 1e-3
    typical = by_head.clamp_min(floor).clamp_min(SMALLEST_STEP).log().mean(1, keepdim=True).exp()
    wanted = steps * (by_head.clamp_min(floor) * typical).sqrt().view(1, -1)
    # Nothing is clipped: a channel with a far value gets wider steps.
    needed = rows.abs().amax(0, keepdim=True) / (MIDDLE - 1)
    step = up(torch.maximum(wanted, needed).clamp_min(SMALLEST_STEP))
    codes = (rows / step).round_().clamp_(1 - MIDDLE, MIDDLE - 1).add_(MIDDLE)
    return codes.to(torch.uint8), step, mean


def _inflate(decompressor: zstandard.ZstdDecompressor, stream: Tensor, size: int) -> Tensor:
    """The ``size`` bytes that ``stream`` was made of. Raises ``CorruptEntryError``."""
    codes = torch.empty(size + 1, dtype=torch.uint8)  # one more: a stream that is too long shows
    try:
        with decompressor.stream_reader(stream.numpy().data) as source:
            got = source.readinto(codes.numpy())
    except zstandard.ZstdError as error:
        raise CorruptEntryError(f"the stream does not decompress: {error}") from error
    if got != size:
        raise CorruptEntryError(f"the stream has {got} codes, not {size}")
    return codes[:size]
