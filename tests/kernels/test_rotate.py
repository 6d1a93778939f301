"""rotate moves keys exactly, for every RoPE flavour, shape and distance."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.rotate import rotate


def frequencies(dim: int) -> torch.Tensor:
    return 1.0 / 10_000 ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def naive(k: torch.Tensor, positions: list[int], inv_freq: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """[T, H, D] rotated one pair at a time, with Python floats."""
    out = k.double().clone()
    half = len(inv_freq)
    for t, position in enumerate(positions):
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            angle = position * float(inv_freq[i])
            x, y = k[t, :, a].double(), k[t, :, b].double()
            out[t, :, a] = x * math.cos(angle) - y * math.sin(angle)
            out[t, :, b] = y * math.cos(angle) + x * math.sin(angle)
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rows", [1, 63, 129])
@pytest.mark.parametrize(("dim", "rotary"), [(32, 32), (64, 16), (80, 80), (128, 64)])
def test_every_row_moves_by_its_own_delta(rows: int, dim: int, rotary: int, interleaved: bool) -> None:
    k = torch.randn(rows, 2, dim)
    delta = torch.randint(-5000, 100_000, (rows,))
    inv_freq = frequencies(rotary)
    got = rotate(k, delta, inv_freq, interleaved=interleaved)
    want = naive(k, delta.tolist(), inv_freq, interleaved)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)
    assert torch.equal(got[..., rotary:], k[..., rotary:])


@pytest.mark.parametrize("scale", [1.0, 1.1386])  # the second is a YaRN attention factor
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_key_made_at_p_becomes_the_key_at_p_plus_delta(interleaved: bool, scale: float) -> None:
    raw, inv_freq = torch.randn(7, 3, 32), frequencies(32)
    at = [11 + t for t in range(7)]
    for delta in (1, -11, 4096, 100_000):
        made = (scale * naive(raw, at, inv_freq, interleaved)).float()
        want = scale * naive(raw, [p + delta for p in at], inv_freq, interleaved)
        got = rotate(made, delta, inv_freq, interleaved=interleaved)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    k, inv_freq = torch.randn(9, 2, 64).to(dtype), frequencies(64)
    got = rotate(k, 99_999, inv_freq)
    assert got.dtype == dtype
    want = naive(k, [99_999] * 9, inv_freq, False)
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_leading_dimensions_and_strides_do_not_matter() -> None:
    k, inv_freq = torch.randn(2, 5, 3, 32), frequencies(32)
    delta = torch.arange(5) * 1000
    want = torch.stack([rotate(k[layer], delta, inv_freq) for layer in range(2)])
    strided = torch.randn(5, 2, 64, 3).permute(1, 0, 3, 2)[..., ::2].copy_(k)
    assert not strided.is_contiguous()
    got = rotate(strided, delta, inv_freq)
    assert torch.equal(got, want) and got.is_contiguous()
    assert torch.equal(rotate(k[None], delta, inv_freq)[0], want)


def test_the_input_is_left_alone_and_zero_delta_returns_its_bytes() -> None:
    k = torch.randn(4, 2, 32).bfloat16()
    k[0, 0, 0], k[1, 0, 0] = -0.0, float("nan")
    before = k.clone()
    rotate(k, 17, frequencies(32))
    for delta in (0, torch.zeros(4, dtype=torch.int64)):
        out = rotate(k, delta, frequencies(32))
        assert torch.equal(out.view(torch.int16), before.view(torch.int16))
        out.zero_()
    assert torch.equal(k.view(torch.int16), before.view(torch.int16))


def test_nothing_in_nothing_out() -> None:
    assert rotate(torch.empty(0, 2, 32), 5, frequencies(32)).shape == (0, 2, 32)
    assert rotate(torch.empty(3, 0, 2, 32), torch.empty(0).long(), frequencies(32)).shape == (3, 0, 2, 32)
    assert torch.equal(rotate(k := torch.randn(2, 1, 8), 5, torch.empty(0)), k)


@pytest.mark.parametrize(
    ("k", "delta", "inv_freq", "shown"),
    [
        (torch.zeros(2, 32), 1, frequencies(32), r"\(2, 32\)"),
        (torch.zeros(2, 1, 32).int(), 1, frequencies(32), "int32"),
        (torch.zeros(2, 1, 32), 1, frequencies(64), r"\(32,\)"),
        (torch.zeros(2, 1, 32), torch.zeros(3).long(), frequencies(32), r"\(3,\)"),
        (torch.zeros(2, 1, 32), torch.zeros(2), frequencies(32), "float32"),
        (torch.zeros(2, 1, 32), 1.5, frequencies(32), "float32"),
    ],
)
def test_a_bad_shape_or_dtype_is_shown(
    k: torch.Tensor, delta: int | torch.Tensor, inv_freq: torch.Tensor, shown: str
) -> None:
    with pytest.raises(ValueError, match=shown):
        rotate(k, delta, inv_freq)
