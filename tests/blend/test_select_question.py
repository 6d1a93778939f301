"""What the question attends to, and every option of asking it, against an independent truth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from blend.method import recompute
from blend.model import Observed
from blend.select import open_selector
from blend.select.alone import alone
from blend.select.base import no_rows
from blend.select.probe import probe
from blend.select.question import anchor_rows
from kernels.select_rows import select_rows
from tests.blend.scene import CONTEXT, LOADED, MISSING, QUESTION, SIZES, Scene, planes, rows_by_layer

ALLOWED = torch.tensor(sorted(LOADED))
CHUNKS = {1: range(6, 26), 2: range(26, 27), 4: range(60, 72)}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def chosen(scene: Scene, spec: str, budget: int) -> list[int]:
    return open_selector(spec).select(scene.state(budget)).rows.tolist()


def test_the_probe_gives_the_attention_of_the_question(scene: Scene) -> None:
    """Every head of every question row hands out a mass of one per layer; what the context gets is at most that."""
    mass = probe(scene.state(10), no_rows())
    assert mass.shape == (CONTEXT,)
    assert bool((mass >= 0).all())
    assert 0 < float(mass.sum()) <= QUESTION * 4 * 4


def test_the_probe_is_the_attention_that_transformers_computes(scene: Scene, truth: Any) -> None:
    made = scene.state(10)
    made.walk(made.loaded.missing_rows)
    k, v = (plane[:, :CONTEXT] for plane in planes(made))
    made.loaded.k[:, made.loaded.missing_rows] = k[:, made.loaded.missing_rows]
    expected = truth("llama").attention(k, v, scene.prompt.token_ids[CONTEXT:])
    torch.testing.assert_close(probe(made, no_rows()), expected, atol=1e-3, rtol=1e-3)


def test_repairing_in_the_walk_of_the_probe_is_repairing_before_it(scene: Scene) -> None:
    """Missing rows and chunk heads: their fresh keys count, not the stored ones."""
    together, before = scene.state(10), scene.state(10)
    repair = torch.cat([together.loaded.missing_rows, torch.tensor([6, 60])]).unique()
    mass = probe(together, repair)

    def keep(layer: int, seen: Observed) -> None:
        before.loaded.k[layer, repair] = seen.k

    before.walk(repair, watch=keep)
    torch.testing.assert_close(mass, probe(before, no_rows()), atol=1e-5, rtol=1e-4)
    unrepaired = probe(scene.state(10), no_rows())
    assert not torch.allclose(mass, unrepaired, atol=1e-3), "the repair changes nothing here; this test shows nothing"


def test_the_probe_leaves_no_trace(scene: Scene) -> None:
    made = scene.state(10)
    made.loaded.finish()
    before = planes(made)
    probe(made, no_rows())
    for got, expected in zip(planes(made), before, strict=True):
        assert torch.equal(got[:, :CONTEXT], expected[:, :CONTEXT])


def test_the_mass_of_single_layers_adds_up_to_that_of_all(scene: Scene) -> None:
    missing = scene.state(10).loaded.missing_rows
    single = [probe(scene.state(10), missing, layers=frozenset({i})) for i in range(4)]
    torch.testing.assert_close(torch.stack(single).sum(dim=0), probe(scene.state(10), missing), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("layers", "deepest"), [("all", 3), ("lower", 1), ("0", 0), ("0|2", 2), ("last", 3)])
def test_the_probe_stops_after_the_deepest_layer_that_counts(scene: Scene, layers: str, deepest: int) -> None:
    made = scene.state(10)
    ran = rows_by_layer(made)
    open_selector(f"question(layers={layers})").select(made)
    assert len(ran) == deepest + 1


def test_anchors_share_the_softmax_among_themselves(scene: Scene) -> None:
    """By hand, with what the layers saw: rows that are no anchors are not in the sum."""
    made, other = scene.state(10), scene.state(10)
    missing, question = made.loaded.missing_rows, made.question_rows
    among = anchor_rows(made, 0.3, frozenset({1, 2}))
    mass = probe(made, missing, layers=frozenset({1, 2}), among=among)
    there = among.clone()
    there[missing] = True
    expected = torch.zeros(CONTEXT)

    def by_hand(layer: int, seen: Observed) -> None:
        if layer not in (1, 2):
            return
        keys = torch.cat([other.loaded.k[layer].clone(), seen.k[len(missing) :]])
        keys[missing] = seen.k[: len(missing)]
        for r in range(QUESTION):
            rows = [*there.nonzero().flatten().tolist(), *question[: r + 1].tolist()]
            for head in range(4):
                q = seen.q[len(missing) + r, head]
                weights = (keys[rows, head // 2] @ q * 32**-0.5).softmax(dim=0)
                expected[rows[: -r - 1]] += weights[: -r - 1]

    other.walk(torch.cat([missing, question]), watch=by_hand)
    torch.testing.assert_close(mass, expected, atol=1e-4, rtol=1e-4)
    assert bool((mass[~there] == 0).all())


def test_anchors_are_the_smallest_keys_of_each_chunk_and_its_head(scene: Scene) -> None:
    made = scene.state(10)
    norms = made.loaded.k[1:3].double().norm(dim=-1).sum(dim=(0, 2))
    anchors = anchor_rows(made, 0.3, frozenset({1, 2}))
    expected = set(range(6))
    for rows in CHUNKS.values():
        best = sorted(rows, key=lambda row: float(norms[row]))[: -(-3 * len(rows) // 10)]
        expected |= {rows[0], *best}
    assert set(anchors.nonzero().flatten().tolist()) == expected
    assert set(chosen(scene, "question(anchors=0.3,layers=1-2)", 100)) <= expected
    assert anchor_rows(made, 1.0, frozenset({0})).tolist() == made.loaded.present.tolist()


def test_the_question_alone_is_what_transformers_says(scene: Scene, truth: Any) -> None:
    """Its hidden states behind the prefix, its queries at their true places, the last layer's stored keys."""
    net = truth("llama").net.model
    inputs: list[Tensor] = []
    hook = net.layers[-1].self_attn.q_proj.register_forward_hook(lambda _, __, out: inputs.append(out))
    question = torch.tensor(scene.prompt.token_ids[CONTEXT:])
    prefix = torch.tensor(scene.prompt.token_ids[: SIZES[0]])
    net(torch.cat([prefix, question])[None])
    hook.remove()
    q = inputs[0][:, len(prefix) :].view(1, QUESTION, 4, 32).transpose(1, 2)
    places = torch.arange(CONTEXT, CONTEXT + QUESTION)[None]
    q, _ = apply_rotary_pos_emb(q, q, *net.rotary_emb(q, places))
    made = scene.state(10)
    rows = made.loaded.present.nonzero().flatten()
    keys = made.loaded.k[-1, rows].repeat_interleave(2, dim=1)  # [N, Hq, D]
    expected = torch.zeros(CONTEXT)
    expected[rows] = (torch.einsum("hqd,nhd->hqn", q[0], keys) * 32**-0.5).softmax(dim=-1).sum(dim=(0, 1))
    before = planes(made)
    torch.testing.assert_close(alone(made), expected, atol=2e-4, rtol=1e-3)
    for got, then in zip(planes(made), before, strict=True):
        assert torch.equal(got[:, rows], then[:, rows])
    picked = select_rows(expected, 10, eligible=ALLOWED).tolist()
    assert chosen(scene, "question(fast=true)", 10) == picked
    assert picked != chosen(scene, "question(layers=last)", 10), "context makes no difference here"


