"""The store on disk among other processes, threads and strange folders."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch

from store import (
    FORMAT_VERSION,
    ChunkKV,
    KVKey,
    KVStore,
    LostError,
    Miss,
    StoreConfig,
    StoreError,
    StoreFormatError,
    Want,
    open_store,
)
from store.errors import CorruptEntryError
from store.memory import MemoryStore
from store.ssd import Files, SsdStore

Get = Callable[[KVStore, ChunkKV], ChunkKV | Miss]
Same = Callable[[object, ChunkKV], bool]
Make = Callable[[int], ChunkKV]

# Forked children start in milliseconds; a fresh interpreter imports torch for seconds.
FORK = multiprocessing.get_context("fork")


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


class SsdReader:
    """A store open in another process, asked through pipes."""

    def __init__(self, config: StoreConfig) -> None:
        self._pipe, theirs = FORK.Pipe()
        self._child = child_of(self._serve, config, theirs)
        self._child.start()

    def ask(self, chunks: list[ChunkKV]) -> list[bool]:
        """Which of the chunks it can read."""
        self._pipe.send([(c.key, c.layout, c.token_ids, c.source, c.tokenizer) for c in chunks])
        return list(self._pipe.recv())

    def held(self) -> int:
        """How many segment files it has open."""
        self._pipe.send(None)
        return int(self._pipe.recv())

    def stop(self) -> None:
        self._pipe.send("stop")
        self._child.join(30)
        assert self._child.exitcode == 0

    @staticmethod
    def _serve(config: StoreConfig, pipe: Any) -> None:
        store = SsdStore(config)
        while True:
            asked = pipe.recv()
            if asked == "stop":
                return
            if asked is None:
                store.stats()
                store.used(KVKey(bytes(32)))
                opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
                pipe.send(sum(str(config.path) in name and ".seg" in name for name in opened))
            else:
                pipe.send([isinstance(store.get(Want(*fields)), ChunkKV) for fields in asked])


def test_a_reader_follows_a_writer_in_another_process_as_the_map_grows(
    tmp_path: Path, make_with: Any, get: Get, same: Same
) -> None:
    chunks = [make_with(tokens=512)(n) for n in range(40)]  # 15 MiB in all
    SsdStore(StoreConfig(path=tmp_path / "kv")).close()

    def write() -> None:
        store = SsdStore(StoreConfig(path=tmp_path / "kv"))
        for chunk in chunks:
            store.put(chunk)
        store.close()

    child = child_of(write)
    child.start()
    reader = SsdStore(StoreConfig(path=tmp_path / "kv", readonly=True))
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
    SsdStore(StoreConfig(path=tmp_path / "kv")).close()

    def write(part: int) -> None:
        store = SsdStore(StoreConfig(path=tmp_path / "kv"))
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
    store = SsdStore(StoreConfig(path=tmp_path / "kv"))
    assert all(same(get(store, chunk), chunk) for chunk in chunks)
    assert store.stats().bytes == sum(entry.bytes for entry in store.entries())
    store.close()


def test_threads_read_while_the_map_is_replaced(tmp_path: Path, make_with: Any, get: Get, same: Same) -> None:
    chunks = [make_with(tokens=512)(n) for n in range(24)]
    store = SsdStore(StoreConfig(path=tmp_path / "kv"))
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
    store = open_store(StoreConfig(path=tmp_path / "a" / "kv"))
    assert isinstance(store, SsdStore) and store.tier == "ssd"
    store.put(make(1))
    store.put(make(2))
    store.delete(make(2).key, evicted=True)
    store.close()
    store = open_store(StoreConfig(path=tmp_path / "a" / "kv"))
    assert same(get(store, make(1)), make(1))
    assert get(store, make(2)) == Miss("evicted")
    store.close()
    with pytest.raises(StoreError, match="closed"):
        get(store, make(1))
    store.close()


def test_a_store_without_a_path_is_in_memory() -> None:
    assert isinstance(open_store(StoreConfig()), MemoryStore)
    with pytest.raises(ValueError, match="readonly"):
        StoreConfig(readonly=True)


def test_a_readonly_store_reads_and_refuses_to_write(tmp_path: Path, make: Make, get: Get, same: Same) -> None:
    with pytest.raises(StoreFormatError, match="not a folder"):
        open_store(StoreConfig(path=tmp_path / "none", readonly=True))
    assert not (tmp_path / "none").exists()
    store = open_store(StoreConfig(path=tmp_path / "kv"))
    store.put(make(1))
    store.close()
    store = open_store(StoreConfig(path=tmp_path / "kv", readonly=True))
    assert same(get(store, make(1)), make(1))
    for write in (
        lambda: store.put(make(2)),
        lambda: store.delete(make(1).key),
        lambda: store.verify(repair=True),
        lambda: store.pin([make(1).key]),
        lambda: store.gc(),
    ):
        with pytest.raises(StoreError, match="read-only"):
            write()
    store.close()


def test_opening_twice_in_one_process_is_refused_clearly(tmp_path: Path, make: Make, get: Get) -> None:
    first = open_store(StoreConfig(path=tmp_path / "kv"))
    with pytest.raises(StoreError, match="already open in this process"):
        open_store(StoreConfig(path=tmp_path / "kv"))
    first.put(make(1))  # the refused attempt did no harm
    first.close()
    open_store(StoreConfig(path=tmp_path / "kv")).close()


def foreign_lmdb(path: Path) -> None:
    env = lmdb.open(str(path), max_dbs=5)
    with env.begin(write=True) as txn:
        txn.put(b"meta", b"mine")
    env.close()


def other_program(path: Path) -> None:
    env = lmdb.open(str(path), max_dbs=9)
    for name in (
        b"entries",
        b"payloads",
        b"usage",
        b"pins",
        b"tombstones",
        b"sources",
        b"segments",
        b"graves",
        b"meta",
    ):
        env.open_db(name)
    env.close()


def newer_format(path: Path) -> None:
    SsdStore(StoreConfig(path=path)).close()
    env = lmdb.open(str(path), max_dbs=9)
    with env.begin(write=True) as txn:
        txn.put(b"format", (FORMAT_VERSION + 1).to_bytes(4, "little"), db=env.open_db(b"meta", txn=txn))
    env.close()


def older_format(path: Path) -> None:
    """As version 1 left it: all in LMDB."""
    env = lmdb.open(str(path), max_dbs=5)
    with env.begin(write=True) as txn:
        meta = [env.open_db(name, txn=txn) for name in (b"headers", b"planes", b"sources", b"tombstones", b"meta")][-1]
        txn.put(b"program", b"ragblend kv store", db=meta)
        txn.put(b"format", (1).to_bytes(4, "little"), db=meta)
    env.close()


def someones_files(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def not_lmdb(path: Path) -> None:
    path.mkdir()
    (path / "data.mdb").write_bytes(b"hello" * 5000)


def a_file(path: Path) -> None:
    path.write_text("mine")


@pytest.mark.parametrize(
    "prepare", [foreign_lmdb, other_program, newer_format, older_format, someones_files, not_lmdb, a_file]
)
@pytest.mark.parametrize("readonly", [False, True])
def test_a_folder_that_is_not_ours_is_refused_and_left_alone(
    tmp_path: Path, prepare: Callable[[Path], None], readonly: bool
) -> None:
    path = tmp_path / "kv"
    prepare(path)

    def content() -> dict[str, bytes]:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        return {f.name: f.read_bytes() for f in files if f.name != "lock.mdb"}

    before = content()
    for _ in range(2):  # the refusal leaves nothing open behind
        with pytest.raises(StoreFormatError, match="kv"):
            open_store(StoreConfig(path=path, readonly=readonly))
    assert content() == before


def test_files_are_for_the_owner_only(tmp_path: Path, make_with: Any) -> None:
    store = SsdStore(StoreConfig(path=tmp_path / "kv"))
    store.put(make_with(tokens=300)(1))
    store.close()
    files = list((tmp_path / "kv").rglob("*"))
    assert {file.name for file in files} == {"data.mdb", "lock.mdb", "segments", "00000001.seg"}
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)


def test_readers_and_a_collector_in_another_process_do_not_disturb_each_other(
    tmp_path: Path, make_with: Any, want: Callable[[ChunkKV], Want]
) -> None:
    """A child deletes, puts and collects all the time; what is read is right or lost, never damage."""
    chunks = [make_with(tokens=200)(n) for n in range(24)]
    config = StoreConfig(path=tmp_path / "kv", segment_bytes=256 << 10)
    store = SsdStore(config)
    store.put_many(chunks)
    stop = FORK.Event()

    def churn() -> None:
        rng, mine = random.Random(1), SsdStore(config)
        while not stop.is_set():
            some = rng.sample(chunks, 8)
            for chunk in some:
                mine.delete(chunk.key, evicted=rng.random() < 0.5)
            mine.gc(full=True)
            mine.put_many(some)
        mine.close()

    store.close()
    child = child_of(churn)
    child.start()
    store = SsdStore(config)
    rng, read = random.Random(2), 0
    lost: set[str] = set()
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        chunk = rng.choice(chunks)
        found = store.find(want(chunk))
        if isinstance(found, Miss):
            assert found.reason in ("evicted", "never_precomputed")
            continue
        k, v = torch.empty(2, *chunk.k.shape[1:])
        try:
            for layer in range(chunk.layout.layers):
                found.read(layer, k, v)
                assert torch.equal(k, chunk.k[layer]) and torch.equal(v, chunk.v[layer])
                read += 1
                time.sleep(rng.random() / 500)
        except LostError as error:
            lost.add(error.reason)
    stop.set()
    child.join(60)
    assert child.exitcode == 0 and read > 50 and lost <= {"evicted"}
    assert store.stats().counters.get("corrupt", 0) == 0 and store.verify().bad == ()
    store.close()


def test_what_was_found_is_read_where_a_collection_has_moved_it(
    tmp_path: Path, make_with: Any, want: Callable[[ChunkKV], Want]
) -> None:
    class NoHoles(Files):
        def punch(self, descriptor: int, offset: int, length: int) -> bool:
            return False

    chunks = [make_with(tokens=200)(n) for n in range(3)]
    store = SsdStore(StoreConfig(path=tmp_path / "kv"), files=NoHoles())
    store.put_many(chunks)
    generation = store.generation(chunks[1].key)
    found = store.find(want(chunks[1]))
    assert not isinstance(found, Miss)
    k, v = torch.empty(2, *chunks[1].k.shape[1:])
    found.read(0, k, v)
    store.delete(chunks[0].key)
    store.delete(chunks[2].key)
    assert store.gc(full=True).moved > 0
    assert not (tmp_path / "kv" / "segments" / "00000001.seg").exists()
    assert store.generation(chunks[1].key) == generation is not None
    for layer in (1, 2):
        found.read(layer, k, v)
        assert torch.equal(k, chunks[1].k[layer]) and torch.equal(v, chunks[1].v[layer])
    store.delete(chunks[1].key)
    store.put(chunks[1])
    assert store.generation(chunks[1].key) != generation
    found.read(0, k, v)  # the same bytes again
    assert torch.equal(k, chunks[1].k[0])
    store.close()


def test_a_removed_segment_is_let_go_of(
    tmp_path: Path, make_with: Any, get: Get, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that another process has removed takes its room until the last descriptor is closed."""
    chunks = [make_with(tokens=200)(n) for n in range(4)]
    config = StoreConfig(path=tmp_path / "kv", segment_bytes=1)  # one record per segment
    store = SsdStore(config)
    store.put_many(chunks)
    monkeypatch.setattr("store.ssd.store._SWEEP_S", 0.0)
    store.close()
    reader = SsdReader(config)
    store = SsdStore(config)
    assert reader.ask(chunks) == [True] * 4
    for chunk in chunks[:3]:
        store.delete(chunk.key)
    assert reader.ask(chunks) == [False] * 3 + [True]
    assert reader.held() == 1
    reader.stop()
    store.close()


