"""deviation is the squared distance a loop would find."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from kernels.deviation import deviation


def naive(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(a.shape[0], dtype=torch.float64)
    for t in range(a.shape[0]):
        for x, y in zip(a[t].flatten().tolist(), b[t].flatten().tolist(), strict=True):
            out[t] += (x - y) ** 2
    return out


@pytest.mark.parametrize(("rows", "heads", "dim"), [(1, 1, 32), (63, 2, 64), (129, 3, 80), (5, 8, 128)])
def test_it_equals_the_loop(rows: int, heads: int, dim: int) -> None:
    k, v, k2, v2 = torch.randn(4, rows, heads, dim)
    parts = {"k": naive(k, k2), "v": naive(v, v2)}
    parts["kv"] = parts["k"] + parts["v"]
    uses: tuple[Literal["k", "v", "kv"], ...] = ("k", "v", "kv")
    for use in uses:
        got = deviation(k, v, k2, v2, use=use)
        assert got.dtype == torch.float32 and got.shape == (rows,)
        torch.testing.assert_close(got.double(), parts[use], rtol=1e-5, atol=0)
    assert torch.equal(deviation(k, v, k2, v2), deviation(k, v, k2, v2, use="kv"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_differences_are_taken_in_float32(dtype: torch.dtype) -> None:
    k, v, k2, v2 = torch.randn(4, 17, 2, 32).to(dtype)
    want = naive(k, k2) + naive(v, v2)
    torch.testing.assert_close(deviation(k, v, k2, v2).double(), want, rtol=1e-5, atol=0)
    # Stored KV may have been kept in another dtype than the fresh.
    mixed = deviation(k, v, k2.float(), v2.float())
    torch.testing.assert_close(mixed.double(), want, rtol=1e-5, atol=0)


def test_large_half_values_do_not_overflow() -> None:
    big = torch.full((2, 1, 32), 60_000.0, dtype=torch.float16)
    assert deviation(big, big, -big, -big).isfinite().all()


def test_equal_rows_are_exactly_zero_and_others_are_not() -> None:
    k, v = torch.randn(2, 9, 2, 32)
    k2 = k.clone()
    k2[4, 1, 3] += 0.5
    got = deviation(k, v, k2, v)
    assert got.nonzero().flatten().tolist() == [4]


def test_a_poisoned_row_stays_in_its_row_and_inputs_are_left_alone() -> None:
    k, v, k2, v2 = torch.randn(4, 9, 2, 32)
    k2[3] = float("nan")
    before = [x.clone() for x in (k, v, k2, v2)]
    got = deviation(k, v, k2, v2)
    assert got.isnan().nonzero().flatten().tolist() == [3]
    for x, y in zip((k, v, k2, v2), before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_strides_do_not_matter() -> None:
    k, v, k2, v2 = torch.randn(4, 9, 2, 32)
    strided = torch.empty(32, 2, 18).permute(2, 1, 0)[::2].copy_(k)
    torch.testing.assert_close(deviation(strided, v, k2, v2), deviation(k, v, k2, v2), rtol=1e-6, atol=0)


def test_no_rows() -> None:
    none = torch.empty(0, 2, 32)
    assert deviation(none, none, none, none).shape == (0,)


def test_a_bad_shape_or_choice_is_shown() -> None:
    x = torch.zeros(3, 2, 32)
    with pytest.raises(ValueError, match=r"\(4, 2, 32\)"):
        deviation(x, x, torch.zeros(4, 2, 32), x)
    with pytest.raises(ValueError, match=r"\(2, 32\)"):
        deviation(x[0], x[0], x[0], x[0])
    with pytest.raises(ValueError, match="'q'"):
        deviation(x, x, x, x, use="q")  # type: ignore[arg-type]
