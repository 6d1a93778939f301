"""The command line: ``ragblend COMMAND``. One file per command.

Heavy imports happen inside commands, so that help is instant.
"""

from __future__ import annotations

from app.cli.root import app, main

__all__ = ["app", "main"]
