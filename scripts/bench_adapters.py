"""Adapters beside PEFT's in one run: steps of LoRA and DoRA layers, injection, loading, combining; time and memory.

    .venv/bin/python scripts/bench_adapters.py                   # the full sizes: minutes
    .venv/bin/python scripts/bench_adapters.py --quick           # small ones
    .venv/bin/python scripts/bench_adapters.py --only steps --device cuda

Both sides get the same weights, inputs, threads and dtype. The rows come from the modules in ``adapter_benchmarks``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from markdown_table import number, table  # noqa: E402 - it lies beside this script

if TYPE_CHECKING:
    from adapter_benchmarks.rows import Row

GROUPS = ("steps", "injection", "loading", "combining")
COLUMNS = ("what", "setting", "bare ms", "ours ms", "PEFT ms", "faster", "ours MB", "PEFT MB", "note")


def main() -> None:
    """Parse the options, run the groups, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--repeats", type=int, default=7, help="of every measurement")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # of PEFT's and transformers'
    rows: list[Row] = []
    for group in options.only:
        print(f"{group} ...", file=sys.stderr, flush=True)
        rows += importlib.import_module(f"adapter_benchmarks.{group}").run(options)
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {device}, {options.threads} threads\n")
    print(table(COLUMNS, map(cells, rows), words=("what", "setting", "note")))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    return (
        row.what,
        row.setting,
        number(row.bare_ms, "{:.4g}"),
        number(row.ours_ms, "{:.4g}"),
        number(row.theirs_ms, "{:.4g}"),
        number(row.speedup, "{:.2f}×"),
        number(row.ours_mb, "{:.0f}"),
        number(row.theirs_mb, "{:.0f}"),
        row.note,
    )


if __name__ == "__main__":
    main()
