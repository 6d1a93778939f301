"""What every codec promises: shapes, bounds, determinism, and no answer made of the wrong bytes."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from store.codec import CODECS, open_codec
from store.codec.base import Bytes, Codec
from store.errors import CorruptEntryError
from store.types import DTYPES, KVLayout

LOSSY = [name for name, codec in CODECS.items() if not codec.lossless]
SHAPES = [(1, 1, 32), (2, 1, 37), (3, 3, 5), (63, 2, 64), (64, 1, 256), (129, 4, 80), (200, 8, 128), (257, 2, 96)]


def keys_and_values(tokens: int, heads: int, dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """As a model makes them: K with an offset by channel and wide and narrow channels, V with large tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    k = normal(tokens, heads, dim) * normal(1, heads, dim).exp() + 4 * normal(1, heads, dim)
    v = normal(tokens, heads, dim) * normal(tokens, 1, 1).exp() + normal(1, heads, dim)
    return k.to(dtype), v.to(dtype)


def layout_of(heads: int, dim: int, dtype: torch.dtype) -> KVLayout:
    name = next(name for name, known in DTYPES.items() if known == dtype)
    return KVLayout(model="ab", layers=1, heads=heads, head_dim=dim, dtype=name, rope="cd")


def decode(codec: Codec, plane: Bytes, like: Tensor) -> tuple[Tensor, Tensor]:
    """K and V, written over poison."""
    k, v = (torch.full_like(like, float("nan"), memory_format=torch.contiguous_format) for _ in range(2))
    codec.decode(plane, k, v)
    return k, v


