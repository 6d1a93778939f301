"""Blend or not, and the accounting of a full prefill."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from blend.decide import DEFAULT_RATIO, decide, full_stats, settle
from blend.engines import EngineInfo
from blend.types import BlendOptions, Prompt, Segment
from store.types import KVKey, KVLayout
from tests.certificates import passing

PREFIX, FIRST, SECOND = (KVKey(bytes([i]) * 32) for i in range(3))


LAYOUT = KVLayout("0" * 64, 1, 1, 2, "float32", "none")
CERTIFICATE = passing(EngineInfo("trivial", "1", "model", "cpu", LAYOUT, "bytes", 4096, 261))


def prompt(prefix: int = 10, *chunks: int) -> Prompt:
    segments, at = [Segment("prefix", 0, prefix, PREFIX, name="prefix")], prefix
    for key, size in zip((FIRST, SECOND), chunks, strict=False):
        segments.append(Segment("chunk", at, at + size, key, name=key.hex[:2]))
        at += size
    segments.append(Segment("question", at, at + 5))
    return Prompt(tuple(range(at + 5)), tuple(segments))


def choose(mode: Any, held: set[KVKey], *chunks: int) -> tuple[str, str | None]:
    return decide(
        prompt(10, *chunks), BlendOptions(mode), held.__contains__, min_context_tokens=64, certificate=CERTIFICATE
    )


def test_auto_blends_when_any_chunk_is_held() -> None:
    assert choose("auto", {SECOND}, 40, 40) == ("blend", None)


@pytest.mark.parametrize(("held", "chunks", "why"), [
    (set(), (40, 40), "no chunk is in the store"),
    ({PREFIX}, (40, 40), "no chunk is in the store"),
    ({FIRST, SECOND}, (20, 33), "context of 63 tokens is below 64"),
])  # fmt: skip
def test_auto_prefills_in_full_and_says_why(held: set[KVKey], chunks: tuple[int, ...], why: str) -> None:
    assert choose("auto", held, *chunks) == ("full", why)


def test_the_limit_itself_blends() -> None:
    assert choose("auto", {FIRST}, 20, 34) == ("blend", None)


def test_auto_prefills_a_model_without_a_certificate_in_full_and_says_so() -> None:
    failed = replace(CERTIFICATE, passed=False, reasons=("agreement is 0.80, below 0.97", "and more"))
    for certificate, said in ((None, "run `ragblend certify`"), (failed, "agreement is 0.80, below 0.97")):
        found = decide(prompt(10, 40, 40), BlendOptions(), {FIRST}.__contains__, certificate=certificate)
        assert found == ("full", f"model is not certified; {said}")


@pytest.mark.parametrize("mode", ["blend", "reuse"])
def test_whoever_asks_for_a_blend_needs_no_certificate(mode: Any) -> None:
    assert decide(prompt(10, 40, 40), BlendOptions(mode), {FIRST}.__contains__) == (mode, None)


def test_auto_is_what_the_certificate_says_where_nothing_else_was_asked_for() -> None:
    passed = replace(CERTIFICATE, selector="question(layers=upper)", ratio=0.05)
    assert settle("auto", "auto", None, passed) == BlendOptions("auto", "question(layers=upper)", 0.05)
    assert settle("blend", "auto", 0.2, passed) == BlendOptions("blend", "question(layers=upper)", 0.2)
    assert settle("auto", "heads", None, passed) == BlendOptions("auto", "heads", 0.05)
    assert settle("auto", "auto", 0.0, passed).recompute_ratio == 0.0
    for none in (None, replace(passed, passed=False, reasons=("no",))):
        assert settle("auto", "auto", None, none) == BlendOptions("auto", "auto", DEFAULT_RATIO)


@pytest.mark.parametrize("mode", ["full", "blend", "reuse"])
def test_what_was_asked_for_is_done(mode: str) -> None:
    assert choose(mode, set(), 3) == (mode, None)


def test_without_context_there_is_nothing_to_blend() -> None:
    bare = Prompt((1, 2), (Segment("question", 0, 2),))
    for mode in ("auto", "blend", "reuse"):
        assert decide(bare, BlendOptions(mode), lambda _: True)[0] == "full"  # type: ignore[arg-type]


@pytest.mark.parametrize(("cached", "reused"), [
    (0, (0, 0, 0)), (7, (7, 0, 0)), (10, (10, 0, 0)), (35, (10, 25, 0)), (60, (10, 40, 10)), (95, (10, 40, 40)),
])  # fmt: skip
def test_a_full_prefill_accounts_for_the_exact_prefix_cache(cached: int, reused: tuple[int, ...]) -> None:
    stats = full_stats(prompt(10, 40, 40), cached, "because")
    assert (stats.mode, stats.why, stats.missing, stats.tokens) == ("full", "because", 0, 90)
    assert stats.reused == sum(reused)
    assert tuple(c.reused for c in stats.chunks) == reused
    assert tuple(c.recomputed for c in stats.chunks) == tuple(c.tokens - c.reused for c in stats.chunks)
