"""Processes that want the same at the same time: one computes, all get equal numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "run_compute.py"


@pytest.mark.parametrize("locking", ["locks", "no locks"])
def test_processes_get_equal_numbers(tmp_path: Path, locking: str) -> None:
    command = [sys.executable, str(PROGRAM), str(tmp_path / "s"), locking]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        lines = [process.communicate(timeout=200)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(30)
    assert len({digest for _, _, digest in lines}) == 1
    ran = [int(calls) for _, calls, _ in lines if calls != "0"]
    if locking == "locks":
        assert sorted(found for found, _, _ in lines) == ["None", "artefact", "artefact"]
        assert len(ran) == 1
    assert ran
