"""The documents keep up with the code: the README's tree, every command, no figure left blank."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import typer

from app.cli.root import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def _commands(command: object, path: str = "ragblend") -> list[str]:
    found = []
    for name, below in getattr(command, "commands", {}).items():
        found += _commands(below, f"{path} {name}") or [f"{path} {name}"]
    return found


def test_the_tree_in_the_readme_is_the_tree() -> None:
    check = subprocess.run(
        [sys.executable, "scripts/readme_tree.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert check.returncode == 0, f"run `python scripts/readme_tree.py` {check.stderr}"


def test_every_command_is_in_the_readme() -> None:
    commands = _commands(typer.main.get_command(app))
    assert len(commands) > 8
    for command in commands:
        assert f"`{command}" in README, f"{command} is not in the README"


def test_no_figure_was_left_blank() -> None:
    for path in (ROOT / "README.md", ROOT / "models/demo/README.md"):
        assert not re.findall(r"^(RESULTS|DEMO|TIME|TODO)\b", path.read_text("utf-8"), re.MULTILINE), path


def test_the_two_commands_of_the_readme_are_make_targets() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for name in re.findall(r"`?make ([a-z]+)", README):
        assert name in targets, f"the README names `make {name}`"
