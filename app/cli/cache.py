"""``ragblend cache``: look at the stored KV and check it."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.options import Config, DataDir, Json, help_alone, read_settings
from app.cli.output import note, print_json, print_table, say

if TYPE_CHECKING:
    from app.settings import Settings
    from store.base import KVStore

group = typer.Typer(help="Look at the stored KV and check it.", rich_markup_mode=None)


def add_to(app: typer.Typer) -> None:
    app.add_typer(group, name="cache")


@group.callback(invoke_without_command=True)
def _cache(context: typer.Context) -> None:
    """Look at the stored KV and check it."""
    help_alone(context)


@group.command("ls")
def list_entries(
    limit: Annotated[int, typer.Option("--limit", min=0, help="Entries to list (0: all).")] = 50,
    data_dir: DataDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Stored chunks: key, tokens, size, and the layout (model, shapes, RoPE) they are for."""
    store = _open(read_settings(config, data_dir=data_dir), readonly=True)
    if store is None:
        entries, total, size = [], 0, 0
    else:
        try:
            entries = list(islice(store.entries(), limit or None))
            total, size = store.stats().entries, store.stats().bytes
        finally:
            store.close()
    if as_json:
        listed = [{"key": e.key.hex, "tokens": e.tokens, "bytes": e.bytes, "layout": e.layout} for e in entries]
        print_json({"entries": listed, "total": total, "bytes": size})
        return
    if entries:
        rows = [[e.key.hex[:16], e.layout[:12], e.tokens, e.bytes] for e in entries]
        print_table("", ["key", "layout", "tokens", "bytes"], rows, numbers=2)
    say(f"{total} entries, {size / 2**30:.3f} GiB" + (f"; {len(entries)} listed" if len(entries) < total else ""))


@group.command()
def verify(
    repair: Annotated[
        bool, typer.Option("--repair", help="Delete bad entries; they are made again when needed.")
    ] = False,
    data_dir: DataDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Read every stored chunk and check its checksum and shape. Exit code 1 if bad entries remain."""
    store = _open(read_settings(config, data_dir=data_dir), readonly=not repair)
    if store is None:
        checked, bad, repaired = 0, [], 0
    else:
        try:
            report = store.verify(repair=repair)
        finally:
            store.close()
        checked, bad, repaired = report.checked, [key.hex for key in report.bad], report.repaired
    if as_json:
        print_json({"checked": checked, "bad": bad, "repaired": repaired})
    else:
        for key in bad:
            say(f"bad {key}")
        say(f"{checked} entries checked, {len(bad)} bad, {repaired} deleted")
    if len(bad) > repaired:
        note("bad entries are never served; ragblend cache verify --repair deletes them")
        raise typer.Exit(1)


def _open(settings: Settings, *, readonly: bool) -> KVStore | None:
    """The store on disk, or None if there is none yet."""
    from store import open_store

    if not settings.store_dir.is_dir():
        note(f"nothing is stored in {settings.store_dir} yet")
        return None
    return open_store(settings.store_dir, readonly=readonly)
