"""A collection gives dead bytes back and loses nothing, whoever reads, writes or dies meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from store import ChunkKV, KVStore, Miss, StoreConfig, StoreFullError, StoreIOError
from store.check import read_whole
from store.ssd import SsdStore
from store.ssd import collect as collecting
from store.ssd.collect import collect
from store.ssd.files import Files
from tests.store.conftest import Make, want_of

Get = Callable[[KVStore, ChunkKV], ChunkKV | Miss]
Same = Callable[[object, ChunkKV], bool]

SEGMENT = 1 << 20
CHUNKS = [Make(tokens=300)(n) for n in range(48)]  # of 120 KiB: eight in a segment


class NoHoles(Files):
    """A file system that cannot give back blocks from the middle of a file."""

    def punch(self, descriptor: int, offset: int, length: int) -> bool:
        return False


@pytest.fixture(params=["holes", "no holes"])
def files(request: pytest.FixtureRequest) -> Files:
    return Files() if request.param == "holes" else NoHoles()


@pytest.fixture
def filled(tmp_path: Path, files: Files) -> Iterator[SsdStore]:
    """Six segments, five of them full and sealed."""
    store = SsdStore(StoreConfig(path=tmp_path / "kv", segment_bytes=SEGMENT), files=files)
    store.put_many(CHUNKS)
    yield store
    store.close()


def segments(store: SsdStore) -> dict[int, Any]:
    return store._parts.db.read(store._parts.index.segments)


def files_of(store: SsdStore) -> dict[str, int]:
    """Name -> bytes on the device."""
    return {p.name: p.stat().st_blocks * 512 for p in (store.path / "segments").iterdir()}


def delete_but_every(store: SsdStore, nth: int) -> list[ChunkKV]:
    """Leave every n-th; those."""
    for n, chunk in enumerate(CHUNKS):
        if n % nth:
            store.delete(chunk.key)
    return CHUNKS[::nth]


@pytest.mark.parametrize("nth", [2, 7, 100])
def test_a_full_collection_leaves_no_dead_bytes(filled: SsdStore, get: Get, same: Same, nth: int) -> None:
    before = sum(files_of(filled).values())
    left = delete_but_every(filled, nth)
    report = filled.gc(full=True)
    assert sum(extent.dead for extent in segments(filled).values()) == 0
    live = sum(extent.live for extent in segments(filled).values())
    assert sum(files_of(filled).values()) == live < before
    assert set(files_of(filled)) == {f"{number:08}.seg" for number in segments(filled)}
    assert all(same(get(filled, chunk), chunk) for chunk in left)
    assert (filled.verify().bad, filled.stats().entries) == ((), len(left))
    assert filled.stats().bytes == sum(entry.bytes for entry in filled.entries())
    assert report.moved <= live
    again = filled.gc(full=True)
    assert (again.freed, again.moved) == (0, 0)


def test_what_a_collection_says_it_freed_is_free(tmp_path: Path, get: Get) -> None:
    store = SsdStore(StoreConfig(path=tmp_path / "kv", segment_bytes=SEGMENT), files=NoHoles())
    store.put_many(CHUNKS)
    delete_but_every(store, 2)
    before = sum(files_of(store).values())
    report = store.gc(full=True)
    assert before - sum(files_of(store).values()) == pytest.approx(report.freed, abs=256 << 10)  # the index shrinks not
    assert report.moved == 24 * 122_880
    store.close()


def test_segments_in_which_nothing_lives_go_without_a_copy(filled: SsdStore) -> None:
    for chunk in CHUNKS[:20]:
        filled.delete(chunk.key)
    report = filled.gc()
    assert report.moved <= 4 * 122_880  # of the third segment at most, which is half dead
    assert {"00000001.seg", "00000002.seg"}.isdisjoint(files_of(filled))


def test_a_segment_with_few_dead_bytes_is_left_alone(filled: SsdStore) -> None:
    filled.delete(CHUNKS[0].key)
    assert filled.gc().moved == 0
    assert filled.gc(full=True).moved in (0, 7 * 122_880)  # a hole is no dead byte


def test_a_bounded_collection_takes_the_worst_segment_first(tmp_path: Path) -> None:
    store = SsdStore(StoreConfig(path=tmp_path / "kv", segment_bytes=SEGMENT), files=NoHoles())
    store.put_many(CHUNKS)
    for n in [*range(8, 11), *range(16, 22), *range(24, 28)]:  # of the second 3, the third 6, the fourth 4 of eight
        store.delete(CHUNKS[n].key)
    parts = store._parts

    def run(most: int) -> tuple[int, set[int]]:
        before = set(segments(store))
        done = collect(parts.db, parts.index, parts.segments, parts.appender, most_bytes=most)
        return done.moved, before - set(segments(store))

    assert run(122_880) == (0, set())  # less than any of them needs
    assert run(2 * 122_880) == (2 * 122_880, {3})
    assert run(SEGMENT) == (4 * 122_880, {4})
    assert store.verify().bad == ()
    store.close()


def test_who_reads_a_removed_file_reads_on(filled: SsdStore, same: Same) -> None:
    found = {n: filled.find(want_of(CHUNKS[n])) for n in (0, 8, 40)}
    delete_but_every(filled, 8)
    filled.gc(full=True)
    filled.gc(full=True)
    for n, entry in found.items():
        assert not isinstance(entry, Miss)
        assert same(read_whole(entry, want_of(CHUNKS[n])), CHUNKS[n])


def test_readers_and_writers_go_on_while_it_collects(tmp_path: Path, files: Files, same: Same) -> None:
    store = SsdStore(StoreConfig(path=tmp_path / "kv", segment_bytes=SEGMENT), files=files)
    stays, comes = CHUNKS[:16], CHUNKS[16:]
    store.put_many(CHUNKS)
    wrong: list[object] = []
    stop = threading.Event()

    def read(start: int) -> None:
        n = start
        while not stop.is_set():
            chunk = stays[n % len(stays)]
            got = store.get(want_of(chunk))
            if not same(got, chunk):
                wrong.append((n % len(stays), got))
            n += 1

    def write() -> None:
        n = 0
        while not stop.is_set():
            chunk = comes[n % len(comes)]
            store.delete(chunk.key)
            store.put(chunk)
            n += 1

    def watched(work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=watched, args=a) for a in ((read, 0), (read, 7), (write,))]
    for thread in threads:
        thread.start()
    for _ in range(12):
        store.gc(full=True)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert store.verify().bad == ()
    assert store.stats().counters.get("corrupt", 0) == 0
    store.close()


def test_two_collections_at_once_are_one(tmp_path: Path, get: Get, same: Same) -> None:
    """They choose the same segments; each entry is moved once, each file removed once."""
    store = SsdStore(StoreConfig(path=tmp_path / "kv", segment_bytes=SEGMENT), files=NoHoles())
    for _ in range(4):
        store.put_many(CHUNKS)
        left = delete_but_every(store, 3)
        errors: list[BaseException] = []

        def run(errors: list[BaseException] = errors) -> None:
            try:
                store.gc(full=True)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert all(same(get(store, chunk), chunk) for chunk in left)
        assert store.verify().bad == ()
        assert set(files_of(store)) == {f"{number:08}.seg" for number in segments(store)}
    store.close()


def flip(store: SsdStore, chunk: ChunkKV) -> None:
    """Damage the last byte of an entry's planes."""
    place = store._parts.db.read(lambda txn: store._parts.index.place(txn, chunk.key))
    assert place is not None
    path = store.path / "segments" / f"{place.segment:08}.seg"
    at = place.offset + place.head + place.payload - 1
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_damage_is_not_copied_but_dropped_and_counted(tmp_path: Path, get: Get, same: Same) -> None:
    store = SsdStore(StoreConfig(path=tmp_path / "kv", segment_bytes=SEGMENT), files=NoHoles())
    store.put_many(CHUNKS)
    left = delete_but_every(store, 2)
    for chunk in left[:3]:
        flip(store, chunk)
    store.gc(full=True)
    assert store.stats().counters["corrupt"] == 3
    assert all(get(store, chunk) == Miss("never_precomputed") for chunk in left[:3])
    assert all(same(get(store, chunk), chunk) for chunk in left[3:])
    assert (store.verify().bad, store.stats().entries) == ((), len(left) - 3)
    store.close()


