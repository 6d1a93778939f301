"""row_attention equals a loop over rows and heads, and never sees the future."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.row_attention import reference, row_attention

NAN, INF = float("nan"), float("inf")


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, scale: float) -> torch.Tensor:
    """[R, Hq, D] float64; one row and one head at a time, over the visible keys only."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for row, position in enumerate(positions.tolist()):
        for head in range(q.shape[1]):
            keys = k[: position + 1, head // group].double()
            values = v[: position + 1, head // group].double()
            scores = [scale * float((q[row, head].double() * key).sum()) for key in keys]
            top = max(scores)
            weights = [math.exp(s - top) for s in scores]
            for weight, value in zip(weights, values, strict=True):
                out[row, head] += weight / sum(weights) * value
    return out


def inputs(rows: int, keys: int, q_heads: int, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(rows, q_heads, dim), torch.randn(keys, heads, dim), torch.randn(keys, heads, dim)


@pytest.mark.parametrize(
    ("rows", "keys", "q_heads", "heads", "dim"),
    [(1, 1, 1, 1, 32), (1, 63, 4, 2, 64), (5, 129, 2, 2, 80), (63, 64, 4, 1, 32), (129, 33, 2, 1, 128)],
)
def test_it_equals_the_loop(rows: int, keys: int, q_heads: int, heads: int, dim: int) -> None:
    q, k, v = inputs(rows, keys, q_heads, heads, dim)
    positions = torch.randint(0, keys, (rows,))  # unsorted, with duplicates
    want = naive(q, k, v, positions, dim**-0.5)
    got = row_attention(q, k, v, positions, scale=dim**-0.5)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-6)
    exact = row_attention(q.double(), k.double(), v.double(), positions, scale=dim**-0.5)
    torch.testing.assert_close(exact, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs(6, 40, 4, 2, 32))
    positions = torch.tensor([0, 3, 3, 17, 39, 39])
    got = row_attention(q, k, v, positions, scale=0.3)
    assert got.dtype == dtype
    want = naive(q, k, v, positions, 0.3)
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(37, 50, 4, 2, 32)
    positions = torch.randint(0, 50, (37,))
    whole = row_attention(q, k, v, positions, scale=0.2)
    for limit in (1, 4 * 50, 4 * 50 * 5):
        monkeypatch.setattr(reference, "MAX_SCORES", limit)
        torch.testing.assert_close(row_attention(q, k, v, positions, scale=0.2), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_a_poisoned_future_never_reaches_a_row(poison: float) -> None:
    q, k, v = inputs(20, 60, 4, 2, 32)
    positions = torch.randint(0, 59, (20,))
    clean = row_attention(q, k, v, positions, scale=0.2)
    k[int(positions.max()) + 1 :] = poison
    v[int(positions.max()) + 1 :] = poison
    assert torch.equal(row_attention(q, k, v, positions, scale=0.2), clean)
    # Poison in the middle: rows before it are untouched, rows that see it say so.
    middle = int(positions.median())
    k[middle + 1] = poison
    v[middle + 1] = poison
    got = row_attention(q, k, v, positions, scale=0.2)
    before = positions <= middle
    assert before.any() and (~before).any()
    torch.testing.assert_close(got[before], clean[before], rtol=0, atol=1e-6)
    if poison != -INF:
        assert not got[~before].isfinite().any()


def test_a_poisoned_value_alone_marks_only_its_head_and_dimension() -> None:
    q, k, v = inputs(4, 10, 4, 2, 32)
    positions = torch.tensor([0, 4, 5, 9])
    clean = row_attention(q, k, v, positions, scale=0.2)
    v[5, 1, 7] = NAN
    got = row_attention(q, k, v, positions, scale=0.2)
    hit = torch.zeros(4, 4, 32, dtype=torch.bool)
    hit[2:, 2:, 7] = True
    assert torch.equal(got.isnan(), hit)
    torch.testing.assert_close(got[~hit], clean[~hit], rtol=0, atol=1e-6)


def test_large_finite_values_are_not_taken_for_poison() -> None:
    q, k, v = inputs(2, 4, 1, 1, 32)
    v[:] = 3e38  # their sum overflows, each is finite
    assert row_attention(q, k, v, torch.tensor([0, 3]), scale=0.2).isfinite().all()


def test_scores_far_apart_stay_finite() -> None:
    q, k, v = inputs(3, 8, 2, 1, 32)
    assert row_attention(q * 1e4, k * 1e4, v, torch.tensor([0, 4, 7]), scale=1.0).isfinite().all()


def test_strides_do_not_matter() -> None:
    q, k, v = inputs(7, 30, 4, 2, 32)
    positions = torch.arange(0, 28, 4)
    want = row_attention(q, k, v, positions, scale=0.2)
    q2 = torch.empty(4, 7, 64).transpose(0, 1)[..., ::2].copy_(q)
    k2 = torch.empty(60, 32, 2).transpose(1, 2)[::2].copy_(k)
    v2 = torch.empty(2, 30, 32).transpose(0, 1).copy_(v)
    spread = torch.zeros(14, dtype=torch.int64)
    spread[::2] = positions
    assert torch.equal(row_attention(q2, k2, v2, spread[::2], scale=0.2), want)


def test_no_rows() -> None:
    q, k, v = inputs(0, 5, 4, 2, 32)
    assert row_attention(q, k, v, torch.empty(0).long(), scale=1.0).shape == (0, 4, 32)
    q, k, v = inputs(0, 0, 4, 2, 32)
    assert row_attention(q, k, v, torch.empty(0).long(), scale=1.0).shape == (0, 4, 32)


@pytest.mark.parametrize(
    ("q", "k", "v", "positions", "shown"),
    [
        ((2, 3, 32), (4, 2, 32), (4, 2, 32), [0, 1], r"\(2, 3, 32\) and \(4, 2, 32\)"),
        ((2, 2, 32), (4, 2, 64), (4, 2, 64), [0, 1], r"\(4, 2, 64\)"),
        ((2, 2, 32), (4, 2, 32), (3, 2, 32), [0, 1], r"\(3, 2, 32\)"),
        ((2, 2, 32), (4, 2, 32), (4, 2, 32), [0], r"\(1,\)"),
        ((2, 2, 32), (4, 2, 32), (4, 2, 32), [0, 4], r"0\.\.4"),
        ((2, 2, 32), (4, 2, 32), (4, 2, 32), [-1, 2], r"-1\.\.2"),
    ],
)
def test_a_bad_shape_or_position_is_shown(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], positions: list[int], shown: str
) -> None:
    with pytest.raises(ValueError, match=shown):
        row_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), torch.tensor(positions), scale=1.0)
