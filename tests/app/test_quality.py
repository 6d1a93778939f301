"""What the project promises about answers, on the committed demo model and held-out questions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_blending_gives_back_what_naive_reuse_loses() -> None:
    """Isolated compile, a tenth of the rows recomputed; the answers to lose are those that need an earlier chunk."""
    command = ["eval", "quality", "--engine", "transformers", "--seed", "3", "--questions", "30", "--ratio", "0.1"]
    run = subprocess.run(
        [sys.executable, "-c", "from app.cli import main; main()", *command, "--selector", "auto", "random", "--json"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    tasks = json.loads(run.stdout)["tasks"]
    accuracy = {task: {arm: result["accuracy"] for arm, result in arms.items()} for task, arms in tasks.items()}
    assert all(
        set(r) == {"accuracy", "n", "ci95", "agreement", "kl_first"} for arms in tasks.values() for r in arms.values()
    )
    same, cross = accuracy["same-chunk"], accuracy["cross-chunk"]
    assert same["full"] >= 0.95
    assert cross["full"] >= 0.9
    assert cross["full"] - cross["reuse"] >= 0.4, "reuse loses nothing here: the demo cannot show what blending is for"
    assert cross["auto"] >= cross["full"] - 0.1
    assert cross["auto"] - cross["random"] >= 0.4, "the rows would not have to be chosen"
    assert same["auto"] >= same["full"] - 0.1
