"""Starting up costs nothing that is not used: the heavy libraries are imported when they are needed."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "transformers", "datasets", "sklearn", "scipy", "numpy", "pandas", "matplotlib", "peft")
HELP = "import sys\nsys.argv = ['smartinit', '--help']\nfrom smartinit.cli import main\nmain()"


def run(*arguments: str) -> str:
    """Standard output of a new interpreter; what it prints to stderr is shown when it fails."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def heavy_after(code: str) -> set[str]:
    """Which heavy libraries a new interpreter has imported when it exits after this code."""
    report = f"import atexit, sys\natexit.register(lambda: print('\\nmodules', *set({HEAVY}) & set(sys.modules)))\n"
    return set(run("-c", report + code).rpartition("\nmodules")[2].split())


def seconds(code: str) -> float:
    """Wall time of a new interpreter running this code, its own start included."""
    start = time.perf_counter()
    run("-c", code)
    return time.perf_counter() - start


def reaches_ratio(code: str, base: str, limit: float, rounds: int = 12) -> tuple[bool, float]:
    """Whether the best time of `code` is at most `limit` × the best of `base`, measured by turns, and the ratio.

    Stops at the first round that shows it: noise can only make a run slower.
    """
    best, best_base = float("inf"), float("inf")
    for _ in range(rounds):
        best_base = min(best_base, seconds(base))
        best = min(best, seconds(code))
        if best <= limit * best_base:
            return True, best / best_base
    return False, best / best_base


def test_heavy_imports_would_be_seen() -> None:
    assert heavy_after("import numpy") == {"numpy"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert heavy_after("import smartinit") == set()


def test_values_without_tensors_import_nothing_heavy() -> None:
    assert heavy_after("import smartinit\nsmartinit.Plan, smartinit.errors.ConfigError") == set()


def test_package_adds_at_most_a_tenth_to_torch() -> None:
    fine, ratio = reaches_ratio("import torch, smartinit", "import torch", 1.10)
    assert fine, f"torch and smartinit took {ratio:.2f}× the time of torch alone"


def test_help_imports_nothing_heavy() -> None:
    assert heavy_after(HELP) == set()


@pytest.mark.parametrize("arguments", [("-c", HELP), ("-m", "smartinit", "--help")], ids=["smartinit", "python -m"])
def test_help_prints_the_verbs(arguments: tuple[str, ...]) -> None:
    shown = run(*arguments)
    assert "Usage:" in shown
    assert "compute" in shown


def test_help_starts_about_as_fast_as_click_does() -> None:
    # The goal is half a second; an interpreter with click takes a tenth of one where that was set, so 4× is in it.
    fine, ratio = reaches_ratio(HELP, "import click", 4.0)
    assert fine, f"smartinit --help took {ratio:.1f}× the time of an interpreter that imports click"
