"""Processes that are killed by the dozen: one imports everything once, and forks a life for each line it is sent.

So a life costs milliseconds, not the seconds of imports. Lines on the nursery's output, each one write, so none is ever
torn: ``NAME pid N``, then what the life says (``NAME WORD...``), ``NAME error TEXT``, ``NAME died STATUS``.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parents[1]
Say = Callable[[str], None]


class Listener(Protocol):
    """Hears what one life says; ``pid`` and ``died`` (its exit status) are set by the nursery."""

    pid: int
    died: int | None

    def hear(self, kind: str, words: list[str]) -> None: ...


class Nursery:
    """Runs ``-m module``, which calls ``raise_lives``."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # One thread: others would not survive a fork.
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        self._listeners: dict[str, Listener] = {}
        self._errors: dict[str, str] = {}
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"nursery ready\n"

    def start(self, name: str, listener: Listener, **fields: Any) -> None:
        """Begin a life; it has a process id when this returns."""
        assert self._process.stdin is not None
        listener.pid, listener.died = 0, None
        self._listeners[name] = listener
        self._errors[name] = ""
        self._process.stdin.write(json.dumps(fields | {"name": name}).encode() + b"\n")
        self._process.stdin.flush()
        self.until(lambda: listener.pid > 0)

    def until(self, done: Callable[[], bool]) -> None:
        """Listen until it is so."""
        assert self._process.stdout is not None
        while not done():
            line = self._process.stdout.readline()
            assert line, "the nursery died"
            name, kind, *words = line.decode().split()
            listener = self._listeners[name]
            if kind == "pid":
                listener.pid = int(words[0])
            elif kind == "died":
                listener.died = int(words[0])
            elif kind == "error":
                self._errors[name] = " ".join(words)
            else:
                listener.hear(kind, words)

    def kill(self, listener: Listener) -> None:
        """SIGKILL; all that the life has said before is heard when this returns."""
        if listener.died is None:
            os.kill(listener.pid, signal.SIGKILL)
        self.ended(listener)

    def ended(self, listener: Listener) -> None:
        """Until it is dead; it must not have failed."""
        self.until(lambda: listener.died is not None)
        errors = {name: text for name, text in self._errors.items() if text}
        assert listener.died in (0, -signal.SIGKILL) and not errors, errors

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        for listener in self._listeners.values():
            if listener.died is None:
                os.kill(listener.pid, signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def raise_lives(live: Callable[[dict[str, Any], Say], None]) -> None:
    """In the nursery's process: fork for every line, ``live(fields, say)`` in the child, until the input ends."""
    os.write(1, b"nursery ready\n")
    children: dict[int, str] = {}
    while (line := _next_line(children)) is not None:
        fields = json.loads(line)
        name = fields.pop("name")
        pid = os.fork()
        if pid == 0:
            os._exit(_live(live, fields, name))
        children[pid] = name
        _say(f"{name} pid {pid}")


def _live(live: Callable[[dict[str, Any], Say], None], fields: dict[str, Any], name: str) -> int:
    try:
        live(fields, lambda text: _say(f"{name} {text}"))
    except BaseException as error:
        _say(f"{name} error {type(error).__name__}: {str(error)[:1000]!r}")
        return 1
    return 0


def _next_line(children: dict[int, str]) -> bytes | None:
    """A line of the input, read byte by byte: nothing may wait in a buffer that a fork copies. Deaths are told
    meanwhile."""
    line = b""
    while not line.endswith(b"\n"):
        while not select.select([0], [], [], 0.002)[0]:
            while children:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                _say(f"{children.pop(pid)} died {os.waitstatus_to_exitcode(status)}")
        piece = os.read(0, 1)
        if not piece:
            return None
        line += piece
    return line


def _say(text: str) -> None:
    os.write(1, text.encode() + b"\n")
