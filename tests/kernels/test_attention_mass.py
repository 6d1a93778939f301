"""attention_mass equals a loop, adds up to one per row and head, and ignores the future."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.attention_mass import attention_mass
from kernels.row_attention import reference


def naive(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, scale: float) -> torch.Tensor:
    out = torch.zeros(k.shape[0], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for row, position in enumerate(positions.tolist()):
        for head in range(q.shape[1]):
            keys = k[: position + 1, head // group].double()
            scores = [scale * float((q[row, head].double() * key).sum()) for key in keys]
            weights = [math.exp(s - max(scores)) for s in scores]
            for n, weight in enumerate(weights):
                out[n] += weight / sum(weights)
    return out


@pytest.mark.parametrize(
    ("rows", "keys", "q_heads", "heads", "dim"),
    [(1, 1, 2, 1, 32), (1, 129, 4, 2, 64), (5, 63, 2, 2, 80), (63, 40, 4, 1, 32), (129, 12, 2, 1, 128)],
)
def test_it_equals_the_loop(rows: int, keys: int, q_heads: int, heads: int, dim: int) -> None:
    q, k = torch.randn(rows, q_heads, dim), torch.randn(keys, heads, dim)
    positions = torch.randint(0, keys, (rows,))
    got = attention_mass(q, k, positions, scale=dim**-0.5)
    assert got.dtype == torch.float32 and got.shape == (keys,)
    torch.testing.assert_close(got.double(), naive(q, k, positions, dim**-0.5), rtol=1e-5, atol=1e-5)
    assert float(got.sum()) == pytest.approx(rows * q_heads, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_sums_in_float32(dtype: torch.dtype) -> None:
    q, k = torch.randn(4, 4, 32).to(dtype), torch.randn(20, 2, 32).to(dtype)
    positions = torch.tensor([0, 7, 7, 19])
    got = attention_mass(q, k, positions, scale=0.3)
    torch.testing.assert_close(got.double(), naive(q, k, positions, 0.3), rtol=1e-5, atol=1e-5)


def test_layers_add_up_in_one_buffer() -> None:
    positions = torch.tensor([3, 9])
    layers = [(torch.randn(2, 4, 32), torch.randn(10, 2, 32)) for _ in range(3)]
    out = torch.zeros(10)
    for q, k in layers:
        assert attention_mass(q, k, positions, scale=0.2, out=out) is out
    want = sum(attention_mass(q, k, positions, scale=0.2) for q, k in layers)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)


def test_blocks_and_strides_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(37, 4, 32), torch.randn(50, 2, 32)
    positions = torch.randint(0, 50, (37,))
    whole = attention_mass(q, k, positions, scale=0.2)
    monkeypatch.setattr(reference, "MAX_SCORES", 4 * 50 * 3)
    q2 = torch.empty(4, 37, 64).transpose(0, 1)[..., ::2].copy_(q)
    k2, out = torch.empty(32, 2, 50).permute(2, 1, 0).copy_(k), torch.zeros(100)[::2]
    torch.testing.assert_close(attention_mass(q2, k2, positions, scale=0.2, out=out), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_future_gets_no_mass_and_gives_none(poison: float) -> None:
    q, k = torch.randn(6, 4, 32), torch.randn(40, 2, 32)
    positions = torch.tensor([5, 1, 20, 20, 0, 12])
    clean = attention_mass(q, k, positions, scale=0.2)
    k[21:] = poison
    got = attention_mass(q, k, positions, scale=0.2)
    assert torch.equal(got, clean)
    assert torch.equal(got[21:], torch.zeros(19))


def test_no_rows_add_nothing() -> None:
    out = torch.ones(5)
    q, k = torch.empty(0, 4, 32), torch.randn(5, 2, 32)
    assert torch.equal(attention_mass(q, k, torch.empty(0).long(), scale=1.0, out=out), torch.ones(5))


@pytest.mark.parametrize(
    ("k", "positions", "out", "shown"),
    [
        ((5, 3, 32), [0, 1], None, r"\(5, 3, 32\)"),
        ((5, 2, 32), [0, 5], None, r"0\.\.5"),
        ((5, 2, 32), [0, 1], torch.zeros(4), r"\(4,\)"),
        ((5, 2, 32), [0, 1], torch.zeros(5).double(), "float64"),
    ],
)
def test_a_bad_shape_is_shown(k: tuple[int, ...], positions: list[int], out: torch.Tensor | None, shown: str) -> None:
    with pytest.raises(ValueError, match=shown):
        attention_mass(torch.zeros(2, 4, 32), torch.zeros(k), torch.tensor(positions), scale=1.0, out=out)
