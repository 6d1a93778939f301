"""Memory in front of another tier: fast, never stale, and no worse than what is below."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from store import ChunkKV, Found, KVKey, KVStore, LostError, Miss, StoreConfig, StoreError, StoreFullError, Want
from store.codec import CODECS, Bytes, open_codec
from store.entry import encode
from store.errors import CorruptEntryError
from store.held import Held
from store.memory import MemoryStore
from store.remote import RemoteError, pack, unpack
from store.ssd import SsdStore
from store.tiered import TieredStore

Make = Callable[[int], ChunkKV]
Get = Callable[[KVStore, ChunkKV], ChunkKV | Miss]
Same = Callable[[object, ChunkKV], bool]
ROOT = Path(__file__).resolve().parents[2]


class Below(MemoryStore):
    """The tier below, as another process would see it too; counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.finds = 0
        self.fetched: list[KVKey] = []
        self.ahead: list[KVKey] = []
        self.closed = False

    def find(self, want: Want) -> Found | Miss:
        self.finds += 1
        found = super().find(want)
        if not isinstance(found, Miss):
            found.tier = "ssd"
        return found

    def read_encoded(self, key: KVKey) -> tuple[bytes, list[Bytes]] | None:
        self.fetched.append(key)
        return super().read_encoded(key)

    def prefetch(self, keys: Iterable[KVKey]) -> int:
        self.ahead.extend(keys := list(keys))
        return super().prefetch(keys)

    def close(self) -> None:
        self.closed = True
        super().close()


class Elsewhere:
    """A remote tier in a dict; ``broken``: it cannot be reached."""

    name = "elsewhere"

    def __init__(self) -> None:
        self.blobs: dict[KVKey, bytes] = {}
        self.broken = False
        self.asked = 0

    def _reach(self) -> None:
        self.asked += 1
        if self.broken:
            raise RemoteError("no route to host")

    def get_entry(self, key: KVKey) -> bytes | None:
        self._reach()
        return self.blobs.get(key)

    def put_entry(self, key: KVKey, blob: bytes) -> None:
        self._reach()
        self.blobs[key] = blob

    def contains(self, key: KVKey) -> bool:
        self._reach()
        return key in self.blobs

    def delete(self, key: KVKey) -> bool:
        self._reach()
        return self.blobs.pop(key, None) is not None


def size_of(chunk: ChunkKV) -> int:
    return chunk.layout.token_bytes * len(chunk.token_ids)


def want(chunk: ChunkKV) -> Want:
    return Want(chunk.key, chunk.layout, chunk.token_ids, chunk.source, chunk.tokenizer)


def tier_of(store: KVStore, chunk: ChunkKV) -> str:
    found = store.find(want(chunk))
    return found.reason if isinstance(found, Miss) else found.tier


@pytest.fixture
def below() -> Below:
    return Below()


@pytest.fixture
def open_tiers(below: Below, make: Make) -> Iterator[Callable[..., TieredStore]]:
    """Over ``below``, with room in memory for ``room`` chunks."""
    opened: list[TieredStore] = []

    def open_(room: int = 8, remote: Elsewhere | None = None, **options: Any) -> TieredStore:
        config = StoreConfig(ram_bytes=room * size_of(make(0)), **options)
        opened.append(TieredStore(config, below, remote=remote))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()


@pytest.fixture
def tiers(open_tiers: Callable[..., TieredStore]) -> TieredStore:
    return open_tiers()


def read(store: TieredStore, get: Get, chunk: ChunkKV) -> ChunkKV | Miss:
    """As a request does, and the copy that follows from it is made."""
    got = get(store, chunk)
    store._promoter.flush()
    return got


def test_the_second_read_is_from_memory(tiers: TieredStore, below: Below, make: Make, get: Get, same: Same) -> None:
    chunk = make(1)
    tiers.put(chunk)
    assert tier_of(tiers, chunk) == "ssd"
    assert same(read(tiers, get, chunk), chunk)
    asked = below.finds
    assert tier_of(tiers, chunk) == "ram" and same(get(tiers, chunk), chunk)
    assert below.finds == asked
    assert tiers.stats().counters["promoted"] == 1


