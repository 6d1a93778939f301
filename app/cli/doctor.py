"""``ragblend doctor``: is this machine, this environment and this model ready, and what to do where it is not."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli.options import Config, DataDir, EngineName, Json, Model, read_settings
from app.cli.output import print_json, say


def add_to(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    model: Model = None,
    data_dir: DataDir = None,
    engine: EngineName = None,
    config: Config = None,
    as_json: Json = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as failures.")] = False,
) -> None:
    """Check Python, libraries, processor or GPU, the model, the data folder. Exit code 1 if something fails."""
    from app.diagnosis import diagnose

    checks = diagnose(read_settings(config, model=model, data_dir=data_dir, engine=engine))
    bad = {"fail", "warn"} if strict else {"fail"}
    ok = not any(c.state in bad for c in checks)
    if as_json:
        listed = [{"name": c.name, "state": c.state, "detail": c.detail, "advice": c.advice} for c in checks]
        print_json({"ok": ok, "checks": listed})
    else:
        width = max(len(c.name) for c in checks)
        for c in checks:
            say(f"{c.state:<4}  {c.name:<{width}}  {c.detail}")
            if c.advice:
                say(f"{'':<4}  {'':<{width}}  -> {c.advice}")
    if not ok:
        raise typer.Exit(1)
