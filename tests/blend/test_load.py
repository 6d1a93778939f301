"""Loading by layers: the same cache as loading it all first, while it is computed; and lost chunks leave no trace."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from blend.engines.transformers.model import RowModel
from blend.load import Loader, load
from blend.method import blend
from blend.rope import Rope
from blend.select import NAMES
from blend.types import BlendOptions, BlendStats, Prompt, Segment
from kernels.rotate import rotate
from store import ChunkKV, KVKey, KVLayout, LostError, Miss, MissReason, Want
from store.loader import Reading
from store.memory import MemoryStore
from tests.blend.scene import CONTEXT, MISSING, SIZES, SPECS, Scene
from tests.blend.tiny import KINDS

LONG_S = 30.0
LAYERS = 4
STARTS = [sum(SIZES[:i]) for i in range(len(SIZES))]
CHOOSING = (*NAMES, *SPECS)
Act = Callable[[int, Tensor, Tensor], None]


@pytest.fixture(autouse=True)
def _no_grad(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("store.loader._SMALL_BYTES", 0)  # threads, little as it is
    with torch.no_grad():
        yield


@dataclass
class Acting:
    """A found entry, in whose reading one takes part."""

    found: Any
    act: Act
    tier: str = "ssd"

    @property
    def header(self) -> Any:
        return self.found.header

    def read(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.act(layer, k, v)
        self.found.read(layer, k, v)

    def advise(self) -> None:
        return None


class Trouble:
    """As much of a store as ``load`` needs: the scene's, with chunks that are gone or act when they are read."""

    def __init__(self, store: Any, acts: Mapping[int, Act], gone: Mapping[int, MissReason] | None = None) -> None:
        self.store, self.acts, self.gone = store, acts, gone or {}

    def find(self, want: Want) -> Any:
        number = want.key.digest[0]
        if number in self.gone:
            return Miss(self.gone[number])
        found = self.store.find(want)
        return found if isinstance(found, Miss) or number not in self.acts else Acting(found, self.acts[number])


def losing(at: int, reason: MissReason = "evicted") -> Act:
    """Every plane is NaN first; the one of layer ``at`` is lost like that."""

    def act(layer: int, k: Tensor, v: Tensor) -> None:
        k.fill_(torch.nan)
        v.fill_(torch.nan)
        if layer == at:
            raise LostError(reason, "gone")

    return act


def poisoned(loader: Loader, layout: KVLayout, poison: float = torch.nan, rows: int = 200) -> Loader:
    """``loader`` with kept staging memory full of ``poison``."""
    staging = loader.borrow(layout, rows)
    staging.k.fill_(poison)
    staging.v.fill_(poison)
    loader.give_back(staging)
    return loader


@dataclass
class Blended:
    k: Tensor
    v: Tensor
    stats: BlendStats

    def same(self, other: Blended) -> bool:
        return torch.equal(self.k, other.k) and torch.equal(self.v, other.v)


def run(scene: Scene, store: Any, spec: str, loader: Loader | None = None, *, computed: int = 0, ratio: float = 0.25,
        model: RowModel | None = None, poison: float = torch.nan) -> Blended:  # fmt: skip
    """A blend in an engine's cache full of NaN, read into staging full of ``poison``."""
    model = model or RowModel(scene.weights, len(scene.prompt.token_ids))
    model.cache.k.fill_(torch.nan)
    model.cache.v.fill_(torch.nan)
    model.cache.k[:, :, :computed] = 0.25
    model.cache.v[:, :, :computed] = 0.5
    loader = poisoned(loader or Loader(keep_bytes=1 << 20), scene.weights.layout, poison)
    options = BlendOptions("blend" if ratio else "reuse", spec, ratio)
    stats = blend(model, scene.prompt, options, store, tokenizer="tok", computed=computed, loader=loader)
    made = Blended(model.cache.k.transpose(1, 2), model.cache.v.transpose(1, 2), stats)
    assert bool(made.k.isfinite().all())
    assert bool(made.v.isfinite().all())
    return made


