"""``ragblend cache``: look at the stored KV, check it, and say what is to be kept."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.cli import carry, steer
from app.cli.options import Config, DataDir, Json, Url, help_alone, read_settings
from app.cli.output import human, note, print_json, print_table, say
from app.cli.stored import Chunks, Collections, Documents, opened_store, selection
from app.cli.talk import find_server

group = typer.Typer(help="Look at the stored KV, check it, and say what is to be kept.", rich_markup_mode=None)


def add_to(app: typer.Typer) -> None:
    app.add_typer(group, name="cache")


@group.callback(invoke_without_command=True)
def _cache(context: typer.Context) -> None:
    """Look at the stored KV, check it, and say what is to be kept.

    Works beside a running server, and without one. Several --collection, --document or --chunk are alternatives; the
    three kinds narrow one another down.
    """
    help_alone(context)


@group.command("ls")
def list_entries(
    collection: Collections = None,
    document: Documents = None,
    chunk: Chunks = None,
    pinned: Annotated[
        bool | None, typer.Option("--pinned/--not-pinned", help="Only what is pinned, or only what is not.")
    ] = None,
    codec: Annotated[str | None, typer.Option("--codec", help="Only what is stored by this codec.")] = None,
    sort: Annotated[str, typer.Option("--sort", help="key, used, frequency, bytes, tokens or created.")] = "key",
    limit: Annotated[int, typer.Option("--limit", min=0, help="Entries to list (0: all).")] = 50,
    data_dir: DataDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Stored chunks and the documents they stand in, the highest --sort value first."""
    from app.control import SORTS, Listing, Sort
    from app.offline import open_control
    from app.stored import entry_view

    by: Sort | None = next((s for s in SORTS if s == sort), None)
    if by is None:
        raise typer.BadParameter(f"--sort {sort!r} is unknown; choose one of {', '.join(SORTS)}")
    chosen = selection(collection, document, chunk)
    found = Listing((), 0, 0, None)
    settings = read_settings(config, data_dir=data_dir)
    with open_control(settings, readonly=True) as control:
        if control is None:
            note(f"nothing is stored in {settings.store_dir} yet")
        else:
            found = control.listing(chosen, pinned=pinned, codec=codec, sort=by, limit=limit or None)
    if as_json:
        entries = [{k: v for k, v in entry_view(row).items() if k != "object"} for row in found.rows]
        print_json({"entries": entries, "total": found.total, "bytes": found.bytes})
        return
    if found.rows:
        columns = ["document", "chunk", "key", "codec", "pinned", "tokens", "size", "frequency", "last used"]
        print_table("", columns, [_row(entry_view(row)) for row in found.rows], numbers=5)
    listed = f"; {len(found.rows)} listed" if len(found.rows) < found.total else ""
    say(f"{found.total} entries, {human(found.bytes)}{listed}")


@group.command()
def stats(url: Url = None, data_dir: DataDir = None, config: Config = None, as_json: Json = False) -> None:
    """What the store holds, tier by tier, and what it has evicted, refused and found corrupt so far.

    Asks the running server if there is one; else what is on disk.
    """
    from app.stored import stats_view
    from store.base import StoreStats

    settings = read_settings(config, data_dir=data_dir)
    server = find_server(settings, url)
    if server is not None:
        with server:
            found = server.cache("summary")
    else:
        with opened_store(settings) as store:
            found = stats_view(StoreStats("ssd", 0, 0) if store is None else store.stats())
    if as_json:
        print_json(found)
        return
    ratio = f", {found['raw_bytes'] / found['bytes']:.2f} times smaller than raw" if found["bytes"] else ""
    say(f"{found['entries']} entries, {found['pinned']} pinned, {human(found['bytes'])}{ratio}")
    rows = [
        [t["tier"], t["entries"], *(_size(t[name]) for name in ("bytes", "held_bytes", "limit_bytes"))]
        for t in found["tiers"]
    ]
    print_table("", ["tier", "entries", "size", "taken", "limit"], rows)
    if found["counters"]:
        say()
        print_table("", ["so far", "chunks"], [[name, n] for name, n in found["counters"].items()])


@group.command()
def verify(
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Delete bad entries (made again when needed); make a damaged index anew."),
    ] = False,
    data_dir: DataDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Read every stored chunk and check its checksum and shape. Exit code 1 if bad entries remain."""
    from app.upkeep import verify_view
    from store.base import VerifyReport
    from store.ssd import DamagedError

    with opened_store(read_settings(config, data_dir=data_dir), readonly=not repair, repair=repair) as store:
        if store is None:
            report = VerifyReport(0, (), 0)
        else:
            try:
                held = store.stats()
                note(f"verify: reading {held.entries} entries, {human(held.bytes)}")
            except DamagedError:
                if not repair:
                    raise
            report = store.verify(repair=repair)
    found = verify_view(report)
    if as_json:
        print_json(found)
    else:
        for key in found["bad"]:
            say(f"bad {key}")
        say(f"{report.checked} entries checked, {len(report.bad)} bad, {report.repaired} deleted")
    if len(report.bad) > report.repaired:
        note("bad entries are never served; ragblend cache verify --repair deletes them")
        raise typer.Exit(1)


@group.command()
def gc(
    full: Annotated[bool, typer.Option("--full", help="Leave no dead bytes, whatever it takes.")] = False,
    data_dir: DataDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Expire what is over its time, evict down to the limit, and give dead bytes back to the device.

    May be interrupted at any point, and run while a server does.
    """
    from app.upkeep import gc_view
    from store.base import GcReport

    with opened_store(read_settings(config, data_dir=data_dir), readonly=False) as store:
        found = gc_view(GcReport(0, 0, 0, 0) if store is None else store.gc(full=full))
    if as_json:
        print_json(found)
        return
    say(
        f"{human(found['freed_bytes'])} given back, {human(found['moved_bytes'])} moved for it; "
        f"{found['expired']} entries expired, {found['evicted']} evicted"
    )


def _row(entry: dict[str, Any]) -> list[Any]:
    from datetime import UTC, datetime

    used = entry["used_at"]
    return [
        entry["title"] or entry["filename"] or ("(our prefix)" if entry["chunk_id"] == "prefix" else "(no document)"),
        entry["chunk_id"] if entry["ordinal"] is None else f"{entry['ordinal']} {entry['chunk_id']}",
        entry["key"][:16],
        entry["codec"],
        "pinned" if entry["pinned"] else "",
        entry["tokens"],
        human(entry["bytes"]),
        f"{entry['frequency']:.1f}",
        datetime.fromtimestamp(used, UTC).strftime("%Y-%m-%d %H:%M") if used else None,
    ]


def _size(size: int | None) -> str | None:
    return None if size is None else human(size)


steer.add_to(group)
carry.add_to(group)
