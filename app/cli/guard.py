"""``ragblend guard``: what the online guard found, and how to overrule it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.options import Config, DataDir, Json, Url, help_alone, read_settings
from app.cli.output import note, print_json, print_table, say
from app.cli.talk import find_server

if TYPE_CHECKING:
    from app.settings import Settings

group = typer.Typer(help="Collections whose blended answers are watched.", rich_markup_mode=None)


def add_to(app: typer.Typer) -> None:
    app.add_typer(group, name="guard")


@group.callback(invoke_without_command=True)
def _guard(context: typer.Context) -> None:
    """Collections whose blended answers are watched."""
    help_alone(context)


@group.command("ls")
def list_levels(url: Url = None, data_dir: DataDir = None, config: Config = None, as_json: Json = False) -> None:
    """Collections that were compared with full prefill: agreement, and the least ratio they are recomputed at.

    Asks the running server if there is one, else reads what the last one left.
    """
    settings = read_settings(config, data_dir=data_dir)
    server = find_server(settings, url)
    if server is None:
        found = _kept(settings)
    else:
        with server:
            found = server.guarded()
    if as_json:
        print_json({"collections": found})
    elif found:
        columns = ["collection", "least ratio", "why", "since", "agreement", "KL", "comparisons"]
        print_table("", columns, [_row(level) for level in found], numbers=4)
    else:
        say("no answer was compared yet")


@group.command()
def reset(
    collection: Annotated[str, typer.Argument(help="The collection to serve as asked again.", show_default=False)],
    url: Url = None,
    data_dir: DataDir = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Forget what was found about a collection: its prompts are blended as asked until it fails again.

    Goes through the running server if there is one, else changes what the last one left.
    """
    settings = read_settings(config, data_dir=data_dir)
    server = find_server(settings, url)
    if server is None:
        _forget(settings, collection)
    else:
        with server:
            server.reset_guard(collection)
    if as_json:
        print_json({"collection": collection, "reset": True})
    else:
        say(f"{collection} is served as asked again")


def _kept(settings: Settings) -> list[dict[str, Any]]:
    from app.guard.state import read_state, view

    state = read_state(settings.data_dir)
    note(f"guard: no server is running; this is what {settings.data_dir} holds")
    return [view(name, level) for name, level in sorted(state.collections.items())] if state else []


def _forget(settings: Settings, collection: str) -> None:
    from app.errors import NotGuardedError
    from app.guard.state import read_state, write_state

    state = read_state(settings.data_dir)
    if state is None or state.collections.pop(collection, None) is None:
        raise NotGuardedError(f"the guard knows nothing of collection {collection!r} in {settings.data_dir}")
    write_state(settings.data_dir, state.model_dump_json(indent=1))


def _row(level: dict[str, Any]) -> list[Any]:
    ratio, since = level["least_ratio"], level["since"]
    return [
        level["collection"],
        "as asked" if ratio == 0 else "full prefill" if ratio >= 1 else f"{ratio:g}",
        level["why"],
        datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%d %H:%M") if since else None,
        None if level["agreement"] is None else f"{level['agreement']:.2f}",
        None if level["kl"] is None else f"{level['kl']:.3f}",
        level["comparisons"],
    ]
