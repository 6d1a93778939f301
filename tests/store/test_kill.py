"""Killed at any moment, a store has every entry that was acknowledged, whole, and none that was deleted.

30 kills at random moments of each scenario here; ``KILLS=1000`` in the environment for as many as it says.
SIGKILL loses nothing of what the kernel has been given; for power loss see ``test_power``.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from store import ChunkKV, KVStore, Miss, StoreConfig, Want
from store.ssd import SsdStore
from tests.nursery import Nursery
from tests.store.lives import NUMBERS, SEGMENT_BYTES, make, quick_folder

Same = Callable[[object, ChunkKV], bool]

KILLS = int(os.environ.get("KILLS", "30"))


@dataclass
class Told:
    """What a life said: numbers ``present`` and ``absent`` by what was acknowledged, and the ``unsure`` ones of the
    operation that was cut short, which may be either."""

    present: set[int] = field(default_factory=set)
    absent: set[int] = field(default_factory=set)
    unsure: set[int] = field(default_factory=set)
    operation: str = ""
    operations: int = 0
    pid: int = 0
    died: int | None = None

    def hear(self, kind: str, words: list[str]) -> None:
        if kind == "begin":
            self.operation, self.unsure = words[0], {int(n) for n in words[1:]}
            # What the operation does not change stays certain.
            self.unsure -= self.present if self.operation == "put" else self.absent
            self.present -= self.unsure
            self.absent -= self.unsure
            return
        assert kind == "end"
        (self.present if self.operation == "put" else self.absent).update(self.unsure)
        self.unsure = set()
        self.operations += 1


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery("tests.store.lives")
    yield nursery
    nursery.close()


CHUNKS = [make(n) for n in range(NUMBERS)]


def ask(store: KVStore, chunk: ChunkKV) -> ChunkKV | Miss:
    return store.get(Want(chunk.key, chunk.layout, chunk.token_ids, chunk.source, chunk.tokenizer))


def check(path: Path, told: Told, same: Same, *, evicts: bool = False) -> None:
    """Reopen: what was acknowledged is there and whole, what was deleted is not, and nothing is damaged."""
    store = SsdStore(StoreConfig(path=path, segment_bytes=SEGMENT_BYTES))
    try:
        assert store.verify().bad == ()
        sizes = 0
        for n, chunk in enumerate(CHUNKS):
            got = ask(store, chunk)
            if isinstance(got, Miss):
                assert got.reason in ("never_precomputed", "evicted")
                assert evicts or n not in told.present, f"{n} was acknowledged and is lost: {got.reason}"
            else:
                assert same(got, chunk)
                assert n not in told.absent, f"{n} was deleted and is back"
                sizes += sum(plane.nbytes for plane in (got.k, got.v))
        assert (store.stats().bytes, store.stats().counters.get("corrupt", 0)) == (sizes, 0)
        on_disk = {p.name for p in (path / "segments").iterdir()}
        assert len(on_disk) <= 1 + store.stats().entries  # no file is left behind of which nobody knows
    finally:
        store.close()


def wait(nursery: Nursery, told: Told, rng: random.Random) -> None:
    """For a few operations, none now and then, and a moment."""
    enough = told.operations + rng.choice((0, 1, rng.randint(2, 12)))
    nursery.until(lambda: told.operations >= enough or told.died is not None)
    time.sleep(rng.choice((0.001, 0.01)) * rng.random())


@pytest.mark.parametrize("holes", [True, False])
def test_a_store_killed_at_random_has_what_it_acknowledged(
    nursery: Nursery, tmp_path: Path, same: Same, holes: bool
) -> None:
    rng = random.Random(os.environ.get("KILLS_SEED", "1"))
    told = Told()
    for _ in range(KILLS):
        nursery.start("life", told, path=str(tmp_path / "kv"), seed=rng.randrange(1 << 30), holes=holes)
        wait(nursery, told, rng)
        nursery.kill(told)
        check(tmp_path / "kv", told, same)
    assert told.operations > KILLS


def evicted_of(config: StoreConfig, chunks: list[ChunkKV]) -> int:
    """How many the store has evicted, after putting these."""
    store = SsdStore(config)
    store.put_many(chunks)
    count = store.stats().counters.get("evicted:capacity", 0)
    store.close()
    return count


def test_a_store_that_evicts_is_whole_after_any_kill(nursery: Nursery, tmp_path: Path, same: Same) -> None:
    """Its limit is below what it is given: puts evict."""
    rng = random.Random(2)
    told = Told()
    config = StoreConfig(path=tmp_path / "kv", max_bytes=4 << 20, segment_bytes=SEGMENT_BYTES, admission=False)
    before = evicted_of(config, CHUNKS)
    assert before > 0
    for _ in range(KILLS // 2):
        nursery.start("life", told, path=str(tmp_path / "kv"), seed=rng.randrange(1 << 30), max_bytes=4 << 20)
        wait(nursery, told, rng)
        nursery.kill(told)
        check(tmp_path / "kv", told, same, evicts=True)
    assert told.operations > KILLS // 2
    assert evicted_of(config, []) > before


def test_a_writer_goes_on_when_another_is_killed(nursery: Nursery, tmp_path: Path, same: Same) -> None:
    """Even when that one held the lock of all writers; both collect, by copying."""
    rng = random.Random(3)
    stayed, fell = Told(), Told()
    nursery.start("stays", stayed, path=str(tmp_path / "kv"), seed=1, numbers=list(range(0, NUMBERS, 2)), holes=False)
    for _ in range(KILLS // 2):
        seed = rng.randrange(1 << 30)
        nursery.start(
            "falls", fell, path=str(tmp_path / "kv"), seed=seed, numbers=list(range(1, NUMBERS, 2)), holes=False
        )
        wait(nursery, fell, rng)
        nursery.kill(fell)
        before = stayed.operations
        nursery.until(lambda before=before: stayed.operations > before or stayed.died is not None)  # type: ignore[misc]
        assert stayed.died is None
    nursery.kill(stayed)
    both = Told(present=stayed.present | fell.present, absent=stayed.absent | fell.absent)
    check(tmp_path / "kv", both, same)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with quick_folder(tmp_path) as path:
        yield path


@pytest.mark.slow
@pytest.mark.parametrize(("after", "holes"), [(False, True), (True, False)])
def test_a_store_killed_at_each_system_call_has_what_it_acknowledged(
    nursery: Nursery, folder: Path, same: Same, after: bool, holes: bool
) -> None:
    """Before or after the i-th call, for every i of a fixed run of puts, deletes and collections over four segments."""
    calls = 0
    while True:
        told = Told()
        path = folder / f"kv-{calls}"
        nursery.start("life", told, path=str(path), seed=11, at_call=calls, after=after, holes=holes, steps=36)
        nursery.ended(told)
        check(path, told, same)
        shutil.rmtree(path)
        if told.died == 0:
            break
        calls += 1
    assert calls > 30
