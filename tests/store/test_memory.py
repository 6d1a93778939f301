"""The store in memory: what stays when room runs out, and that nothing damaged is served."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from store import ChunkKV, Found, KVKey, KVStore, LostError, Miss, StoreConfig, StoreFullError, Want
from store.codec import open_codec
from store.entry import encode
from store.errors import CorruptEntryError
from store.evict import Item, choose
from store.held import BLOCK, Held, HeldFound
from store.memory import MemoryStore
from store.ram import Ram
from store.types import KVLayout

Make = Callable[[int], ChunkKV]
Get = Callable[[KVStore, ChunkKV], ChunkKV | Miss]
Same = Callable[[object, ChunkKV], bool]
RAW = open_codec("raw")


def size_of(chunk: ChunkKV) -> int:
    return chunk.layout.token_bytes * len(chunk.token_ids)


def want(chunk: ChunkKV) -> Want:
    return Want(chunk.key, chunk.layout, chunk.token_ids, chunk.source, chunk.tokenizer)


def damage(store: MemoryStore, chunk: ChunkKV, layer: int) -> None:
    """Flip one bit of what is held."""
    held = store._held[chunk.key]
    planes = [plane.copy() for plane in held.planes]
    planes[layer][planes[layer].size // 2] ^= 0x10
    store._held[chunk.key] = replace(held, planes=tuple(planes))


def full(make: Make, room: int, **options: Any) -> MemoryStore:
    """Holds chunks 0 .. room - 1 and not one more."""
    store = MemoryStore(StoreConfig(max_bytes=room * size_of(make(0)), **options))
    for n in range(room):
        assert store.put(make(n))
    return store


@pytest.mark.parametrize("seed", range(5))
def test_lru_in_memory_is_lru(make: Make, get: Get, seed: int) -> None:
    """Against an OrderedDict, over random puts, gets and deletes: looking for victims ahead changes nothing."""
    rng, room = random.Random(seed), 20
    chunks = [make(n) for n in range(40)]
    store = MemoryStore(StoreConfig(max_bytes=room * size_of(chunks[0]), policy="lru"))
    model: OrderedDict[int, None] = OrderedDict()
    for _ in range(1500):
        n = rng.randrange(40)
        what = rng.random()
        if what < 0.5:
            assert isinstance(get(store, chunks[n]), ChunkKV) == (n in model)
            if n in model:
                model.move_to_end(n)
        elif what < 0.95:
            assert (store.put(chunks[n]) > 0) == (n not in model)
            if n not in model:
                model[n] = None
                if len(model) > room:
                    model.popitem(last=False)
        else:
            assert store.delete(chunks[n].key) == (n in model)
            model.pop(n, None)
    assert {entry.key for entry in store.entries()} == {chunks[n].key for n in model}
    assert store.stats().bytes == len(model) * size_of(chunks[0])


def test_victims_chosen_ahead_are_still_among_the_worst(make: Make) -> None:
    """Whoever goes is, at that moment, in the worst fifth by the policy, and never one that was used since."""
    ram = Ram(StoreConfig(max_bytes=60 * size_of(make(0)), policy="gdsf", admission=False))
    rng = random.Random(1)
    for n in range(60):
        ram.insert(Held.of(make(n), RAW))
    for n in range(60, 160):
        used = {rng.choice(list(ram.held)) for _ in range(3)}
        for key in used:
            ram.get(key, use=True)
        items = [life.item for life in ram.lives.values()]
        now = max(item.usage.last for item in items)
        order = choose(items, ram._rules(0.0), ram.policy, need=items[0].bytes, now=now, clock=0.0).victims
        (evicted,) = ram.insert(Held.of(make(n), RAW)) or []
        assert evicted in [key for key, _ in order[:12]] and evicted not in used
    assert ram.counters["evicted:capacity"] == 100


def test_what_is_pinned_stays_and_a_store_of_pins_is_full(make: Make, get: Get, same: Same) -> None:
    store = full(make, 3, admission=False)
    assert store.pin([make(0).key, make(1).key, make(9).key]) == 3
    assert store.pin([make(0).key]) == 0
    store.put(make(3))
    assert get(store, make(2)) == Miss("evicted")
    store.put(make(9))  # pinned before it came
    assert get(store, make(3)) == Miss("evicted")
    with pytest.raises(StoreFullError, match="pinned"):
        store.put(make(4))
    assert all(same(get(store, make(n)), make(n)) for n in (0, 1, 9))
    assert store.stats().pinned == 3
    assert store.pin([make(0).key], pinned=False) == 1
    store.put(make(4))
    assert get(store, make(0)) == Miss("evicted") and same(get(store, make(4)), make(4))


def test_a_victim_that_was_pinned_after_it_was_chosen_stays(make: Make, get: Get) -> None:
    store = full(make, 20, policy="lru", admission=False)
    store.put(make(20))  # chooses the next victims too: 0 goes, 1 is among the next
    store.pin([make(1).key])
    store.put(make(21))
    assert isinstance(get(store, make(1)), ChunkKV) and get(store, make(2)) == Miss("evicted")


def test_a_scan_does_not_flush_what_is_used(make: Make, get: Get) -> None:
    store = full(make, 8)
    for _ in range(3):
        for n in range(8):
            get(store, make(n))
    for n in range(100, 130):
        assert store.put(make(n)) == 0
    assert all(isinstance(get(store, make(n)), ChunkKV) for n in range(8))
    assert store.stats().counters["refused"] == 30
    get(store, make(200))  # somebody asks for it: that is worth room
    assert store.put(make(200)) > 0


def test_a_store_that_evicts_nothing_is_full(make: Make, get: Get, same: Same) -> None:
    store = full(make, 3, policy="none")
    with pytest.raises(StoreFullError, match="none"):
        store.put(make(3))
    assert all(same(get(store, make(n)), make(n)) for n in range(3))


def test_a_chunk_larger_than_the_store_is_refused_and_nothing_goes_for_it(make: Make, make_with: Any) -> None:
    store = full(make, 3)
    with pytest.raises(StoreFullError, match="larger"):
        store.put(make_with(tokens=64)(7))
    assert store.stats().entries == 3


def test_put_many_keeps_what_was_stored_before_it_failed(make: Make, make_with: Any) -> None:
    store = MemoryStore(StoreConfig(max_bytes=3 * size_of(make(0))))
    with pytest.raises(StoreFullError):
        store.put_many([make(0), make_with(tokens=64)(7), make(1)])
    assert store.contains(make(0).key) and not store.contains(make(1).key)


def test_what_is_unused_for_long_expires(make: Make, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("store.ram.time.time", lambda: now[0])
    store = MemoryStore(StoreConfig(ttl_s=60))
    for n in range(4):
        store.put(make(n))
    store.pin([make(3).key])
    now[0] += 50
    get(store, make(0))
    now[0] += 20
    report = store.gc()
    assert (report.expired, report.evicted, report.freed) == (2, 0, 2 * size_of(make(0)))
    assert {entry.key for entry in store.entries()} == {make(0).key, make(3).key}
    assert get(store, make(1)) == Miss("evicted")
    assert store.stats().counters["evicted:expired"] == 2


def test_an_owner_above_its_share_goes_first(make: Make) -> None:
    store = MemoryStore(StoreConfig(max_bytes=10 * size_of(make(0)), shares={"a": 0.3}, admission=False))
    for n in range(6):
        store.put(replace(make(n), owner="a"))
    for n in range(6, 14):
        store.put(replace(make(n), owner="b"))
    owners = [entry.owner for entry in store.entries()]
    assert owners.count("a") <= 3 and len(owners) >= 8
    assert store.stats().counters["evicted:share"] >= 3


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_bit_that_flipped_in_memory_is_never_served(make: Make, get: Get, same: Same, layer: int) -> None:
    store, chunk = MemoryStore(), make(1)
    store.put(chunk)
    store.put(make(2))
    found = store.find(want(chunk))
    assert not isinstance(found, Miss)
    damage(store, chunk, layer)
    assert store.verify().bad == (chunk.key,)
    assert get(store, chunk) == Miss("checksum_failed")
    assert not store.contains(chunk.key) and store.stats().counters["corrupt"] == 1
    assert read_all(found, chunk)  # what was found before has the sound planes still
    assert store.put(chunk) > 0 and same(get(store, chunk), chunk)
    assert same(get(store, make(2)), make(2))
    damage(store, chunk, layer)
    assert store.put(chunk) > 0 and same(get(store, chunk), chunk)  # putting again heals


def read_all(found: Found, chunk: ChunkKV) -> bool:
    """Read into poisoned memory, last layer first."""
    k, v = torch.full_like(chunk.k, float("nan")), torch.full_like(chunk.v, float("nan"))
    for layer in reversed(range(chunk.layout.layers)):
        found.read(layer, k[layer], v[layer])
    return torch.equal(k, chunk.k) and torch.equal(v, chunk.v)


def test_what_was_found_can_be_read_though_it_is_deleted(make: Make) -> None:
    store, chunk = MemoryStore(), make(1)
    store.put(chunk)
    found = store.find(want(chunk))
    assert not isinstance(found, Miss) and found.tier == "ram"
    store.delete(chunk.key)
    store.close()
    assert read_all(found, chunk)


def test_the_check_covers_every_block_of_a_long_plane() -> None:
    """Planes of several blocks, the last one short: a flip in any of them is found, and the copy is exact."""
    layout = KVLayout(model="ab", layers=1, heads=1, head_dim=1, dtype="float16", rope="cd")
    tokens = (2 * BLOCK + 1000) // 2
    make_kv = torch.Generator().manual_seed(3)
    k, v = (torch.randn((1, tokens, 1, 1), generator=make_kv).half() for _ in range(2))
    chunk = ChunkKV(KVKey(b"k" * 32), layout, tuple(range(tokens)), k, v, 0, b"s" * 32, "ef")
    held = Held.of(chunk, RAW)
    dropped: list[object] = []
    out_k, out_v = torch.full_like(k[0], 7.0), torch.full_like(v[0], 7.0)
    HeldFound(held, lambda h, e: dropped.append(e)).read(0, out_k, out_v)
    assert torch.equal(out_k, k[0]) and torch.equal(out_v, v[0]) and not dropped
    plane = held.planes[0]
    for at in (0, BLOCK - 1, BLOCK, 2 * BLOCK + 999, 2 * BLOCK + 1000, plane.size - 1):
        bad = plane.copy()
        bad[at] ^= 1
        with pytest.raises(LostError) as lost:
            HeldFound(replace(held, planes=(bad,)), lambda h, e: dropped.append(e)).read(0, out_k, out_v)
        assert lost.value.reason == "checksum_failed"
    for short in (plane[:-1], np.concatenate((plane, plane[:2]))):
        with pytest.raises(LostError):
            HeldFound(replace(held, planes=(short,)), lambda h, e: dropped.append(e)).read(0, out_k, out_v)
    assert len(dropped) == 8


def test_a_tensor_elsewhere_is_refused_and_the_entry_stays(make: Make, get: Get, same: Same) -> None:
    store, chunk = MemoryStore(), make(1)
    store.put(chunk)
    found = store.find(want(chunk))
    assert not isinstance(found, Miss)
    elsewhere = torch.empty(chunk.k.shape[1:], device="meta")
    with pytest.raises(ValueError, match="meta"):
        found.read(0, elsewhere, elsewhere)
    assert same(get(store, chunk), chunk)


def test_an_encoded_entry_goes_in_and_out_as_it_is(make: Make, get: Get, same: Same) -> None:
    one, other, chunk = MemoryStore(), MemoryStore(), make(1)
    one.put(chunk)
    encoded = one.read_encoded(chunk.key)
    assert encoded is not None and one.read_encoded(make(2).key) is None
    assert other.put_encoded([encoded]) == [size_of(chunk)] and other.put_encoded([encoded]) == [0]
    assert same(get(other, chunk), chunk)
    with pytest.raises(ValueError, match="read-only"):
        encoded[1][0][0] = 1
    blob, planes = encode(make(2), RAW)
    planes[1][0] ^= 1
    with pytest.raises(CorruptEntryError):
        other.put_encoded([(blob, planes)])
    with pytest.raises(CorruptEntryError):
        other.put_encoded([(blob[:-1] + b"x", planes)])
    with pytest.raises(CorruptEntryError):
        other.put_encoded([(blob, planes[:-1])])
    assert not other.contains(make(2).key)
    damage(one, chunk, 0)
    with pytest.raises(LostError):
        one.read_encoded(chunk.key)
    assert not one.contains(chunk.key)


def test_a_generation_is_never_used_twice(make: Make) -> None:
    store, chunk, seen = MemoryStore(), make(1), set()
    assert store.generation(chunk.key) is None
    for _ in range(3):
        store.put(chunk)
        seen.add(store.generation(chunk.key))
        store.delete(chunk.key)
    assert len(seen) == 3 and None not in seen


def test_uses_are_counted_and_shown(make: Make, get: Get) -> None:
    store, chunk = MemoryStore(), make(1)
    store.put(chunk)
    before = store.entry(chunk.key)
    for _ in range(3):
        get(store, chunk)
    get(store, replace(chunk, tokenizer="0000"))  # a wrong question is no use
    after = store.entry(chunk.key)
    assert before is not None and after is not None
    assert before.frequency < 1 and after.frequency == 3 and after.used >= before.used > 0


def test_evicted_keys_are_not_remembered_for_ever(make: Make, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.memory.REMEMBERED", 5)
    store = full(make, 2, admission=False)
    for n in range(2, 30):
        store.put(make(n))
    said = [get(store, make(n)) for n in range(28)]
    assert said == [Miss("never_precomputed")] * 23 + [Miss("evicted")] * 5
    assert len(store._sources) == len(store._sources_of) == 7


def test_threads_fill_a_small_store_and_its_figures_stay_true(make: Make, get: Get, same: Same) -> None:
    chunks = [make(n) for n in range(24)]
    store = MemoryStore(StoreConfig(max_bytes=8 * size_of(chunks[0])))
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            chunk = rng.choice(chunks)
            what = rng.random()
            if what < 0.4:
                store.put(chunk)
            elif what < 0.5:
                store.delete(chunk.key, evicted=what < 0.45)
            elif what < 0.6:
                store.pin([chunk.key], pinned=False)
            else:
                got = get(store, chunk)
                if not isinstance(got, Miss) and not same(got, chunk):
                    wrong.append(got)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = list(store.entries())
    assert not wrong and store.verify().bad == ()
    assert store.stats().bytes == sum(entry.bytes for entry in held) <= 8 * size_of(chunks[0])
    assert set(store._ram.lives) == {entry.key for entry in held}


def test_an_item_is_priced_by_its_tokens(make: Make, make_with: Any) -> None:
    ram = Ram(StoreConfig())
    ram.insert(Held.of(make(0), RAW))
    (life,) = ram.lives.values()
    assert isinstance(life.item, Item) and (life.item.cost, life.item.bytes) == (16.0, size_of(make(0)))


def test_the_codec_auto_packs_closer_as_memory_runs_out(make_with: Any, get: Get) -> None:
    maker = make_with(tokens=256)
    chunks = [maker(n) for n in range(40)]
    store = MemoryStore(StoreConfig(max_bytes=12 * size_of(chunks[0]), codec="auto"))
    for chunk in chunks[:5]:
        store.put(chunk)
    assert {entry.codec for entry in store.entries()} == {"raw"}
    for chunk in chunks[5:]:
        store.put(chunk)
    packed = [entry for entry in store.entries() if entry.codec != "raw"]
    assert packed and all(entry.bytes < entry.raw_bytes // 2 for entry in packed)
    stats = store.stats()
    assert stats.raw_bytes > 12 * size_of(chunks[0]) >= stats.bytes
    got = get(store, chunks[12])
    assert isinstance(got, ChunkKV) and torch.allclose(got.k, chunks[12].k, atol=1.0)


def test_without_a_limit_the_codec_auto_gives_nothing_up(make: Make) -> None:
    store = MemoryStore(StoreConfig(codec="auto"))
    store.put_many([make(n) for n in range(50)])
    assert {entry.codec for entry in store.entries()} == {"raw"}