def test_the_question_alone_costs_no_context_rows(scene: Scene) -> None:
    made = scene.state(10)
    alone(made)
    assert made.row_layers == 0


def test_the_question_alone_behind_a_missing_prefix_computes_it(scene: Scene) -> None:
    there, lost = scene.state(10), scene.state(10)
    expected = alone(there)
    for plane in (lost.model.cache.k, lost.model.cache.v):  # type: ignore[attr-defined]
        plane[:, :, :6] = 7.0
    lost.loaded.k[:, :6] = lost.loaded.v[:, :6] = float("nan")
    lost.loaded.present[:6] = False
    lost.loaded.missing_rows = torch.cat([torch.arange(6), lost.loaded.missing_rows])
    got = alone(lost)
    assert lost.row_layers == 6 * 4
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_the_question_alone_behind_a_check_layer_keeps_what_that_made_fresh(scene: Scene) -> None:
    """It runs in the place of missing rows here, which go on from the check layer: their fresh KV must come back."""
    made, plain = scene.state(8, computed=24), scene.state(8, computed=24)
    recompute(made, open_selector("deviation:0.5+question(fast=true):0.5").select(made))
    plain.walk(torch.arange(24, CONTEXT + QUESTION))
    for got, expected in zip(planes(made), planes(plain), strict=True):
        torch.testing.assert_close(got[:2], expected[:2], atol=1e-5, rtol=1e-4)


