"""The ten invariants of the design, on every engine (row by row in test_rows.py, under the same numbers)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from blend.keys import KeyMaker
from blend.select import NAMES
from tests.blend.served import OTHER_TENANT, TENANT, Served
from tests.blend.tiny import sentence

COMBINED = (
    "heads(rows=1):0.3+deviation(filter=gradual,check=0|1)",
    "deviation:0.5+question(fast=true):0.5",
    "question(rounds=2,layers=1-2,anchors=0.4,pool=1,budget=chunks)",
    "question(fast=true)",
)
TEXTS = [sentence(i, words) for i, words in enumerate((14, 9, 22, 5, 17, 11))]


@pytest.fixture
def refs(engine: Served) -> list[Any]:
    return engine.document(*TEXTS)


# 1 -------------------------------------------------------------------------------------------------------------------


def test_1_recomputing_everything_is_full_prefill(any_engine: Served, truth: Callable[[str], Any]) -> None:
    prompt = any_engine.prompt(any_engine.document(*TEXTS))
    full = any_engine.ask(prompt, "full")
    blended = any_engine.ask(prompt, "blend", ratio=1.0)
    assert full.tokens == truth(any_engine.kind).greedy(prompt.token_ids, 6)
    assert blended.distance(full) <= any_engine.tolerance
    assert blended.stats.recomputed == prompt.context_tokens


def test_1_in_any_order_and_number_of_chunks(engine: Served, refs: list[Any]) -> None:
    orders = [refs[:1], refs[::-1], refs[1:4], *([refs[i] for i in p] for p in itertools.permutations((0, 2, 5)))]
    for order in orders:
        prompt = engine.prompt(order)
        assert engine.ask(prompt, "blend", ratio=1.0).distance(engine.ask(prompt, "full")) <= engine.tolerance


@pytest.mark.parametrize("selector", NAMES)
def test_1_with_every_selector(engine: Served, refs: list[Any], selector: str) -> None:
    prompt = engine.prompt([refs[3], refs[0], refs[4]])
    blended = engine.ask(prompt, "blend", ratio=1.0, selector=selector)
    assert blended.distance(engine.ask(prompt, "full")) <= engine.tolerance


def test_1_has_teeth_because_plain_reuse_is_not_full_prefill(engine: Served, refs: list[Any]) -> None:
    prompt = engine.prompt(refs[::-1])
    full, reused = engine.ask(prompt, "full", tokens=1), engine.ask(prompt, "reuse", tokens=1)
    assert reused.tokens != full.tokens or reused.distance(full) > 20 * engine.tolerance


# 2 -------------------------------------------------------------------------------------------------------------------


def test_2_a_chunk_at_its_compiled_place_is_exact(any_engine: Served) -> None:
    first, *_ = any_engine.document(*TEXTS)
    prompt = any_engine.prompt([first])
    reused = any_engine.ask(prompt, "reuse")
    assert reused.stats.reused == prompt.context_tokens
    assert reused.distance(any_engine.ask(prompt, "full")) <= any_engine.tolerance


def test_2_a_whole_document_in_reading_order_is_exact(any_engine: Served) -> None:
    refs = any_engine.document(*TEXTS, context="document", name="whole")
    prompt = any_engine.prompt(refs)
    reused = any_engine.ask(prompt, "reuse")
    assert reused.stats.reused == prompt.context_tokens
    assert reused.distance(any_engine.ask(prompt, "full")) <= any_engine.tolerance


# 3 is about rows: test_rows.py. What a client sees of it: ------------------------------------------------------------


def test_3_what_comes_later_changes_nothing_earlier(engine: Served, refs: list[Any]) -> None:
    """Chunks stored by a compile do not depend on the chunks compiled after them."""
    short, long = (
        engine.document(*TEXTS[:2], context="document", name="s"),
        engine.document(*TEXTS, context="document", name="l"),
    )
    assert [r.key for r in short] == [r.key for r in long[:2]]
    prompt = engine.prompt(short)
    assert engine.ask(prompt, "reuse").distance(engine.ask(prompt, "full")) <= engine.tolerance


# 4 -------------------------------------------------------------------------------------------------------------------


def test_4_a_moved_chunk_has_the_keys_of_its_new_place(any_engine: Served, truth: Callable[[str], Any]) -> None:
    """Layer-0 K depends on nothing but token and position, so it must equal transformers' K there."""
    refs = any_engine.document(*TEXTS)
    prompt = any_engine.prompt([refs[5], refs[2], refs[0]])
    k, _ = any_engine.fused(prompt)
    expected, _ = truth(any_engine.kind).kv(prompt.token_ids[: prompt.context_tokens])
    torch.testing.assert_close(k[0], expected[0], atol=5e-4, rtol=1e-4)


