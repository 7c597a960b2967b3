from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for `faulty`

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FULL = "SMARTINIT_STORE_FAULTS"
"""Set by scripts/store_faults.py: the counts of docs/reliability.md instead of small ones."""
REPORT = "SMARTINIT_STORE_FAULTS_REPORT"


@pytest.fixture
def ram() -> Iterator[Path]:
    """A folder in memory where there is one: a kill cannot tell, and a flush costs nothing."""
    memory = Path("/dev/shm")  # noqa: S108
    folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def times() -> Callable[[int, int], int]:
    """How often to try: few in the suite, many for the table."""
    return lambda few, many: many if FULL in os.environ else few


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Takes down what was tried how often, for the table."""
    began = time.monotonic()
    found: dict[str, Any] = {}
    yield lambda **counts: found.update(counts)
    if REPORT in os.environ and found:
        line = {"test": request.node.nodeid, "seconds": round(time.monotonic() - began, 1), **found}
        with open(os.environ[REPORT], "a") as file:  # noqa: PTH123
            file.write(json.dumps(line) + "\n")


@pytest.fixture
def program() -> Callable[..., dict[str, Any]]:
    """Run one of this folder's programs in a process of its own; the JSON that it prints."""

    def run(name: str, *args: object, timeout: float = 3000 if FULL in os.environ else 250) -> dict[str, Any]:
        path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, str(HERE / name), *map(str, args)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
