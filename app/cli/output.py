"""What commands print: data on stdout, progress and remarks on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_EVERY_S = 5.0


def print_json(data: Any) -> None:
    """``data`` as indented JSON on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def say(text: str = "") -> None:
    """A line of result on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """A remark on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def human(size: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: int = 1) -> None:
    """A table on stdout; columns from ``numbers`` on are right-aligned. In a pipe it is a Markdown table."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        if title:
            say(f"**{title}**\n")
        say("| " + " | ".join(columns) + " |")
        say("|" + "|".join("---" if i < numbers else "---:" for i in range(len(columns))) + "|")
        for row in cells:
            say("| " + " | ".join(row) + " |")
        return
    table = Table(title=title or None, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < numbers else "right")
    for row in cells:
        table.add_row(*row)
    Console().print(table)


class Meter:
    """Progress of a known number of steps: a bar on a terminal, a plain line every few seconds in a pipe."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self._said, self._ended = -PLAIN_EVERY_S, False
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(name, total=total, text="")

    def __enter__(self) -> Meter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, text: str = "", *, done: int | None = None, total: int | None = None) -> None:
        """One step further (or ``done`` of ``total`` steps), with a word on what was done."""
        self.done = self.done + 1 if done is None else done
        self.total = self.total if total is None else total
        if self._bar:
            self._bar.update(self._task, completed=self.done, total=self.total, text=text)
            return
        now = time.monotonic()
        ended = self.done >= self.total and not self._ended
        if now - self._said >= PLAIN_EVERY_S or ended:
            self._said, self._ended = now, self.done >= self.total
            note(f"{self.name} {self.done}/{self.total} {text}".rstrip())


@contextmanager
def stdout_is_for_results() -> Iterator[None]:
    """Inside, whatever writes to file descriptor 1 (engines log there, from their own processes too) lands on stderr.

    Print results after it.
    """
    try:
        real = sys.stdout.fileno() == 1
    except (OSError, ValueError):  # captured by a test
        real = False
    if not real:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def quiet_engines(model: str) -> None:
    """Engines say errors only, and a model that is a folder needs no hub; the environment's own values stay.

    Call before an engine is imported.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if os.path.isdir(model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
