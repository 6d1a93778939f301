"""``ragblend cache export|import``: stored KV to another machine, another disk, a backup."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli.options import Config, DataDir, Json, read_settings
from app.cli.output import Meter, human, note, print_json, say
from app.cli.stored import Chunks, Collections, Documents, opened_control, selection


def add_to(group: typer.Typer) -> None:
    group.command("export")(export_entries)
    group.command("import")(import_entries)


def export_entries(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.", show_default=False)],
    collection: Collections = None,
    document: Documents = None,
    chunk: Chunks = None,
    data_dir: DataDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Write stored chunks (default: all) as plain files with a manifest; prints the manifest's SHA-256.

    Keys rest on the tenant's secret: who imports them needs the folder tenants of this data directory too.
    """
    from dataclasses import asdict

    from app.offline import open_disk
    from store.portable import export

    settings = read_settings(config, data_dir=data_dir)
    chosen = selection(collection, document, chunk)
    with opened_control(settings) as control:
        keys = None if chosen.empty else control.choose(chosen).keys
    with open_disk(settings, readonly=True) as store, Meter("export", 0) as meter:
        report = export(store, folder, keys, progress=lambda done, total: meter(done=done, total=total))
    if as_json:
        print_json(asdict(report))
        return
    say(f"{report.entries} entries, {human(report.bytes)} in {report.files} files")
    if report.left_out:
        note(f"export: {report.left_out} entries were gone or damaged and are left out")
    say(f"manifest sha256 {report.manifest}")


def import_entries(
    folder: Annotated[Path, typer.Argument(help="What cache export has written.", show_default=False)],
    expect: Annotated[
        str | None, typer.Option("--expect-sha256", help="Refuse any other manifest than the one with this SHA-256.")
    ] = None,
    salvage: Annotated[bool, typer.Option("--salvage", help="Import the sound entries of a damaged export.")] = False,
    data_dir: DataDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Put exported chunks into the store. Every byte is checked first; what is there already is passed over.

    May be interrupted and started again. Exit code 1 if entries were damaged.
    """
    from app.offline import open_disk
    from store.portable import import_

    settings = read_settings(config, data_dir=data_dir)
    with open_disk(settings, readonly=False) as store, Meter("import", 0) as meter:
        report = import_(
            store, folder, expect=expect, salvage=salvage,
            progress=lambda done, total: meter(done=done, total=total),
        )  # fmt: skip
    damaged = [{"key": key.hex, "why": why} for key, why in report.damaged]
    if as_json:
        print_json(
            {
                "imported": report.imported,
                "bytes": report.bytes,
                "present": report.present,
                "refused": report.refused,
                "damaged": damaged,
                "manifest": report.manifest,
            }
        )
    else:
        say(
            f"{report.imported} entries imported, {human(report.bytes)}; {report.present} were there, "
            f"{report.refused} not worth their room, {len(damaged)} damaged"
        )
    for entry in damaged:
        note(f"import: {entry['key']}: {entry['why']}")
    if damaged:
        raise typer.Exit(1)
