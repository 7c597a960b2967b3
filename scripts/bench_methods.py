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

from markdown_table import number, table  # noqa: E402 - it lies beside this script

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
    print(table(COLUMNS, map(cells, rows), words=("method", "setting", "note")))
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


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    return (
        row.method,
        row.setting,
        number(row.ours_seconds, "{:.3g}"),
        number(row.theirs_seconds, "{:.3g}"),
        number(row.speedup, "{:.1f}×"),
        number(row.ours_error, "{:.1e}"),
        number(row.theirs_error, "{:.1e}"),
        number(row.ours_mb, "{:.0f}"),
        number(row.theirs_mb, "{:.0f}"),
        row.note,
    )


if __name__ == "__main__":
    main()
