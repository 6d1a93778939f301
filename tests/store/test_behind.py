"""Writing behind: bounded, grouped, and nothing is lost in silence."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest

from store import ChunkKV, StoreError, StoreFullError, StoreIOError
from store.behind import GROUP_CHUNKS, Behind
from store.memory import MemoryStore

Make = Callable[[int], ChunkKV]
ROOT = Path(__file__).resolve().parents[2]


class Slow:
    """A ``put_many`` that can be held back and made to fail, and remembers its groups."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.groups: list[list[ChunkKV]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.error: Callable[[ChunkKV], BaseException | None] = lambda chunk: None

    def __call__(self, chunks: list[ChunkKV]) -> list[int]:
        self.groups.append(chunks)
        self.entered.set()
        assert self.gate.wait(30)
        sizes = []
        for chunk in chunks:
            error = self.error(chunk)
            if error is not None:
                raise error
            sizes.append(self.store.put(chunk))
        return sizes


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def behind(slow: Slow, make: Make) -> Iterator[Behind]:
    """With room for four chunks."""
    made = Behind(slow, 4 * size_of(make(0)))
    yield made
    slow.gate.set()
    made.close()


def size_of(chunk: ChunkKV) -> int:
    return chunk.layout.token_bytes * len(chunk.token_ids)


def hold(slow: Slow, behind: Behind, chunk: ChunkKV) -> None:
    """The writer is in the middle of ``chunk`` and stays there."""
    slow.gate.clear()
    slow.entered.clear()
    behind.put(chunk)
    assert slow.entered.wait(30)


def test_a_future_is_done_when_its_chunk_is_stored(slow: Slow, behind: Behind, make: Make) -> None:
    slow.gate.clear()
    done = [behind.put(make(n)) for n in range(3)]
    assert not any(future.done() for future in done) and behind.waiting_bytes == 3 * size_of(make(0))
    slow.gate.set()
    assert [future.result(30) for future in done] == [size_of(make(0))] * 3
    assert all(slow.store.contains(make(n).key) for n in range(3))
    assert behind.put(make(0)).result(30) == 0  # it was there


def test_what_queues_up_meanwhile_is_one_group(slow: Slow, behind: Behind, make: Make) -> None:
    hold(slow, behind, make(0))
    done = [behind.put(make(n)) for n in range(1, 4)]
    slow.gate.set()
    wait(done, 30)
    assert [len(group) for group in slow.groups] == [1, 3]


def test_a_group_has_an_end(slow: Slow, make: Make) -> None:
    behind = Behind(slow, 1 << 30)
    hold(slow, behind, make(0))
    one = make(1)
    done = [behind.put(one) for _ in range(GROUP_CHUNKS + 10)]
    slow.gate.set()
    wait(done, 30)
    assert [len(group) for group in slow.groups] == [1, GROUP_CHUNKS, 10]
    behind.close()


def test_put_waits_while_too_much_is_queued(slow: Slow, behind: Behind, make: Make) -> None:
    hold(slow, behind, make(0))
    for n in range(1, 4):
        behind.put(make(n))
    fifth = threading.Thread(target=lambda: behind.put(make(4)))
    fifth.start()
    fifth.join(0.2)
    assert fifth.is_alive() and behind.waiting_bytes == 4 * size_of(make(0))
    slow.gate.set()
    fifth.join(30)
    assert not fifth.is_alive()
    behind.flush()
    assert slow.store.contains(make(4).key)


def test_a_chunk_larger_than_the_bound_goes_alone(slow: Slow, make: Make) -> None:
    behind = Behind(slow, 1)
    for n in range(3):
        behind.put(make(n))
    behind.close()
    assert [len(group) for group in slow.groups] == [1, 1, 1] and slow.store.stats().entries == 3


