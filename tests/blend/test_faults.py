"""Whatever is wrong with a stored chunk, the answer is the one without it: slower, never wrong, never an error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import Tensor

from store import Found, KVKey, KVStore, LostError, Miss, StoreConfig, Want
from store.memory import MemoryStore
from tests.blend.served import Served
from tests.blend.tiny import sentence

TEXTS = [sentence(i, 18) for i in range(16)]


def answer_without(served: Served, refs: list[Any], lost: int, **how: Any) -> Any:
    """What is answered when chunk ``lost`` was never stored, and everything else was."""
    key = refs[lost].key
    hidden = served.engine.store.contains
    served.engine.store.delete(key)
    assert not hidden(key)
    return served.ask(served.prompt(refs), **how)


@pytest.fixture
def served(reference: Callable[..., Served]) -> Served:
    return reference()


def flip(store: Any, key: Any, plane: int, byte: int) -> None:
    """One bit of what the memory store holds."""
    assert isinstance(store, MemoryStore)
    held = store._held[key]
    planes = list(held.planes)
    planes[plane] = planes[plane].copy()
    planes[plane][byte] ^= 0x10
    store._held[key] = replace(held, planes=tuple(planes))


@pytest.mark.parametrize("mode", ["reuse", "blend", "auto"])
@pytest.mark.parametrize("lost", [0, 2, 3])
def test_a_damaged_chunk_is_recomputed(served: Served, mode: str, lost: int) -> None:
    refs = served.document(*TEXTS[:4])
    flip(served.engine.store, refs[lost].key, 1, 5)
    damaged = served.ask(served.prompt(refs), mode, ratio=0.2)
    gone = damaged.stats.chunks[1 + lost]
    assert (gone.missing, gone.miss_reason) == (gone.tokens, "checksum_failed")
    expected = answer_without(served, refs, lost, mode=mode, ratio=0.2)
    assert damaged.distance(expected) == 0.0
    assert damaged.stats.missing == gone.tokens


class Trouble:
    """The engine's store, whose chunk ``key`` is found and then acts before each of its layers is read."""

    def __init__(self, store: KVStore, key: KVKey, act: Callable[[int], None]) -> None:
        self._store, self._key, self._act = store, key, act

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def find(self, want: Want) -> Found | Miss:
        found = self._store.find(want)
        if want.key != self._key or isinstance(found, Miss):
            return found

        def read(layer: int, k: Tensor, v: Tensor) -> None:
            self._act(layer)
            found.read(layer, k, v)

        return cast(Found, SimpleNamespace(header=found.header, tier="ssd", read=read))


LAYERS = range(4)


