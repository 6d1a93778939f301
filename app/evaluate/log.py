"""Results of an evaluation on disk: appended as they come, found again when an interrupted run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class EvaluationError(Exception):
    """The evaluation cannot go on; the message says why."""


class ResultLog:
    """Results by task and index, and the file they are appended to: one JSON object a line, the first names the run."""

    def __init__(self, path: Path | None, identity: dict[str, Any], found: list[dict[str, Any]], size: int) -> None:
        self._found = {(r["task"], r["index"]): r for r in found}
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self._file.truncate(size)  # a line that was cut short when the last run died
            if not size:
                self._write({"run": identity})

    @classmethod
    def open(cls, path: Path | None, identity: dict[str, Any]) -> ResultLog:
        """Read what ``path`` holds. Raises ``EvaluationError`` if it is another run's, or no such file at all."""
        if path is None or not path.exists():
            return cls(path, identity, [], 0)
        found, size = [], 0
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True)):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if record is None or not line.endswith(b"\n"):
                break
            if number == 0 and record.get("run") != json.loads(json.dumps(identity)):
                raise EvaluationError(f"{path} holds results of another run; name another file or remove it")
            size += len(line)
            found += [record] if number else []
        if not size and path.stat().st_size:
            raise EvaluationError(f"{path} does not hold results of an evaluation; name another file")
        return cls(path, identity, found, size)

    def __enter__(self) -> ResultLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def find(self, task: str, index: int) -> dict[str, Any] | None:
        return self._found.get((task, index))

    def add(self, record: dict[str, Any]) -> None:
        self._found[record["task"], record["index"]] = record
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