# What is loaded ------------------------------------------------------------------------------------------------------


@dataclass
class Sheet:
    """As much of a model as ``load`` needs; ``k``, ``v`` [L, N, H, D] full of NaN."""

    layout: KVLayout
    rope: Rope
    rows: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        shape = (self.layout.layers, self.rows, self.layout.heads, self.layout.head_dim)
        self.k, self.v = (torch.full(shape, torch.nan, dtype=self.layout.torch_dtype) for _ in range(2))

    def write_kv(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        assert k.shape[0] == v.shape[0] == len(rows)
        self.k[layer, rows], self.v[layer, rows] = k, v


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [8, 4, 1])
@pytest.mark.parametrize("computed", [0, 9, 33])
def test_each_layer_is_as_stored_with_its_keys_turned(dtype: str, interleaved: bool, half: int, computed: int) -> None:
    """By hand, chunk by chunk; one stands where it was compiled, one is missing, one is there twice."""
    layout = KVLayout("m", 3, 2, 16, dtype, "r")
    rope = Rope("default", 1.0 / 100 ** (torch.arange(half).double() / half), 2 * half, "r", interleaved)
    store, sizes, at = MemoryStore(), (5, 7, 1, 12), {0: 0, 1: 5, 2: 30, 3: 1000}
    chunks, segments, ids = {}, [], list[int]()
    generator = torch.Generator().manual_seed(0)
    for number in (0, 1, 9, 2, 3, 1):  # the second stands at 5, as compiled, and again at the end
        size = 4 if number == 9 else sizes[number]
        tokens, key = tuple(range(number, number + size)), KVKey(bytes([number]) * 32)
        segments.append(Segment("chunk", len(ids), len(ids) + size, key, b"s" * 32, str(number)))
        ids += tokens
        if number != 9 and number not in chunks:
            k, v = (torch.randn(3, size, 2, 16, generator=generator).to(layout.torch_dtype) for _ in range(2))
            k[:, 0, 0, 0] = -0.0
            chunks[number] = ChunkKV(key, layout, tokens, k, v, at[number], b"s" * 32, "tok")
            store.put(chunks[number])
    n = len(ids)
    prompt = Prompt((*ids, 1), (*segments, Segment("question", n, n + 1)))
    model = Sheet(layout, rope, n)
    loader = poisoned(Loader(keep_bytes=1 << 20), layout)
    expected_k, expected_v = (torch.full_like(model.k, torch.nan) for _ in range(2))
    for s in segments:
        chunk = chunks.get(s.key.digest[0]) if s.key else None
        if chunk is not None:
            turned = rotate(chunk.k, s.start - chunk.k_position, rope.inv_freq.float(), interleaved=interleaved)
            expected_k[:, s.start : s.stop], expected_v[:, s.start : s.stop] = turned, chunk.v
    there = ~expected_k[0].isnan().flatten(1).any(dim=1)
    with load(model, prompt, store, tokenizer="tok", computed=computed, loader=loader) as loaded:  # type: ignore[arg-type]
        assert loaded.present.tolist() == there.tolist()
        assert loaded.missing_rows.tolist() == [r for r in range(n) if r >= computed and not there[r]]
        assert [origin.miss_reason for origin in loaded.found] == [
            None if s.key is None or s.name != "9" else "never_precomputed" for s in prompt.segments
        ]
        for layer in (2, 0, 1):
            assert bool(model.k[layer].isnan().all())
            k, v = loaded.layer(layer)
            for got, expected, written in ((k, expected_k, model.k), (v, expected_v, model.v)):
                assert torch.equal(bits(got[there]), bits(expected[layer, there]))
                assert bool(written[layer, :computed].isnan().all())
                there_and_ours = there & (torch.arange(n) >= computed)
                assert torch.equal(bits(written[layer, there_and_ours]), bits(expected[layer, there_and_ours]))
                assert bool(written[layer, ~there_and_ours].isnan().all())


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("spec", CHOOSING)
@pytest.mark.parametrize("computed", [0, 10, 40])
def test_threads_and_kept_memory_change_nothing(scene: Scene, spec: str, computed: int) -> None:
    plain = run(scene, scene.store, spec, Loader(Reading(threads=0)), computed=computed)
    loader = Loader.start(threads=2, timeout_s=LONG_S)
    for _ in range(2):
        assert run(scene, Trouble(scene.store, {}), spec, loader, computed=computed).same(plain)
    loader.close()


