"""A full store or disk refuses the new entry and keeps the old ones; room that is freed can be used again."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from store import ChunkKV, KVStore, LmdbStore, MemoryStore, Miss, StoreFullError, open_store

Get = Callable[[KVStore, ChunkKV], ChunkKV | Miss]
Same = Callable[[object, ChunkKV], bool]
Make = Callable[[int], ChunkKV]

LIMIT = 8 << 20


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
    # A plane needs contiguous pages, so a used file holds less than a new one; but it does not go on.
    assert rounds[1] >= 0.75 * rounds[0] and rounds[2] >= rounds[1] - 2, rounds


def test_max_bytes_bounds_the_file(tmp_path: Path, make_with: Any, get: Get, same: Same) -> None:
    store = LmdbStore(tmp_path / "kv", max_bytes=LIMIT, map_size=1 << 20)
    check_full_store(store, make_with(tokens=256), get, same)
    size = (tmp_path / "kv" / "data.mdb").stat().st_size
    assert LIMIT // 2 < size <= LIMIT
    store.close()


def test_a_chunk_larger_than_the_limit_is_refused(tmp_path: Path, make_with: Any, make: Make) -> None:
    huge = make_with(tokens=60_000)(1)
    for store in (open_store(tmp_path / "kv", max_bytes=LIMIT), open_store(None, max_bytes=LIMIT)):
        with pytest.raises(StoreFullError):
            store.put(huge)
        assert store.put(make(1)) > 0
        assert [entry.key for entry in store.entries()] == [make(1).key]
        store.close()


def test_a_senseless_limit_is_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4095"):
        open_store(tmp_path / "kv", max_bytes=4095)
    with pytest.raises(ValueError, match="0"):
        open_store(None, max_bytes=0)


def test_memory_evicts_the_least_recently_used(make: Make, get: Get, same: Same) -> None:
    size = make(0).layout.token_bytes * 16
    store = MemoryStore(3 * size)
    for n in (1, 2, 3):
        store.put(make(n))
    assert same(get(store, make(1)), make(1))  # now 2 is the oldest
    store.put(make(4))
    assert get(store, make(2)) == Miss("evicted")
    assert all(same(get(store, make(n)), make(n)) for n in (1, 3, 4))
    assert store.stats().bytes == 3 * size


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
    store = LmdbStore(small_disk / "kv", map_size=1 << 20)
    check_full_store(store, make_with(tokens=256), get, same)
    store.close()


def test_a_disk_filled_by_others_refuses_and_recovers(small_disk: Path, make_with: Any, get: Get, same: Same) -> None:
    maker = make_with(tokens=256)
    store = LmdbStore(small_disk / "kv", map_size=64 << 20)  # a map far larger than the disk
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
    store = LmdbStore(small_disk / "kv")
    assert all(same(get(store, chunk), chunk) for chunk in [*first, late])
    store.close()


def test_a_disk_too_full_to_open_a_store_says_so(small_disk: Path) -> None:
    fill_disk(small_disk)
    with pytest.raises(StoreFullError):
        LmdbStore(small_disk / "kv")
