"""A life that writes to a store until it is killed, and says what it has been promised (see ``tests.nursery``).

It says ``begin OPERATION NUMBERS`` before an operation and ``end`` when the store has returned from it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from store import ChunkKV, StoreConfig
from store.ssd import SsdStore
from store.ssd.files import Files
from tests.nursery import Say, raise_lives
from tests.store.conftest import Make

NUMBERS = 64
SEGMENT_BYTES = 1 << 18
# float32, 3 layers of 2 x 8: 384 bytes a token. The larger ones lie in segments, the smallest in the index itself.
TOKENS = (16, 100, 200, 500)
CALLS = ("open", "pwritev", "sync", "sync_folder", "punch", "truncate", "unlink")


@contextmanager
def quick_folder(otherwise: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: for hundreds of runs that do not depend on what a real disk does."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 256 << 20:
        yield otherwise
        return
    with TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def make(number: int) -> ChunkKV:
    """The chunk of that number; the same in every process."""
    return Make(tokens=TOKENS[number % len(TOKENS)])(number)


@dataclass(frozen=True)
class Life:
    """Works on the store in ``path`` with ``numbers``, in an order drawn from ``seed``, ``steps`` operations long.

    ``at_call``: it kills itself before the i-th system call on the segments, or right behind it (``after``).
    ``holes``: if the file system can give back blocks from the middle of a file; else collections copy.
    """

    path: str
    seed: int
    numbers: Sequence[int] = range(NUMBERS)
    max_bytes: int | None = None
    at_call: int | None = None
    after: bool = False
    holes: bool = True
    steps: int | None = None


class KillingFiles(Files):
    """Kills the process at its i-th call, if there is to be one."""

    def __init__(self, at_call: int | None, after: bool, holes: bool) -> None:
        super().__init__()
        self.left = at_call
        self.after, self.holes = after, holes


def _killing(name: str) -> Callable[..., Any]:
    def call(self: KillingFiles, *arguments: Any) -> Any:
        if self.left is not None:
            self.left -= 1
            if self.left < 0 and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
        if name == "punch" and not self.holes:
            return False
        result = getattr(Files, name)(self, *arguments)
        if self.left is not None and self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


for _name in CALLS:
    assert hasattr(Files, _name)
    setattr(KillingFiles, _name, _killing(_name))


def live(fields: dict[str, Any], say: Say) -> None:
    life = Life(**fields)
    files = KillingFiles(life.at_call, life.after, life.holes)
    say("begin open")
    store = SsdStore(
        StoreConfig(path=Path(life.path), max_bytes=life.max_bytes, segment_bytes=SEGMENT_BYTES), files=files
    )
    say("end")
    rng = random.Random(life.seed)
    done = 0
    while life.steps is None or done < life.steps:
        done += 1
        operation = rng.choices(("put", "delete", "evict", "gc", "full"), (6, 4, 1, 1, 0.5))[0]
        numbers = rng.sample(life.numbers, {"put": rng.randint(1, 5), "gc": 0, "full": 0}.get(operation, 1))
        say(f"begin {operation} {' '.join(map(str, numbers))}".rstrip())
        act(store, operation, [make(n) for n in numbers])
        say("end")
    say("begin close")
    store.close()
    say("end")


def act(store: SsdStore, operation: str, chunks: Sequence[ChunkKV]) -> None:
    """One operation: ``put``, ``delete``, ``evict``, ``gc`` or ``full`` (a full collection)."""
    if operation == "put":
        store.put_many(list(chunks))
    elif operation in ("delete", "evict"):
        for chunk in chunks:
            store.delete(chunk.key, evicted=operation == "evict")
    else:
        store.gc(full=operation == "full")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for _number in range(NUMBERS):
        make(_number)
    raise_lives(live)