def test_a_chunk_may_have_no_rows_left_to_write(scene: Scene) -> None:
    """All of the context is in the engine's own prefix cache."""
    made = run(scene, scene.store, "none", computed=CONTEXT, ratio=0.0)
    assert bool((made.k[:, :CONTEXT] == 0.25).all())
    assert made.stats.reused == CONTEXT


# While it is computed ------------------------------------------------------------------------------------------------


def test_a_layer_is_loaded_while_the_one_before_is_computed(scene: Scene) -> None:
    """Layer l + 1 cannot be read before layer l is being computed: whoever loads first computes nothing."""
    gates = [threading.Event() for _ in range(LAYERS)]
    gates[0].set()
    acts: dict[int, Act] = {i: lambda layer, k, v: gates[layer].wait(LONG_S) and None for i in range(len(SIZES))}
    model = RowModel(scene.weights, len(scene.prompt.token_ids))
    plain = model.forward_layer

    def forward(layer: int, hidden: Tensor, step: Any) -> Tensor:
        gates[min(layer + 1, LAYERS - 1)].set()
        return plain(layer, hidden, step)

    model.forward_layer = forward  # type: ignore[method-assign]
    loader = Loader.start(threads=2, timeout_s=LONG_S / 2)
    made = run(scene, Trouble(scene.store, acts), "none", loader, ratio=0.0, model=model)
    loader.close()
    assert made.stats.missing == SIZES[MISSING]
    assert made.same(run(scene, scene.store, "none", ratio=0.0))


def test_the_time_is_told(scene: Scene) -> None:
    acts: dict[int, Act] = {4: lambda layer, k, v: time.sleep(0.05)}
    begin = time.perf_counter()
    stats = run(scene, Trouble(scene.store, acts), "none", Loader(Reading(threads=0)), ratio=0.0).stats
    total = time.perf_counter() - begin
    assert stats.loaded_bytes == (CONTEXT - SIZES[MISSING]) * scene.weights.layout.token_bytes
    assert LAYERS * 0.05 < stats.wait_s < stats.wait_s + stats.blend_s < total
    assert LAYERS * 0.05 < stats.load_s <= stats.wait_s  # nobody else reads
    tiers = [c.tier for c in stats.chunks]
    assert tiers == [None if i == MISSING else "ssd" if i == 4 else "ram" for i in range(len(SIZES))]


# Lost ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", CHOOSING)
@pytest.mark.parametrize(
    ("at", "lost", "computed", "threads"), [*((at, 1, 0, 2) for at in range(LAYERS)), (2, 4, 10, 0), (3, 1, 15, 0)]
)
def test_a_chunk_lost_at_any_layer_was_never_there(
    scene: Scene, spec: str, at: int, lost: int, computed: int, threads: int
) -> None:
    """To the bit: the same rows are chosen, from the same KV, whatever was selected and computed with it before."""
    ratio = 0.1 if computed > 10 else 0.25  # fewer rows than may be chosen
    gone = Trouble(scene.store, {}, {lost: "evicted"})
    expected = run(scene, gone, spec, computed=computed, ratio=ratio, poison=3.0)
    loader = Loader(Reading(threads), keep_bytes=1 << 20)
    got = run(scene, Trouble(scene.store, {lost: losing(at)}), spec, loader, computed=computed, ratio=ratio)
    assert got.same(expected)
    for field in ("tokens", "reused", "recomputed", "missing", "chunks", "selector"):
        assert getattr(got.stats, field) == getattr(expected.stats, field)
    assert got.stats.chunks[lost].miss_reason == "evicted"
    assert got.stats.computed_share >= expected.stats.computed_share


