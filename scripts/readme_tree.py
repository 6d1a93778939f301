"""Write the README tree: one line per file, the first paragraph of its docstring. ``--check`` only compares."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("retriever", "store", "kernels", "blend", "app", "scripts", "docker", "tests")
BEGIN, END = "<!-- tree: scripts/readme_tree.py -->\n", "<!-- end of tree -->"
OTHERS = {
    "docker/Dockerfile.cpu": "The CPU image, over scripts/setup.sh.",
    "docker/Dockerfile.cuda": "The CUDA image, over scripts/setup.sh.",
    "docker/compose.yaml": "One service, one volume.",
    "docker/hadolint.yaml": "Rules of the Dockerfile linter.",
    "scripts/lock.sh": "Resolve requirements/*.txt anew (needs uv).",
    "scripts/setup.sh": "Make .venv ready: torch first, then the hash-pinned lock, then this project.",
    "scripts/traces/musique_dev.json": "What our retriever finds for 100 questions, for simulate_eviction.py.",
    "blend/README.md": "The maths, and the papers' names mapped to ours.",
    "tests/app/questions.jsonl": "Three questions in CacheBlend's form.",
}


def tree() -> str:
    """The tree as Markdown."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *ROOMS],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    lines = []
    for room in ROOMS:
        lines.append(f"{room}/")
        for name in sorted(f for f in listed if f.startswith(room + "/") and (ROOT / f).is_file()):
            if (about := describe(name)) is not None:
                lines.append(f"    {name.removeprefix(room + '/'):<38} {about}")
    return "```text\n" + "\n".join(lines) + "\n```\n"


def describe(name: str) -> str | None:
    """One line about a file; None for an empty ``__init__.py``."""
    if not name.endswith(".py"):
        return OTHERS[name]
    text = (ROOT / name).read_text("utf-8")
    about = ast.get_docstring(ast.parse(text))
    if about is None:
        if text.strip():
            raise SystemExit(f"{name} has no docstring; its first line is the README's line about it")
        return None
    return " ".join(about.split("\n\n")[0].split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the README is out of date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    fresh = head + BEGIN + tree() + END + tail
    if check:
        return int(fresh != text)
    readme.write_text(fresh, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
