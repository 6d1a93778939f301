"""The command line: ``ragblend COMMAND``. One file per command; heavy imports happen inside commands, so help is instant."""

from __future__ import annotations

from app.cli.root import app, main

__all__ = ["app", "main"]
