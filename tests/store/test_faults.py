"""Every system call on the store's files fails once, for every one of them, and then for good.

The error is typed, nothing acknowledged is lost, the next operation works, and the store verifies.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from store import ChunkKV, KVStore, Miss, StoreConfig, StoreError, StoreFullError, StoreIOError
from store.ssd import SsdStore
from store.ssd.files import Files
from tests.store.conftest import Make
from tests.store.lives import CALLS, SEGMENT_BYTES, quick_folder

Get = Callable[[KVStore, ChunkKV], ChunkKV | Miss]
Same = Callable[[object, ChunkKV], bool]

# Five to seven in a segment, except every fifth, which is small enough to lie in the index.
CHUNKS = [Make(tokens=20 if n % 5 == 4 else 90 + n)(n) for n in range(40)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with quick_folder(tmp_path) as path:
        yield path


class FaultyFiles(Files):
    """The calls from the i-th on fail with ``code``, ``times`` of them; ``made`` counts all. ``cut``: a write that
    fails has written half before. ``punches``: if the file system can give blocks back."""

    def __init__(self, at: int | None, code: int, *, times: int = 1, cut: bool = False, punches: bool = True) -> None:
        super().__init__()
        self.at, self.code, self.times, self.cut, self.punches = at, code, times, cut, punches
        self.made = 0

    def fails(self) -> bool:
        self.made += 1
        return self.at is not None and self.at <= self.made - 1 < self.at + self.times

    def punch(self, descriptor: int, offset: int, length: int) -> bool:
        if self.fails():
            raise OSError(self.code, os.strerror(self.code))
        return self.punches and super().punch(descriptor, offset, length)

    def pwritev(self, descriptor: int, buffers: Any, offset: int) -> int:
        if self.fails():
            if self.cut:
                os.pwritev(descriptor, [b"".join(buffers)[: sum(map(len, buffers)) // 2]], offset)
            raise OSError(self.code, os.strerror(self.code))
        return super().pwritev(descriptor, buffers, offset)


def _faulty(name: str) -> Callable[..., Any]:
    def call(self: FaultyFiles, *arguments: Any) -> Any:
        if self.fails():
            raise OSError(self.code, os.strerror(self.code))
        return getattr(Files, name)(self, *arguments)

    return call


for _name in CALLS:
    if _name not in FaultyFiles.__dict__:
        setattr(FaultyFiles, _name, _faulty(_name))


class Run:
    """The scenario: puts over several segments, deletes, evictions and collections; and what was acknowledged."""

    def __init__(self, path: Path, files: Files) -> None:
        self.path, self.files = path, files
        self.store: SsdStore | None = None
        self.present: set[int] = set()
        self.absent: set[int] = set()
        self.deleted: set[int] = set()  # of the absent: the others were evicted
        self.errors: list[StoreError] = []

    def steps(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "open", ()
        yield "put", tuple(range(12))
        yield "put", tuple(range(12, 25))
        yield "delete", (3,)
        yield "evict", (7,)
        yield "delete", (14,)
        yield "put", tuple(range(25, 40))
        yield "put", (3, 7)
        for n in range(12, 24, 2):
            yield "delete", (n,)
        yield "gc", ()
        yield "full", ()
        yield "put", (12, 16)
        yield "close", ()

    def all(self) -> None:
        """Every step; one that fails works the second time."""
        for name, numbers in self.steps():
            if not self.tried(name, numbers):
                self.step(name, numbers)

    def as_far_as_it_goes(self) -> None:
        """Every step once, whether it works or not; but for the last, ``close``."""
        for name, numbers in self.steps():
            if name != "close" and not self.tried(name, numbers) and name == "open":
                return

    def tried(self, name: str, numbers: tuple[int, ...]) -> bool:
        try:
            self.step(name, numbers)
        except StoreError as error:
            self.errors.append(error)
            self.doubt(name, numbers)
            return False
        return True

    def doubt(self, name: str, numbers: tuple[int, ...]) -> None:
        """A step did not return: what it was to change is uncertain, all else is not."""
        changes = set(numbers) - (self.present if name == "put" else self.absent)
        self.present -= changes
        self.absent -= changes
        self.deleted -= changes

    def step(self, name: str, numbers: tuple[int, ...]) -> None:
        if name == "open":
            self.store = SsdStore(StoreConfig(path=self.path, segment_bytes=SEGMENT_BYTES), files=self.files)
            return
        assert self.store is not None
        chunks = [CHUNKS[n] for n in numbers]
        if name == "put":
            self.store.put_many(chunks)
            self.present |= set(numbers)
            self.absent -= set(numbers)
            self.deleted -= set(numbers)
        elif name in ("delete", "evict"):
            for chunk in chunks:
                self.store.delete(chunk.key, evicted=name == "evict")
            self.present -= set(numbers)
            self.absent |= set(numbers)
            self.deleted |= set(numbers) if name == "delete" else set()
        elif name == "close":
            self.store.close()
        else:
            self.store.gc(full=name == "full")

    def check(self, get: Get, same: Same) -> None:
        """In a new store on the same files, which do not fail any more."""
        store = SsdStore(StoreConfig(path=self.path, segment_bytes=SEGMENT_BYTES))
        try:
            assert store.verify().bad == ()
            for n, chunk in enumerate(CHUNKS):
                got = get(store, chunk)
                if n in self.present:
                    assert same(got, chunk), f"{n} was acknowledged and is lost: {got}"
                elif n in self.absent:
                    assert isinstance(got, Miss), f"{n} was deleted and is back"
                else:
                    assert same(got, chunk) or isinstance(got, Miss)
            assert store.stats().counters.get("corrupt", 0) == 0
            store.gc(full=True)
            assert all(same(get(store, CHUNKS[n]), CHUNKS[n]) for n in self.present)
        finally:
            store.close()


def calls_of(path: Path, punches: bool) -> int:
    files = FaultyFiles(None, 0, punches=punches)
    run = Run(path, files)
    run.all()
    assert not run.errors
    return files.made


@pytest.mark.parametrize(("code", "punches"), [(errno.EIO, True), (errno.EIO, False), (errno.ENOSPC, False)])
def test_each_call_fails_once(folder: Path, get: Get, same: Same, code: int, punches: bool) -> None:
    count = calls_of(folder / "sound", punches)
    assert count > 60
    seen = 0
    for i in range(count):
        run = Run(folder / f"kv-{i}", FaultyFiles(i, code, cut=i % 2 == 0, punches=punches))
        run.all()
        kind = StoreFullError if code == errno.ENOSPC else StoreIOError
        assert all(type(error) is kind for error in run.errors), run.errors
        assert all(str(run.path) in str(error) for error in run.errors)
        seen += len(run.errors)
        run.check(get, same)
        shutil.rmtree(run.path)
    assert seen > count // 3  # most are told; a block that could not be given back is nobody's error


def test_a_device_that_fails_for_good_loses_nothing(folder: Path, get: Get, same: Same) -> None:
    """From the i-th call on all fail: every operation says so or works, and when the device is back all is there."""
    count = calls_of(folder / "sound", True)
    for i in range(3, count, 3):
        files = FaultyFiles(i, errno.EIO, times=1 << 30, cut=True)
        run = Run(folder / f"kv-{i}", files)
        run.as_far_as_it_goes()
        assert all(type(error) is StoreIOError for error in run.errors), run.errors
        files.at = None
        if run.store is not None:
            # The same process goes on, without being opened anew.
            assert all(same(get(run.store, CHUNKS[n]), CHUNKS[n]) for n in run.present)
            assert run.store.put_many(CHUNKS)
            assert all(same(get(run.store, chunk), chunk) for chunk in CHUNKS)
            for n in run.absent:
                run.store.delete(CHUNKS[n].key)
            run.present = set(range(len(CHUNKS))) - run.absent
            run.store.close()
        run.check(get, same)
        shutil.rmtree(run.path)


def test_a_file_whose_sync_failed_is_never_appended_to_again(folder: Path, get: Get, same: Same) -> None:
    """The kernel may have dropped what it could not write, and calls the next sync of that file a success."""
    files = FaultyFiles(None, errno.EIO)
    run = Run(folder / "kv", files)
    run.step("open", ())
    run.step("put", (0,))
    before = {p.name: p.stat().st_size for p in (folder / "kv" / "segments").iterdir()}
    sync = Files.sync
    failing = [OSError(errno.EIO, os.strerror(errno.EIO))]

    def fail_once(descriptor: int) -> None:
        if failing:
            raise failing.pop()
        sync(files, descriptor)

    files.sync = fail_once  # type: ignore[method-assign]
    assert not run.tried("put", (1,))
    for n in (1, 2, 3):
        run.step("put", (n,))
    after = {p.name: p.stat().st_size for p in (folder / "kv" / "segments").iterdir()}
    assert len(after) == 2
    assert all(after[name] == size for name, size in before.items())
    run.step("close", ())
    run.check(get, same)


class BadReads(Files):
    """The i-th read fails."""

    def __init__(self, at: int, code: int) -> None:
        super().__init__()
        self.left, self.code = at, code

    def read(self, descriptor: int, buffers: Any, offset: int) -> int:
        self.left -= 1
        if self.left == -1:
            raise OSError(self.code, os.strerror(self.code))
        return super().read(descriptor, buffers, offset)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOMEM])
def test_a_read_that_fails_is_a_miss(folder: Path, get: Get, same: Same, code: int) -> None:
    large = [chunk for n, chunk in enumerate(CHUNKS) if n % 5 != 4]
    for i in range(6):
        path = folder / f"kv-{i}"
        store = SsdStore(StoreConfig(path=path))
        store.put_many(large[:4])
        store.close()
        store = SsdStore(StoreConfig(path=path), files=BadReads(i, code))
        got = [get(store, chunk) for chunk in large[:4]]
        misses = [answer for answer in got if isinstance(answer, Miss)]
        assert len(misses) == 1
        assert misses[0].reason in ("checksum_failed", "load_timeout")
        assert all(same(a, c) for a, c in zip(got, large, strict=False) if not isinstance(a, Miss))
        store.put_many(large[:4])
        assert all(same(get(store, chunk), chunk) for chunk in large[:4])
        store.close()


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """write(2) and pwrite(2) fail beyond ``size``, as on a device that is full (EFBIG); Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_index_s_own_writes_fail(folder: Path, get: Get, same: Same, make: Make) -> None:
    """LMDB writes its pages itself: each of the first writes beyond the index's length fails, of puts and deletes."""
    messages: list[str] = []
    for spare in range(0, 40, 2):
        path = folder / f"kv-{spare}"
        store = SsdStore(StoreConfig(path=path))
        stored = [make(n) for n in range(8)]
        store.put_many(stored)
        gone: list[ChunkKV] = []
        unsure: list[ChunkKV] = []
        with no_file_beyond((path / "data.mdb").stat().st_size + spare * 4096):
            for n in range(8, 60):
                chunk = make(n)
                try:
                    if n % 4 == 3:
                        unsure = [stored[0]]
                        store.delete(stored[0].key)
                        gone.append(stored.pop(0))
                    else:
                        unsure = [chunk]
                        store.put(chunk)
                        stored.append(chunk)
                    unsure = []
                except (StoreIOError, StoreFullError) as error:
                    messages.append(str(error))
                    break
            assert all(same(get(store, chunk), chunk) for chunk in stored if chunk not in unsure)
        late = make(100)
        assert store.put(late) > 0
        store.close()
        store = SsdStore(StoreConfig(path=path))
        assert all(same(get(store, chunk), chunk) for chunk in [*stored, late] if chunk not in unsure)
        assert not any(store.contains(chunk.key) for chunk in gone)
        assert store.verify().bad == ()
        store.close()
    assert len(messages) > 5
    assert all(str(folder) in message for message in messages)
