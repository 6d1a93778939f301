"""Power fails at any system call: what was not synced is there, or half there, or not; names too.

A simulation, because SIGKILL loses nothing of what the kernel has been given: the store runs on files that remember
what of them is durable; at the cut, the folder is made anew from the durable state and a random part of the rest. LMDB
syncs its own file, which is copied as it is.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from store import ChunkKV, KVStore, Miss, StoreConfig
from store.ssd import SsdStore
from store.ssd.files import Files
from tests.store.lives import SEGMENT_BYTES, quick_folder
from tests.store.test_faults import CHUNKS, Run

Get = Callable[[KVStore, ChunkKV], ChunkKV | Miss]
Same = Callable[[object, ChunkKV], bool]

BLOCK = 4096


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with quick_folder(tmp_path) as path:
        yield path


class PowerCut(BaseException):
    """Nothing of the store's catches this."""


class VolatileFiles(Files):
    """``cut_at``: the call at which the power fails, before it is made."""

    def __init__(self, cut_at: int | None, *, punches: bool) -> None:
        super().__init__()
        self.cut_at, self.punches = cut_at, punches
        self.made = 0
        self.off = False
        self._paths: dict[int, Path] = {}
        self._durable: dict[Path, bytes] = {}  # content at the last sync
        self._names: dict[Path, set[str]] = {}  # of a folder at its last sync

    def count(self) -> None:
        if self.off:
            raise PowerCut
        if self.made == self.cut_at:
            self.off = True
            raise PowerCut
        self.made += 1

    def open(self, path: Path, flags: int) -> int:
        self.count()
        descriptor = super().open(path, flags)
        self._paths[descriptor] = path
        if flags & os.O_CREAT:
            self._durable[path] = b""
        return descriptor

    def pwritev(self, descriptor: int, buffers: Any, offset: int) -> int:
        self.count()
        return super().pwritev(descriptor, buffers, offset)

    def punch(self, descriptor: int, offset: int, length: int) -> bool:
        self.count()
        return self.punches and super().punch(descriptor, offset, length)

    def truncate(self, descriptor: int, size: int) -> None:
        self.count()
        super().truncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        self.count()
        super().sync(descriptor)
        path = self._paths[descriptor]
        if path.exists():
            self._durable[path] = path.read_bytes()

    def sync_folder(self, path: Path) -> None:
        self.count()
        super().sync_folder(path)
        self._names[path] = set(os.listdir(path))

    def unlink(self, path: Path) -> None:
        self.count()
        super().unlink(path)

    def after_the_cut(self, path: Path, copy: Path, rng: random.Random) -> None:
        """The folder as the next start finds it."""
        copy.mkdir()
        shutil.copyfile(path / "data.mdb", copy / "data.mdb")
        folder = path / "segments"
        if "segments" not in self._names.get(path, set()) and rng.random() < 0.5:
            return
        (copy / "segments").mkdir()
        there = set(os.listdir(folder)) if folder.exists() else set()
        for name in there | self._names.get(folder, set()):
            certain = name in there and name in self._names.get(folder, set())
            if not certain and rng.random() < 0.5:
                continue
            now = (folder / name).read_bytes() if name in there else self._durable[folder / name]
            (copy / "segments" / name).write_bytes(torn(self._durable.get(folder / name, b""), now, rng))


def torn(old: bytes, new: bytes, rng: random.Random) -> bytes:
    """Of two states of a file, block by block either; its length too."""
    share = rng.choice((0.0, 0.3, 1.0))
    length = len(new) if rng.random() < share else len(old)
    old, new = old.ljust(length, b"\0")[:length], new.ljust(length, b"\0")[:length]
    blocks = [(new if rng.random() < share else old)[at : at + BLOCK] for at in range(0, length, BLOCK)]
    return b"".join(blocks)


def run_until_cut(path: Path, files: VolatileFiles) -> Run:
    run = Run(path, files)
    for name, numbers in run.steps():
        if files.off:
            break
        try:
            run.step(name, numbers)
        except PowerCut:
            run.doubt(name, numbers)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("punches", [True, False])
def test_power_fails_at_each_call(folder: Path, get: Get, same: Same, punches: bool) -> None:
    sound = VolatileFiles(None, punches=punches)
    run_until_cut(folder / "sound", sound)
    assert sound.made > 60
    rng = random.Random(4)
    for i in range(sound.made):
        path, copy = folder / f"kv-{i}", folder / f"copy-{i}"
        files = VolatileFiles(i, punches=punches)
        run = run_until_cut(path, files)
        assert files.off
        if (path / "data.mdb").exists():
            files.after_the_cut(path, copy, rng)
            run.path = copy
            run.check(get, same)
        if run.store is not None:
            files.off, files.cut_at = False, None
            run.store.close()
        for used in (path, copy):
            shutil.rmtree(used, ignore_errors=True)


@pytest.mark.parametrize("punches", [True, False])
def test_power_fails_and_the_index_is_lost_too(folder: Path, get: Get, same: Same, punches: bool) -> None:
    """What was synced to the segments is found by the scan, and what was deleted is not."""
    sound = VolatileFiles(None, punches=punches)
    run_until_cut(folder / "sound", sound)
    rng = random.Random(6)
    for i in range(2, sound.made, 3):
        path, copy = folder / f"kv-{i}", folder / f"copy-{i}"
        files = VolatileFiles(i, punches=punches)
        run = run_until_cut(path, files)
        if not (path / "segments").exists():
            continue
        files.after_the_cut(path, copy, rng)
        (copy / "data.mdb").unlink()
        store = SsdStore(StoreConfig(path=copy, segment_bytes=SEGMENT_BYTES))
        assert store.verify().bad == ()
        for n in run.deleted:
            got = get(store, CHUNKS[n])
            assert isinstance(got, Miss), f"{n} was deleted and is back"
        for n in run.present:
            if n % 5 != 4:  # those are so small that they lay in the index
                assert same(get(store, CHUNKS[n]), CHUNKS[n]), f"{n} is lost"
        store.close()
        if run.store is not None:
            files.off, files.cut_at = False, None
            run.store.close()
        for used in (path, copy):
            shutil.rmtree(used, ignore_errors=True)