def test_who_copies_yields_to_the_request_and_does_not_share_its_core(
    tiers: TieredStore, below: Below, make: Make, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader is bound to one core, as OpenMP binds its first thread; another of its threads to another core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("there is one core")
    seen: list[tuple[set[int], int]] = []
    encoded_of = below.read_encoded

    def read_encoded(key: KVKey) -> tuple[bytes, list[Bytes]] | None:
        seen.append((os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        return encoded_of(key)

    monkeypatch.setattr(below, "read_encoded", read_encoded)
    tiers.put(make(1))
    over = threading.Event()

    def elsewhere() -> None:
        os.sched_setaffinity(0, cores[1:])
        over.wait(30)

    def request() -> None:
        os.sched_setaffinity(0, cores[:1])
        read(tiers, get, make(1))

    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    bound, asking = threading.Thread(target=elsewhere), threading.Thread(target=request)
    bound.start()
    asking.start()
    asking.join()
    over.set()
    bound.join()
    assert seen == [(set(cores), max(10, mine))]


def test_what_was_not_read_to_its_end_stays_below(tiers: TieredStore, below: Below, make: Make) -> None:
    chunk = make(1)
    tiers.put(chunk)
    found = tiers.find(want(chunk))
    assert not isinstance(found, Miss)
    for layer in (0, 1, 1, 0):
        found.read(layer, chunk.k[layer].clone(), chunk.v[layer].clone())
    tiers._promoter.flush()
    assert below.fetched == [] and tier_of(tiers, chunk) == "ssd"
    found.read(2, chunk.k[2].clone(), chunk.v[2].clone())
    tiers._promoter.flush()
    assert below.fetched == [chunk.key] and tier_of(tiers, chunk) == "ram"
    found.read(2, chunk.k[2].clone(), chunk.v[2].clone())  # once is enough
    tiers._promoter.flush()
    assert below.fetched == [chunk.key]


def test_a_hit_in_memory_counts_as_a_use_below(tiers: TieredStore, make: Make, get: Get) -> None:
    chunk = make(1)
    tiers.put(chunk)
    read(tiers, get, chunk)
    before = tiers.entry(chunk.key)
    get(tiers, chunk)
    after = tiers.entry(chunk.key)
    assert before is not None and after is not None and after.frequency > before.frequency + 0.9


def test_what_another_process_deleted_is_gone_at_once(tiers: TieredStore, below: Below, make: Make, get: Get) -> None:
    for n in (1, 2):
        tiers.put(make(n))
        read(tiers, get, make(n))
        assert tier_of(tiers, make(n)) == "ram"
    below.delete(make(1).key)
    assert get(tiers, make(1)) == Miss("never_precomputed")
    below.delete(make(2).key, evicted=True)
    assert get(tiers, make(2)) == Miss("evicted")
    assert tiers._ram.held == {} and not tiers.contains(make(1).key)


def test_a_copy_of_an_earlier_write_is_not_served(tiers: TieredStore, below: Below, make: Make, get: Get) -> None:
    """Deleted and put again by another process: memory has the bytes of the first write."""
    chunk = make(1)
    tiers.put(chunk)
    read(tiers, get, chunk)
    below.delete(chunk.key)
    below.put(replace(chunk, k=chunk.k + 1))
    got = read(tiers, get, chunk)
    assert isinstance(got, ChunkKV) and torch.equal(got.k, chunk.k + 1)
    assert tier_of(tiers, chunk) == "ram"
    got = get(tiers, chunk)
    assert isinstance(got, ChunkKV) and torch.equal(got.k, chunk.k + 1)


def test_collection_lets_go_of_copies_of_what_is_gone(tiers: TieredStore, below: Below, make: Make, get: Get) -> None:
    for n in range(4):
        tiers.put(make(n))
        read(tiers, get, make(n))
    below.delete(make(0).key)
    assert len(tiers._ram.held) == 4
    tiers.gc()
    assert set(tiers._ram.held) == {make(n).key for n in (1, 2, 3)}


def test_copies_of_what_is_gone_do_not_stay_for_long(
    tiers: TieredStore, below: Below, make: Make, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(3):
        tiers.put(make(n))
        read(tiers, get, make(n))
    below.delete(make(0).key)
    read(tiers, get, make(1))
    assert make(0).key in tiers._ram.held
    monkeypatch.setattr("store.promote.SWEEP_S", 0.0)
    read(tiers, get, make(1))
    assert set(tiers._ram.held) == {make(1).key, make(2).key}


@pytest.mark.parametrize("when", ["before it is read", "while it is read", "after it is read"])
def test_a_delete_during_promotion_leaves_no_copy(
    tiers: TieredStore, below: Below, make: Make, get: Get, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    chunk = make(1)
    tiers.put(chunk)
    encoded_of, insert = below.read_encoded, tiers._ram.insert

    def read_encoded(key: KVKey) -> tuple[bytes, list[Bytes]] | None:
        if when == "before it is read":
            tiers.delete(key)
        encoded = encoded_of(key)
        if when == "while it is read":
            tiers.delete(key)
        return encoded

    def inserted(new: Held, *, forced: bool = False) -> list[KVKey] | None:
        result = insert(new, forced=forced)
        if when == "after it is read":
            below.delete(new.header.key)  # by another process: it knows nothing of our memory
        return result

    monkeypatch.setattr(below, "read_encoded", read_encoded)
    monkeypatch.setattr(tiers._ram, "insert", inserted)
    read(tiers, get, chunk)
    assert tiers._ram.held == {} and tiers._ram.bytes == 0
    assert get(tiers, chunk) == Miss("never_precomputed")


def test_a_damaged_copy_is_read_from_below(tiers: TieredStore, make: Make, get: Get, same: Same) -> None:
    chunk = make(1)
    tiers.put(chunk)
    for layer in range(3):
        read(tiers, get, chunk)
        held = tiers._ram.held[chunk.key]
        planes = [plane.copy() for plane in held.planes]
        planes[layer][5] ^= 0x20
        tiers._ram.held[chunk.key] = replace(held, planes=tuple(planes))
        assert tier_of(tiers, chunk) == "ram"
        assert same(get(tiers, chunk), chunk)
        assert tiers.stats().counters["corrupt"] == layer + 1
        assert chunk.key not in tiers._ram.held


def test_a_damaged_copy_of_what_is_gone_below_is_a_miss(tiers: TieredStore, below: Below, make: Make, get: Get) -> None:
    chunk = make(1)
    tiers.put(chunk)
    read(tiers, get, chunk)
    held = tiers._ram.held[chunk.key]
    bad = held.planes[0].copy()
    bad[0] ^= 1
    tiers._ram.held[chunk.key] = replace(held, planes=(bad, *held.planes[1:]))
    found = tiers.find(want(chunk))
    assert not isinstance(found, Miss)
    below.delete(chunk.key, evicted=True)
    with pytest.raises(LostError) as lost:
        found.read(0, chunk.k[0].clone(), chunk.v[0].clone())
    assert lost.value.reason == "evicted"


def test_verify_drops_damaged_copies_and_counts_what_is_below(
    tiers: TieredStore, make: Make, get: Get, same: Same
) -> None:
    for n in range(3):
        tiers.put(make(n))
        read(tiers, get, make(n))
    held = tiers._ram.held[make(1).key]
    bad = held.planes[2].copy()
    bad[-1] ^= 1
    tiers._ram.held[make(1).key] = replace(held, planes=(*held.planes[:2], bad))
    report = tiers.verify()
    assert (report.checked, report.bad) == (3, ())
    assert set(tiers._ram.held) == {make(0).key, make(2).key}
    assert same(get(tiers, make(1)), make(1))


def test_memory_keeps_what_is_used_most(open_tiers: Callable[..., TieredStore], make: Make, get: Get) -> None:
    tiers = open_tiers(room=8)
    for n in range(40):
        tiers.put(make(n))
    for _ in range(5):
        for n in range(3):
            read(tiers, get, make(n))
    for n in range(4, 40):  # each once
        read(tiers, get, make(n))
        read(tiers, get, make(n % 3))
    assert {make(n).key for n in range(3)} < set(tiers._ram.held) and len(tiers._ram.held) == 8
    stats = tiers.stats()
    assert (stats.counters["ram:evicted"], stats.entries) == (39 - 8, 40)


def test_what_does_not_fit_at_all_is_not_even_fetched(
    open_tiers: Callable[..., TieredStore], below: Below, make: Make, make_with: Any, get: Get
) -> None:
    tiers, large = open_tiers(room=2), make_with(tokens=64)(1)
    tiers.put_many([large, make(2)])
    for chunk in (large, make(2)):
        read(tiers, get, chunk)
        read(tiers, get, chunk)
    assert below.fetched == [make(2).key]


def test_warming_and_cooling(open_tiers: Callable[..., TieredStore], below: Below, make: Make, get: Get) -> None:
    tiers = open_tiers(room=4)
    for n in range(8):
        tiers.put(make(n))
    for _ in range(9):
        for n in range(4):
            read(tiers, get, make(n))
    keys = [make(n).key for n in (4, 5)]
    assert tiers.warm([*keys, make(99).key]) == 2  # an operator's word counts more than use
    assert set(keys) <= set(tiers._ram.held) and tier_of(tiers, make(4)) == "ram"
    assert tiers.warm(keys) == 2
    assert tiers.cool([*keys, make(99).key]) == 2 and tiers.cool(keys) == 0
    assert tier_of(tiers, make(4)) == "ssd" and tiers.contains(make(4).key)
    below.fetched.clear()
    assert tiers.warm(make(n).key for n in range(8)) == 4  # no more fits
    assert len(below.fetched) <= 5 + 1 and tiers._ram.bytes <= 4 * size_of(make(0))


def test_only_what_is_not_in_memory_is_prefetched(tiers: TieredStore, below: Below, make: Make, get: Get) -> None:
    for n in range(3):
        tiers.put(make(n))
    read(tiers, get, make(0))
    assert tiers.prefetch(make(n).key for n in (0, 1, 2, 9)) == 3
    assert below.ahead == [make(n).key for n in (1, 2, 9)]


def test_a_pin_holds_below_and_no_memory(open_tiers: Callable[..., TieredStore], make: Make, get: Get) -> None:
    tiers = open_tiers(room=2, admission=False)
    for n in range(4):
        tiers.put(make(n))
    assert tiers.pin([make(0).key]) == 1
    for n in range(4):
        read(tiers, get, make(n))
    entry = tiers.entry(make(0).key)
    assert entry is not None and entry.pinned and make(0).key not in tiers._ram.held


def test_memory_may_hold_another_codec(open_tiers: Callable[..., TieredStore], below: Below, make: Make) -> None:
    """Compressed below, raw in memory: the values are those that the codec made of it, from either tier."""

    class Halves:
        name, version, lossless, direct = "halves", 1, False, False

        def encode(self, k: torch.Tensor, v: torch.Tensor, *, depth: float) -> Bytes:
            packed: Bytes = torch.stack((k, v)).half().flatten().view(torch.uint8).numpy().copy()
            return packed

        def decode(self, plane: Bytes, k: torch.Tensor, v: torch.Tensor) -> None:
            both = torch.from_numpy(plane.copy()).view(torch.float16).reshape(2, *k.shape)
            k.copy_(both[0])
            v.copy_(both[1])

    chunk = make(1)
    assert isinstance(CODECS, dict)
    CODECS["halves"] = Halves()
    try:
        below.put_encoded([encode(chunk, CODECS["halves"])])
        tiers = open_tiers(ram_codec="raw")
        first = tiers.get(want(chunk))
        tiers._promoter.flush()
        held = tiers._ram.held[chunk.key]
        second = tiers.get(want(chunk))
    finally:
        del CODECS["halves"]
    assert held.header.codec.name == "raw" and held.size == 2 * below.stats().bytes
    assert isinstance(first, ChunkKV) and isinstance(second, ChunkKV)
    assert torch.equal(first.k, chunk.k.half().float())
    assert torch.equal(first.k, second.k) and torch.equal(first.v, second.v)
    assert (second.k_position, second.owner) == (chunk.k_position, chunk.owner)


def test_put_later_is_stored_and_a_delete_calls_it_off(
    tiers: TieredStore, below: Below, make: Make, get: Get, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, entered, put_many = threading.Event(), threading.Event(), below.put_many

    def slow(chunks: list[ChunkKV]) -> list[int]:
        entered.set()
        assert gate.wait(30)
        return put_many(chunks)

    monkeypatch.setattr(below, "put_many", slow)
    done = [tiers.put_later(make(0))]
    assert entered.wait(30)
    done += [tiers.put_later(make(n)) for n in (1, 2)]
    assert not tiers.delete(make(2).key)
    gate.set()
    tiers.flush()
    assert [future.result(0) for future in done] == [size_of(make(0))] * 2 + [0]
    assert same(get(tiers, make(0)), make(0)) and not tiers.contains(make(2).key)


def test_closing_writes_what_was_put_later_and_closes_what_is_below(below: Below, make: Make) -> None:
    tiers = TieredStore(StoreConfig(ram_bytes=1 << 20), below)
    seen: list[int] = []
    close = below.close
    below.close = lambda: (seen.append(below.stats().entries), close())[1]  # type: ignore[func-returns-value, method-assign]
    done = [tiers.put_later(make(n)) for n in range(5)]
    tiers.close()
    assert seen == [5] and all(future.done() for future in done) and below.closed
    with pytest.raises(StoreError, match="closed"):
        tiers.put_later(make(9))


def test_the_figures_have_both_tiers_and_count_an_entry_once(tiers: TieredStore, make: Make, get: Get) -> None:
    for n in range(3):
        tiers.put(make(n))
    read(tiers, get, make(0))
    stats = tiers.stats()
    assert (stats.tier, stats.entries, stats.bytes) == (tiers.tier, 3, 3 * size_of(make(0)))
    ram, disk = stats.tiers
    assert (ram.tier, ram.entries, ram.bytes, ram.limit_bytes) == ("ram", 1, size_of(make(0)), 8 * size_of(make(0)))
    assert disk.entries == 3 and ram.held_bytes > ram.bytes


def test_threads_read_put_and_delete_through_both_tiers(
    open_tiers: Callable[..., TieredStore], below: Below, make: Make, get: Get, same: Same
) -> None:
    tiers = open_tiers(room=6)
    chunks = [make(n) for n in range(16)]
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(120):
            chunk = rng.choice(chunks)
            what = rng.random()
            if what < 0.2:
                tiers.put(chunk)
            elif what < 0.3:
                tiers.put_later(chunk)
            elif what < 0.4:
                (below if what < 0.35 else tiers).delete(chunk.key)
            elif what < 0.45:
                tiers.warm([chunk.key])
            else:
                got = get(tiers, chunk)
                if not isinstance(got, Miss) and not same(got, chunk):
                    wrong.append(got)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tiers.flush()
    tiers.gc()
    tiers._promoter.flush()
    assert not wrong and tiers.verify().bad == ()
    assert set(tiers._ram.held) <= {entry.key for entry in below.entries()}
    assert tiers._ram.bytes == sum(held.size for held in tiers._ram.held.values()) <= 6 * size_of(chunks[0])


def test_another_process_deletes_evicts_and_writes_anew_under_a_warm_memory(
    tmp_path: Path, make: Make, get: Get, same: Same
) -> None:
    """Over the real SSD tier: what the process with the memory serves is what is on the disk at that moment."""
    config = StoreConfig(path=tmp_path / "kv", ram_bytes=1 << 24)
    tiers = TieredStore(config, SsdStore(config))
    chunks = [make(n) for n in range(6)]
    tiers.put_many(chunks)
    assert tiers.warm(chunk.key for chunk in chunks) == 6
    assert {tier_of(tiers, chunk) for chunk in chunks} == {"ram"}
    code = """
import sys
from pathlib import Path
from store import KVKey, StoreConfig
from store.ssd import SsdStore
store = SsdStore(StoreConfig(path=Path(sys.argv[1])))
deleted, evicted, anew = (KVKey.from_hex(text) for text in sys.argv[2:])
assert store.delete(deleted) and store.delete(evicted, evicted=True)
entry = store.read_encoded(anew)
assert store.delete(anew) and store.put_encoded([entry])
store.close()
"""
    arguments = [str(tmp_path / "kv"), *(chunk.key.hex for chunk in chunks[:3])]
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=True, timeout=120)
    assert get(tiers, chunks[0]) == Miss("never_precomputed") and get(tiers, chunks[1]) == Miss("evicted")
    assert tier_of(tiers, chunks[2]) == "ssd" and same(get(tiers, chunks[2]), chunks[2])
    assert all(tier_of(tiers, chunk) == "ram" and same(get(tiers, chunk), chunk) for chunk in chunks[3:])
    assert tiers.verify().bad == ()
    tiers.close()


def test_a_remote_tier_serves_what_is_not_here_and_keeps_it_here(
    open_tiers: Callable[..., TieredStore], below: Below, make: Make, get: Get, same: Same
) -> None:
    remote = Elsewhere()
    tiers, chunk = open_tiers(remote=remote), make(1)
    remote.blobs[chunk.key] = pack(*encode(chunk, open_codec("raw")))
    assert tier_of(tiers, chunk) == "remote" and below.contains(chunk.key)
    below.delete(chunk.key)
    assert same(get(tiers, chunk), chunk) and tier_of(tiers, chunk) == "ssd"
    asked = remote.asked
    get(tiers, chunk)
    assert remote.asked == asked
    assert get(tiers, make(2)) == Miss("never_precomputed") and remote.asked == asked + 1


def test_what_is_put_is_put_there_too_and_deleted_there_too(
    open_tiers: Callable[..., TieredStore], below: Below, make: Make, get: Get, same: Same
) -> None:
    remote = Elsewhere()
    tiers, chunk = open_tiers(remote=remote), make(1)
    tiers.put(chunk)
    below.delete(chunk.key, evicted=True)
    assert same(get(tiers, chunk), chunk)
    tiers.delete(chunk.key, evicted=True)
    assert chunk.key in remote.blobs
    assert tiers.warm([chunk.key]) == 1 and tier_of(tiers, chunk) == "ram"
    assert tiers.delete(chunk.key) and remote.blobs == {}
    assert get(tiers, chunk) == Miss("never_precomputed")


def test_a_remote_tier_that_fails_is_a_miss_and_a_line_in_the_log(
    open_tiers: Callable[..., TieredStore], make: Make, get: Get, same: Same, caplog: pytest.LogCaptureFixture
) -> None:
    remote = Elsewhere()
    tiers, chunk = open_tiers(remote=remote), make(1)
    remote.broken = True
    with caplog.at_level(logging.WARNING):
        assert get(tiers, chunk) == Miss("never_precomputed")
        assert tiers.put(chunk) > 0
    assert [record.message.count("no route to host") for record in caplog.records] == [1, 1]
    assert same(get(tiers, chunk), chunk)
    with pytest.raises(RemoteError):  # a copy is still out there: whoever deletes has to know
        tiers.delete(chunk.key)
    assert not tiers.contains(chunk.key)


def test_nothing_that_a_remote_tier_says_is_believed(
    open_tiers: Callable[..., TieredStore], below: Below, make: Make, get: Get
) -> None:
    remote, chunk = Elsewhere(), make(1)
    tiers = open_tiers(remote=remote)
    sound = pack(*encode(chunk, open_codec("raw")))
    rng = random.Random(2)
    lies = [b"", sound[:10], sound[:-1], sound + b"\0", pack(*encode(make(2), open_codec("raw")))]
    for _ in range(200):
        flipped = bytearray(sound)
        flipped[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        lies.append(bytes(flipped))
    for lie in lies:
        remote.blobs[chunk.key] = lie
        assert get(tiers, chunk) == Miss("never_precomputed")
        with pytest.raises(CorruptEntryError):
            unpack(chunk.key, lie)
    assert below.stats().entries == 0
    remote.blobs[chunk.key] = sound
    assert get(tiers, replace(chunk, tokenizer="0000")) == Miss("tokenizer_changed")


def test_what_cannot_be_kept_here_is_served_all_the_same(
    open_tiers: Callable[..., TieredStore],
    below: Below,
    make: Make,
    get: Get,
    same: Same,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remote, chunk = Elsewhere(), make(1)
    tiers = open_tiers(remote=remote)
    remote.blobs[chunk.key] = pack(*encode(chunk, open_codec("raw")))

    def refuse(items: object) -> list[int]:
        raise StoreFullError("no space left on the device")

    monkeypatch.setattr(below, "put_encoded", refuse)
    assert same(get(tiers, chunk), chunk) and not below.contains(chunk.key)


def test_a_packed_entry_is_its_bytes_and_views_of_them(make: Make) -> None:
    chunk = make(1)
    header, planes = encode(chunk, open_codec("raw"))
    held = unpack(chunk.key, pack(header, planes))
    assert held.blob == header and all(np.array_equal(a, b) for a, b in zip(held.planes, planes, strict=True))
    assert not any(plane.flags.writeable for plane in held.planes)