# 5 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["Who built it?", "When was the tower painted, and by whom?", "?"])
def test_5_the_question_is_computed_on_the_fused_cache(
    any_engine: Served, truth: Callable[[str], Any], question: str
) -> None:
    """Plain reuse equals transformers prefilling the question over a cache made by hand from the stored chunks."""
    refs = any_engine.document(*TEXTS)
    prompt = any_engine.prompt([refs[4], refs[1], refs[3]], question)
    reused = any_engine.ask(prompt, "reuse", tokens=1)
    ids = prompt.token_ids[prompt.question.start :]
    expected, _ = truth(any_engine.kind).over(*any_engine.fused(prompt), ids)
    assert reused.tokens == [int(expected[-1].argmax())]
    for token, value in reused.top[0].items():
        assert value == pytest.approx(float(expected[-1, token]), abs=any_engine.tolerance)


def test_5_asking_stores_nothing(engine: Served, refs: list[Any]) -> None:
    before = {e.key for e in engine.engine.store.entries()}
    for question in ("Who?", "Where was the letter written?"):
        for mode in ("full", "reuse", "blend", "auto"):
            engine.ask(engine.prompt(refs[:3], question), mode, ratio=0.2)
    assert {e.key for e in engine.engine.store.entries()} == before


# 6 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "reuse", "blend", "auto"])
@pytest.mark.parametrize("kinds", ["", "c", "m", "ccc", "cmc", "mmc", "ccmm", "cc=", "mm="])
def test_6_every_context_row_is_accounted_for(engine: Served, refs: list[Any], mode: str, kinds: str) -> None:
    """``c`` a compiled chunk, ``m`` one that was never compiled, ``=`` the one before once more."""
    lost = engine.document(*(sentence(100 + i, 15) for i in range(4)), name=f"lost-{mode}-{kinds}", compiled=False)
    order: list[Any] = []
    for i, kind in enumerate(kinds):
        order.append({"c": refs[i], "m": lost[i % 4]}[kind] if kind != "=" else order[-1])
    prompt = engine.prompt(order, f"Who, {mode} {kinds}?")
    stats = engine.ask(prompt, mode, ratio=0.25, tokens=1).stats
    assert stats.tokens == prompt.context_tokens == stats.reused + stats.recomputed + stats.missing
    assert [(c.name, c.tokens) for c in stats.chunks] == [(s.name, s.tokens) for s in prompt.segments[:-1]]
    for c in stats.chunks:
        assert c.reused + c.recomputed + c.missing == c.tokens
    for field in ("reused", "recomputed", "missing"):
        assert sum(getattr(c, field) for c in stats.chunks) == getattr(stats, field)
    if stats.mode == "full":
        assert stats.missing == 0
        return
    assert stats.mode == ("reuse" if mode == "reuse" else "blend")
    for c, s in zip(stats.chunks, prompt.segments, strict=False):
        gone = s.key in {r.key for r in lost}
        assert (c.missing, c.miss_reason) == ((c.tokens, "never_precomputed") if gone else (0, None))
        assert (c.tier is None) == gone
    assert stats.recomputed <= int(0.25 * prompt.context_tokens)


def test_6_auto_says_why_it_did_not_blend(engine: Served, refs: list[Any]) -> None:
    lost = engine.document(*(sentence(200 + i, 30) for i in range(3)), name="unknown", compiled=False)
    assert engine.ask(engine.prompt(lost), "auto", tokens=1).stats.why == "no chunk is in the store"
    assert "below 64" in str(engine.ask(engine.prompt(refs[3:4]), "auto", tokens=1).stats.why)
    blended = engine.ask(engine.prompt([*lost, refs[0]]), "auto", ratio=0.1, tokens=1).stats
    assert (blended.mode, blended.why) == ("blend", None)


def test_6_plain_chat_has_no_context(engine: Served) -> None:
    prompt = engine.layout.plain([{"role": "user", "content": "Hello, who are you?"}])
    for mode in ("full", "auto", "blend", "reuse"):
        stats = engine.ask(prompt, mode, tokens=2).stats
        assert (stats.mode, stats.tokens, stats.chunks) == ("full", 0, ())


# 7 -------------------------------------------------------------------------------------------------------------------