def test_a_group_costs_one_sync_of_its_segment(tmp_path: Path, make_with: Any) -> None:
    class Counting(Files):
        syncs = 0

        def sync(self, descriptor: int) -> None:
            self.syncs += 1
            super().sync(descriptor)

    files = Counting()
    store = SsdStore(StoreConfig(path=tmp_path / "kv"), files=files)
    store.put_many([make_with(tokens=200)(n) for n in range(10)])
    assert files.syncs == 1
    store.put(make_with(tokens=200)(11))
    assert files.syncs == 2
    store.put(make_with(tokens=16)(12))  # in the index
    assert files.syncs == 2
    store.close()


def test_uses_outlast_the_process(tmp_path: Path, make: Make, get: Get) -> None:
    config = StoreConfig(path=tmp_path / "kv")
    store = SsdStore(config)
    store.put(make(1))
    before = store.entry(make(1).key)
    for _ in range(5):
        get(store, make(1))
    store.close()
    store = SsdStore(config)
    after = store.entry(make(1).key)
    assert before is not None and after is not None
    assert after.frequency > before.frequency + 4 and after.created == before.created
    store.close()


def test_encoded_entries_go_from_store_to_store_untouched(tmp_path: Path, make_with: Any, get: Get, same: Same) -> None:
    chunks = [make_with(tokens=tokens)(tokens) for tokens in (16, 200)]
    first, second = (SsdStore(StoreConfig(path=tmp_path / name)) for name in "ab")
    first.put_many(chunks)
    items = [first.read_encoded(chunk.key) for chunk in chunks]
    assert first.read_encoded(make_with()(5).key) is None
    sent = [item for item in items if item is not None]
    assert second.put_encoded(sent) == [chunk.layout.token_bytes * len(chunk.token_ids) for chunk in chunks]
    assert all(same(get(second, chunk), chunk) for chunk in chunks)
    header, planes = sent[1]
    planes[2][5] ^= 1
    with pytest.raises(CorruptEntryError):
        second.put_encoded([(header, planes)])
    with pytest.raises(CorruptEntryError):
        second.put_encoded([(header, planes[:2])])
    assert second.stats().entries == 2
    first.close()
    second.close()


