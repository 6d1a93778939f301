"""Options that several commands share, and the settings they become."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from app.settings import Settings

Config = Annotated[Path | None, typer.Option("--config", help="YAML file with settings (default: RAGBLEND_CONFIG).")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Where documents, index and KV are kept.")]
Model = Annotated[str | None, typer.Option("--model", help="Hugging Face folder of the model (default: models/demo).")]
EngineName = Annotated[str | None, typer.Option("--engine", help="auto, vllm or transformers.")]
Collection = Annotated[str, typer.Option("--collection", help="Collection of documents.")]
Url = Annotated[str | None, typer.Option("--url", help="A running server (default: the settings' host and port).")]
Json = Annotated[bool, typer.Option("--json", help="Print data as JSON on stdout; progress goes to stderr.")]


def help_alone(context: typer.Context) -> None:
    """For the callback of a group: without a command, print the group's help and end."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


def read_settings(config: Path | None, **flags: Any) -> Settings:
    """Settings from file, environment and flags; flags of None are not given. Raises ``SettingsError``."""
    from app.settings import load_settings

    return load_settings(config, **flags)


class ManyCommand(TyperCommand):
    """A command without arguments whose repeatable options take several values: ``--ratio 0.05 0.1``, ``0.05,0.1``.

    A comma inside parentheses belongs to its value: ``--selector "deviation(check=1,filter=gradual),heads"``.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        many = {o for p in self.params if getattr(p, "multiple", False) for o in p.opts}
        return super().parse_args(ctx, _repeat(args, many))


_COMMA = re.compile(r",(?![^()]*\))")


def _repeat(args: Sequence[str], many: set[str]) -> list[str]:
    """``--ratio 0.05 0.1`` and ``--ratio 0.05,0.1`` as ``--ratio 0.05 --ratio 0.1``; the rest as it is."""
    out: list[str] = []
    option, empty = None, False
    for arg in args:
        name, equals, value = arg.partition("=")
        if name in many or arg.startswith("-"):
            out += [str(option)] * empty  # without a value: the parser will say so
            option, empty = (name, not equals) if name in many else (None, False)
            arg = value if equals and option else arg
            if empty:
                continue
        if option is None:
            out.append(arg)
            continue
        empty = False
        for v in _COMMA.split(arg):
            out += [option, v] if v else []
    return out + [str(option)] * empty
