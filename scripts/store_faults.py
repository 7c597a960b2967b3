"""The faults of docs/reliability.md with its counts: the same tests as in the suite, many times over.

    .venv/bin/python scripts/store_faults.py                 # all; about ten minutes on two cores
    .venv/bin/python scripts/store_faults.py kills flips     # some
    .venv/bin/python scripts/store_faults.py --seed 7

Prints a table, and ends with 1 if anything was lost, wrong or not told.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GROUPS = ("kills", "power_loss", "full_disk", "many_processes", "eviction", "flips", "clock", "read_only_midway")


def main() -> int:
    """Run the tests with full counts and print what they have counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all of them if none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unknown = set(options.groups) - set(GROUPS)
    if unknown:
        parser.error(f"no such group: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    tests = [f"tests/store/test_{group}.py" for group in options.groups or GROUPS]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        environment = os.environ | {
            "SMARTINIT_STORE_FAULTS": "full",
            "SMARTINIT_STORE_FAULTS_REPORT": str(report),
            "SMARTINIT_TEST_SEED": str(options.seed),
            "OMP_NUM_THREADS": "1",
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "--timeout",
            "3600",
            *tests,
        ]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False, stdout=sys.stderr).returncode
        lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    lines = list(merged(lines).values())
    print(f"Seed {options.seed}; {'every test passed' if code == 0 else 'SOME TESTS FAILED, see above'}.\n")
    print("| fault | counted | s |\n|---|---|---|")
    for line in lines:
        counts = ", ".join(
            f"{name} {count:,}" for name, count in line.items() if name not in ("test", "seconds", "fault")
        )
        print(f"| {line['fault']} | {counts} | {line['seconds']} |")
    return int(code != 0)


def merged(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One line for each fault: what was counted for it, added up."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        known = found.setdefault(line["fault"], {"fault": line["fault"], "seconds": 0})
        for name, count in line.items():
            if name not in ("test", "fault"):
                known[name] = round(known.get(name, 0) + count, 1)
    return found


if __name__ == "__main__":
    sys.exit(main())
