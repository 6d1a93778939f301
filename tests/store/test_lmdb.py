"""The store on disk among other processes, crashes, threads and strange folders."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch

from store import (
    ChunkKV,
    KVStore,
    LmdbStore,
    MemoryStore,
    Miss,
    StoreError,
    StoreFormatError,
    open_store,
)

Get = Callable[[KVStore, ChunkKV], ChunkKV | Miss]
Same = Callable[[object, ChunkKV], bool]
Make = Callable[[int], ChunkKV]

# Forked children start in milliseconds; a fresh interpreter imports torch for seconds.
FORK = multiprocessing.get_context("fork")
TINY = 1 << 20


def child_of(work: Callable[..., None], *args: Any) -> Any:
    """A process, not yet started, that will do ``work``.

    On one thread: a forked child has lost the threads of its parent's OpenMP pool and would wait for them for ever.
    """

    def alone() -> None:
        torch.set_num_threads(1)
        work(*args)

    return FORK.Process(target=alone, daemon=True)


def in_child(work: Callable[[], None]) -> int:
    """The exit code of ``work`` in another process."""
    child = child_of(work)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def test_a_killed_writer_leaves_every_entry_complete_or_absent(
    tmp_path: Path, make_with: Any, get: Get, same: Same
) -> None:
    chunks = [make_with(tokens=64)(n) for n in range(64)]
    path, seen = tmp_path / "kv", set()

    def work(ready: Any) -> None:
        store = LmdbStore(path, map_size=TINY)
        ready.set()
        while True:
            chunk = rng.choice(chunks)
            if rng.random() < 0.7:
                store.put(chunk)
            else:
                store.delete(chunk.key)

    rng = random.Random()
    for _ in range(10):
        ready = FORK.Event()
        child = child_of(work, ready)
        child.start()
        assert ready.wait(30)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        store = LmdbStore(path)
        assert store.verify().bad == ()
        for chunk in chunks:
            got = get(store, chunk)
            assert same(got, chunk) or got == Miss("never_precomputed"), got
        seen.add(store.stats().entries)
        assert store.stats().bytes == sum(entry.bytes for entry in store.entries())
        store.close()
    assert len(seen) > 1, "every kill hit the same moment: the test shows nothing"


def test_a_reader_follows_a_writer_in_another_process_as_the_map_grows(
    tmp_path: Path, make_with: Any, get: Get, same: Same
) -> None:
    chunks = [make_with(tokens=512)(n) for n in range(40)]  # 15 MiB in all
    LmdbStore(tmp_path / "kv", map_size=TINY).close()

    def write() -> None:
        store = LmdbStore(tmp_path / "kv", map_size=TINY)
        for chunk in chunks:
            store.put(chunk)
        store.close()

    child = child_of(write)
    child.start()
    reader = LmdbStore(tmp_path / "kv", readonly=True, map_size=TINY)
    seen: set[int] = set()
    deadline = time.monotonic() + 30
    while len(seen) < len(chunks) and time.monotonic() < deadline:
        for n, chunk in enumerate(chunks):
            got = get(reader, chunk)
            if isinstance(got, ChunkKV):
                assert same(got, chunk)
                seen.add(n)
            else:
                assert got == Miss("never_precomputed") and n not in seen
    child.join(30)
    assert child.exitcode == 0 and len(seen) == len(chunks)
    reader.close()


def test_two_processes_write_at_once_and_both_maps_grow(tmp_path: Path, make_with: Any, get: Get, same: Same) -> None:
    chunks = [make_with(tokens=256)(n) for n in range(48)]
    LmdbStore(tmp_path / "kv", map_size=TINY).close()

    def write(part: int) -> None:
        store = LmdbStore(tmp_path / "kv", map_size=TINY)
        for chunk in chunks[part::2]:
            store.put(chunk)
        for chunk in chunks:
            got = get(store, chunk)
            assert same(got, chunk) or got == Miss("never_precomputed")
        store.close()

    children = [child_of(write, part) for part in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    store = LmdbStore(tmp_path / "kv")
    assert all(same(get(store, chunk), chunk) for chunk in chunks)
    assert store.stats().bytes == sum(entry.bytes for entry in store.entries())
    store.close()


def test_threads_read_while_the_map_is_replaced(tmp_path: Path, make_with: Any, get: Get, same: Same) -> None:
    chunks = [make_with(tokens=512)(n) for n in range(24)]
    store = LmdbStore(tmp_path / "kv", map_size=TINY)
    store.put(chunks[0])
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            got = get(store, chunks[0])
            if not same(got, chunks[0]):
                wrong.append(got)
            list(store.entries())
            store.stats()

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for chunk in chunks:
        store.put(chunk)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.stats().entries == len(chunks)
    store.close()


def test_entries_survive_closing(tmp_path: Path, make: Make, get: Get, same: Same) -> None:
    store = open_store(tmp_path / "a" / "kv")
    assert isinstance(store, LmdbStore) and store.tier == "ssd"
    store.put(make(1))
    store.put(make(2))
    store.delete(make(2).key, evicted=True)
    store.close()
    store = open_store(tmp_path / "a" / "kv")
    assert same(get(store, make(1)), make(1))
    assert get(store, make(2)) == Miss("evicted")
    store.close()
    with pytest.raises(StoreError, match="closed"):
        get(store, make(1))
    store.close()


def test_a_store_without_a_path_is_in_memory() -> None:
    assert isinstance(open_store(None), MemoryStore)
    with pytest.raises(ValueError, match="readonly"):
        open_store(None, readonly=True)


def test_a_readonly_store_reads_and_refuses_to_write(tmp_path: Path, make: Make, get: Get, same: Same) -> None:
    with pytest.raises(StoreFormatError, match="not a folder"):
        open_store(tmp_path / "none", readonly=True)
    assert not (tmp_path / "none").exists()
    store = open_store(tmp_path / "kv")
    store.put(make(1))
    store.close()
    store = open_store(tmp_path / "kv", readonly=True)
    assert same(get(store, make(1)), make(1))
    for write in (
        lambda: store.put(make(2)),
        lambda: store.delete(make(1).key),
        lambda: store.verify(repair=True),
    ):
        with pytest.raises(StoreError, match="read-only"):
            write()
    store.close()


def test_opening_twice_in_one_process_is_refused_clearly(tmp_path: Path, make: Make, get: Get) -> None:
    first = open_store(tmp_path / "kv")
    with pytest.raises(StoreError, match="already open in this process"):
        open_store(tmp_path / "kv")
    first.put(make(1))  # the refused attempt did no harm
    first.close()
    open_store(tmp_path / "kv").close()


def foreign_lmdb(path: Path) -> None:
    env = lmdb.open(str(path), max_dbs=5)
    with env.begin(write=True) as txn:
        txn.put(b"meta", b"mine")
    env.close()


def other_program(path: Path) -> None:
    env = lmdb.open(str(path), max_dbs=5)
    for name in (b"headers", b"planes", b"sources", b"tombstones", b"meta"):
        env.open_db(name)
    env.close()


def newer_format(path: Path) -> None:
    LmdbStore(path).close()
    env = lmdb.open(str(path), max_dbs=5)
    with env.begin(write=True) as txn:
        txn.put(b"format", (2).to_bytes(4, "little"), db=env.open_db(b"meta", txn=txn))
    env.close()


def someones_files(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def not_lmdb(path: Path) -> None:
    path.mkdir()
    (path / "data.mdb").write_bytes(b"hello" * 5000)


def a_file(path: Path) -> None:
    path.write_text("mine")


@pytest.mark.parametrize("prepare", [foreign_lmdb, other_program, newer_format, someones_files, not_lmdb, a_file])
@pytest.mark.parametrize("readonly", [False, True])
def test_a_folder_that_is_not_ours_is_refused_and_left_alone(
    tmp_path: Path, prepare: Callable[[Path], None], readonly: bool
) -> None:
    path = tmp_path / "kv"
    prepare(path)

    def content() -> dict[str, bytes]:
        files = [path] if path.is_file() else path.iterdir()
        return {f.name: f.read_bytes() for f in files if f.name != "lock.mdb"}

    before = content()
    for _ in range(2):  # the refusal leaves nothing open behind
        with pytest.raises(StoreFormatError, match="kv"):
            open_store(path, readonly=readonly)
    assert content() == before


def test_files_are_for_the_owner_only(tmp_path: Path) -> None:
    open_store(tmp_path / "kv").close()
    for file in (tmp_path / "kv").iterdir():
        assert file.stat().st_mode & 0o077 == 0