def test_a_segment_whose_file_is_lost_is_forgotten(tmp_path: Path, get: Get, same: Same) -> None:
    store = SsdStore(StoreConfig(path=tmp_path / "kv", segment_bytes=SEGMENT), files=NoHoles())
    store.put_many(CHUNKS)
    store.delete(CHUNKS[0].key)
    store.close()
    (tmp_path / "kv" / "segments" / "00000001.seg").unlink()
    store = SsdStore(StoreConfig(path=tmp_path / "kv", segment_bytes=SEGMENT), files=NoHoles())
    store.gc(full=True)
    assert 1 not in segments(store)
    assert (store.verify().bad, store.stats().entries) == ((), 40)
    assert all(same(get(store, chunk), chunk) for chunk in CHUNKS[8:])
    store.close()


def test_without_room_for_copies_it_says_so_and_changes_nothing(
    tmp_path: Path, get: Get, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SsdStore(StoreConfig(path=tmp_path / "kv", segment_bytes=SEGMENT), files=NoHoles())
    store.put_many(CHUNKS)
    left = delete_but_every(store, 2)
    before = files_of(store)
    monkeypatch.setattr(store._parts.db, "spare_bytes", lambda: 4 * 122_880 - 1)
    with pytest.raises(StoreFullError, match="491520"):
        store.gc(full=True)
    assert files_of(store) == before
    assert all(same(get(store, chunk), chunk) for chunk in left)
    monkeypatch.undo()
    assert store.gc(full=True).freed > 0
    store.close()


def test_puts_at_the_limit_collect_as_they_go(tmp_path: Path, files: Files, get: Get, same: Same) -> None:
    """Where there are no holes too: what is evicted must be copied around before its room can be used."""
    limit = 8 << 20
    config = StoreConfig(path=tmp_path / "kv", segment_bytes=SEGMENT // 2, max_bytes=limit, admission=False)
    store = SsdStore(config, files=files)
    made = Make(tokens=300)
    most = 0
    for n in range(150):
        store.put(made(1000 + n))
        most = max(most, store.stats().tiers[0].held_bytes)
        if n % 3 == 0:
            store.get(want_of(made(1000 + n - n % 7)))
    assert most <= limit + SEGMENT // 2
    there = [entry.key for entry in store.entries()]
    assert len(there) * 122_880 > limit // 3
    assert all(same(get(store, c), c) for c in map(made, range(1000, 1150)) if c.key in there)
    assert (store.verify().bad, store.stats().counters["put"]) == ((), 150)
    store.close()


def test_a_file_of_nobody_is_removed_by_a_writer_only(tmp_path: Path, get: Get, same: Same) -> None:
    path = tmp_path / "kv"
    store = SsdStore(StoreConfig(path=path, segment_bytes=SEGMENT))
    store.put_many(CHUNKS[:10])
    store.close()
    orphan = path / "segments" / "00000009.seg"
    orphan.write_bytes(os.urandom(50_000))
    (path / "segments" / "notes.txt").write_text("somebody's")
    SsdStore(StoreConfig(path=path, readonly=True)).close()
    assert orphan.exists()
    store = SsdStore(StoreConfig(path=path, segment_bytes=SEGMENT))
    assert not orphan.exists()
    assert (path / "segments" / "notes.txt").exists()
    assert all(same(get(store, chunk), chunk) for chunk in CHUNKS[:10])
    store.close()


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_what_was_put_anew_while_it_was_read_is_not_overtaken(
    tmp_path: Path, get: Get, same: Same, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """Deleted, or deleted and put again, in another codec perhaps, between its reading and its moving."""
    config = StoreConfig(path=tmp_path / "kv", segment_bytes=SEGMENT)
    store = SsdStore(config, files=NoHoles())
    store.put_many(CHUNKS[:9])
    for chunk in CHUNKS[4:8]:
        store.delete(chunk.key)
    read = collecting._read

    def meanwhile(*arguments: Any) -> Any:
        copies = read(*arguments)
        monkeypatch.setattr(collecting, "_read", read)
        store.delete(CHUNKS[0].key)
        store.delete(CHUNKS[1].key)
        store.config = replace(config, codec=codec)
        store.put(CHUNKS[1])
        return copies

    monkeypatch.setattr(collecting, "_read", meanwhile)
    generation = store.generation(CHUNKS[1].key)
    store.gc(full=True)
    assert isinstance(get(store, CHUNKS[0]), Miss)
    entry = store.entry(CHUNKS[1].key)
    assert entry is not None
    assert entry.codec == codec
    assert store.generation(CHUNKS[1].key) != generation
    assert same(get(store, CHUNKS[1]), CHUNKS[1]) == (codec == "raw")
    assert all(same(get(store, chunk), chunk) for chunk in (*CHUNKS[2:4], CHUNKS[8]))
    assert store.verify().bad == ()
    assert sum(extent.live for extent in segments(store).values()) == sum(
        -(-(entry.bytes + 4096) // 4096) * 4096 for entry in store.entries()
    )
    store.close()


class Killed(BaseException):
    """Nothing of the store's catches this."""


@pytest.mark.parametrize("batch", range(4))
def test_what_a_cut_short_collection_had_moved_is_deleted_for_good(
    tmp_path: Path, get: Get, same: Same, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """The old copy is in a segment that still stands: a lost index must not bring it back."""
    path = tmp_path / "kv"
    store = SsdStore(StoreConfig(path=path, segment_bytes=SEGMENT), files=NoHoles())
    store.put_many(CHUNKS[:8])
    store.put_many(CHUNKS[8:10])
    for chunk in CHUNKS[4:8]:
        store.delete(chunk.key)
    monkeypatch.setattr(collecting, "_BATCH_RECORDS", 1)
    move, moves = collecting._move, 0

    def stop(*arguments: Any, **options: Any) -> Any:
        nonlocal moves
        if moves == batch:
            raise Killed
        moves += 1
        return move(*arguments, **options)

    monkeypatch.setattr(collecting, "_move", stop)
    with pytest.raises(Killed):
        store.gc(full=True)
    store.close()
    store = SsdStore(StoreConfig(path=path, segment_bytes=SEGMENT), files=NoHoles())
    assert all(same(get(store, chunk), chunk) for chunk in CHUNKS[:4])
    assert moves == batch
    for chunk in CHUNKS[:2]:
        assert store.delete(chunk.key)
    store.close()
    (path / "data.mdb").unlink()
    store = SsdStore(StoreConfig(path=path, segment_bytes=SEGMENT), files=NoHoles())
    assert all(isinstance(get(store, chunk), Miss) for chunk in CHUNKS[:2])
    assert all(same(get(store, chunk), chunk) for chunk in (*CHUNKS[2:4], *CHUNKS[8:10]))
    monkeypatch.undo()
    store.gc(full=True)
    assert sum(extent.dead for extent in segments(store).values()) == 0
    store.close()


class NoSpace(NoHoles):
    """Writes fail from now on."""

    full = False

    def pwritev(self, descriptor: int, buffers: Any, offset: int) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().pwritev(descriptor, buffers, offset)


def test_a_device_that_fills_up_meanwhile_loses_nothing(tmp_path: Path, get: Get, same: Same) -> None:
    files = NoSpace()
    store = SsdStore(StoreConfig(path=tmp_path / "kv", segment_bytes=SEGMENT), files=files)
    store.put_many(CHUNKS)
    left = delete_but_every(store, 2)
    files.full = True
    with pytest.raises((StoreFullError, StoreIOError)):
        store.gc(full=True)
    assert all(same(get(store, chunk), chunk) for chunk in left)
    files.full = False
    store.gc(full=True)
    assert sum(extent.dead for extent in segments(store).values()) == 0
    assert all(same(get(store, chunk), chunk) for chunk in left)
    store.close()
