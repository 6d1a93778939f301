"""A document acknowledged as searchable survives the process: killed at random points of ingest and precompute.

50 kills here; ``KILLS=1000`` in the environment for as many as it says, ``KILLS_SEED`` for other moments.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.app.lives import NAMES
from tests.nursery import Nursery

KILLS = int(os.environ.get("KILLS", "50"))


@dataclass
class Told:
    """What the lives have said: the versions in which each document may be (0: gone), more than one only while a
    change is not acknowledged."""

    allowed: dict[str, set[int]] = field(default_factory=lambda: {name: {0} for name in NAMES})
    change: tuple[str, int] | None = None
    heard: int = 0
    checked: int = 0
    acknowledged: int = 0
    finished: bool = False
    pid: int = 0
    died: int | None = None

    def hear(self, kind: str, words: list[str]) -> None:
        self.heard += 1
        if kind == "begin":
            self.change = (words[0], int(words[1]))
            self.allowed[words[0]].add(int(words[1]))
        elif kind == "end":
            assert self.change is not None
            name, version = self.change
            self.allowed[name] = {version}
            self.change = None
            self.acknowledged += 1
        elif kind == "checked":
            self.checked += 1
        elif kind == "finished":
            self.finished = True


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery("tests.app.lives")
    yield nursery
    nursery.close()


@pytest.mark.slow
@pytest.mark.timeout(300 + 3 * KILLS)
def test_acknowledged_documents_survive_kill(nursery: Nursery, tmp_path: Path) -> None:
    rng = random.Random(os.environ.get("KILLS_SEED", "1"))
    told = Told()

    def begin(**more: object) -> None:
        allowed = {name: sorted(versions) for name, versions in told.allowed.items()}
        nursery.start("life", told, folder=str(tmp_path), seed=rng.randrange(1 << 30), allowed=allowed, **more)

    for _ in range(KILLS):
        begin()
        # So many words after its start, none now and then: killed while it opens and recovers; and a moment later.
        enough = told.heard + rng.choice((0, 1, 1 + rng.randint(1, 8)))
        nursery.until(lambda enough=enough: told.heard >= enough or told.died is not None)  # type: ignore[misc]
        time.sleep(rng.choice((0.005, 0.05)) * rng.random())
        nursery.kill(told)
    begin(finish=True)
    nursery.ended(told)
    assert told.finished
    assert told.acknowledged > KILLS // 2
    assert told.checked > KILLS // 3