@pytest.mark.parametrize("spec", ["auto", "deviation", "question(fast=true)", "none", "all"])
@pytest.mark.parametrize("at", range(LAYERS))
@pytest.mark.parametrize("computed", [0, 15])
def test_a_chunk_that_is_late_at_any_layer_was_never_there(scene: Scene, spec: str, at: int, computed: int) -> None:
    gate = threading.Event()

    def hang(layer: int, k: Tensor, v: Tensor) -> None:
        k.fill_(torch.nan)
        if layer == at:
            gate.wait(LONG_S)

    expected = run(scene, Trouble(scene.store, {}, {1: "load_timeout"}), spec, computed=computed, poison=3.0)
    loader = Loader.start(threads=2, timeout_s=0.2)
    try:
        begin = time.monotonic()
        got = run(scene, Trouble(scene.store, {1: hang}), spec, loader, computed=computed)
        assert time.monotonic() - begin < LONG_S / 2
    finally:
        gate.set()
        loader.close()
    assert got.same(expected)
    assert got.stats.chunks == expected.stats.chunks
    assert got.stats.chunks[1].miss_reason == "load_timeout"


@pytest.mark.parametrize("spec", CHOOSING)
def test_a_lost_prefix_was_never_there(scene: Scene, spec: str) -> None:
    expected = run(scene, Trouble(scene.store, {}, {0: "checksum_failed"}), spec, poison=3.0)
    got = run(scene, Trouble(scene.store, {0: losing(LAYERS - 1, "checksum_failed")}), spec, Loader(Reading(threads=0)))
    assert got.same(expected)
    assert got.stats.chunks == expected.stats.chunks


@pytest.mark.parametrize("spec", ["auto", "deviation(check=0|2,on=v)", "none"])
def test_every_chunk_lost_one_after_the_other_is_full_prefill(scene: Scene, truth: Any, spec: str) -> None:
    acts = {i: losing(layer) for layer, i in enumerate((0, 1, 2, 4))}
    got = run(scene, Trouble(scene.store, acts), spec, Loader(Reading(threads=0)))
    assert got.stats.missing == CONTEXT
    for mine, expected in zip((got.k, got.v), truth("llama").kv(scene.prompt.token_ids), strict=True):
        torch.testing.assert_close(mine, expected, atol=5e-4, rtol=1e-3)


def test_rows_that_ran_for_nothing_are_counted(scene: Scene) -> None:
    """The missing 33 rows run in layers 0 to 2; then, with 20 lost ones, in all four."""
    got = run(scene, Trouble(scene.store, {1: losing(3)}), "none", Loader(Reading(threads=0)), ratio=0.0)
    assert got.stats.computed_share * CONTEXT * LAYERS == pytest.approx(3 * 33 + 4 * 53)


def test_a_defect_of_a_store_is_no_silent_answer(scene: Scene) -> None:
    def fail(layer: int, k: Tensor, v: Tensor) -> None:
        raise ZeroDivisionError("a defect")

    for reading in (Reading(threads=0), Reading(threads=2), Reading(threads=2, timeout_s=LONG_S)):
        with pytest.raises(ZeroDivisionError):
            run(scene, Trouble(scene.store, {2: fail}), "none", Loader(reading))


# What an engine keeps ------------------------------------------------------------------------------------------------


def test_staging_memory_is_used_again_and_only_by_one_request_at_a_time(scene: Scene) -> None:
    layout, loader = scene.weights.layout, Loader(keep_bytes=1 << 20)
    first, second = loader.borrow(layout, 50), loader.borrow(layout, 50)
    assert first.memory.data_ptr() != second.memory.data_ptr()
    loader.give_back(first)
    smaller = loader.borrow(layout, 20)
    assert smaller.memory.data_ptr() == first.memory.data_ptr()
    assert smaller.k.shape == (LAYERS, 20, layout.heads, layout.head_dim)
    loader.give_back(smaller)
    assert loader.borrow(layout, 51).memory.data_ptr() != first.memory.data_ptr()  # too small


