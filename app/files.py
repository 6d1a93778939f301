"""Small files of the data directory: replaced whole, so that a crash leaves the old or the new one."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import AppError


class DataFileError(AppError):
    """A file of the data directory cannot be read or written, or does not hold what it should; the message has its
    path, which is not for clients."""


def replace_text(path: Path, text: str) -> None:
    """Make ``text`` the content of ``path``, on disk when it returns. Raises ``OSError``."""
    draft = path.parent / f".{path.name}-{secrets.token_hex(4)}"
    try:
        with draft.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among all processes that change ``path``, until the block ends. Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file of its own: the one that is changed is replaced, and a lock on what was replaced keeps nobody out.
    with (path.parent / f".{path.name}.lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