def test_a_chunk_larger_than_a_segment_gets_one_of_its_own(
    tmp_path: Path, make_with: Any, get: Get, same: Same
) -> None:
    chunks = [make_with(tokens=tokens)(tokens) for tokens in (200, 4000, 210, 220)]
    store = SsdStore(StoreConfig(path=tmp_path / "kv", segment_bytes=512 << 10))
    store.put_many(chunks)
    assert all(same(get(store, chunk), chunk) for chunk in chunks)
    assert len(list((tmp_path / "kv" / "segments").iterdir())) == 3
    store.close()


def test_more_segments_than_descriptors(
    tmp_path: Path, make_with: Any, want: Callable[[ChunkKV], Want], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only some files stay open, but what a reader holds does, and no descriptor becomes another file's under it."""
    monkeypatch.setattr("store.ssd.segment._MOST_OPEN", 2)
    chunks = [make_with(tokens=200)(n) for n in range(12)]
    store = SsdStore(StoreConfig(path=tmp_path / "kv", segment_bytes=1))
    store.put_many(chunks)
    before = len(os.listdir("/proc/self/fd"))
    found = [store.find(want(chunk)) for chunk in chunks]
    for chunk, entry in zip(chunks, found, strict=True):
        assert not isinstance(entry, Miss)
        k, v = torch.empty(2, *chunk.k.shape[1:])
        entry.read(1, k, v)
        assert torch.equal(k, chunk.k[1])
    del found, entry
    assert len(os.listdir("/proc/self/fd")) <= before
    store.close()


def test_what_a_crash_left_above_the_tail_is_cut_before_a_delete_and_a_put(tmp_path: Path, make_with: Any) -> None:
    chunks = [make_with(tokens=200)(n) for n in range(2)]
    segment = tmp_path / "kv" / "segments" / "00000001.seg"
    store = SsdStore(StoreConfig(path=tmp_path / "kv"))
    store.put(chunks[0])
    tail = segment.stat().st_size
    for write in (lambda: store.put(chunks[1]), lambda: store.delete(chunks[0].key)):
        with segment.open("ab") as file:
            file.write(b"x" * 1_000_000)
        write()
        assert segment.stat().st_size in (tail, 2 * tail)
    store.close()


def test_files_of_which_little_is_left_do_not_pile_up(
    tmp_path: Path, make_with: Any, get: Get, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holes take no room, but every file has a name: of forty, most are merged when little is left in each."""
    monkeypatch.setattr("store.ssd.room._FEW_FILES", 4)
    maker = make_with(tokens=100)  # 8 records per segment
    store = SsdStore(StoreConfig(path=tmp_path / "kv", segment_bytes=360 << 10))
    kept: list[ChunkKV] = []
    for start in range(0, 320, 8):
        group = [maker(n) for n in range(start, start + 8)]
        store.put_many(group)
        kept += group[:1] if start < 160 else []
        for chunk in group[1:] if start < 160 else group:
            store.delete(chunk.key)
    assert all(same(get(store, chunk), chunk) for chunk in kept)
    assert len(list((tmp_path / "kv" / "segments").iterdir())) <= 14
    assert store.verify().bad == ()
    store.close()


def test_a_prefetch_brings_all_of_an_entry_into_the_page_cache(
    tmp_path: Path, make_with: Any, want: Callable[[ChunkKV], Want]
) -> None:
    """In one call the kernel reads no more than its window ahead; what is advised must be there to its last byte."""
    chunk = make_with(tokens=60_000)(1)  # 23 MB
    store = SsdStore(StoreConfig(path=tmp_path / "kv"))
    store.put(chunk)
    segment = tmp_path / "kv" / "segments" / "00000001.seg"
    for fetch in ("prefetch", "advise"):
        with segment.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cached_share(segment) > 0.1:
            store.close()
            pytest.skip("the file system keeps what it was told to drop")
        if fetch == "prefetch":
            assert store.prefetch([chunk.key]) == 1
        else:
            found = store.find(want(chunk))
            assert not isinstance(found, Miss)
            found.advise()
        deadline = time.monotonic() + 20
        while cached_share(segment) < 0.98 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert cached_share(segment) >= 0.98  # all but its header, which the index has
    store.close()


def cached_share(path: Path) -> float:
    """How much of a file is in the page cache, by mincore(2)."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as m,
    ):
        first = ctypes.c_char.from_buffer(m)
        there = (ctypes.c_ubyte * pages)()
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), there)
        del first
    assert not failed
    return sum(page & 1 for page in there) / pages


def test_many_are_deleted_at_once(tmp_path: Path, make_with: Any, get: Get, same: Same) -> None:
    chunks = [make_with(tokens=16 if n % 3 else 200)(n) for n in range(30)]
    store = SsdStore(StoreConfig(path=tmp_path / "kv"))
    store.put_many(chunks)
    gone = [chunk.key for chunk in chunks[:20]]
    assert store.delete_many([*gone, gone[3], make_with()(99).key]) == 20
    assert [get(store, chunk) for chunk in chunks[:20]] == [Miss("never_precomputed")] * 20
    assert all(same(get(store, chunk), chunk) for chunk in chunks[20:])
    assert store.delete_many((chunk.key for chunk in chunks), evicted=True) == 10
    assert [get(store, chunk) for chunk in chunks[20:]] == [Miss("evicted")] * 10
    assert store.stats().counters == {"put": 30, "deleted": 20, "evicted:asked": 10}
    store.close()
