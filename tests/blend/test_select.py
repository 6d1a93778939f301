"""Selectors choose within their budget, among what they may choose, the same rows every time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from blend.engines.transformers.model import RowModel
from blend.errors import UnknownSelectorError
from blend.load import load
from blend.method import Blend, blend, recompute
from blend.select import NAMES, open_selector
from blend.select.base import eligible
from blend.types import BlendOptions
from tests.blend.scene import CONTEXT, LOADED, PARTIAL, SPECS, WHOLE, Scene, planes, rows_by_layer

CHOOSING = [*(n for n in NAMES if n not in ("all", "none")), *SPECS]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("spec", CHOOSING)
@pytest.mark.parametrize(("budget", "computed"), [(0, 0), (1, 0), (2, 10), (5, 0), (16, 10), (31, 0), (1000, 10)])
def test_selected_rows_are_eligible_sorted_and_within_budget(
    scene: Scene, spec: str, budget: int, computed: int
) -> None:
    state = scene.state(budget, computed)
    allowed = {row for row in LOADED if row >= computed}
    rows = open_selector(spec).select(state).rows.tolist()
    assert rows == sorted(set(rows))
    assert set(rows) <= allowed
    if "gradual" in spec:  # its budget is a mean over layers: test_select_deviation.py
        assert len(rows) <= 1.25 * budget
    elif spec in PARTIAL:
        assert len(rows) <= budget
    else:
        assert len(rows) == min(budget, len(allowed))


def test_what_may_be_chosen_is_what_was_loaded_and_is_not_exact_already(scene: Scene) -> None:
    state = scene.state(5, computed=10)
    rows = set(eligible(state, torch.tensor([11, 70])).nonzero().flatten().tolist())
    assert rows == {row for row in LOADED if row >= 10} - {11, 70}


def test_none_and_all(scene: Scene) -> None:
    assert open_selector("none").select(scene.state(30)).rows.tolist() == []
    assert open_selector("all").select(scene.state(72, computed=4)).rows.tolist() == list(range(4, 72))


@pytest.mark.parametrize("spec", [*NAMES, *SPECS])
def test_the_same_request_selects_the_same_rows(scene: Scene, spec: str) -> None:
    runs = [open_selector(spec).select(scene.state(15)).rows.tolist() for _ in range(2)]
    assert runs[0] == runs[1]


def test_selectors_differ(scene: Scene) -> None:
    """Options that change nothing would pass every other test here."""
    specs = [s for s in CHOOSING if s not in ("auto", "oracle")]  # oracle is in NAMES and in SPECS
    chosen = {spec: tuple(open_selector(spec).select(scene.state(15)).rows.tolist()) for spec in specs}
    same = [(a, b) for a in chosen for b in chosen if a < b and chosen[a] == chosen[b]]
    assert not same


def test_heads_are_taken_evenly_over_the_chunks(scene: Scene) -> None:
    def chosen(spec: str, budget: int) -> list[int]:
        return open_selector(spec).select(scene.state(budget)).rows.tolist()

    assert chosen("heads", 3) == [6, 26, 60]
    assert chosen("heads", 5) == [6, 7, 26, 60, 61]  # the chunk of one row has no second
    assert chosen("heads(rows=2)", 30) == [6, 7, 26, 60, 61]
    assert chosen("heads(rows=1):0.5+heads(rows=2):0.5", 8) == [6, 7, 26, 60, 61]


def test_random_rows_follow_the_seed(scene: Scene) -> None:
    runs = [open_selector(f"random(seed={i})").select(scene.state(15)).rows.tolist() for i in range(8)]
    assert len({tuple(r) for r in runs}) == 8


@pytest.mark.parametrize("spec", [s for s in WHOLE if "rows=" not in s] + ["heads", "auto", "deviation", "question"])
def test_a_budget_for_every_row_is_full_prefill(scene: Scene, truth: Any, spec: str) -> None:
    """Not the short cut of ratio 1: the selector runs and its rows, with the missing ones, are all that is wrong."""
    state = scene.state(1000 if "gradual" in spec else len(LOADED))
    recompute(state, open_selector(spec).select(state))
    for got, expected in zip(planes(state), truth("llama").kv(scene.prompt.token_ids), strict=True):
        torch.testing.assert_close(got, expected, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("spec", [s for s in CHOOSING if "deviation" not in s or s.startswith("oracle(")])
@pytest.mark.parametrize("computed", [0, 10])
def test_choosing_leaves_nothing_behind(scene: Scene, spec: str, computed: int) -> None:
    """Probes, rounds, the question alone and a full prefill: afterwards only the chosen rows are not as loaded."""
    state, plain = scene.state(20, computed), scene.state(20, computed)
    chosen = open_selector(spec).select(state)
    recompute(state, chosen)
    plain.walk(torch.cat([plain.loaded.missing_rows, chosen.rows, plain.question_rows]).unique())
    for got, expected in zip(planes(state), planes(plain), strict=True):
        kept = torch.ones(len(scene.prompt.token_ids), dtype=torch.bool)
        kept[torch.cat([state.loaded.missing_rows, chosen.rows, state.question_rows])] = False
        assert torch.equal(got[:, kept], expected[:, kept])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spec", [*NAMES, *SPECS])
@pytest.mark.parametrize("computed", [0, 10])
def test_rows_below_computed_are_never_touched(scene: Scene, spec: str, computed: int) -> None:
    state = scene.state(25, computed)
    recompute(state, open_selector(spec).select(state))
    k, v = planes(state)
    assert bool((k[:, :computed] == 0.25).all())
    assert bool((v[:, :computed] == 0.5).all())


@pytest.mark.parametrize("spec", [*NAMES, *SPECS])
def test_accounting_counts_what_was_selected(scene: Scene, spec: str) -> None:
    model = RowModel(scene.weights, len(scene.prompt.token_ids))
    stats = blend(model, scene.prompt, BlendOptions("blend", spec, 0.25), scene.store, tokenizer="tok")
    assert stats.selector == spec
    assert stats.missing == 33
    if spec not in PARTIAL:
        first = 22 if spec == "deviation(filter=gradual)" else 18  # 1.25 x 18 rows enter its first layer
        assert "rows=3" in spec or stats.recomputed == {"none": 0, "all": 39}.get(spec, first)
    assert [c.missing for c in stats.chunks] == [0, 0, 0, 33, 0]


@pytest.mark.parametrize("spec", [*NAMES, *SPECS])
def test_the_computed_share_is_what_the_model_ran(scene: Scene, spec: str) -> None:
    state = scene.state(18, computed=3)
    watched = rows_by_layer(state)
    recompute(state, open_selector(spec).select(state))
    ran = sum(len(rows) for rows in watched)
    if "fast" in spec:
        ran -= 7 * 4  # the question, on rows of the context
    assert state.row_layers == ran
    assert state.row_layers >= (33 if spec != "all" else 69) * 4


def test_the_computed_share_is_the_cost_against_full_prefill(scene: Scene) -> None:
    def share(spec: str, ratio: float = 0.25, computed: int = 0) -> float:
        model = RowModel(scene.weights, len(scene.prompt.token_ids))
        options = BlendOptions("blend", spec, ratio)
        stats = blend(model, scene.prompt, options, scene.store, tokenizer="tok", computed=computed)
        return stats.computed_share * CONTEXT

    assert share("heads", 1.0) == pytest.approx(72)
    assert share("heads", 1.0, computed=10) == pytest.approx(62)
    assert share("none") == pytest.approx(33)
    assert share("heads") == pytest.approx(33 + 18)
    assert share("question") == pytest.approx(33 + 33 + 18)  # the missing rows run in the probe and again
    assert share("deviation") == pytest.approx((2 * 72 + 2 * (33 + 18)) / 4)
    assert share("oracle") == pytest.approx(72 + 33 + 18)


def test_rows_that_the_engine_already_has_are_reused_even_of_a_chunk_that_is_missing(scene: Scene) -> None:
    model = RowModel(scene.weights, len(scene.prompt.token_ids))
    options = BlendOptions("blend", "heads", 0.1)
    stats = blend(model, scene.prompt, options, scene.store, tokenizer="tok", computed=40)
    assert (stats.missing, stats.recomputed, stats.reused) == (20, 7, 45)
    assert [(c.missing, c.reused) for c in stats.chunks] == [(0, 6), (0, 20), (0, 1), (20, 13), (0, 5)]


@pytest.mark.parametrize("spec", [*NAMES, *SPECS])
def test_a_question_that_the_engine_computes_itself_is_no_error(scene: Scene, spec: str) -> None:
    """vLLM computes the last row: of a question of one token, nothing is left to ask with."""
    model = RowModel(scene.weights, len(scene.prompt.token_ids))
    loaded = load(model, scene.prompt, scene.store, tokenizer="tok")
    state = Blend(model, scene.prompt, loaded, 0, CONTEXT, 10)
    recompute(state, open_selector(spec).select(state))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_a_bad_selector_is_an_error_at_every_ratio(scene: Scene, ratio: float) -> None:
    model = RowModel(scene.weights, len(scene.prompt.token_ids))
    for spec in ("best", "question(layers=4)"):
        with pytest.raises(UnknownSelectorError):
            blend(model, scene.prompt, BlendOptions("blend", spec, ratio), scene.store, tokenizer="tok")
