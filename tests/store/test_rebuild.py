"""An index that is lost or damaged is made anew from the segments: all that is sound, nothing that was deleted."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from store import ChunkKV, KVStore, Miss, StoreConfig, StoreError, StoreFormatError, StoreIOError
from store.ssd import SsdStore, put_aside
from store.ssd import rebuild as rebuilding
from store.ssd.database import DamagedError
from store.ssd.files import Files
from store.ssd.record import BLOCK, make_head
from tests.store.conftest import Make

Get = Callable[[KVStore, ChunkKV], ChunkKV | Miss]
Same = Callable[[object, ChunkKV], bool]

SEGMENT = 1 << 20
CHUNKS = [Make(tokens=300)(n) for n in range(20)]  # of 120 KiB: eight in a segment
RECORD = 122_880


def opened(path: Path, **options: Any) -> SsdStore:
    return SsdStore(StoreConfig(path=path, segment_bytes=SEGMENT, **options))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed store of three segments: three entries deleted, two evicted, one put twice."""
    store = opened(tmp_path / "kv")
    store.put_many(CHUNKS)
    for n in (2, 9, 19):
        store.delete(CHUNKS[n].key)
    for n in (4, 11):
        store.delete(CHUNKS[n].key, evicted=True)
    store.delete(CHUNKS[6].key)
    store.put(CHUNKS[6])
    store.close()
    return tmp_path / "kv"


DELETED = {2, 9, 19}
EVICTED = {4, 11}
LEFT = [n for n in range(20) if n not in DELETED | EVICTED]


def check(store: SsdStore, get: Get, same: Same, *, lost: set[int] | None = None) -> None:
    """All is there but what was taken out and what is ``lost``."""
    for n, chunk in enumerate(CHUNKS):
        got = get(store, chunk)
        if n in LEFT and n not in (lost or set()):
            assert same(got, chunk), f"{n} is lost: {got}"
        elif n in DELETED or n in (lost or set()):
            assert isinstance(got, Miss), f"{n} is back"
        else:
            assert isinstance(got, Miss) or same(got, chunk)
    assert store.verify().bad == ()
    assert store.stats().bytes == sum(entry.bytes for entry in store.entries())


def remove(path: Path) -> None:
    (path / "data.mdb").unlink()


def empty(path: Path) -> None:
    os.truncate(path / "data.mdb", 0)


def lose_all(path: Path) -> None:
    remove(path)
    (path / "lock.mdb").unlink()


def overwrite_pages(path: Path) -> None:
    """All but the first two pages, by which LMDB knows its own."""
    size = (path / "data.mdb").stat().st_size
    with (path / "data.mdb").open("r+b") as file:
        file.seek(2 * 4096)
        file.write(random.Random(1).randbytes(size - 2 * 4096))


