"""``ragblend serve``: the HTTP service."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from app.cli.options import Config, DataDir, EngineName, Model, read_settings
from app.cli.output import quiet_engines


def add_to(app: typer.Typer) -> None:
    app.command()(serve)


def serve(
    host: Annotated[str | None, typer.Option("--host", help="Address to bind (default: 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port to bind (default: 8000).")] = None,
    data_dir: DataDir = None,
    model: Model = None,
    engine: EngineName = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Ingest and precompute the demo collection before the first request.")
    ] = False,
    config: Config = None,
) -> None:
    """Serve chat with retrieval over HTTP until Ctrl-C. Ready when GET /readyz says so."""
    settings = read_settings(config, host=host, port=port, data_dir=data_dir, model=model, engine=engine)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    quiet_engines(settings.model)

    from app.demo.load import for_demo, load_demo
    from app.server import run_server

    if demo:
        run_server(for_demo(settings), prepare=load_demo)
    else:
        run_server(settings)