def test_a_second_round_asks_again_with_the_first_half_repaired(scene: Scene) -> None:
    first = torch.tensor(chosen(scene, "question", 5))
    made = scene.state(10)
    mass = probe(made, torch.cat([made.loaded.missing_rows, first]).unique())
    expected = select_rows(mass, 10, forced=first, eligible=ALLOWED).tolist()
    assert chosen(scene, "question(rounds=2)", 10) == expected
    assert any(chosen(scene, "question(rounds=2)", b) != chosen(scene, "question", b) for b in (4, 8, 12, 16, 20))


def test_rows_of_earlier_parts_are_repaired_before_the_question_is_asked(scene: Scene) -> None:
    made = scene.state(10)
    heads = torch.tensor([6, 26, 60])
    mass = probe(made, torch.cat([made.loaded.missing_rows, heads]).unique())
    expected = select_rows(mass, 10, forced=heads, eligible=ALLOWED).tolist()
    assert chosen(scene, "heads(rows=1)+question", 10) == expected


def test_a_threshold_takes_the_fewest_rows_that_hold_the_mass(scene: Scene) -> None:
    made = scene.state(10)
    mass = probe(made, made.loaded.missing_rows)[ALLOWED]
    best = mass.sort(descending=True).values.cumsum(0) / mass.sum()
    for part in (0.2, 0.5, 0.8):
        needed = int((best < part).sum()) + 1
        assert len(chosen(scene, f"question(threshold={part})", 1000)) == needed
        assert len(chosen(scene, f"question(threshold={part})", 3)) == min(3, needed)


def test_chunk_budgets_keep_a_quiet_chunk_in(scene: Scene) -> None:
    """Make one chunk's keys loud: one budget for all goes there, chunk budgets leave the other its part."""
    rows = {}
    for spec in ("question", "question(budget=chunks)"):
        made = scene.state(12)
        made.loaded.k[:, 60:72] *= 3
        for layer in range(4):
            made.model.write_kv(layer, torch.arange(60, 72), made.loaded.k[layer, 60:72], made.loaded.v[layer, 60:72])
        picked = open_selector(spec).select(made).rows.tolist()
        rows[spec] = [sum(row in chunk for row in picked) for chunk in CHUNKS.values()]
    assert sum(rows["question"]) == sum(rows["question(budget=chunks)"]) == 12
    assert rows["question(budget=chunks)"][0] > rows["question"][0]
    assert MISSING not in CHUNKS


def test_keep_leaves_what_knows_more_than_the_prompt_alone(scene: Scene) -> None:
    segments = [replace(s, lacking=s.name == "4") for s in scene.prompt.segments]
    scene.prompt = replace(scene.prompt, segments=tuple(segments))
    everything, kept = chosen(scene, "question", 30), chosen(scene, "question(keep=true)", 30)
    assert set(everything) & set(CHUNKS[4])
    assert set(kept) == {*CHUNKS[1], *CHUNKS[2]}  # what is left of the budget stays unspent