def cut_in_half(path: Path) -> None:
    os.truncate(path / "data.mdb", (path / "data.mdb").stat().st_size // 8192 * 4096)


@pytest.mark.parametrize("damage", [remove, empty, lose_all])
def test_a_lost_index_is_rebuilt_at_the_next_open(
    path: Path, get: Get, same: Same, damage: Callable[..., None]
) -> None:
    damage(path)
    store = opened(path)
    check(store, get, same)
    assert store._parts.db.read(store._parts.index.complete)
    # It is a store like any other: nothing is used twice, all can be changed.
    store.put_many(CHUNKS)
    assert all(same(get(store, chunk), chunk) for chunk in CHUNKS)
    for chunk in CHUNKS[:10]:
        store.delete(chunk.key)
    store.gc(full=True)
    assert all(same(get(store, chunk), chunk) for chunk in CHUNKS[10:])
    assert store.verify().bad == ()
    store.close()
    remove(path)
    store = opened(path)
    assert [isinstance(get(store, chunk), Miss) for chunk in CHUNKS] == [True] * 10 + [False] * 10
    store.close()


@pytest.mark.parametrize("damage", [overwrite_pages, cut_in_half])
def test_a_damaged_index_is_rebuilt_by_repair(path: Path, get: Get, same: Same, damage: Callable[..., None]) -> None:
    """Or at the open, if it is so damaged that it cannot be opened; and it is kept."""
    before = (path / "data.mdb").read_bytes()
    damage(path)
    store = opened(path)
    store.verify(repair=True)
    check(store, get, same)
    store.close()
    kept = [p for p in path.iterdir() if p.name.startswith("data.mdb.")]
    assert len(kept) <= 1
    if kept:
        assert kept[0].read_bytes()[:100] == before[:100]
    opened(path).close()  # what is kept does not disturb


def test_an_index_that_is_not_lmdb_s_is_refused_until_it_is_put_aside(path: Path, get: Get, same: Same) -> None:
    (path / "data.mdb").write_bytes(b"hello" * 5000)
    with pytest.raises(StoreFormatError):
        opened(path)
    assert put_aside(path) == path / "data.mdb.damaged-1"
    store = opened(path)
    check(store, get, same)
    store.close()
    assert put_aside(path) == path / "data.mdb.damaged-2"
    assert put_aside(path) is None
    store = opened(path)
    check(store, get, same)
    store.close()


def test_an_index_in_use_is_not_put_aside(path: Path) -> None:
    code = f"""
        import sys
        from pathlib import Path
        from store import StoreConfig
        from store.ssd import SsdStore
        store = SsdStore(StoreConfig(path=Path({str(path)!r}), readonly=True))
        print("open", flush=True)
        sys.stdin.read()
    """
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(StoreError, match="in use"):
            put_aside(path)
        assert (path / "data.mdb").exists()
        other.stdin.close()
        assert other.wait(30) == 0
    assert put_aside(path) is not None


def test_a_repair_that_another_process_is_in_the_way_of_leaves_the_store_open(
    path: Path, get: Get, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*arguments: Any, **options: Any) -> Any:
        raise DamagedError("a page is damaged")

    store = opened(path)
    monkeypatch.setattr("store.ssd.store.verify", damaged)

    def in_use(*arguments: Any) -> None:
        raise StoreError(f"{path} is in use by another process")

    monkeypatch.setattr("store.ssd.store.put_aside", in_use)
    with pytest.raises(StoreError, match="in use"):
        store.verify(repair=True)
    monkeypatch.undo()
    check(store, get, same)
    store.close()


def test_the_last_of_several_records_of_a_key_wins(path: Path, get: Get, same: Same) -> None:
    """Whatever their order in the files: an old one may lie behind a new one after a collection."""
    store = opened(path)
    place = store._parts.db.read(lambda txn: store._parts.index.place(txn, CHUNKS[0].key))
    assert place is not None
    blob, planes = store.read_encoded(CHUNKS[0].key) or (b"", [])
    store.close()
    older = make_head(blob, 0, sum(plane.size for plane in planes)) + b"".join(plane.tobytes() for plane in planes)
    (path / "segments" / "00000077.seg").write_bytes(older.ljust(-(-len(older) // BLOCK) * BLOCK, b"\0"))
    remove(path)
    store = opened(path)
    check(store, get, same)
    now = store._parts.db.read(lambda txn: store._parts.index.place(txn, CHUNKS[0].key))
    assert now is not None
    assert (now.segment, now.generation) == (place.segment, place.generation)
    store.put(CHUNKS[2])
    placed = store._parts.db.read(lambda txn: store._parts.index.place(txn, CHUNKS[2].key))
    assert placed is not None
    assert placed.segment > 77  # no number is used twice
    assert placed.generation > max(place.generation, 20)
    store.delete(CHUNKS[0].key)
    store.close()
    remove(path)
    store = opened(path)
    assert isinstance(get(store, CHUNKS[0]), Miss)  # and the older one did not step in
    store.close()


def test_torn_and_damaged_records_are_left_out(path: Path, get: Get, same: Same) -> None:
    """A bit of each part, a torn tail, a missing head: the others are found all the same."""
    rng = random.Random(3)
    store = opened(path)
    places = {n: store._parts.db.read(lambda txn, n=n: store._parts.index.place(txn, CHUNKS[n].key)) for n in LEFT}
    store.close()
    hurt = {0: 0, 1: 20, 3: 60, 5: 400, 10: 5000, 12: RECORD - 6000}  # entry -> byte of its record
    for n, at in hurt.items():
        place = places[n]
        assert place is not None
        with (path / "segments" / f"{place.segment:08}.seg").open("r+b") as file:
            file.seek(place.offset + at)
            byte = file.read(1)[0]
            file.seek(place.offset + at)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    last = max((place.segment, place.offset, n) for n, place in places.items() if place is not None)
    os.truncate(path / "segments" / f"{last[0]:08}.seg", last[1] + RECORD // 2)
    remove(path)
    store = opened(path)
    check(store, get, same, lost={*hurt, last[2]})
    assert store.stats().counters.get("corrupt", 0) == 0  # nothing of it was ever served or entered
    store.put_many(CHUNKS)
    store.gc(full=True)
    assert all(same(get(store, chunk), chunk) for chunk in CHUNKS)
    store.close()


def test_random_bytes_between_and_behind_are_no_records(path: Path, get: Get, same: Same) -> None:
    rng = random.Random(4)
    for number in (1, 2, 3):
        with (path / "segments" / f"{number:08}.seg").open("ab") as file:
            file.write(rng.randbytes(rng.randrange(1, 100_000)))
    (path / "segments" / "00000050.seg").write_bytes(rng.randbytes(300_000))
    (path / "segments" / "00000051.seg").write_bytes(b"")
    (path / "segments" / "00000052.seg").write_bytes(b"ragblREC" * 10_000)
    remove(path)
    store = opened(path)
    check(store, get, same)
    store.gc(full=True)
    check(store, get, same)
    assert all(p.stat().st_size <= 2 * SEGMENT for p in (path / "segments").iterdir())
    store.close()


class Killed(BaseException):
    """Nothing of the store's catches this."""


@pytest.mark.parametrize("at", range(6))
def test_a_rebuild_that_is_killed_begins_again(
    path: Path, get: Get, same: Same, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """No segment is taken for an orphan meanwhile."""
    remove(path)
    monkeypatch.setattr(rebuilding, "_BATCH", 3)
    enter, calls = rebuilding._enter, 0

    def stop(*arguments: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls > at:
            raise Killed
        return enter(*arguments)

    monkeypatch.setattr(rebuilding, "_enter", stop)
    for _ in range(2):
        with pytest.raises(Killed):
            opened(path)
        calls = 0
        assert len(list((path / "segments").iterdir())) == 3
    reader = opened(path, readonly=True)  # of an index that is not complete: what it says is true
    for n, chunk in enumerate(CHUNKS):
        got = get(reader, chunk)
        assert isinstance(got, Miss) or same(got, chunk)
        assert n not in DELETED or isinstance(got, Miss)
    reader.close()
    monkeypatch.undo()
    store = opened(path)
    check(store, get, same)
    store.close()


def in_another_process(path: Path, line: str) -> None:
    code = f"""
        from pathlib import Path
        from store import KVKey, StoreConfig
        from store.ssd import SsdStore
        store = SsdStore(StoreConfig(path=Path({str(path)!r}), segment_bytes={SEGMENT}))
        {line}
        store.close()
    """
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=root, check=True, timeout=60)


def test_a_slower_rebuild_brings_nothing_back(
    path: Path, get: Get, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has finished and deleted an entry since this one read its record."""
    remove(path)
    enter, begun = rebuilding._enter, False

    def meanwhile(*arguments: Any) -> bool:
        nonlocal begun
        if not begun:
            begun = True
            in_another_process(path, f"assert store.delete(KVKey.from_hex({CHUNKS[0].key.hex!r}))")
        return enter(*arguments)

    monkeypatch.setattr(rebuilding, "_enter", meanwhile)
    store = opened(path)
    assert begun
    assert not store.contains(CHUNKS[0].key)
    check(store, get, same, lost={0})
    store.close()


def test_two_processes_that_find_no_index_agree(path: Path, get: Get, same: Same) -> None:
    remove(path)
    code = f"""
        from pathlib import Path
        from store import StoreConfig
        from store.ssd import SsdStore
        store = SsdStore(StoreConfig(path=Path({str(path)!r}), segment_bytes={SEGMENT}))
        print(store.stats().entries, store.verify().bad, flush=True)
        store.close()
    """
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", textwrap.dedent(code)]
    others = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [other.communicate(timeout=60)[0] for other in others]
    assert said == [f"{len(LEFT)} ()\n"] * 3
    store = opened(path)
    check(store, get, same)
    store.close()


class KilledAfterSync(Files):
    """Dies when records are written and synced, and before the index knows of them."""

    armed = False

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        if self.armed:
            raise Killed


def goes_on(store: SsdStore, files: KilledAfterSync, reopen: bool) -> SsdStore:
    """Who writes next: a process that is started anew, or another one that has the store open all the while (this one:
    nothing in it knows of the death)."""
    files.armed = False
    if not reopen:
        return store
    store.close()
    return opened(store.path)


LARGE = Make(tokens=2600)(500)  # nearly fills a segment of its own


@pytest.mark.parametrize("reopen", [True, False])
@pytest.mark.parametrize("then", ["overwritten", "sealed"])
def test_what_a_killed_put_left_behind_does_not_outlive_a_delete(
    tmp_path: Path, get: Get, then: str, reopen: bool
) -> None:
    """It is sound and in no index: a scan would find it, after the same entry was put, and deleted, elsewhere."""
    path, chunk, files = tmp_path / "kv", CHUNKS[0], KilledAfterSync()
    store = SsdStore(StoreConfig(path=path, segment_bytes=SEGMENT), files=files)
    store.put(CHUNKS[8])
    files.armed = True
    with pytest.raises(Killed):
        store.put_many([*CHUNKS[1:7], chunk])
    store = goes_on(store, files, reopen)
    if then == "overwritten":  # the first of the seven records; then the segment is sealed
        store.put(chunk)
        store.put(LARGE)
    else:
        store.put(LARGE)
        store.put(chunk)
    assert store.delete(chunk.key)
    store.close()
    remove(path)
    store = opened(path)
    assert isinstance(get(store, chunk), Miss)
    store.close()


@pytest.mark.parametrize("reopen", [True, False])
@pytest.mark.parametrize("then", ["delete", "collect"])
def test_what_a_killed_collection_copied_does_not_outlive_a_delete(
    tmp_path: Path, get: Get, same: Same, then: str, reopen: bool
) -> None:
    path, files = tmp_path / "kv", KilledAfterSync()
    store = SsdStore(StoreConfig(path=path, segment_bytes=SEGMENT), files=files)
    store.put_many(CHUNKS[:9])  # the ninth is in a second segment
    for chunk in CHUNKS[1:8]:
        store.delete(chunk.key)
    files.armed = True
    with pytest.raises(Killed):
        store.gc()
    store = goes_on(store, files, reopen)
    if then == "collect":
        store.delete(CHUNKS[8].key)
        store.gc(full=True)
    assert same(get(store, CHUNKS[0]), CHUNKS[0])
    assert store.delete(CHUNKS[0].key)
    store.close()
    remove(path)
    store = opened(path)
    assert isinstance(get(store, CHUNKS[0]), Miss)
    store.close()


class FailsTwice(Files):
    """A sync fails, and what was written cannot be cut off again."""

    armed = False

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        if self.armed:
            raise OSError(5, "Input/output error")

    def truncate(self, descriptor: int, size: int) -> None:
        if self.armed:
            raise OSError(5, "Input/output error")
        super().truncate(descriptor, size)


def test_what_could_not_be_cut_off_at_once_is_at_the_next_open(tmp_path: Path, get: Get) -> None:
    """Its segment is sealed, so that no later append would come across it."""
    path, chunk, files = tmp_path / "kv", CHUNKS[0], FailsTwice()
    store = SsdStore(StoreConfig(path=path, segment_bytes=SEGMENT), files=files)
    store.put(CHUNKS[8])
    files.armed = True
    with pytest.raises(StoreIOError):
        store.put_many([*CHUNKS[1:7], chunk])
    files.armed = False
    store.put(chunk)
    store.close()
    store = opened(path)
    assert store.delete(chunk.key)
    store.close()
    remove(path)
    store = opened(path)
    assert [isinstance(get(store, c), Miss) for c in (chunk, CHUNKS[8])] == [True, False]
    store.close()


class BadDisk(Files):
    """Segment 2 cannot be read beyond its first 300 KiB."""

    def __init__(self) -> None:
        super().__init__()
        self._bad: set[int] = set()

    def open(self, path: Path, flags: int) -> int:
        descriptor = super().open(path, flags)
        self._bad.discard(descriptor)
        if path.name == "00000002.seg":
            self._bad.add(descriptor)
        return descriptor

    def read(self, descriptor: int, buffers: Any, offset: int) -> int:
        if descriptor in self._bad and offset + sum(map(len, buffers)) > 300 << 10:
            raise OSError(5, "Input/output error")
        return super().read(descriptor, buffers, offset)


def test_a_segment_that_cannot_be_read_costs_its_own_entries_only(path: Path, get: Get, same: Same) -> None:
    remove(path)
    store = SsdStore(StoreConfig(path=path, segment_bytes=SEGMENT), files=BadDisk())
    found = {n for n in LEFT if same(get(store, CHUNKS[n]), CHUNKS[n])}
    assert {n for n in LEFT if n < 8 or n >= 16} - {6} <= found < set(LEFT)
    store.put_many(CHUNKS)
    store.close()
    store = opened(path)
    assert all(same(get(store, chunk), chunk) for chunk in CHUNKS)
    store.close()


def test_a_new_or_empty_store_has_nothing_to_rebuild(tmp_path: Path) -> None:
    opened(tmp_path / "kv").close()
    remove(tmp_path / "kv")
    store = opened(tmp_path / "kv")
    assert store.stats().entries == 0
    store.close()
    shutil.rmtree(tmp_path / "kv" / "segments")
    store = opened(tmp_path / "kv")
    assert (store.stats().entries, store.put(CHUNKS[0]) > 0) == (0, True)
    store.close()