def test_an_error_reaches_whose_it_is_and_the_others_are_stored(
    slow: Slow, behind: Behind, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    hold(slow, behind, make(0))
    bad = {make(1).key: StoreIOError("EIO"), make(3).key: ValueError("a row of NaN")}
    slow.error = lambda chunk: bad.get(chunk.key)
    done = [behind.put(make(n)) for n in range(1, 4)]
    with caplog.at_level(logging.ERROR):
        slow.gate.set()
        wait(done, 30)
    assert isinstance(done[0].exception(), StoreIOError) and isinstance(done[2].exception(), ValueError)
    assert done[1].result() == size_of(make(2)) and slow.store.contains(make(2).key)
    assert {record.message.split()[0] for record in caplog.records} == {make(1).key.hex, make(3).key.hex}
    slow.error = lambda chunk: None
    assert behind.put(make(1)).result(30) > 0  # the device works again, and so does the queue


def test_a_full_store_says_so_to_everyone_and_the_queue_goes_on(slow: Slow, behind: Behind, make: Make) -> None:
    slow.error = lambda chunk: StoreFullError("no space left on the device")
    done = [behind.put(make(n)) for n in range(10)]  # more than the bound: nobody waits for ever
    assert all(isinstance(future.exception(30), StoreFullError) for future in done)
    behind.flush()
    assert behind.waiting_bytes == 0
    slow.error = lambda chunk: None
    assert behind.put(make(0)).result(30) > 0


def test_even_a_bug_below_leaves_no_future_open(slow: Slow, behind: Behind, make: Make) -> None:
    slow.error = lambda chunk: KeyError("a bug")
    done = behind.put(make(1))
    with pytest.raises(StoreError, match="broken off"):
        done.result(30)
    slow.error = lambda chunk: None
    assert behind.put(make(1)).result(30) > 0


def test_a_waiter_who_gives_up_does_not_call_the_write_off(slow: Slow, behind: Behind, make: Make) -> None:
    hold(slow, behind, make(0))
    done = behind.put(make(1))
    assert not done.cancel()
    slow.gate.set()
    assert done.result(30) > 0 and slow.store.contains(make(1).key)


def test_close_writes_what_is_queued_and_takes_no_more(slow: Slow, behind: Behind, make: Make) -> None:
    hold(slow, behind, make(0))
    done = [behind.put(make(n)) for n in range(1, 4)]
    refused: list[BaseException] = []

    def late() -> None:
        try:
            behind.put(make(4))  # waits for room when close comes
        except StoreError as error:
            refused.append(error)

    waiting = threading.Thread(target=late)
    waiting.start()
    closing = threading.Thread(target=behind.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    slow.gate.set()
    closing.join(30)
    waiting.join(30)
    assert all(future.result(0) > 0 for future in done)
    assert slow.store.stats().entries == 4 + (not refused)
    with pytest.raises(StoreError, match="closed"):
        behind.put(make(5))
    behind.close()  # twice does no harm


def test_what_was_deleted_does_not_come_back(slow: Slow, behind: Behind, make: Make) -> None:
    hold(slow, behind, make(0))
    done = behind.put(make(1))
    assert behind.discard(make(1).key) and done.result(0) == 0
    assert not behind.discard(make(2).key)
    # One that is being written is waited for: then the delete finds it.
    discarding = threading.Thread(target=lambda: behind.discard(make(0).key))
    discarding.start()
    discarding.join(0.1)
    assert discarding.is_alive()
    slow.gate.set()
    discarding.join(30)
    assert not discarding.is_alive() and slow.store.contains(make(0).key)
    behind.flush()
    assert not slow.store.contains(make(1).key) and behind.waiting_bytes == 0


def test_flush_waits_for_what_is_queued(slow: Slow, behind: Behind, make: Make) -> None:
    hold(slow, behind, make(0))
    behind.put(make(1))
    flushing = threading.Thread(target=behind.flush)
    flushing.start()
    flushing.join(0.1)
    assert flushing.is_alive()
    slow.gate.set()
    flushing.join(30)
    assert slow.store.stats().entries == 2


def test_a_senseless_bound_is_shown(slow: Slow) -> None:
    with pytest.raises(ValueError, match="-1"):
        Behind(slow, -1)


def test_many_threads_put_and_everything_arrives_once(slow: Slow, behind: Behind, make: Make) -> None:
    chunks = [make(n) for n in range(40)]
    sizes: list[int] = []

    def work(start: int) -> None:
        futures = [behind.put(chunks[n]) for n in range(start, 40, 2)]
        sizes.extend(future.result(30) for future in futures)

    threads = [threading.Thread(target=work, args=(n % 2,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sum(sizes) == 40 * size_of(chunks[0]) and sizes.count(0) == 40
    assert slow.store.stats().entries == 40


def test_a_process_that_just_ends_writes_what_is_queued(tmp_path: Path) -> None:
    """No flush, no close: the interpreter's own end waits for the writer."""
    code = """
import sys, time
from pathlib import Path
import torch
from store import ChunkKV, KVKey, KVLayout
from store.behind import Behind
layout = KVLayout(model="ab", layers=1, heads=1, head_dim=2, dtype="float32", rope="cd")
def put_many(chunks):
    time.sleep(0.2)
    for chunk in chunks:
        (Path(sys.argv[1]) / chunk.key.hex[:4]).write_bytes(b"")
    return [1] * len(chunks)
behind = Behind(put_many, 1 << 20)
for n in range(5):
    behind.put(ChunkKV(KVKey(bytes([n]) * 32), layout, (1,), *torch.zeros(2, 1, 1, 1, 2), 0, b"s" * 32, "ef"))
"""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, timeout=60)
    assert {path.name for path in tmp_path.iterdir()} == {f"{n:02x}{n:02x}" for n in range(5)}
    assert time.monotonic() - started > 0.2
