"""Every initialisation beside its rival, in one run: seconds, error of ``B A``, memory.

    .venv/bin/python scripts/bench_methods.py                   # the full sizes: minutes
    .venv/bin/python scripts/bench_methods.py --quick           # small ones
    .venv/bin/python scripts/bench_methods.py --only pissa olora --json rows.json

Rivals get the same weights, data, threads and dtype. The rows come from the modules in ``method_benchmarks``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

if TYPE_CHECKING:
    from method_benchmarks.rows import Row

# Module -> the methods that its rows are about, so that --only runs no more than it must.
GROUPS = {
    "weights": ("pissa", "olora", "milora", "mica"),
    "covariance": ("corda", "output_pca", "lora_null"),
    "gradients": ("lora_ga", "lora_one"),
    "quantised": ("loftq",),
}
COLUMNS = (
    "method",
    "setting",
    "ours s",
    "theirs s",
    "faster",
    "ours error",
    "theirs error",
    "ours MB",
    "theirs MB",
    "note",
)


def main() -> None:
    """Parse the options, run the groups, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*GROUPS, *(method for methods in GROUPS.values() for method in methods)]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help=f"groups or methods: {', '.join(names)}"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many runs counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(options.threads)
    rows = list(collect(options))
    print(f"torch {torch.__version__}, {options.threads} threads, {platform.processor() or platform.machine()}\n")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def collect(options: argparse.Namespace) -> list[Row]:
    """The rows of every group that is asked for and there."""
    wanted = set(options.only or GROUPS)
    rows: list[Row] = []
    for group, methods in GROUPS.items():
        if group not in wanted and not wanted.intersection(methods):
            continue
        if not (HERE / "method_benchmarks" / f"{group}.py").is_file():
            print(f"no benchmark of {group} yet", file=sys.stderr)
            continue
        print(f"{group} ...", file=sys.stderr, flush=True)
        options.methods = methods if group in wanted else tuple(wanted.intersection(methods))
        module = importlib.import_module(f"method_benchmarks.{group}")
        rows += [row for row in module.run(options) if group in wanted or row.method.split(",")[0] in wanted]
    return rows


def table(rows: list[Row]) -> str:
    """The rows as markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|--:|--:|--:|--:|--:|--:|--:|---|"]
    for row in rows:
        cells = (
            row.method,
            row.setting,
            _number(row.ours_seconds, "{:.3g}"),
            _number(row.theirs_seconds, "{:.3g}"),
            _number(row.speedup, "{:.1f}×"),
            _number(row.ours_error, "{:.1e}"),
            _number(row.theirs_error, "{:.1e}"),
            _number(row.ours_mb, "{:.0f}"),
            _number(row.theirs_mb, "{:.0f}"),
            row.note,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


if __name__ == "__main__":
    main()
