"""A full store or disk refuses the new entry and keeps the old ones; room that is freed can be used again."""

from __future__ import annotations

import errno
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from store import ChunkKV, KVStore, Miss, StoreConfig, StoreFullError, Want, open_store
from store.evict import Tuner
from store.ssd import SsdStore
from store.ssd.index import Index
from store.types import KVKey

Get = Callable[[KVStore, ChunkKV], ChunkKV | Miss]
Same = Callable[[object, ChunkKV], bool]
Make = Callable[[int], ChunkKV]

LIMIT = 4 << 20


def fill(store: KVStore, maker: Make) -> list[ChunkKV]:
    """Put until full; what went in."""
    stored: list[ChunkKV] = []
    for n in range(1000):
        chunk = maker(n)
        try:
            store.put(chunk)
        except StoreFullError:
            assert not store.contains(chunk.key)
            return stored
        stored.append(chunk)
    raise AssertionError("the store never filled")


def check_full_store(store: KVStore, maker: Make, get: Get, same: Same) -> None:
    """Fill, free and fill again, three times."""
    rounds = []
    for _ in range(3):
        stored = fill(store, maker)
        rounds.append(len(stored))
        assert all(same(get(store, chunk), chunk) for chunk in stored)
        assert store.verify().bad == ()
        assert store.put(stored[0]) == 0  # what is there may be put again
        for chunk in stored[: len(stored) // 2]:
            assert store.delete(chunk.key, evicted=True)
        assert get(store, stored[0]) == Miss("evicted")
        assert store.put(maker(2000)) > 0
        assert same(get(store, maker(2000)), maker(2000))
        store.delete(maker(2000).key)
        for chunk in stored[len(stored) // 2 :]:
            assert store.delete(chunk.key)
        assert store.stats().entries == 0
    # The index keeps the pages it once had: a used store may hold a little less than a new one; but it does not go on.
    assert rounds[1] >= 0.75 * rounds[0] and rounds[2] >= rounds[1] - 2, rounds


def held(path: Path) -> int:
    """Bytes that a store takes on the device, by the file system's word; ``lock.mdb`` is not data."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "lock.mdb"]
    return sum(file.stat().st_blocks * 512 for file in files)


@pytest.mark.parametrize("tokens", [80, 256], ids=["in the index too", "in segments"])
def test_max_bytes_bounds_the_files(tmp_path: Path, make_with: Any, get: Get, same: Same, tokens: int) -> None:
    store = SsdStore(StoreConfig(path=tmp_path / "kv", max_bytes=LIMIT, policy="none"))
    check_full_store(store, make_with(tokens=tokens), get, same)
    fill(store, make_with(tokens=tokens))
    tier = store.stats().tiers[0]
    assert LIMIT // 2 < held(tmp_path / "kv") <= LIMIT
    assert abs(tier.held_bytes - held(tmp_path / "kv")) <= 64 << 10 and tier.limit_bytes == LIMIT
    store.close()


@pytest.mark.parametrize("policy", ["gdsf", "lru"])
@pytest.mark.parametrize("punch", [True, False], ids=["holes are punched", "segments are copied"])
def test_at_the_limit_the_useful_stay_and_the_files_do_not_grow(
    tmp_path: Path, make_with: Any, get: Get, same: Same, policy: str, punch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten favourites are used again and again while many times the limit streams past them."""
    if not punch:  # as on a file system that cannot
        monkeypatch.setattr("store.ssd.files.Files.punch", lambda self, descriptor, offset, length: False)
    maker = make_with(tokens=256)
    config = StoreConfig(path=tmp_path / "kv", max_bytes=LIMIT, policy=policy, admission=False)
    store = SsdStore(config)
    favourites = [maker(n) for n in range(10)]
    for chunk in favourites:
        store.put(chunk)
    most = 0
    for n in range(10, 250):
        store.put(maker(n))
        if n % 4 == 0:
            assert all(same(get(store, chunk), chunk) for chunk in favourites[n // 4 % 2 :: 2])
        most = max(most, held(tmp_path / "kv") if n % 10 == 0 else 0)
    stats = store.stats()
    assert LIMIT // 2 < most <= LIMIT
    assert stats.counters["evicted:capacity"] == 250 - stats.entries
    assert stats.bytes == sum(entry.bytes for entry in store.entries()) > LIMIT // 2
    assert get(store, maker(15)) == Miss("evicted")
    assert store.verify().bad == ()
    store.close()


def test_a_newcomer_nobody_asked_for_does_not_replace_what_is_used(
    tmp_path: Path, make_with: Any, get: Get, same: Same
) -> None:
    maker = make_with(tokens=256)
    store = SsdStore(StoreConfig(path=tmp_path / "kv", max_bytes=LIMIT))
    stored: list[ChunkKV] = []
    refused: list[ChunkKV] = []
    for n in range(60):
        chunk = maker(n)
        (stored if store.put(chunk) else refused).append(chunk)
        for _ in range(3 if chunk in stored else 0):
            assert same(get(store, chunk), chunk)
    assert len(stored) > 20 and len(refused) > 20
    assert store.stats().counters["refused"] == len(refused) and "evicted:capacity" not in store.stats().counters
    assert all(same(get(store, chunk), chunk) for chunk in stored)
    for _ in range(10):  # in the long run it is asked for more often than they are
        assert get(store, refused[0]) == Miss("never_precomputed")
    assert store.put(refused[0]) > 0 and same(get(store, refused[0]), refused[0])
    store.close()


def zipf(rng: np.random.Generator, chunks: int, requests: int) -> list[int]:
    weights = np.arange(1, chunks + 1) ** -0.8
    return [int(n) for n in rng.choice(chunks, requests, p=weights / weights.sum())]


def conversations(rng: np.random.Generator, chunks: int, requests: int) -> list[int]:
    """Each stays with the ten chunks of a topic for a while and does not come back; five at a time."""
    topics = rng.permutation(chunks // 10)
    talks = [int(topics[n]) for n in range(5)]
    asked: list[int] = []
    for n in range(requests):
        if n % 40 == 39:
            talks[n // 40 % 5] = int(topics[(n // 40 + 5) % len(topics)])
        asked.append(10 * talks[n % 5] + int(rng.integers(10)))
    return asked


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of puts, and no crash that they would have to survive."""
    monkeypatch.setattr("lmdb.open", partial(lmdb.open, sync=False))
    monkeypatch.setattr("store.ssd.files.Files.sync", lambda self, descriptor: None)


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize(
    ("trace", "least"), [(conversations, 1.0), (zipf, 1.1)], ids=["recency is all", "popularity is all"]
)
def test_the_disk_finds_out_what_suits_the_traffic(
    tmp_path: Path,
    make_with: Any,
    want: Callable[[ChunkKV], Want],
    monkeypatch: pytest.MonkeyPatch,
    trace: Callable[[np.random.Generator, int, int], list[int]],
    least: float,
) -> None:
    """What is missing is put, as a chat does: as many hits as with ``lru`` where nothing beats it, more elsewhere."""
    now = 1e9
    monkeypatch.setattr("time.time", lambda: now)
    monkeypatch.setattr("store.ssd.uses._EVERY_S", 3600.0)  # written before an eviction only: always the same run
    chunks = [make_with(tokens=96)(n) for n in range(400)]
    asked = trace(np.random.default_rng(7), len(chunks), 1500)
    hits = Counter[str]()
    for policy in ("lru", "gdsf"):
        store = SsdStore(StoreConfig(path=tmp_path / policy, max_bytes=LIMIT, policy=policy))
        for n in asked:
            now += 1.0
            if isinstance(store.find(want(chunks[n])), Miss):
                store.put(chunks[n])
            else:
                hits[policy] += 1
        assert store.stats().counters["evicted:capacity"] > 200
        store.close()
    assert hits["gdsf"] >= least * hits["lru"] > 0, hits


@pytest.mark.usefixtures("unsynced")
def test_a_bulk_load_of_cold_chunks_lists_a_full_store_once(
    tmp_path: Path, make_with: Any, get: Get, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1e9
    monkeypatch.setattr("time.time", lambda: now)
    listed = 0
    items = Index.items

    def counted(self: Index, txn: Any) -> Any:
        nonlocal listed
        listed += 1
        return items(self, txn)

    monkeypatch.setattr(Index, "items", counted)
    maker = make_with(tokens=256)
    store = SsdStore(StoreConfig(path=tmp_path / "kv", max_bytes=LIMIT))
    hot: list[ChunkKV] = []
    while store.put(chunk := maker(len(hot))):
        hot.append(chunk)
        now += 1.0
        assert all(same(get(store, chunk), chunk) for _ in range(3))
    assert len(hot) > 20
    now += 11.0  # the refusal is forgotten
    cold, listed = [maker(n) for n in range(100, 130)], 0
    assert store.put_many(cold) == [0] * 30 and listed == 1
    assert store.stats().counters["refused"] == 31
    now += 11.0  # by then things may have changed
    assert store.put_many(cold) == [0] * 30 and listed == 2
    assert all(same(get(store, chunk), chunk) for chunk in hot)
    assert get(store, cold[-1]) == Miss("never_precomputed")  # now somebody has asked for it
    assert store.put(cold[-1]) > 0 and same(get(store, cold[-1]), cold[-1])
    store.close()


def test_what_an_operator_has_pinned_enters_a_full_store(
    tmp_path: Path, make_with: Any, get: Get, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1e9
    monkeypatch.setattr("time.time", lambda: now)
    maker = make_with(tokens=256)
    store = SsdStore(StoreConfig(path=tmp_path / "kv", max_bytes=LIMIT))
    count = 0
    while store.put(chunk := maker(count)):
        count += 1
        now += 1.0
        assert all(same(get(store, chunk), chunk) for _ in range(3))
    cold, wanted = maker(1000), maker(1001)
    store.pin([wanted.key])
    assert store.put_many([cold, wanted])[0] == 0  # the door has just refused one like it
    assert same(get(store, wanted), wanted)
    now += 11.0
    other = maker(1002)
    store.pin([other.key])
    assert store.put(other) > 0  # nor does the look at who would have to go
    store.close()


def test_the_tuner_hears_of_each_request_once(
    tmp_path: Path, make_with: Any, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Counter[KVKey]()
    monkeypatch.setattr(Tuner, "asked", lambda self, key, bytes, cost, *, now: told.update([key]))
    maker = make_with(tokens=256)
    hit, missed, late, cold, never = (maker(n) for n in range(5))
    for policy in ("lru", "gdsf"):
        store = SsdStore(StoreConfig(path=tmp_path / policy, max_bytes=LIMIT, policy=policy))
        store.put_many([hit, cold])
        for _ in range(2):
            assert isinstance(get(store, hit), ChunkKV)
        store.used(hit.key)  # a copy in memory
        for chunk in (missed, never):
            assert isinstance(get(store, chunk), Miss)
        store.flush()
        store.put(missed)
        assert isinstance(get(store, late), Miss)
        store.put(late)
        store.flush()
        store.delete(missed.key)
        store.put(missed)  # that was not a request
        store.close()
        assert told == ({} if policy == "lru" else {hit.key: 3, missed.key: 1, late.key: 1})


def test_the_codec_auto_packs_closer_as_room_runs_out(tmp_path: Path, make_with: Any) -> None:
    maker = make_with(tokens=256)
    store = SsdStore(StoreConfig(path=tmp_path / "kv", max_bytes=LIMIT, codec="auto"))
    store.put_many([maker(n) for n in range(5)])
    assert {entry.codec for entry in store.entries()} == {"raw"}
    for n in range(5, 80):
        store.put(maker(n))
    assert "raw" not in {entry.codec for entry in store.entries() if entry.bytes < entry.raw_bytes // 2} != set()
    assert store.stats().raw_bytes > LIMIT
    store.close()


def test_the_pinned_are_never_evicted_and_can_fill_a_store(
    tmp_path: Path, make_with: Any, get: Get, same: Same
) -> None:
    maker = make_with(tokens=256)
    store = SsdStore(StoreConfig(path=tmp_path / "kv", max_bytes=LIMIT, admission=False))
    pinned = [maker(n) for n in range(12)]
    store.pin(chunk.key for chunk in pinned)
    for chunk in pinned:
        store.put(chunk)
    for n in range(12, 70):
        store.put(maker(n))
    assert all(same(get(store, chunk), chunk) for chunk in pinned)
    more = [maker(n) for n in range(1000, 1040)]
    store.pin(chunk.key for chunk in more)
    with pytest.raises(StoreFullError, match="pinned"):
        store.put_many(more)
    assert all(same(get(store, chunk), chunk) for chunk in pinned)
    assert store.pin((entry.key for entry in store.entries()), pinned=False) > 20
    assert store.put(maker(2000)) > 0
    store.close()


def test_what_is_unused_for_longer_than_its_time_expires(
    tmp_path: Path, make_with: Any, get: Get, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1e9
    monkeypatch.setattr("time.time", lambda: now)
    store = SsdStore(StoreConfig(path=tmp_path / "kv", ttl_s=100))
    chunks = [make_with(tokens=16 if n % 2 else 256)(n) for n in range(8)]
    store.put_many(chunks)
    store.pin([chunks[7].key])
    now += 60
    assert all(same(get(store, chunk), chunk) for chunk in chunks[:3])
    now += 60
    report = store.gc()
    assert (report.expired, report.evicted) == (4, 0) and report.freed > 0
    assert [get(store, chunk) == Miss("evicted") for chunk in chunks] == [False] * 3 + [True] * 4 + [False]
    assert store.stats().counters["evicted:expired"] == 4
    store.close()


def test_an_owner_above_its_share_makes_room_first(tmp_path: Path, make_with: Any) -> None:
    maker = make_with(tokens=256)
    config = StoreConfig(path=tmp_path / "kv", max_bytes=LIMIT, shares={"greedy": 0.25}, admission=False)
    store = SsdStore(config)
    for n in range(25):
        store.put(replace(maker(n), owner="greedy"))
    assert store.stats().entries == 25  # nobody else wants the room
    for n in range(100, 118):
        store.put(replace(maker(n), owner="modest"))
    by_owner = Counter(entry.owner for entry in store.entries())
    assert by_owner["modest"] == 18 and by_owner["greedy"] < 12
    assert store.stats().counters["evicted:share"] >= 13
    store.close()


def test_those_before_the_one_too_many_are_stored(tmp_path: Path, make_with: Any, get: Get, same: Same) -> None:
    maker = make_with(tokens=256)
    store = SsdStore(StoreConfig(path=tmp_path / "kv", max_bytes=LIMIT, policy="none"))
    chunks = [maker(n) for n in range(60)]
    with pytest.raises(StoreFullError):
        store.put_many(chunks)
    stored = store.stats().entries
    assert stored > 20
    assert all(same(get(store, chunk), chunk) for chunk in chunks[:stored])
    assert get(store, chunks[stored]) == Miss("never_precomputed")
    store.close()


def test_a_chunk_larger_than_the_limit_is_refused(tmp_path: Path, make_with: Any, make: Make) -> None:
    huge = make_with(tokens=60_000)(1)
    for path in (tmp_path / "kv", None):
        store = open_store(StoreConfig(path=path, max_bytes=LIMIT))
        store.put(make(1))
        with pytest.raises(StoreFullError):
            store.put(huge)
        assert [entry.key for entry in store.entries()] == [make(1).key]
        store.close()


def test_a_senseless_limit_is_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4095"):
        StoreConfig(path=tmp_path / "kv", max_bytes=4095)
    with pytest.raises(ValueError, match="0"):
        StoreConfig(max_bytes=0)


def fill_disk(place: Path) -> Path:
    """A file that leaves no byte free."""
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    return ballast


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"cannot mount a small file system: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_refuses_and_recovers(small_disk: Path, make_with: Any, get: Get, same: Same) -> None:
    store = SsdStore(StoreConfig(path=small_disk / "kv"))
    check_full_store(store, make_with(tokens=256), get, same)
    store.close()


def test_a_disk_filled_by_others_refuses_and_recovers(small_disk: Path, make_with: Any, get: Get, same: Same) -> None:
    maker = make_with(tokens=256)
    store = SsdStore(StoreConfig(path=small_disk / "kv"))
    first = [maker(n) for n in range(10)]
    for chunk in first:
        store.put(chunk)
    ballast = fill_disk(small_disk)
    late = maker(11)
    with pytest.raises(StoreFullError):
        store.put(late)
    assert get(store, late) == Miss("never_precomputed")
    assert all(same(get(store, chunk), chunk) for chunk in first)
    assert store.verify().bad == ()
    ballast.unlink()
    assert store.put(late) > 0
    assert same(get(store, late), late)
    store.close()
    store = SsdStore(StoreConfig(path=small_disk / "kv"))
    assert all(same(get(store, chunk), chunk) for chunk in [*first, late])
    store.close()


def test_a_disk_smaller_than_the_limit_is_the_limit(small_disk: Path, make_with: Any, get: Get, same: Same) -> None:
    maker = make_with(tokens=256)
    store = SsdStore(StoreConfig(path=small_disk / "kv", max_bytes=1 << 30, segment_bytes=1 << 20, admission=False))
    for n in range(200):
        store.put(maker(n))
    assert store.stats().counters["evicted:capacity"] > 100 and same(get(store, maker(199)), maker(199))
    assert store.stats().entries > 30 and store.verify().bad == ()
    store.close()


def test_a_disk_too_full_to_open_a_store_says_so(small_disk: Path) -> None:
    fill_disk(small_disk)
    with pytest.raises(StoreFullError):
        SsdStore(StoreConfig(path=small_disk / "kv"))
