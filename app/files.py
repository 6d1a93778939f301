"""Small files of the data directory: replaced whole, so that a crash leaves the old or the new one."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from app.errors import AppError

M = TypeVar("M", bound=BaseModel)


class DataFileError(AppError):
    """A file of the data directory cannot be read or written, or does not hold what it should; the message has its
    path, which is not for clients."""


def read_model(path: Path, kind: type[M], *, wrong: str, remedy: str) -> M | None:
    """The ``kind`` that the JSON in ``path`` holds; ``None`` if there is no file. Raises ``DataFileError``: the path,
    ``wrong`` and the first fault, ``remedy``."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as e:
        raise DataFileError(f"{path} cannot be read: {e.strerror or e}") from e
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataFileError(f"{path} {wrong}: {where + ': ' if where else ''}{first['msg']}; {remedy}") from e


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