@pytest.mark.parametrize("mode", ["reuse", "blend"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_chunk_lost_at_any_layer_is_recomputed(served: Served, mode: str, layer: int) -> None:
    """The damage shows when its layer is read, and by then the layers before may have run with it."""
    refs = served.document(*TEXTS[:4])
    flip(served.engine.store, refs[2].key, layer, 11)
    damaged = served.ask(served.prompt(refs), mode, ratio=0.2)
    gone = damaged.stats.chunks[3]
    assert (gone.missing, gone.miss_reason) == (gone.tokens, "checksum_failed")
    assert damaged.distance(answer_without(served, refs, 2, mode=mode, ratio=0.2)) == 0.0


@pytest.mark.parametrize("mode", ["reuse", "blend"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_chunk_evicted_at_any_layer_is_recomputed(served: Served, mode: str, layer: int) -> None:
    refs = served.document(*TEXTS[:4])
    store: Any = served.engine.store

    def evict(at: int) -> None:
        if at == layer:
            raise LostError("evicted", "another process needed the room")

    served.engine.store = Trouble(store, refs[1].key, evict)  # type: ignore[misc,assignment]
    hit = served.ask(served.prompt(refs), mode, ratio=0.2)
    served.engine.store = store  # type: ignore[misc]
    gone = hit.stats.chunks[2]
    assert (gone.missing, gone.tier, gone.miss_reason) == (gone.tokens, None, "evicted")
    assert hit.distance(answer_without(served, refs, 1, mode=mode, ratio=0.2)) == 0.0


@pytest.mark.parametrize("mode", ["reuse", "blend"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_chunk_that_is_late_at_any_layer_is_recomputed(
    reference: Callable[..., Served], mode: str, layer: int
) -> None:
    """The disk hangs: the answer comes, and so do the next ones."""
    served = reference(load_timeout_s=0.3)
    refs = served.document(*TEXTS[:4])
    store: Any = served.engine.store
    gate = threading.Event()
    served.engine.store = Trouble(store, refs[1].key, lambda at: gate.wait(30) and None if at == layer else None)  # type: ignore[misc,assignment]
    try:
        late = served.ask(served.prompt(refs), mode, ratio=0.2)
        again = served.ask(served.prompt(refs[2:]), mode, ratio=0.2)
    finally:
        gate.set()
        served.engine.store = store  # type: ignore[misc]
    gone = late.stats.chunks[2]
    assert (gone.missing, gone.tier, gone.miss_reason) == (gone.tokens, None, "load_timeout")
    assert again.stats.missing == 0
    assert late.distance(answer_without(served, refs, 1, mode=mode, ratio=0.2)) == 0.0


def test_a_damaged_chunk_is_compiled_anew(served: Served) -> None:
    refs = served.document(*TEXTS[:4])
    before = served.ask(served.prompt(refs), "reuse")
    flip(served.engine.store, refs[1].key, 0, 0)
    served.ask(served.prompt(refs), "reuse")
    served.document(*TEXTS[:4])
    after = served.ask(served.prompt(refs), "reuse")
    assert after.stats.missing == 0
    assert after.distance(before) == 0.0


def test_an_entry_of_other_tokens_is_a_miss(served: Served) -> None:
    refs = served.document(*TEXTS[:3])
    swapped = [refs[0], replace(refs[1], token_ids=refs[1].token_ids[::-1]), refs[2]]
    got = served.ask(served.prompt(swapped), "reuse")
    assert got.stats.chunks[2].missing == len(refs[1].token_ids)
    honest = served.document("x", name="y", compiled=False)  # same prompt, chunk never stored under that key
    unknown = [refs[0], replace(swapped[1], key=honest[0].key), refs[2]]
    assert got.distance(served.ask(served.prompt(unknown), "reuse")) == 0.0


def test_every_entry_damaged_is_a_full_prefill(served: Served) -> None:
    refs = served.document(*TEXTS[:4])
    prompt = served.prompt(refs)
    for entry in list(served.engine.store.entries()):
        flip(served.engine.store, entry.key, 0, 3)
    got = served.ask(prompt, "reuse")
    assert got.stats.missing == prompt.context_tokens
    assert got.distance(served.ask(prompt, "full")) <= served.tolerance


def test_a_store_that_evicts_serves_what_is_left(reference: Callable[..., Served]) -> None:
    layout = reference().engine.info.layout
    served = reference(store=StoreConfig(max_bytes=layout.token_bytes * 90, policy="lru", admission=False))
    refs = served.document(*TEXTS[:6])
    got = served.ask(served.prompt(refs), "reuse")
    assert 0 < got.stats.missing < got.stats.tokens
    assert {c.miss_reason for c in got.stats.chunks} == {None, "evicted"}


@pytest.mark.parametrize("count", range(1, 17))
def test_any_number_of_chunks_with_a_hole_in_the_middle(engine: Served, count: int) -> None:
    refs = engine.document(*TEXTS[:count])
    refs[count // 2] = engine.document(sentence(900 + count, 10), name=f"hole{count}", compiled=False)[0]
    prompt = engine.prompt(refs)
    reused = engine.ask(prompt, "reuse", tokens=2)
    assert reused.stats.missing == len(refs[count // 2].token_ids)
    assert reused.stats.reused == prompt.context_tokens - reused.stats.missing
    everything = engine.ask(prompt, "blend", ratio=1.0, tokens=2)
    assert everything.distance(engine.ask(prompt, "full", tokens=2)) <= engine.tolerance


def test_one_chunk_many_times_in_a_prompt(engine: Served) -> None:
    refs = engine.document(*TEXTS[:2])
    prompt = engine.prompt([refs[0], refs[0], refs[1], refs[0]])
    reused = engine.ask(prompt, "reuse")
    assert reused.stats.reused == prompt.context_tokens
    everything = engine.ask(prompt, "blend", ratio=1.0)
    assert everything.distance(engine.ask(prompt, "full")) <= engine.tolerance


def test_a_hole_sees_the_chunks_before_it(engine: Served) -> None:
    """A missing last chunk behind exact ones is exact: prefix and first chunk are as compiled, the rest is computed."""
    first = engine.document(*TEXTS[:1])
    lost = engine.document(sentence(950, 20), name="tail", compiled=False)
    prompt = engine.prompt([*first, *lost])
    assert engine.ask(prompt, "reuse").distance(engine.ask(prompt, "full")) <= engine.tolerance
