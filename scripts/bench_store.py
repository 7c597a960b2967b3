"""Reading from the store beside `safetensors.torch.load_file`, and writing to it; prints docs/benchmarks.md's tables.

    .venv/bin/python scripts/bench_store.py [--size 1.0] [--repeats 15] [--cold]

`load_file` maps: its tensors are read when they are used, and nothing is checked. So both are timed until the values
lie in memory of one's own, as a trainer has them: in new tensors, and in parameters that exist already. The contenders
take turns in one process, each pair in either order, the file in the page cache (unless --cold). Times are the best of
the repeats, as the rest measures what else the machine does; speeds are their ratios.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from markdown_table import table
from safetensors.torch import load_file, save_file

from smartinit.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

Tensors = dict[str, torch.Tensor]
_LLAMA_7B = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def adapter(rank: int = 64, layers: int = 32) -> Tensors:
    """All linear layers of a model of 7 billion weights, bfloat16: 320 MB at rank 64."""
    found = {}
    for layer in range(layers):
        for name, (rows, columns) in _LLAMA_7B.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            found[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns).bfloat16()
            found[f"{prefix}.lora_B.weight"] = torch.zeros(rows, rank).bfloat16()
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=float, default=1.0, help="GB of the one large tensor")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where the store is made; default: a temporary folder")
    parser.add_argument("--cold", action="store_true", help="empty the page cache before each reading (root)")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    cases = {
        "adapter of a 7B model, r = 64": adapter(),
        "one tensor": {"w": torch.randn(int(options.size * 1e9) // 4096, 1024)},
        "5,000 tensors of 4 kB": {f"layers.{n}.some.module.lora_A.weight": torch.randn(16, 64) for n in range(5000)},
    }
    threads = f"{torch.get_num_threads()} threads, {os.cpu_count()} cores"
    print(f"torch {torch.__version__}, {threads}, best of {options.repeats}\n")
    reading, writing = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, tensors in cases.items():
            times = measure(tensors, Path(folder), options)
            size = sum(tensor.nbytes for tensor in tensors.values())
            reading.append([name, f"{size / 1e6:,.0f}", *_reading_row(times)])
            writing.append(
                [name, *(f"{min(times[way]) * 1e3:,.0f}" for way in _WRITING), f"{size / 1e9 / min(times['put']):.2f}"]
            )
    print(table(["", "MB", *_COLUMNS], reading, words=[""]))
    print()
    print(table(["", *_WRITING, "put, GB/s"], writing, words=[""]))
    return 0


_WRITING = ["save_file", "put", "put again"]
_COLUMNS = [
    "load_file, clone",
    "get(own=True)",
    "speed",
    "load_file, copy_",
    "get(own=parameters)",
    "speed",
    "get, clone",
    "get, copy_",
    "get alone",
    "load_file alone",
]


def _reading_row(times: dict[str, list[float]]) -> list[str]:
    def best(way: str) -> str:
        return f"{min(times[way]) * 1e3:,.1f}"

    def speed(theirs: str, ours: str) -> str:
        return f"{min(times[theirs]) / min(times[ours]):.0%}"

    return [
        *map(best, _COLUMNS[:2]),
        speed(*_COLUMNS[:2]),
        *map(best, _COLUMNS[3:5]),
        speed(*_COLUMNS[3:5]),
        *map(best, _COLUMNS[6:]),
    ]


def measure(tensors: Tensors, folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each way, in the order of the repeats."""
    store, saved = Store(folder / "cache"), folder / "saved.safetensors"
    found: dict[str, list[float]] = {}

    def timed(way: str, call: Callable[[], object]) -> None:
        began = time.perf_counter()
        result = call()
        found.setdefault(way, []).append(time.perf_counter() - began)
        del result

    for _ in range(2):
        store.local.remove("key")
        store.prune()
        for blob in store.local.layout.blobs.glob("*/*"):
            blob.unlink()
        timed("save_file", lambda: save_file(tensors, saved))
        timed("put", lambda: store.put("key", tensors))
    timed("put again", lambda: store.put("key", tensors))
    saved.unlink()
    path = store.local.layout.blob(store.peek("key").blobs["tensors.safetensors"].sha256)
    parameters = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}

    def got() -> Tensors:
        with store.get("key") as entry:
            return dict(entry.tensors)

    def copied(source: Tensors) -> None:
        for name, tensor in source.items():
            parameters[name].copy_(tensor)

    ways: dict[str, Callable[[], object]] = {
        "load_file, clone": lambda: {name: tensor.clone() for name, tensor in load_file(path).items()},
        "get(own=True)": lambda: store.get("key", own=True),
        "load_file, copy_": lambda: copied(load_file(path)),
        "get(own=parameters)": lambda: store.get("key", own=parameters),
        "get, clone": lambda: {name: tensor.clone() for name, tensor in got().items()},
        "get, copy_": lambda: copied(got()),
        "get alone": got,
        "load_file alone": lambda: load_file(path),
    }
    names = list(ways)
    turned = [names[1], names[0], names[3], names[2], *names[4:]]
    for repeat in range(options.repeats):
        for way in turned if repeat % 2 else names:
            if options.cold:
                os.sync()
                Path("/proc/sys/vm/drop_caches").write_text("1")
            timed(way, ways[way])
    return found


if __name__ == "__main__":
    sys.exit(main())
