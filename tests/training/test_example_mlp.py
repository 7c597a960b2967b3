"""The tutorial on a perceptron runs, says what it measured, is the same twice and draws a picture."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "example_mlp.py"
WAYS = ("last layer only", "full fine-tuning", "LoRA", "DoRA", "EVA", "PiSSA")


def run(*arguments: str) -> str:
    """The script's table, from a process of its own with no warning in it."""
    done = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, *arguments], capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_perceptron_learns_new_digits(tmp_path: Path) -> None:
    few = ("--steps", "60", "--repeats", "2", "--seed", "3")
    said = run("--out", str(tmp_path / "new" / "curves.png"), *few)
    rows = {line[:18].strip(): line[27:] for line in said.splitlines()[2:]}
    assert tuple(rows) == WAYS
    before = next(line for line in said.splitlines() if line.startswith("before")).split()
    assert float(before[1]) > 90
    assert float(before[2]) == 0, "it has never seen these digits"
    for way, cells in rows.items():
        old, _, new, _ = (float(number) for number in re.findall(r"\d+\.\d", cells))
        assert old > 60, way
        assert new > 15, way
    picture = (tmp_path / "new" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    assert run(*few) == said