def test_7_requests_do_not_disturb_one_another(engine: Served, refs: list[Any]) -> None:
    asked = [
        ([refs[0], refs[4]], "blend", 0.2),
        ([refs[4], refs[0]], "reuse", 0.0),
        (refs, "full", 0.0),
        (refs[::-1], "blend", 0.3),
    ]
    alone = [engine.ask(engine.prompt(order), mode, ratio=ratio, tokens=10) for order, mode, ratio in asked]
    requests = [engine.request(engine.prompt(order), mode, ratio=ratio, tokens=10) for order, mode, ratio in asked]
    for single, crowded in zip(alone, engine.together(*requests), strict=True):
        assert crowded.distance(single) <= engine.tolerance


# 8 -------------------------------------------------------------------------------------------------------------------


def test_8_tenants_share_no_keys(engine: Served) -> None:
    mine = engine.document(*TEXTS, tenant=TENANT, compiled=False)
    yours = engine.document(*TEXTS, tenant=OTHER_TENANT, compiled=False)
    assert [r.token_ids for r in mine] == [r.token_ids for r in yours]
    assert not {r.key for r in mine} & {r.key for r in yours}
    assert not {r.source for r in mine} & {r.source for r in yours}
    assert engine.keys(TENANT).prefix_ref().key != engine.keys(OTHER_TENANT).prefix_ref().key


def test_8_a_tenant_cannot_use_what_another_compiled(engine: Served) -> None:
    texts = [sentence(300 + i, 30) for i in range(3)]
    mine = engine.document(*texts, tenant=TENANT, name="secret")
    yours = engine.document(*texts, tenant=OTHER_TENANT, name="secret", compiled=False)
    engine.ask(engine.prompt(mine, tenant=TENANT), "full")
    engine.ask(engine.prompt(mine, tenant=TENANT), "reuse")
    for mode in ("reuse", "full"):
        seen = engine.ask(engine.prompt(yours, tenant=OTHER_TENANT), mode, tenant=OTHER_TENANT)
        assert seen.cached == 0, f"another tenant's rows were served in mode {mode}"


def test_8_deleting_one_tenants_chunk_leaves_the_others(reference: Callable[..., Served]) -> None:
    served = reference()
    mine = served.document(*TEXTS[:3], tenant=TENANT)
    yours = served.document(*TEXTS[:3], tenant=OTHER_TENANT)
    for ref in mine:
        assert served.engine.store.delete(ref.key)
    stats = served.ask(served.prompt(yours, tenant=OTHER_TENANT), "reuse", tenant=OTHER_TENANT).stats
    assert stats.missing == 0
    assert served.ask(served.prompt(mine), "reuse").stats.missing == sum(len(r.token_ids) for r in mine)


# 9 -------------------------------------------------------------------------------------------------------------------


def test_9_a_blend_leaves_nothing_in_the_exact_prefix_cache(engine: Served, truth: Callable[[str], Any]) -> None:
    refs = engine.document(*(sentence(400 + i, 25) for i in range(5)), name="nine")
    prompt = engine.prompt(refs[::-1])
    for _ in range(2):
        engine.ask(prompt, "reuse")
        engine.ask(prompt, "blend", ratio=0.1)
        full = engine.ask(prompt, "full")
        assert full.tokens == truth(engine.kind).greedy(prompt.token_ids, 6)
        expected = truth(engine.kind).logprobs([*prompt.token_ids, *full.tokens])
        for i, top in enumerate(full.top):
            for token, value in top.items():
                assert value == pytest.approx(float(expected[len(prompt.token_ids) - 1 + i, token]), abs=2e-3)


# 10 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["llama", "yarn", "phi3"])
@pytest.mark.parametrize(
    ("mode", "selector"), [("full", "auto"), ("reuse", "auto"), *(("blend", n) for n in (*NAMES, *COMBINED))]
)
def test_10_the_engines_agree(engines: Callable[[str, str], Served], kind: str, mode: str, selector: str) -> None:
    answers = []
    for name in ("transformers", "vllm"):
        served = engines(name, kind)
        refs = served.document(*TEXTS, name="ten")
        lost = served.document(sentence(500), name="ten-lost", compiled=False)
        order = [refs[2], refs[5], *lost, refs[0], refs[1]]
        answers.append(served.ask(served.prompt(order), mode, ratio=0.2, selector=selector, tokens=12))
    ours, theirs = answers
    assert ours.distance(theirs) <= 5e-3
    counts = [(a.stats.recomputed, a.stats.missing) for a in answers]
    assert mode == "full" or counts[0] == counts[1]


def test_keys_differ_between_models(tiny_model: Callable[[str], Any], engine: Served) -> None:
    keys = engine.keys()
    other = replace(keys, layout=replace(keys.layout, model="0" * 64))
    assert isinstance(other, KeyMaker)
    assert keys.prefix_ref().key != other.prefix_ref().key
