"""Adapters beside parallel layers: ours against the formulation from parallel layers, in one run on real gloo groups.

    .venv/bin/python scripts/bench_megatron.py                    # 2 and 4 processes
    .venv/bin/python scripts/bench_megatron.py --ranks 2 --quick  # one small case for each kind of layer

The other formulation is the usual one: ``linear_in`` and ``linear_out`` are parallel layers themselves (column-parallel
with gathered output, or row-parallel, and then column-parallel). Both have the same factors and inputs, take turns, and
must agree. What is sent is counted, not measured: the bytes that a rank sends in a ring of its peers, forward and
backward, for the adapter alone.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from markdown_table import table  # noqa: E402 - it lies beside this script

from smartinit.adapters.parallel.collectives import gather, shard  # noqa: E402
from smartinit.megatron import LoRA  # noqa: E402
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RANK = 32
# (kind, in, out, sequence parallel): the projections of a 1-billion model.
CASES = (
    ("column", 2048, 8192, False),
    ("row", 8192, 2048, False),
    ("column", 2048, 8192, True),
    ("row", 8192, 2048, True),
)
COLUMNS = ("layer", "ranks", "tokens", "base ms", "ours ms", "usual ms", "faster", "ours KB", "usual KB", "less")


@dataclass(frozen=True)
class Row:
    """One case."""

    layer: str
    ranks: int
    tokens: int
    base_ms: float
    ours_ms: float
    usual_ms: float
    ours_bytes: float
    usual_bytes: float
    difference: float

    def cells(self) -> tuple[str, ...]:
        """One line of the table."""
        return (
            self.layer,
            str(self.ranks),
            str(self.tokens),
            f"{self.base_ms:.1f}",
            f"{self.ours_ms:.1f}",
            f"{self.usual_ms:.1f}",
            f"{self.usual_ms / self.ours_ms:.2f}×",
            f"{self.ours_bytes / 1e3:.0f}",
            f"{self.usual_bytes / 1e3:.0f}",
            f"{self.usual_bytes / self.ours_bytes:.1f}×",
        )


class UsualAdapter(nn.Module):
    """``s·B A x`` from two parallel layers, with the same factors as an adapter of ours."""

    def __init__(self, kind: str, ours: Any, *, sequence: bool) -> None:  # noqa: ANN401
        super().__init__()
        base = ours.base
        options = {"bias": False, "tp_group": base.group}
        self.kind, self.sequence, self.scaling, self.group = kind, sequence, ours.scaling, base.group
        if kind == "column":
            self.linear_in: Any = ColumnParallelLinear(base.in_features, RANK, gather_output=True, **options)
        else:
            self.linear_in = RowParallelLinear(base.in_features, RANK, **options)
        self.linear_out = ColumnParallelLinear(RANK, base.out_features, gather_output=kind == "row", **options)
        with torch.no_grad():
            self.linear_in.weight.copy_(ours.linear_in.weight)
            self.linear_out.weight.copy_(ours.linear_out.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """In the state of the base layer's output."""
        if self.kind == "column" and self.sequence:
            x = gather(x, 0, self.group, gradient="slice")
        y = self.linear_out(self.linear_in(x)[0])[0]
        if self.kind == "row" and self.sequence:
            y = shard(y, 0, self.group)
        return y * self.scaling


def main() -> None:
    """Parse the options, start the processes, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repeats")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.repeats = 128, 2
    rows: list[Row] = []
    for world in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
            torch.multiprocessing.spawn(_rank, (world, folder, options, queue), nprocs=world)
            rows += queue.get()
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, gloo, 1 thread a process\n")
    print(table(COLUMNS, [row.cells() for row in rows], words=("layer",)))
    print(f"\nOutputs and input gradients are at most {max(row.difference for row in rows):.0e} apart (relative).")


def _rank(rank: int, world: int, folder: str, options: argparse.Namespace, queue: Any) -> None:  # noqa: ANN401
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    rows = [_compare(*case, options) for case in CASES]
    if rank == 0:
        queue.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def _compare(kind: str, in_features: int, out_features: int, sequence: bool, options: argparse.Namespace) -> Row:
    group, world = dist.group.WORLD, dist.get_world_size()
    make = ColumnParallelLinear if kind == "column" else RowParallelLinear
    generator = torch.Generator().manual_seed(0)
    base = make(in_features, out_features, bias=False, tp_group=group, sequence_parallel=sequence, generator=generator)
    lora = LoRA(["linear"], dim=RANK, lora_B_init_method="xavier")
    layer = lora(nn.ModuleDict({"linear": base}))["linear"]
    usual = UsualAdapter(kind, layer.adapter, sequence=sequence)
    x = torch.randn(options.tokens, 1, in_features, generator=generator)
    x = shard(x, -1 if kind == "row" else 0, group) if kind == "row" or sequence else x
    x.requires_grad_()
    contenders: dict[str, Callable[[], torch.Tensor]] = {
        "base": lambda: base(x)[0],
        "ours": lambda: base(x)[0] + layer.adapter(x),
        "usual": lambda: base(x)[0] + usual(x),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    outputs: dict[str, list[torch.Tensor]] = {}
    for repeat in range(options.repeats + 1):
        for name, call in contenders.items():
            dist.barrier()
            started = time.perf_counter()
            x.grad = None
            y = call()
            y.sum().backward()
            dist.barrier()
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - started))
            outputs[name] = [y.detach(), x.grad]
    pairs = zip(outputs["ours"], outputs["usual"], strict=True)
    difference = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    sent = {}
    for name, adapter in (("ours", layer.adapter), ("usual", usual)):
        with _counted() as count:
            adapter(x).sum().backward()
        sent[name] = count[0]
    median = {name: statistics.median(values) for name, values in times.items()}
    label = f"{kind}, {out_features}x{in_features}, r={RANK}{', sequence parallel' if sequence else ''}"
    return Row(
        label,
        world,
        options.tokens,
        median["base"],
        median["ours"],
        median["usual"],
        sent["ours"],
        sent["usual"],
        difference,
    )


@contextmanager
def _counted() -> Iterator[list[float]]:
    """Bytes that this rank sends meanwhile, if every operation goes round a ring."""
    count = [0.0]
    world = dist.get_world_size()
    # Which argument is the large one, and how often its share of each peer goes round.
    kinds = {
        "all_reduce": (0, 2),
        "all_gather_single": (0, 1),
        "all_gather_into_tensor": (0, 1),
        "reduce_scatter_single": (1, 1),
        "reduce_scatter_tensor": (1, 1),
        "all_to_all_single": (1, 1),
    }
    kept = {name: getattr(dist, name) for name in kinds if hasattr(dist, name)}

    def counting(name: str) -> Callable[..., Any]:
        which, rounds = kinds[name]

        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            count[0] += rounds * args[which].nbytes * (world - 1) / world
            return kept[name](*args, **kwargs)

        return call

    for name in kept:
        setattr(dist, name, counting(name))
    try:
        yield count
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


if __name__ == "__main__":
    main()
