"""What every store promises."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from store import ChunkKV, KVStore, LostError, Miss, StoreConfig, Want, open_store, source_of
from store.codec import CODECS

Get = Callable[[KVStore, ChunkKV], ChunkKV | Miss]
Same = Callable[[object, ChunkKV], bool]
Make = Callable[[int], ChunkKV]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [1, 63, 700])
def test_what_was_put_comes_back_to_the_bit(
    store: KVStore, make_with: Any, get: Get, same: Same, dtype: str, tokens: int
) -> None:
    maker = make_with(tokens=tokens)
    chunk = replace(maker, layout=replace(maker.layout, dtype=dtype))(1)
    chunk.k[0, 0, 0, :3] = torch.tensor([float("nan"), -0.0, float("inf")], dtype=chunk.k.dtype)
    assert store.put(chunk) == chunk.layout.token_bytes * tokens
    assert store.contains(chunk.key)
    assert same(get(store, chunk), chunk)


def test_strided_and_gradient_tensors_are_stored_by_value(store: KVStore, make: Make, get: Get, same: Same) -> None:
    chunk = make(1)
    strided = replace(
        chunk,
        k=chunk.k.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0).requires_grad_(),
        v=chunk.v.repeat(1, 1, 1, 2)[..., :8],
    )
    assert not strided.k.is_contiguous() and not strided.v.is_contiguous()
    store.put(strided)
    assert same(get(store, chunk), chunk)


def test_a_second_put_writes_nothing(store: KVStore, make: Make, get: Get, same: Same) -> None:
    chunk = make(1)
    store.put(chunk)
    assert store.put(chunk) == 0
    assert store.put(replace(chunk, k=chunk.k + 1)) == 0
    assert same(get(store, chunk), chunk)
    assert store.stats().entries == 1


def test_a_caller_cannot_damage_what_is_stored(store: KVStore, make: Make, get: Get, same: Same) -> None:
    chunk = make(1)
    store.put(chunk)
    chunk.k.zero_()
    for _ in range(2):
        got = get(store, make(1))
        assert same(got, make(1)) and isinstance(got, ChunkKV)
        got.k.zero_()
        got.v.zero_()


def test_a_miss_says_why(store: KVStore, make: Make, make_with: Any, get: Get) -> None:
    chunk = make(1)
    assert get(store, chunk) == Miss("never_precomputed")
    store.put(chunk)
    other_model = make_with(layout=replace(chunk.layout, model="0000"))(1)
    assert get(store, other_model) == Miss("model_changed")
    assert get(store, make_with(tokenizer="0000")(1)) == Miss("tokenizer_changed")
    both = make_with(layout=replace(chunk.layout, rope="0000"), tokenizer="0000")(1)
    assert get(store, both) == Miss("model_changed")
    assert get(store, replace(make(2), source=chunk.source)) == Miss("never_precomputed")  # its text changed
    assert get(store, make(2)) == Miss("never_precomputed")
    store.put(other_model)
    assert get(store, make_with(tokenizer="0000")(1)) == Miss("tokenizer_changed")


def test_evicted_is_said_until_it_is_put_again(store: KVStore, make: Make, get: Get, same: Same) -> None:
    chunk = make(1)
    store.put(chunk)
    assert store.delete(chunk.key, evicted=True)
    assert get(store, chunk) == Miss("evicted")
    assert not store.delete(chunk.key, evicted=True)
    store.put(chunk)
    assert same(get(store, chunk), chunk)
    assert store.delete(chunk.key)
    assert get(store, chunk) == Miss("never_precomputed")


def test_deleting_leaves_no_trace_of_the_source(store: KVStore, make: Make, make_with: Any, get: Get) -> None:
    chunk = make(1)
    store.put(chunk)
    store.delete(chunk.key)
    assert get(store, make_with(tokenizer="0000")(1)) == Miss("never_precomputed")
    assert not store.contains(chunk.key) and not store.delete(chunk.key)


def test_a_chunk_put_from_two_sources_is_known_by_both(store: KVStore, make: Make, make_with: Any, get: Get) -> None:
    chunk, second = make(1), source_of(b"s" * 32, "a copy of chunk 1")
    store.put(chunk)
    assert store.put(replace(chunk, source=second)) == 0
    changed = make_with(tokenizer="0000")(1)
    for source in (chunk.source, second):
        assert get(store, replace(changed, source=source)) == Miss("tokenizer_changed")


def test_an_entry_that_is_not_what_was_asked_for_is_not_served(
    store: KVStore, make: Make, get: Get, same: Same
) -> None:
    chunk = make(1)
    store.put(chunk)
    wrong_layout = replace(chunk, layout=replace(chunk.layout, rope="0000"))
    assert get(store, wrong_layout) == Miss("model_changed")
    assert get(store, replace(chunk, tokenizer="0000")) == Miss("tokenizer_changed")
    wrong_ids = (*chunk.token_ids[:-1], 0)
    assert get(store, replace(chunk, token_ids=wrong_ids)) == Miss("checksum_failed")
    asked = store.get(Want(chunk.key, chunk.layout, (), chunk.source, chunk.tokenizer))
    assert asked == Miss("checksum_failed")
    assert same(get(store, chunk), chunk)  # an intact entry is not deleted for a wrong question


def test_the_listing_shows_every_entry_in_key_order(store: KVStore, make: Make) -> None:
    chunks = sorted((make(n) for n in range(20)), key=lambda chunk: chunk.key)
    for chunk in chunks:
        store.put(chunk)
    listed = list(store.entries())
    assert [entry.key for entry in listed] == [chunk.key for chunk in chunks]
    for entry, chunk in zip(listed, chunks, strict=True):
        size = chunk.layout.token_bytes * len(chunk.token_ids)
        assert (entry.tokens, entry.bytes, entry.tokenizer) == (16, size, chunk.tokenizer)
        assert (entry.layout, entry.source) == (chunk.layout.digest.hex(), chunk.source)
    stats = store.stats()
    assert (stats.tier, stats.entries, stats.bytes) == (store.tier, 20, sum(e.bytes for e in listed))
    assert stats.raw_bytes == sum(e.raw_bytes for e in listed) and stats.counters["put"] == 20
    for entry in store.entries():  # deleting while listing is allowed
        store.delete(entry.key)
    assert (store.stats().entries, store.stats().bytes) == (0, 0)


def test_a_sound_store_verifies(store: KVStore, make: Make) -> None:
    for n in range(5):
        store.put(make(n))
    report = store.verify(repair=True)
    assert (report.checked, report.bad, report.repaired) == (5, (), 0)
    assert store.stats().entries == 5


def test_threads_put_get_and_delete_at_once(store: KVStore, make: Make, get: Get, same: Same) -> None:
    wrong: list[object] = []

    def work(start: int) -> None:
        for n in range(start, start + 12):
            chunk = make(n % 16)
            store.put(chunk)
            got = get(store, chunk)
            if not same(got, chunk) and got not in (Miss("never_precomputed"), Miss("evicted")):
                wrong.append(got)
            if n % 3 == 0:
                store.delete(chunk.key, evicted=n % 2 == 0)

    threads = [threading.Thread(target=work, args=(5 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.verify().bad == ()
    assert store.stats().bytes == sum(entry.bytes for entry in store.entries())


def test_layers_are_read_one_by_one_in_any_order_into_given_memory(
    store: KVStore, make_with: Any, want: Callable[[ChunkKV], Want]
) -> None:
    for maker in (make_with(tokens=16), make_with(tokens=700)):
        chunk = maker(1)
        store.put(chunk)
        found = store.find(want(chunk))
        assert not isinstance(found, Miss)
        assert found.tier in ("ram", "ssd") and found.header.k_position == chunk.k_position
        found.advise()
        staging = torch.full((2, chunk.layout.layers, 5 + len(chunk.token_ids), 2, 8), float("nan"))
        for layer in (2, 0, 1, 0):
            found.read(layer, staging[0, layer, 5:], staging[1, layer, 5:])
        assert torch.equal(staging[0, :, 5:], chunk.k) and torch.equal(staging[1, :, 5:], chunk.v)
        assert staging[:, :, :5].isnan().all()  # nothing but the place it was given was touched


def test_tensors_that_cannot_take_a_layer_are_refused(
    store: KVStore, make: Make, want: Callable[[ChunkKV], Want]
) -> None:
    chunk = make(1)
    store.put(chunk)
    found = store.find(want(chunk))
    assert not isinstance(found, Miss)
    good = torch.empty(16, 2, 8)
    for bad in (torch.empty(15, 2, 8), torch.empty(16, 2, 8).half(), torch.empty(2, 16, 8).transpose(0, 1)):
        for k, v in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match="contiguous"):
                found.read(0, k, v)
    assert store.contains(chunk.key)  # a reader's mistake is no damage


def test_what_is_deleted_while_it_is_read_is_lost_or_right(
    store: KVStore, make_with: Any, want: Callable[[ChunkKV], Want]
) -> None:
    chunk = make_with(tokens=700)(1)
    store.put(chunk)
    found = store.find(want(chunk))
    assert not isinstance(found, Miss)
    k, v = torch.empty(2, *chunk.k.shape[1:])
    found.read(0, k, v)
    store.delete(chunk.key)
    reasons: list[str] = []
    for layer in (1, 2):
        try:
            found.read(layer, k, v)
        except LostError as lost:
            reasons.append(lost.reason)
        else:
            assert torch.equal(k, chunk.k[layer]) and torch.equal(v, chunk.v[layer])
    assert reasons in ([], ["evicted"] * 2)
    assert store.stats().counters.get("corrupt", 0) == 0


def test_a_group_is_stored_as_one_by_one(store: KVStore, make_with: Any, get: Get, same: Same) -> None:
    chunks = [make_with(tokens=16 if n % 2 else 300)(n) for n in range(9)]
    sizes = store.put_many([*chunks, chunks[3]])
    assert sizes == [*(c.layout.token_bytes * len(c.token_ids) for c in chunks), 0]
    assert all(same(get(store, chunk), chunk) for chunk in chunks)
    assert store.put_many([]) == [] and store.put_many(chunks) == [0] * 9


def test_what_is_put_later_is_there_after_a_flush(store: KVStore, make: Make, get: Get, same: Same) -> None:
    futures = [store.put_later(make(n)) for n in range(20)]
    store.flush()
    assert all(future.result(timeout=10) > 0 for future in futures)
    assert all(same(get(store, make(n)), make(n)) for n in range(20))


def test_pins_count_once_and_outlast_an_eviction(store: KVStore, make: Make) -> None:
    keys = [make(n).key for n in range(3)]
    store.put(make(0))
    assert store.pin(keys) == 3 and store.pin(keys) == 0  # those not stored yet, too
    assert store.stats().pinned == 1
    entry = store.entry(keys[0])
    assert entry is not None and entry.pinned
    store.delete(keys[0], evicted=True)
    store.put(make(0))
    store.put(make(1))
    assert [e.pinned for e in store.entries()] == [True, True]
    store.delete(keys[1])
    store.put(make(1))  # deleted for good: the pin went with it
    listed = store.entry(keys[1])
    assert listed is not None and not listed.pinned
    assert store.pin(keys, pinned=False) == 2 and store.stats().pinned == 0


def test_entries_tell_their_use(store: KVStore, make: Make, get: Get) -> None:
    store.put(make(1))
    before = store.entry(make(1).key)
    for _ in range(3):
        get(store, make(1))
    store.flush()
    after = store.entry(make(1).key)
    assert before is not None and after is not None and store.entry(make(2).key) is None
    assert after.frequency > before.frequency + 2 and after.used >= before.used >= before.created > 1e9


def test_prefetch_and_warm_count_what_is_there(store: KVStore, make_with: Any) -> None:
    chunks = [make_with(tokens=300)(n) for n in range(4)]
    store.put_many(chunks[:3])
    assert store.prefetch([chunk.key for chunk in chunks]) == 3
    assert store.warm([chunk.key for chunk in chunks]) == 3
    assert store.cool([chunk.key for chunk in chunks]) in (0, 3)
    assert store.stats().entries == 3


def test_a_collection_keeps_everything(store: KVStore, make_with: Any, get: Get, same: Same) -> None:
    chunks = [make_with(tokens=300)(n) for n in range(12)]
    store.put_many(chunks)
    for chunk in chunks[::2]:
        store.delete(chunk.key)
    for full in (False, True):
        report = store.gc(full=full)
        assert report.evicted == report.expired == 0
    assert all(same(get(store, chunk), chunk) for chunk in chunks[1::2])
    assert store.stats().entries == 6 and store.verify().bad == ()


@pytest.mark.parametrize("kind", ["memory", "ssd", "tiered"])
@pytest.mark.parametrize("codec", sorted(name for name, codec in CODECS.items() if not codec.lossless))
def test_values_that_a_lossy_codec_refuses_are_stored_raw(
    tmp_path: Path, make: Make, get: Get, same: Same, caplog: pytest.LogCaptureFixture, codec: str, kind: str
) -> None:
    """That chunk only, and wherever the values are: in the last layer, after others were encoded."""
    more = {
        "memory": {},
        "ssd": {"path": tmp_path},
        "tiered": {"path": tmp_path, "ram_bytes": 1 << 20, "ram_codec": codec},
    }
    store = open_store(StoreConfig(codec=codec, **more[kind]))  # type: ignore[arg-type]
    chunks = [make(n) for n in range(3)]
    chunks[1].v[-1, 5, 1, 2] = float("nan")
    chunks[2].k[0, 0, 0, 0] = 1e30
    with caplog.at_level(logging.INFO, logger="store.entry"):
        assert all(store.put_many(chunks))
    for chunk in chunks[1:]:
        assert f"{chunk.key.hex} is stored raw" in caplog.text
    assert chunks[0].key.hex not in caplog.text
    codecs = {entry.key: entry.codec for entry in store.entries()}
    assert [codecs[chunk.key] for chunk in chunks] == [codec, "raw", "raw"]
    store.warm([chunk.key for chunk in chunks])
    for _ in range(2):
        assert same(get(store, chunks[1]), chunks[1]) and same(get(store, chunks[2]), chunks[2])
    store.close()
