"""``ragblend cache pin|unpin|evict|warm|move``: what is to be kept, and where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.options import Config, DataDir, Json, Url, read_settings
from app.cli.output import note, print_json, say
from app.cli.stored import All, Chunks, Collections, Documents, body, opened_control, selection
from app.cli.talk import ServerError, find_server

if TYPE_CHECKING:
    from app.choose import Selection
    from app.settings import Settings


def add_to(group: typer.Typer) -> None:
    for command in (pin, unpin, evict, warm, move):
        group.command()(command)


def pin(
    collection: Collections = None,
    document: Documents = None,
    chunk: Chunks = None,
    all: All = False,
    url: Url = None,
    data_dir: DataDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Keep chunks from eviction and expiry: what is stored of them, and what will be compiled for them.

    A pinned document or collection stays so when it is updated: the pin is remembered in the data directory, and new
    KV is pinned as it is compiled. A pinned --chunk is that text; when the text changes it is another chunk.
    """
    _change("pin", selection(collection, document, chunk, all), read_settings(config, data_dir=data_dir), url, as_json)


def unpin(
    collection: Collections = None,
    document: Documents = None,
    chunk: Chunks = None,
    all: All = False,
    url: Url = None,
    data_dir: DataDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Let chunks be evicted again. What something wider has pinned (a document's collection, say) stays pinned."""
    _change(
        "unpin", selection(collection, document, chunk, all), read_settings(config, data_dir=data_dir), url, as_json
    )


def evict(
    collection: Collections = None,
    document: Documents = None,
    chunk: Chunks = None,
    all: All = False,
    url: Url = None,
    data_dir: DataDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Delete the stored KV of chunks, except what is pinned; the documents stay, and are slower until precomputed."""
    _change(
        "evict", selection(collection, document, chunk, all), read_settings(config, data_dir=data_dir), url, as_json
    )


def warm(
    collection: Collections = None,
    document: Documents = None,
    chunk: Chunks = None,
    all: All = False,
    url: Url = None,
    data_dir: DataDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Load chunks ahead of use: into the memory of the running server, or without one into the page cache only."""
    settings = read_settings(config, data_dir=data_dir)
    chosen = selection(collection, document, chunk, all).require()
    server = find_server(settings, url)
    if server is not None:
        with server:
            found = server.cache("warm", body(chosen))
        found = {name: found[name] for name in ("chunks", "entries", "bytes", "changed", "tier")}
    else:
        with opened_control(settings) as control:
            picked = control.choose(chosen)
            changed = control.store.warm(picked.keys)
        found = {"chunks": picked.chunks, "entries": len(picked.keys), "bytes": picked.bytes}
        found |= {"changed": changed, "tier": "page cache"}
    if as_json:
        print_json(found)
    else:
        say(f"{found['changed']} of {found['entries']} stored entries are in the {_place(found['tier'])} now")


def move(
    tier: Annotated[str, typer.Option("--tier", help="ram, or ssd: out of the memory.", show_default=False)],
    collection: Collections = None,
    document: Documents = None,
    chunk: Chunks = None,
    all: All = False,
    url: Url = None,
    data_dir: DataDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Move chunks between the tiers of the running server. They are always on disk too: --tier ssd frees memory."""
    if tier not in ("ram", "ssd"):
        raise typer.BadParameter(f"--tier {tier!r} is unknown; choose ram or ssd")
    chosen = selection(collection, document, chunk, all).require()
    server = find_server(read_settings(config, data_dir=data_dir), url)
    if server is None:
        raise ServerError("no server is running, and only a server has a tier in memory; start one, or give --url")
    with server:
        found = server.cache("move", {"tier": tier, **body(chosen)})
    if as_json:
        print_json({name: found[name] for name in ("chunks", "entries", "bytes", "changed", "tier")})
    elif tier == "ram":
        say(f"{found['changed']} of {found['entries']} stored entries are in the {_place('ram')} now")
    else:
        say(f"{found['changed']} of {found['entries']} stored entries were taken out of the {_place('ram')}")


def _change(what: str, chosen: Selection, settings: Settings, url: str | None, as_json: bool) -> None:
    """By the running server if there is one, else here."""
    from app.stored import changed_view

    chosen.require()
    server = find_server(settings, url)
    if server is not None:
        with server:
            found = server.cache(what, body(chosen))
        del found["object"]
    else:
        with opened_control(settings, readonly=False) as control:
            found = changed_view({"pin": control.pin, "unpin": control.unpin, "evict": control.evict}[what](chosen))
        if (lacking := found["chunks"] - found["entries"]) > 0:
            note(
                f"cache: {lacking} chunks have no entry of their own: not precomputed, or equal to another document's "
                "chunk, whose entry only a running server finds"
            )
    if as_json:
        print_json(found)
        return
    verb = {"pin": "pinned", "unpin": "unpinned", "evict": "evicted"}[what]
    say(f"{found['changed']} of {found['entries']} stored entries {verb} ({found['chunks']} chunks selected)")
    if found["kept"]:
        why = "are pinned" if what == "evict" else f"stay pinned by something wider: {settings.data_dir}/pins.json"
        note(f"cache: {found['kept']} entries {why}")


def _place(tier: str) -> str:
    return "server's memory" if tier == "ram" else tier
