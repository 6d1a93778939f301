"""Deviation and the oracle: what deviates is found, filtering shrinks, and full prefill leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from blend.method import recompute
from blend.select import open_selector
from blend.select.deviation import gradual_sizes
from kernels.select_rows import select_rows
from tests.blend.scene import CONTEXT, LOADED, Scene, planes, rows_by_layer

ALLOWED = torch.tensor(sorted(LOADED))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def true_deviation(scene: Scene, truth: Any, on: str = "kv") -> Tensor:
    """[L, N]: squared distance of the loaded KV from transformers' own prefill of the whole prompt."""
    loaded = scene.state(0).loaded
    total = torch.zeros(4, CONTEXT)
    for name, fresh in zip("kv", truth("llama").kv(scene.prompt.token_ids), strict=True):
        if name in on:
            total += (fresh[:, :CONTEXT] - getattr(loaded, name)).square().sum(dim=(2, 3))
    return total


def chosen(scene: Scene, spec: str, budget: int) -> list[int]:
    return open_selector(spec).select(scene.state(budget)).rows.tolist()


@pytest.mark.parametrize("on", ["kv", "k", "v"])
@pytest.mark.parametrize("check", [None, "0", "2", "1|3"])
def test_rows_that_deviate_most_at_the_check_layers(scene: Scene, truth: Any, on: str, check: str | None) -> None:
    layers = [int(i) for i in (check or "1").split("|")]
    if layers == [0]:  # of its own rows, layer 0 knows no context: K and V are exact but for rounding
        assert float(true_deviation(scene, truth, on)[0, ALLOWED].max()) < 1e-6
        return
    expected = select_rows(true_deviation(scene, truth, on)[layers].sum(dim=0), 9, eligible=ALLOWED).tolist()
    assert chosen(scene, f"deviation(on={on}" + (f",check={check})" if check else ")"), 9) == expected


def test_deviation_prefers_damaged_rows(scene: Scene) -> None:
    for plane in "kv":
        made = scene.state(3)
        for row in (8, 13, 65):
            getattr(made.loaded, plane)[1, row] += 50.0
        assert open_selector("deviation").select(made).rows.tolist() == [8, 13, 65]


def test_a_threshold_takes_the_fewest_rows_that_hold_the_deviation(scene: Scene, truth: Any) -> None:
    best = true_deviation(scene, truth)[1, ALLOWED].sort(descending=True).values
    needed = int((best.cumsum(0) / best.sum() < 0.6).sum()) + 1
    assert len(chosen(scene, "deviation(threshold=0.6)", 1000)) == needed
    assert len(chosen(scene, "deviation(threshold=0.6)", needed - 1)) == needed - 1


@pytest.mark.parametrize("spec", ["deviation(filter=gradual)", "heads(rows=1)+deviation(filter=gradual)"])
@pytest.mark.parametrize("budget", [1, 4, 11, 20, 30])
def test_gradual_filtering_shrinks_and_keeps_its_mean(scene: Scene, spec: str, budget: int) -> None:
    made = scene.state(budget)
    ran = rows_by_layer(made)
    recompute(made, open_selector(spec).select(made))
    assert len(ran) == 4
    assert [len(rows) for rows in ran[:2]] == [CONTEXT, CONTEXT]
    above = [set(rows.tolist()) & LOADED for rows in ran[2:]]
    assert above[0] >= above[1]
    assert sum(map(len, above)) <= budget * 2
    assert budget < 4 or len(above[0]) > len(above[1])


def test_a_row_left_behind_is_fresh_below_and_as_stored_above(scene: Scene, truth: Any) -> None:
    made, plain = scene.state(12), scene.state(12)
    plain.loaded.finish()
    ran = rows_by_layer(made)
    picked = open_selector("deviation(filter=gradual)").select(made)
    recompute(made, picked)
    third, fourth = (set(rows.tolist()) & LOADED for rows in ran[2:])
    left = sorted(third - fourth)
    assert left, "nothing was left behind"
    assert set(picked.rows.tolist()) == third
    stored, got = planes(plain), planes(made)
    exact = truth("llama").kv(scene.prompt.token_ids)
    for mine, old, true in zip(got, stored, exact, strict=True):
        assert torch.equal(mine[3, left], old[3, left])
        assert not torch.allclose(mine[2, left], old[2, left], atol=1e-3)
        torch.testing.assert_close(mine[:2, :CONTEXT], true[:2, :CONTEXT], atol=5e-4, rtol=1e-3)


def test_each_filter_keeps_what_deviates_most_at_its_own_layer(scene: Scene) -> None:
    """Damage the stored KV of the third layer: the rows that survive it are the damaged ones."""
    made = scene.state(8)
    entered = set(open_selector("deviation(filter=gradual)").select(scene.state(8)).rows.tolist())
    weakest = sorted(entered)[:6]
    for row in weakest:
        made.loaded.v[2, row] += 100.0
    ran = rows_by_layer(made)
    open_selector("deviation(filter=gradual)").select(made)
    assert set(ran[2].tolist()) & LOADED == entered
    assert set(ran[3].tolist()) & LOADED == set(weakest)


@pytest.mark.parametrize("layers", range(1, 40))
@pytest.mark.parametrize("budget", [0, 1, 7, 100, 999])
def test_gradual_sizes_fall_around_the_budget(layers: int, budget: int) -> None:
    sizes = gradual_sizes(budget, layers)
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == layers
    assert budget - 1 <= sum(sizes) / layers <= budget


@pytest.mark.parametrize("by", ["deviation", "attention"])
def test_the_oracle_knows_full_prefill(scene: Scene, truth: Any, by: str) -> None:
    if by == "deviation":
        scores = true_deviation(scene, truth).sum(dim=0)
    else:
        k, v = (plane[:, :CONTEXT] for plane in truth("llama").kv(scene.prompt.token_ids))
        scores = truth("llama").attention(k, v, scene.prompt.token_ids[CONTEXT:])
    expected = select_rows(scores, 12, eligible=ALLOWED).tolist()
    assert chosen(scene, f"oracle(by={by})", 12) == expected
    assert expected != chosen(scene, "deviation" if by == "deviation" else "question", 12)


@pytest.mark.parametrize("spec", ["oracle", "oracle(by=attention)", "heads+oracle"])
@pytest.mark.parametrize("computed", [0, 10])
def test_the_oracle_puts_the_cache_back_byte_by_byte(scene: Scene, spec: str, computed: int) -> None:
    made = scene.state(12, computed)
    made.loaded.finish()
    before = planes(made)
    open_selector(spec).select(made)
    there = made.loaded.present.clone()
    there[:computed] = True
    for got, expected in zip(planes(made), before, strict=True):
        assert torch.equal(got[:, :CONTEXT][:, there], expected[:, :CONTEXT][:, there])


def test_the_oracle_behind_a_check_layer_keeps_what_that_made_fresh(scene: Scene, truth: Any) -> None:
    """The chosen rows go on from the check layer, so its fresh KV must survive the oracle."""
    made = scene.state(12)
    recompute(made, open_selector("deviation:0.5+oracle:0.5").select(made))
    for got, true in zip(planes(made), truth("llama").kv(scene.prompt.token_ids), strict=True):
        torch.testing.assert_close(got[:2, :CONTEXT], true[:2, :CONTEXT], atol=5e-4, rtol=1e-3)
