"""Throw broken and hostile bytes at everything of the store that reads some; see docs/fuzzing.md.

    python scripts/fuzz_store.py --engine hypothesis --seconds 600 --seed 1
    python scripts/fuzz_store.py --engine atheris --seconds 600 --seed 1     # guided by coverage; pip install atheris

The seconds are shared by the targets. A finding is any exception but the expected ones, a message with control
characters in it, two readers that disagree, or more than five seconds for one input; it is written to --findings, and
the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

SLOW = 5.0
_MEMORY = Path("/dev/shm")  # noqa: S108 - where there is one
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


class Result(NamedTuple):
    """What fuzzing one target gave."""

    target: str
    executions: int
    seconds: float
    findings: list[str]


def main(argv: list[str] | None = None) -> int:
    """Fuzz; 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=["hypothesis", "atheris"], default="hypothesis")
    parser.add_argument("--target", action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=60, help="for all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="folder for inputs that fail")
    parser.add_argument("--corpus", type=Path, help="folder that atheris begins with and adds to")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(argv)
    if options.child:
        return _atheris_child(options.child, rest)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if options.engine == "hypothesis":
        from store_fuzzing.targets import TARGETS

        names = options.target or list(TARGETS)
        run = _hypothesis
    else:
        names = options.target or ["manifest", "header", "key", "memo", "entry", "remote"]
        run = _atheris
    print(f"engine {options.engine}, seed {options.seed}, {options.seconds:.0f} s for {len(names)} targets", flush=True)
    if "TMPDIR" not in os.environ and os.access(_MEMORY, os.W_OK):
        os.environ["TMPDIR"] = tempfile.tempdir = str(_MEMORY)  # thousands of small files a second
    results = []
    for name in names:
        results.append(run(name, options.seconds / len(names), options))
        last = results[-1]
        print(
            f"{name:10} {last.executions:>10,} inputs {last.seconds:7.1f} s {len(last.findings)} findings", flush=True
        )
        for text in last.findings:
            print(f"    {text}", flush=True)
    total = sum(result.executions for result in results)
    print(f"{'all':10} {total:>10,} inputs {sum(result.seconds for result in results):7.1f} s")
    return int(any(result.findings for result in results))


def _hypothesis(name: str, seconds: float, options: argparse.Namespace) -> Result:
    """Rounds of a few hundred inputs, each with a seed of its own."""
    from hypothesis import HealthCheck, given, seed, settings
    from store_fuzzing.strategies import STRATEGIES
    from store_fuzzing.targets import TARGETS

    began, count, found, number = time.monotonic(), 0, [], options.seed
    while time.monotonic() - began < seconds and len(found) < 5:  # noqa: PLR2004 - enough to look at

        @seed(number)
        @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(STRATEGIES[name])
        def round_of(data: bytes) -> None:
            nonlocal count
            count += 1
            if time.monotonic() - began < seconds:
                _timed(TARGETS[name], data, options.findings / name)

        try:
            round_of()
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            found.append(f"seed {number}: {_told(error)}")
        number += 1
    return Result(name, count, time.monotonic() - began, found)


def _timed(target, data: bytes, folder: Path) -> None:  # noqa: ANN001 - a function of bytes
    began = time.monotonic()
    try:
        target(data)
        if time.monotonic() - began > SLOW:
            raise TimeoutError(f"{time.monotonic() - began:.1f} s")  # noqa: TRY301
    except Exception:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"last-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
        raise


def _told(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error!s:.300} ({Path(last.filename).name}:{last.lineno})"


def _atheris(name: str, seconds: float, options: argparse.Namespace) -> Result:
    """A process of its own, as libFuzzer ends the one that it runs in."""
    findings = options.findings / name
    findings.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = (options.corpus or Path(scratch)) / name
        corpus.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        command = [sys.executable, __file__, "--child", name, str(corpus), f"-seed={options.seed}"]
        command += [f"-max_total_time={max(int(seconds), 1)}", f"-timeout={SLOW:.0f}", "-rss_limit_mb=6000"]
        command += ["-max_len=20000", "-print_final_stats=1", f"-artifact_prefix={findings}/"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds + 600,
            check=False,
            env=os.environ | {"TMPDIR": scratch},  # libFuzzer ends without cleaning up
        )
    executions = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    last = [line for line in done.stderr.splitlines() if line.strip()][-60:]
    found = [] if done.returncode == 0 else ["\n    ".join(line[:300] for line in last)]
    return Result(name, int(executions[1]) if executions else 0, time.monotonic() - began, found)


def _atheris_child(name: str, arguments: list[str]) -> int:
    import atheris

    with atheris.instrument_imports(include=["smartinit"]):
        from store_fuzzing.targets import SEEDS, TARGETS
    corpus = Path(arguments[0])
    for number, content in enumerate(SEEDS[name]()):
        (corpus / f"seed-{number}").write_bytes(content)
    TARGETS[name](SEEDS[name]()[0])  # what is imported late is no slow input
    atheris.Setup([sys.argv[0], *arguments], TARGETS[name])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
