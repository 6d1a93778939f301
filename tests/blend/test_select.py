"""Selectors choose within their budget, among what they may choose, the same rows every time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from blend.engines.transformers.model import RowModel
from blend.errors import UnknownSelectorError
from blend.load import load
from blend.method import Blend, blend, compile_chunks
from blend.model import Observed
from blend.select import NAMES, open_selector
from blend.select.base import eligible, no_rows
from blend.select.question import probe
from blend.types import BlendOptions, CompileJob, Prompt, Segment
from store import ChunkKV, KVKey, MemoryStore

SIZES = (6, 20, 1, 33, 12)  # the first is the prefix
MISSING = 3


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def scene(weights: Any) -> tuple[Prompt, MemoryStore]:
    """A prefix and four chunks, one of which is not in the store."""
    generator = torch.Generator().manual_seed(5)
    store, ids, segments = MemoryStore(), [], []
    for i, size in enumerate(SIZES):
        chunk = tuple(torch.randint(6, 250, (size,), generator=generator).tolist())
        key = KVKey(bytes([i]) * 32)
        with torch.no_grad():
            job = CompileJob("job", () if i == 0 else (1, 3), (chunk,), (key,), (b"s" * 32,))
            ((k, v),) = compile_chunks(RowModel(weights(), job.tokens), job)
        if i != MISSING:
            store.put(ChunkKV(key, weights().layout, chunk, k, v, len(job.context), b"s" * 32, "tok"))
        kind = "prefix" if i == 0 else "chunk"
        segments.append(Segment(kind, len(ids), len(ids) + size, key, b"s" * 32, str(i)))
        ids += chunk
    segments.append(Segment("question", len(ids), len(ids) + 7))
    return Prompt((*ids, 1, 2, 3, 50, 60, 70, 80), tuple(segments)), store


def state(weights: Any, scene: tuple[Prompt, MemoryStore], budget: int, computed: int = 0) -> Blend:
    prompt, store = scene
    model = RowModel(weights(), len(prompt.token_ids))
    loaded = load(model, prompt, store, tokenizer="tok", computed=computed)
    return Blend(model, prompt, loaded, computed, len(prompt.token_ids), budget)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("all", "none")])
@pytest.mark.parametrize("budget", [0, 1, 2, 5, 17, 38, 1000])
@pytest.mark.parametrize("computed", [0, 10])
def test_selected_rows_are_eligible_sorted_and_within_budget(
    weights: Any, scene: tuple[Prompt, MemoryStore], name: str, budget: int, computed: int
) -> None:
    made = state(weights, scene, budget, computed)
    allowed = set(eligible(made).nonzero().flatten().tolist())
    rows = open_selector(name).select(made).rows.tolist()
    assert rows == sorted(set(rows))
    assert set(rows) <= allowed
    assert len(rows) == min(budget, len(allowed))


def test_what_may_be_chosen_is_what_was_loaded_and_is_not_exact_already(
    weights: Any, scene: tuple[Prompt, MemoryStore]
) -> None:
    rows = set(eligible(state(weights, scene, 5, computed=10)).nonzero().flatten().tolist())
    prefix, missing = range(6), range(27, 60)
    assert rows == set(range(72)) - set(prefix) - set(missing) - set(range(10))


def test_none_and_all(weights: Any, scene: tuple[Prompt, MemoryStore]) -> None:
    assert open_selector("none").select(state(weights, scene, 30)).rows.tolist() == []
    assert open_selector("all").select(state(weights, scene, 72, computed=4)).rows.tolist() == list(range(4, 72))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_request_selects_the_same_rows(weights: Any, scene: tuple[Prompt, MemoryStore], name: str) -> None:
    runs = [open_selector(name).select(state(weights, scene, 15)).rows.tolist() for _ in range(2)]
    assert runs[0] == runs[1]


def test_heads_are_taken_evenly_over_the_chunks(weights: Any, scene: tuple[Prompt, MemoryStore]) -> None:
    def chosen(budget: int) -> list[int]:
        return open_selector("heads").select(state(weights, scene, budget)).rows.tolist()

    assert chosen(3) == [6, 26, 60]
    assert chosen(5) == [6, 7, 26, 60, 61]  # the chunk of one row has no second


def test_deviation_prefers_damaged_rows(weights: Any, scene: tuple[Prompt, MemoryStore]) -> None:
    made = state(weights, scene, 3)
    for row in (8, 13, 65):
        made.loaded.k[1, row] += 50.0
    assert open_selector("deviation").select(made).rows.tolist() == [8, 13, 65]


def test_the_probe_gives_the_attention_of_the_question(weights: Any, scene: tuple[Prompt, MemoryStore]) -> None:
    """Every head of every question row hands out a mass of one per layer; what the context gets is at most that."""
    made = state(weights, scene, 10)
    mass = probe(made, no_rows())
    assert mass.shape == (72,)
    assert bool((mass >= 0).all())
    assert 0 < float(mass.sum()) <= 7 * 4 * 4


def test_the_probe_is_the_attention_that_transformers_computes(
    weights: Any, truth: Any, scene: tuple[Prompt, MemoryStore]
) -> None:
    made = state(weights, scene, 10)
    made.walk(made.loaded.missing_rows)
    made.loaded.k[:, made.loaded.missing_rows] = made.model.cache.k.transpose(1, 2)[:, made.loaded.missing_rows]  # type: ignore[attr-defined]
    k, v = (x.transpose(1, 2)[:, :72].clone() for x in (made.model.cache.k, made.model.cache.v))  # type: ignore[attr-defined]
    expected = truth("llama").attention(k, v, scene[0].token_ids[72:])
    torch.testing.assert_close(probe(made, no_rows()), expected, atol=1e-3, rtol=1e-3)


def test_repairing_in_the_walk_of_the_probe_is_repairing_before_it(
    weights: Any, scene: tuple[Prompt, MemoryStore]
) -> None:
    """Missing rows and chunk heads: their fresh keys count, not the stored ones."""
    together, before = state(weights, scene, 10), state(weights, scene, 10)
    repair = torch.cat([together.loaded.missing_rows, torch.tensor([6, 60])]).unique()
    mass = probe(together, repair)

    def keep(layer: int, seen: Observed) -> None:
        before.loaded.k[layer, repair] = seen.k

    before.walk(repair, watch=keep)
    torch.testing.assert_close(mass, probe(before, no_rows()), atol=1e-5, rtol=1e-4)
    unrepaired = probe(state(weights, scene, 10), no_rows())
    assert not torch.allclose(mass, unrepaired, atol=1e-3), "the repair changes nothing here; this test shows nothing"


def test_the_probe_leaves_no_trace(weights: Any, scene: tuple[Prompt, MemoryStore]) -> None:
    made = state(weights, scene, 10)
    k = made.model.cache.k[:, :, :72].clone()  # type: ignore[attr-defined]
    probe(made, no_rows())
    assert torch.equal(made.model.cache.k[:, :, :72], k)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_accounting_counts_what_was_selected(weights: Any, scene: tuple[Prompt, MemoryStore], name: str) -> None:
    prompt, store = scene
    model = RowModel(weights(), len(prompt.token_ids))
    stats = blend(model, prompt, BlendOptions("blend", name, 0.25), store, tokenizer="tok")
    assert stats.selector == name
    assert stats.missing == 33
    assert stats.recomputed == {"none": 0, "all": 39}.get(name, 18)
    assert [c.missing for c in stats.chunks] == [0, 0, 0, 33, 0]


def test_rows_that_the_engine_already_has_are_reused_even_of_a_chunk_that_is_missing(
    weights: Any, scene: tuple[Prompt, MemoryStore]
) -> None:
    prompt, store = scene
    model = RowModel(weights(), len(prompt.token_ids))
    stats = blend(model, prompt, BlendOptions("blend", "heads", 0.1), store, tokenizer="tok", computed=40)
    assert (stats.missing, stats.recomputed, stats.reused) == (20, 7, 45)
    assert [(c.missing, c.reused) for c in stats.chunks] == [(0, 6), (0, 20), (0, 1), (20, 13), (0, 5)]


def test_an_unknown_selector_lists_the_choices() -> None:
    with pytest.raises(UnknownSelectorError, match=r"'best'.*auto, none, all, deviation"):
        open_selector("best")