def test_too_much_memory_is_not_kept(scene: Scene) -> None:
    layout = scene.weights.layout
    loader = Loader(keep_bytes=layout.token_bytes * 20)
    staging = loader.borrow(layout, 21)
    loader.give_back(staging)
    assert loader.borrow(layout, 10).memory.data_ptr() != staging.memory.data_ptr()


def test_memory_that_a_late_read_may_still_write_to_is_not_used_again(scene: Scene) -> None:
    gate = threading.Event()
    loader = Loader.start(threads=2, timeout_s=0.05)
    borrowed = []
    plain = loader.borrow
    loader.borrow = lambda *a: borrowed.append(plain(*a)) or borrowed[-1]  # type: ignore[method-assign,func-returns-value]
    model = RowModel(scene.weights, len(scene.prompt.token_ids))
    late: dict[int, Act] = {1: lambda layer, k, v: gate.wait(LONG_S) and None}
    options = BlendOptions("reuse")
    try:
        blend(model, scene.prompt, options, Trouble(scene.store, late), tokenizer="tok", loader=loader)  # type: ignore[arg-type]
        assert loader._spare is None
    finally:
        gate.set()
    blend(model, scene.prompt, options, Trouble(scene.store, {}), tokenizer="tok", loader=loader)  # type: ignore[arg-type]
    assert loader._spare is borrowed[1].memory
    loader.close()


def test_a_request_that_fails_leaves_no_reader_behind(scene: Scene) -> None:
    loader = Loader.start(threads=2)
    model = RowModel(scene.weights, len(scene.prompt.token_ids))
    model.forward_layer = None  # type: ignore[method-assign,assignment]
    slow: dict[int, Act] = {i: lambda layer, k, v: time.sleep(0.002) for i in range(len(SIZES))}
    with pytest.raises(TypeError):
        blend(model, scene.prompt, BlendOptions("reuse"), Trouble(scene.store, slow), tokenizer="tok", loader=loader)  # type: ignore[arg-type]
    memory = loader._spare
    assert memory is not None
    before = memory.clone()
    time.sleep(0.03)
    assert torch.equal(before, memory)
    loader.close()


def test_readers_leave_the_core_that_openmp_has_bound_the_caller_to(scene: Scene) -> None:
    everywhere = os.sched_getaffinity(0)
    seen: list[set[int]] = []
    acts: dict[int, Act] = {1: lambda layer, k, v: seen.append(os.sched_getaffinity(0))}
    done = threading.Event()
    other = threading.Thread(target=done.wait)  # one that was not bound, as vLLM's process has them
    other.start()
    try:
        os.sched_setaffinity(0, {min(everywhere)})
        loader = Loader.start(threads=2, timeout_s=LONG_S)
        run(scene, Trouble(scene.store, acts), "none", loader)
        loader.close()
    finally:
        os.sched_setaffinity(0, everywhere)
        done.set()
        other.join()
    assert seen == [everywhere] * LAYERS


def test_requests_in_inference_mode_and_outside_share_memory(scene: Scene) -> None:
    """vLLM's worker runs in inference mode; what it made there could not be written to elsewhere."""
    loader = Loader.start(threads=2)
    plain = run(scene, scene.store, "deviation")
    for mode in (True, False, True):
        with torch.inference_mode(mode=mode):
            again = run(scene, Trouble(scene.store, {}), "deviation", loader)
        assert again.same(plain)
    loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_keys_stand_where_the_model_would_have_put_them(kind: str, weights: Any, truth: Any) -> None:
    """Invariant 4 for the angles made once for all layers: layer 0 against plain transformers."""
    made = Scene(weights(kind))
    state = made.state(0)
    expected_k, _ = truth(kind).kv(made.prompt.token_ids)
    there = state.loaded.present
    torch.testing.assert_close(state.loaded.k[0][there], expected_k[0, :CONTEXT][there], atol=5e-4, rtol=1e-4)
