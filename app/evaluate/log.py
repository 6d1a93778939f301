"""Results of an evaluation on disk: appended as they come, found again when an interrupted run goes on, and merged.

One JSON object a line. The first names the run; each other one holds answers to one question. A question may have
several lines: arms that were added later.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from app.evaluate.errors import EvaluationError

__all__ = ["EvaluationError", "ResultLog", "merge"]

Record = dict[str, Any]
_NAMES = ("model", "data")  # where things lie, for reading; what they hold is compared by digest


class ResultLog:
    """Results by task and index, and the file they are appended to, if any. Open it with ``ResultLog.open``."""

    def __init__(self, path: Path | None, run: Record, found: Sequence[Record], size: int) -> None:
        self._found: dict[tuple[str, int], Record] = {}
        for record in found:
            self._merge(record)
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self._file.truncate(size)  # a line that was cut short when the last run died
            if not size:
                self._write({"run": run})

    @classmethod
    def open(cls, path: Path | None, run: Record) -> ResultLog:
        """Read what ``path`` holds. Raises ``EvaluationError`` if it is another run's, or no such file at all."""
        if path is None or not path.exists() or not path.stat().st_size:
            return cls(path, run, [], 0)
        header, found, size = _read(path)
        differing = _differing(header, _plain(run))
        if differing:
            raise EvaluationError(f"{path} holds results of another run ({differing}); name another file or remove it")
        return cls(path, run, found, size)

    def __enter__(self) -> ResultLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def __iter__(self) -> Iterator[Record]:
        return iter(self._found.values())

    def find(self, task: str, index: int) -> Record | None:
        return self._found.get((task, index))

    def add(self, record: Record) -> None:
        self._merge(record)
        self._write(record)

    def _merge(self, record: Record) -> None:
        known = self._found.setdefault((record["task"], record["index"]), record)
        if known is not record:
            known["trials"] = known["trials"] | record["trials"]

    def _write(self, record: Record) -> None:
        if self._file:
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()


def merge(paths: Sequence[Path]) -> tuple[Record, list[Record]]:
    """The run and the records of several files of one run; a question may be in several, answered alike.

    Raises ``EvaluationError`` naming the files that do not fit together.
    """
    run: Record = {}
    merged: dict[tuple[str, int], Record] = {}
    for path in paths:
        if not path.is_file():
            raise EvaluationError(f"there is no file {path}")
        header, found, _ = _read(path)
        differing = _differing(header, run) if run else ""
        if differing:
            raise EvaluationError(f"{path} and {paths[0]} are not of one run: they differ in {differing}")
        run = run or header
        for record in found:
            known = merged.setdefault((record["task"], record["index"]), record)
            shared = known["trials"].keys() & record["trials"].keys()
            if any(known["trials"][key]["ids"] != record["trials"][key]["ids"] for key in shared):
                raise EvaluationError(f"{path}: {record['task']} {record['index']} has another answer than elsewhere")
            known["trials"] = known["trials"] | record["trials"]
    return run, sorted(merged.values(), key=lambda record: record["index"])


def _read(path: Path) -> tuple[Record, list[Record], int]:
    """Header, records, and how many bytes they are; a last line that was cut short is left out."""
    header: Record | None = None
    found: list[Record] = []
    size = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict):
            break
        if header is None:
            header = record.get("run")
            if not isinstance(header, dict):
                break
        elif {"task", "index", "trials"} <= record.keys():
            found.append(record)
        else:
            raise EvaluationError(f"{path}, line {len(found) + 2}: this is not an answer of an evaluation")
        size += len(line)
    if header is None:
        raise EvaluationError(f"{path} does not hold results of an evaluation; name another file")
    return header, found, size


def _differing(a: Record, b: Record) -> str:
    """What two runs differ in, in words; empty if in nothing."""
    names = sorted(name for name in (a.keys() | b.keys()) - {*_NAMES} if a.get(name) != b.get(name))
    return ", ".join(f"{name} {a.get(name)!r} and {b.get(name)!r}" for name in names)


def _plain(run: Record) -> Record:
    """As it reads from disk."""
    plain: Record = json.loads(json.dumps(run))
    return plain
