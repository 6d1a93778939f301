"""What commands about the stored KV share: which chunks are meant, and the store they are in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.output import note

if TYPE_CHECKING:
    from app.choose import Selection
    from app.control import Control
    from app.settings import Settings
    from store.ssd import SsdStore

Collections = Annotated[list[str] | None, typer.Option("--collection", help="Chunks of this collection (repeatable).")]
Documents = Annotated[list[str] | None, typer.Option("--document", help="Chunks of this document (repeatable).")]
Chunks = Annotated[
    list[str] | None, typer.Option("--chunk", help="This chunk id (repeatable); prefix: the canonical prefix.")
]
All = Annotated[bool, typer.Option("--all", help="Everything but the canonical prefix.")]


class NothingStoredError(Exception):
    """There is no store yet; the message says where."""


@contextmanager
def opened_control(settings: Settings, *, readonly: bool = True) -> Iterator[Control]:
    """Raises ``NothingStoredError``."""
    from app.offline import open_control

    with open_control(settings, readonly=readonly) as control:
        if control is None:
            raise NothingStoredError(f"nothing is stored in {settings.store_dir} yet")
        yield control


@contextmanager
def opened_store(settings: Settings, *, readonly: bool = True, repair: bool = False) -> Iterator[SsdStore | None]:
    """The store on disk; ``None``, and a word, if there is none yet. ``repair`` as in ``open_disk``; what was done, is
    said at the end."""
    from app.offline import open_disk

    if not settings.store_dir.is_dir():
        note(f"nothing is stored in {settings.store_dir} yet")
        yield None
        return
    before = _put_aside(settings.store_dir)
    with open_disk(settings, readonly=readonly, repair=repair) as store:
        yield store
    for name in sorted(_put_aside(settings.store_dir) - before):
        note(
            f"the index was damaged and is kept as {name}; a new one was made from the segments, without pins and "
            "small entries, which were in it alone"
        )


def _put_aside(folder: Path) -> set[str]:
    """Names of damaged indexes."""
    return {path.name for path in folder.glob("data.mdb.damaged-*")}


def selection(
    collection: list[str] | None, document: list[str] | None, chunk: list[str] | None, all: bool = False
) -> Selection:
    """What the options mean."""
    from app.choose import Selection

    return Selection(tuple(collection or ()), tuple(document or ()), tuple(chunk or ()), all)


def body(chosen: Selection) -> dict[str, Any]:
    """As a server reads it."""
    return {
        "collections": list(chosen.collections),
        "file_ids": list(chosen.documents),
        "chunk_ids": list(chosen.chunks),
        "all": chosen.everything,
    }