def round_trip(name: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    codec = open_codec(name)
    return decode(codec, codec.encode(k, v, depth=0.5), k)


def relative_error(got: Tensor, x: Tensor) -> float:
    """Root mean square of the error, relative to what is left of ``x`` without its mean by channel."""
    x = x.double()
    return float((got.double() - x).norm() / (x - x.mean(0)).norm())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_every_value_is_written_for_every_shape(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    k, v = keys_and_values(*shape, dtype)
    for got, x in zip(round_trip(name, k, v), (k, v), strict=True):
        assert got.dtype == dtype and bool(got.isfinite().all())
        off = (got.double() - x.double()).abs().amax()
        assert off <= 0.13 * (x.double().amax() - x.double().amin()) + 0.01 * x.double().abs().amax()


@pytest.mark.parametrize(("name", "limit"), [("fp8", 0.09), ("int8", 0.012), ("int4", 0.12), ("entropy", 0.08)])
def test_the_error_is_what_the_codec_is_for(name: str, limit: float) -> None:
    k, v = keys_and_values(256, 4, 64, torch.float32)
    k = k - k.mean(0)  # floats err by the size of a value, its offset included; the others do not
    for got, x in zip(round_trip(name, k, v - v.mean(0)), (k, v - v.mean(0)), strict=True):
        assert limit / 4 < relative_error(got, x) < limit


@pytest.mark.parametrize(
    ("name", "limit"), [("int8", 0.012), ("int4", 0.12), ("entropy", 0.08), ("entropy-coarse", 0.16)]
)
def test_a_large_offset_of_a_channel_costs_no_resolution(name: str, limit: float) -> None:
    # Models with a bias in their keys (Qwen2) have channels whose mean is a hundred times their spread.
    k, v = keys_and_values(256, 4, 64, torch.float32)
    far = k - k.mean(0) + 300 * torch.linspace(-1, 1, 256).view(1, 4, 64)
    got, _ = round_trip(name, far, v)
    assert relative_error(got, far) < limit


@pytest.mark.parametrize("name", CODECS)
def test_an_empty_chunk_is_empty(name: str) -> None:
    k = torch.empty(0, 2, 8)
    plane = open_codec(name).encode(k, k, depth=0.0)
    assert plane.size == 0 == open_codec(name).plane_bytes(layout_of(2, 8, torch.float32), 0)
    open_codec(name).decode(plane, k, k)


@pytest.mark.parametrize("name", CODECS)
def test_strides_and_gradients_do_not_matter(name: str) -> None:
    k, v = keys_and_values(33, 2, 16, torch.float32)
    strided = k.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    every_second = torch.stack([v, -v], dim=-1).flatten(-2)[..., ::2]
    assert not strided.is_contiguous() and not every_second.is_contiguous()
    codec = open_codec(name)
    assert np.array_equal(codec.encode(strided, every_second, depth=0.5), codec.encode(k, v, depth=0.5))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_the_same_input_makes_the_same_bytes_and_stays_as_it_was(name: str, dtype: torch.dtype) -> None:
    k, v = keys_and_values(70, 2, 64, dtype)
    kept = k.clone(), v.clone()
    planes = [open_codec(name).encode(k, v, depth=0.5) for _ in range(3)]
    assert all(plane.dtype == np.uint8 and np.array_equal(plane, planes[0]) for plane in planes)
    assert torch.equal(k, kept[0]) and torch.equal(v, kept[1])
    planes[0][:] = 0  # new memory: the caller's tensors are not the plane's
    assert torch.equal(k, kept[0]) and torch.equal(v, kept[1])


@pytest.mark.parametrize("name", CODECS)
def test_planes_in_memory_that_may_not_be_written_or_starts_anywhere_are_read(name: str) -> None:
    k, v = keys_and_values(50, 2, 20, torch.bfloat16)
    codec = open_codec(name)
    plane = codec.encode(k, v, depth=0.5)
    want = decode(codec, plane, k)
    shifted = np.frombuffer(b"?" + plane.tobytes() + b"?", np.uint8)[1:-1]
    assert not shifted.flags.writeable
    assert all(torch.equal(a, b) for a, b in zip(decode(codec, shifted, k), want, strict=True))


@pytest.mark.parametrize("name", CODECS)
def test_a_plane_of_another_size_is_corrupt(name: str) -> None:
    k, v = keys_and_values(40, 2, 16, torch.float32)
    codec = open_codec(name)
    plane = codec.encode(k, v, depth=0.5)
    lengths = {0, 1, 7, 8, 9, plane.size // 3, plane.size // 2, plane.size - 1}
    damaged = [plane[:length] for length in lengths] + [np.append(plane, np.uint8(0)), np.tile(plane, 2)]
    for bad in damaged:
        with pytest.raises(CorruptEntryError):
            decode(codec, bad, k)
    for tokens in (0, 39, 41):
        with pytest.raises(CorruptEntryError):
            decode(codec, plane, torch.empty(tokens, 2, 16))


def test_a_damaged_entropy_stream_is_corrupt_or_of_the_right_size() -> None:
    # The checksum comes first, so this is a second line: whatever the bytes, no crash, no other error, no NaN.
    k, v = keys_and_values(40, 2, 16, torch.float32)
    codec = open_codec("entropy")
    plane = codec.encode(k, v, depth=0.5)
    scales = 8 + 2 * 4 * 32
    caught = 0
    for at in [*range(8), *range(scales, plane.size, 11)]:
        bad = plane.copy()
        bad[at] ^= 0x41
        try:
            got = decode(codec, bad, k)
        except CorruptEntryError:
            caught += 1
        else:
            assert all(bool(x.isfinite().all()) for x in got)
    assert caught > 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", LOSSY)
def test_what_is_not_finite_is_refused(name: str, dtype: torch.dtype, bad: float) -> None:
    k, v = keys_and_values(20, 2, 16, dtype)
    for which in range(2):
        broken = [k.clone(), v.clone()]
        broken[which][13, 1, 4] = bad
        with pytest.raises(ValueError, match=r"token 13, channel 20 is -?(nan|inf).*use the codec raw"):
            open_codec(name).encode(*broken, depth=0.5)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_largest_and_the_smallest_values_stay_finite_and_near(name: str, dtype: torch.dtype) -> None:
    top = min(float(torch.finfo(dtype).max), 1e15) * 0.999
    x = torch.tensor([0.0, -0.0, 1e-6, -1e-6, top, -top]).to(dtype).repeat(11, 2, 3)
    for got in round_trip(name, x, x):
        assert bool(got.isfinite().all())
        assert (got.double() - x.double()).abs().amax() <= 0.07 * 2 * top
    tiny = torch.full((9, 2, 16), float(torch.finfo(dtype).tiny)).to(dtype)
    for got in round_trip(name, tiny, torch.zeros_like(tiny)):
        assert got.abs().amax() <= 2e-4


@pytest.mark.parametrize("name", LOSSY)
def test_beyond_what_can_be_calculated_is_refused(name: str) -> None:
    x = torch.full((4, 1, 8), 2e15)
    with pytest.raises(ValueError, match="1e\\+15"):
        open_codec(name).encode(x, -x, depth=0.5)


@pytest.mark.parametrize("name", LOSSY)
def test_what_is_constant_is_exact_up_to_its_offset(name: str) -> None:
    k = torch.linspace(-3, 5, 48).view(1, 2, 24).repeat(30, 1, 1)
    for got in round_trip(name, k, k):
        assert (got - k).abs().amax() <= (0.07 * 5 if name == "fp8" else 2**-8 * 5 / 8)


@given(
    tokens=st.integers(1, 70),
    heads=st.integers(1, 3),
    dim=st.sampled_from([2, 8, 31, 64]),
    scale=st.integers(-20, 20),
    seed=st.integers(0, 2**31),
    spike=st.floats(1.0, 1e5),
)
@example(tokens=1, heads=1, dim=2, scale=0, seed=0, spike=1.0)
@settings(max_examples=60, deadline=None)
def test_no_value_is_further_off_than_half_a_step(
    tokens: int, heads: int, dim: int, scale: int, seed: int, spike: float
) -> None:
    k, v = keys_and_values(tokens, heads, dim, torch.float32, seed)
    k[seed % tokens, 0, seed % dim] *= spike  # one far value: it may cost its group resolution, it is not cut off
    k, v = k * 2.0**scale, v * 2.0**scale
    rounding = 1e-6 * float(k.abs().amax() + v.abs().amax())

    def half_step(x: Tensor, levels: int, dims: int | tuple[int, ...]) -> Tensor:
        """Range and rounded offset, by levels, and the step's own rounding."""
        low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
        return ((high - low) + low.abs() / 128) / (levels - 1) / 2 * (1 + 2**-7) + rounding

    got_k, got_v = round_trip("int8", k, v)
    assert bool(((got_k - k).abs() <= half_step(k, 256, 0)).all())
    mean = v.mean(0, keepdim=True).to(torch.bfloat16).float()
    assert bool(((got_v - v).abs() <= half_step(v - mean, 256, 2)).all())

    got_k, got_v = round_trip("int4", k, v)
    assert bool(((got_k - k).abs() <= half_step(k, 16, 0)).all())
    assert bool(((got_v - v).abs() <= half_step(v - mean, 16, (1, 2))).all())

    got_k, got_v = round_trip("fp8", k, v)
    for got, x in ((got_k, k), (got_v, v)):
        subnormal = x.abs().amax((0, 2), keepdim=True) / 448 * 2**-10
        assert bool(((got - x).abs() <= x.abs() * 2**-4 * 1.001 + subnormal + rounding).all())

    for name, steps in (("entropy", 0.25), ("entropy-coarse", 0.5)):
        got_k, got_v = round_trip(name, k, v)
        for got, x in ((got_k, k), (got_v, v)):
            middle = x.mean(0, keepdim=True)
            far = ((x - middle).abs().amax(0, keepdim=True) + middle.abs() / 256) / 127
            spread = (x - middle).square().mean(0, keepdim=True).sqrt()
            widest = torch.maximum(far, steps * spread.amax(2, keepdim=True))
            assert bool(((got - x).abs() <= widest / 2 * (1 + 2**-7) + rounding).all())


@given(codes=st.lists(st.integers(0, 255), min_size=8, max_size=8))
@settings(max_examples=40, deadline=None)
def test_eight_bit_floats_are_those_of_torch(codes: list[int]) -> None:
    """Decoding moves bits; torch's own table of e4m3 is the independent truth."""
    codec = open_codec("fp8")
    codes = [c if c & 127 != 127 else 0 for c in codes]  # NaN is never written
    scale = np.array([1.0, 0.37], dtype=np.float32)
    body = np.array(codes, np.uint8)
    plane = np.concatenate([scale.view(np.uint8), body])
    k, v = decode(codec, plane, torch.empty(4, 1, 1))
    want = torch.from_numpy(body).view(torch.float8_e4m3fn).float()
    assert torch.equal(k.flatten(), want[:4]) and torch.equal(v.flatten(), want[4:] * 0.37)


def test_all_eight_bit_floats_are_decoded() -> None:
    body = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    plane = np.concatenate([np.ones(2, np.float32).view(np.uint8), body.numpy(), body.numpy()])
    k, _ = decode(open_codec("fp8"), plane, torch.empty(len(body), 1, 1))
    assert torch.equal(k.flatten(), body.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", [(250, 2, 64), (512, 8, 128), (100, 1, 96)], ids=str)
def test_the_size_is_known_before(name: str, shape: tuple[int, int, int]) -> None:
    k, v = keys_and_values(*shape, torch.bfloat16)
    codec = open_codec(name)
    size, expected = codec.encode(k, v, depth=0.5).size, codec.plane_bytes(layout_of(*shape[1:], k.dtype), shape[0])
    if name.startswith("entropy"):
        assert abs(size / expected - 1) < 0.15
    else:
        assert size == expected


@pytest.mark.parametrize(("name", "ratio"), [("fp8", 1.99), ("int8", 1.92), ("int4", 3.55), ("entropy", 3.6)])
def test_planes_are_as_much_smaller_than_bfloat16_as_they_are_said_to_be(name: str, ratio: float) -> None:
    k, v = keys_and_values(256, 8, 128, torch.bfloat16)
    assert (k.nbytes + v.nbytes) / open_codec(name).encode(k, v, depth=0.5).size >= ratio


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_has_no_state_that_threads_could_mix_up(name: str) -> None:
    codec = open_codec(name)
    chunks = [keys_and_values(90, 2, 32, torch.float32, seed) for seed in range(4)]
    planes = [codec.encode(k, v, depth=0.5) for k, v in chunks]
    want = [decode(codec, plane, chunks[0][0]) for plane in planes]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(15):
            plane = codec.encode(*chunks[seed], depth=0.5)
            got = decode(codec, plane, chunks[0][0])
            if not (np.array_equal(plane, planes[seed]) and all(map(torch.equal, got, want[seed]))):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_every_codec_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "codecs.md").read_text(encoding="utf-8")
    assert [name for name in CODECS if text.count(f"| `{name}` |") < 3] == []  # what it is, its size, its answers


def test_an_unknown_codec_is_named_with_the_choices() -> None:
    with pytest.raises(ValueError, match="'zip' is unknown; choose one of raw, fp8, int8, int4, entropy"):
        open_codec("zip")


# Written by version 1 of each codec, of K and V [3, 1, 4] below. Stores in the field hold such planes: a change that
# cannot read them needs a new version.
GOLDEN = {
    "fp8": "9224c93c2549123d5aef7d1252ea7e1ae7ed7da05e66de0076fe6e66464ed65e",
    "int8": "013c813b813ba5370000c0bf000040c000002041a69b44bb434093c0553f803f0b3d843dfa3c03c037c13bc0fe0000cbdefe"
    "fefe007f400000ff061ffe00e3c100fe3460",
    "int4": "093e893d893daf390000c0bf000040c000002041a69b44bb434093c0553f803f143f8c3f053f03c037c13bc0fff0007c4d0f"
    "d0bf00f23f60",
    "entropy": "150000001500000080be20c027410000b23d713d763d8c3b434093c0553f803f463f963f1e3fbe3e28b52ffd000061000089"
    "7879808688898072807d7f28b52ffd00006100007d867d7d867685837c847e80",
    "entropy-coarse": ""
    "150000001500000080be20c027410000063eb53db93dd23b434093c0553f803f943fe13f6d3f0f3f28b52ffd000061000086"
    "7a7b808486868076807e8028b52ffd00006100007e847e7e847a83827d837f80",
}
GOLDEN_K = torch.tensor([[0.5, -3.0, 10.0, 1e-3], [0.25, -2.0, 11.0, 2e-3], [-1.5, -2.5, 10.25, -3e-3]]).view(3, 1, 4)
GOLDEN_V = torch.tensor([[1.0, 2.0, -1.0, 0.0], [8.0, -16.0, 4.0, 2.0], [0.125, 0.25, -0.5, 1.0]]).view(3, 1, 4)


@pytest.mark.parametrize("name", LOSSY)
def test_planes_written_by_an_earlier_program_are_read(name: str) -> None:
    assert CODECS[name].version == 1
    plane = np.frombuffer(bytes.fromhex(GOLDEN[name]), np.uint8)
    k, v = decode(CODECS[name], plane, GOLDEN_K)
    far = {"fp8": 0.02, "int8": 0.003, "int4": 0.03, "entropy": 0.03, "entropy-coarse": 0.06}[name]
    assert (k - GOLDEN_K).abs().amax() < far * 11
    assert (v - GOLDEN_V).abs().amax() < far * 16
    # Decoding is one multiplication and additions: what differs between machines is the last bit.
    fresh = decode(CODECS[name], CODECS[name].encode(GOLDEN_K, GOLDEN_V, depth=1.0), GOLDEN_K)
    assert torch.allclose(k, fresh[0], atol=1e-5) and torch.allclose(v, fresh[1], atol=1e-5)
