"""Single rows of the reference model: what is in its cache, row by row (invariants 2 to 5, by their numbers)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from blend.engines.transformers.model import RowModel, Weights
from blend.method import blend, compile_chunks, walk
from blend.select import NAMES
from blend.types import BlendOptions, CompileJob, Prompt, Segment
from kernels.rotate import rotate
from store import ChunkKV, KVKey
from store.memory import MemoryStore
from tests.blend.scene import SPECS
from tests.blend.tiny import KINDS

CONTEXT = tuple(range(100, 107))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(6, 250, (count,), generator=torch.Generator().manual_seed(seed))


def planes(model: RowModel) -> tuple[Tensor, Tensor]:
    """K and V [L, N, H, D] of the cache."""
    return model.cache.k.transpose(1, 2), model.cache.v.transpose(1, 2)


def prefilled(weights: Weights, ids: Tensor) -> RowModel:
    model = RowModel(weights, len(ids))
    walk(model, ids, torch.arange(len(ids)))
    return model


class Shelf:
    """A store of chunks compiled behind ``CONTEXT``, and prompts made of them."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.store = MemoryStore()

    def key(self, ids: Tensor) -> KVKey:
        return KVKey(bytes(torch.cat([ids, torch.zeros(32, dtype=torch.int64)])[:32].to(torch.uint8).tolist()))

    def compile(self, *chunks: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each chunk alone behind the context."""
        done = []
        for ids in chunks:
            chunk = tuple(ids.tolist())
            job = CompileJob("job", CONTEXT, (chunk,), (self.key(ids),), (b"s" * 32,))
            ((k, v),) = compile_chunks(RowModel(self.weights, job.tokens), job)
            self.store.put(
                ChunkKV(self.key(ids), self.weights.layout, chunk, k, v, len(CONTEXT), b"s" * 32, "tokenizer")
            )
            done.append((k, v))
        return done

    def prompt(self, chunks: list[Tensor], question: Tensor) -> Prompt:
        ids: list[int] = []
        segments = []
        for chunk in chunks:
            segments.append(Segment("chunk", len(ids), len(ids) + len(chunk), self.key(chunk), b"s" * 32))
            ids += chunk.tolist()
        segments.append(Segment("question", len(ids), len(ids) + len(question)))
        return Prompt(tuple(ids + question.tolist()), tuple(segments))

    def blend(self, prompt: Prompt, mode: Any = "reuse", **options: Any) -> RowModel:
        model = RowModel(self.weights, len(prompt.token_ids))
        blend(model, prompt, BlendOptions(mode, **options), self.store, tokenizer="tokenizer")
        return model


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_equals_transformers_in_every_layer(kind: str, weights: Any, truth: Any) -> None:
    ids = tokens(90)
    k, v = planes(prefilled(weights(kind), ids))
    expected_k, expected_v = truth(kind).kv(ids.tolist())
    torch.testing.assert_close(k, expected_k, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(v, expected_v, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_2_reuse_puts_the_stored_bytes_into_the_cache(kind: str, weights: Any) -> None:
    shelf = Shelf(weights(kind))
    ids = tokens(40, 1)
    ((k, v),) = shelf.compile(ids)
    head = torch.tensor(CONTEXT)
    got_k, got_v = planes(shelf.blend(shelf.prompt([head, ids], tokens(5, 2))))
    place = slice(len(CONTEXT), len(CONTEXT) + 40)
    assert torch.equal(got_k[:, place], k)
    assert torch.equal(got_v[:, place], v)


@pytest.mark.parametrize("kind", KINDS)
def test_4_rotated_keys_are_those_of_the_new_place_in_every_layer(kind: str, weights: Any, truth: Any) -> None:
    """RoPE is relative: the whole text moved by p has, in every layer, the keys moved by p, and the same values."""
    ids = tokens(50, 3).tolist()
    k0, v0 = truth(kind).kv(ids)
    for place in (1, 37, 1500):
        k, v = truth(kind).kv(ids, place)
        inv_freq = weights(kind).rope.inv_freq
        torch.testing.assert_close(rotate(k0, place, inv_freq), k, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(rotate(k, -place, inv_freq), k0, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(v, v0, atol=2e-3, rtol=1e-3)
        assert not torch.allclose(k, k0, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_4_blended_keys_stand_at_their_new_places(kind: str, weights: Any, truth: Any) -> None:
    shelf = Shelf(weights(kind))
    chunks = [tokens(n, n) for n in (31, 12, 44)]
    shelf.compile(*chunks)
    prompt = shelf.prompt([chunks[2], chunks[0], chunks[1]], tokens(6, 9))
    k, v = planes(shelf.blend(prompt))
    expected_k, expected_v = truth(kind).kv(prompt.token_ids)
    torch.testing.assert_close(k[0], expected_k[0], atol=5e-4, rtol=1e-4)
    torch.testing.assert_close(v[0], expected_v[0], atol=5e-4, rtol=1e-4)


def test_3_a_later_token_changes_no_earlier_row(weights: Any) -> None:
    ids = tokens(60)
    other = ids.clone()
    other[41] = (other[41] + 7) % 250
    for a, b in zip(planes(prefilled(weights(), ids)), planes(prefilled(weights(), other)), strict=True):
        torch.testing.assert_close(a[:, :41], b[:, :41], atol=1e-6, rtol=0)
        assert not torch.allclose(a[:, 41:], b[:, 41:], atol=1e-3)


def test_3_nor_among_scattered_rows(weights: Any) -> None:
    """Holes are recomputed between reused chunks; each sees what is before it and nothing that is after."""
    shelf = Shelf(weights())
    known, holes = [tokens(20, 20 + i) for i in range(3)], [tokens(15, 30 + i) for i in range(3)]
    shelf.compile(*known)
    for at in (0, 7, 14):
        changed = holes[1].clone()
        changed[at] = (changed[at] + 5) % 250
        runs = []
        for hole in (holes[1], changed):
            chunks = [known[0], holes[0], known[1], hole, known[2], holes[2]]
            runs.append(planes(shelf.blend(shelf.prompt(chunks, tokens(4, 5)))))
        row = 55 + at
        for a, b in zip(*runs, strict=True):
            torch.testing.assert_close(a[:, :row], b[:, :row], atol=1e-6, rtol=0)
            torch.testing.assert_close(a[:, 70:90], b[:, 70:90], atol=0, rtol=0)  # a reused chunk stays as stored
            assert not torch.allclose(a[1:, 90:], b[1:, 90:], atol=1e-3)  # what is computed after it sees it


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_3_scattered_rows_are_repaired_exactly(kind: str, weights: Any) -> None:
    """Damage some rows of an exact cache, recompute just those: the cache is exact again."""
    ids = tokens(80, 4)
    model = prefilled(weights(kind), ids)
    exact = [x.clone() for x in planes(model)]
    rows = torch.tensor([0, 3, 4, 5, 17, 40, 41, 79])
    for layer in range(4):
        model.write_kv(layer, rows, torch.full((8, 2, 32), 9.0), torch.full((8, 2, 32), -9.0))
    walk(model, ids, rows)
    for got, expected in zip(planes(model), exact, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_rows_not_reached_cannot_leak_even_if_they_are_nan(weights: Any) -> None:
    ids = tokens(30, 6)
    clean = prefilled(weights(), ids)
    poisoned = RowModel(weights(), 50)
    poisoned.cache.k[:, :, 30:] = float("nan")
    poisoned.cache.v[:, :, 30:] = float("nan")
    walk(poisoned, ids, torch.arange(30))
    assert torch.equal(planes(poisoned)[0][:, :30], planes(clean)[0])


def test_long_walks_are_attended_in_blocks_with_the_same_result(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(100, 7)
    whole = planes(prefilled(weights(), ids))
    monkeypatch.setattr("blend.engines.transformers.model._BLOCK", 7)
    for got, expected in zip(planes(prefilled(weights(), ids)), whole, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_5_a_blend_computes_the_question_on_the_repaired_cache(weights: Any, truth: Any) -> None:
    """Truth: transformers prefills the same question over the blended context rows."""
    shelf = Shelf(weights())
    chunks = [tokens(n, n) for n in (25, 25 + 1, 25 + 2)]
    shelf.compile(*chunks)
    for selector in (*NAMES, *SPECS):
        prompt = shelf.prompt(chunks[::-1], tokens(8, 11))
        n = prompt.context_tokens
        k, v = planes(shelf.blend(prompt, "blend", selector=selector, recompute_ratio=0.3))
        _, expected = truth("llama").over(k[:, :n], v[:, :n], prompt.token_ids[n:])
        torch.testing.assert_close(k, expected, atol=2e-4, rtol=1e-4, msg=selector)


def test_chunks_compiled_together_equal_chunks_compiled_behind_the_earlier_ones(weights: Any) -> None:
    a, b, c = (tuple(tokens(n, n).tolist()) for n in (13, 21, 8))
    keys = tuple(KVKey(bytes([i]) * 32) for i in range(3))
    job = CompileJob("all", CONTEXT, (a, b, c), keys, (b"s" * 32,) * 3)
    together = compile_chunks(RowModel(weights(), job.tokens), job)
    last = CompileJob("last", CONTEXT + a + b, (c,), keys[2:], (b"s" * 32,))
    ((k, v),) = compile_chunks(RowModel(weights(), last.tokens), last)
    torch.testing.assert_close(together[2][0], k, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[2][1], v, atol=1e-5, rtol=0)


def test_rows_below_computed_are_left_alone(weights: Any) -> None:
    """The engine's own prefix cache holds them; they are neither written nor recomputed."""
    shelf = Shelf(weights())
    chunks = [tokens(20, 40 + i) for i in range(3)]
    shelf.compile(*chunks)
    prompt = shelf.prompt(chunks, tokens(5, 50))
    for selector in (*NAMES, *SPECS):
        model = RowModel(weights(), len(prompt.token_ids))
        model.cache.k[:, :, :30] = 0.25
        model.cache.v[:, :, :30] = 0.5
        options = BlendOptions("blend", selector, 0.4)
        stats = blend(model, prompt, options, shelf.store, tokenizer="tokenizer", computed=30)
        assert bool((model.cache.k[:, :, :30] == 0.25).all())
        assert bool((model.cache.v[:, :, :30] == 0.5).all())
        assert stats.reused >= 30
