"""Forward and backward of LoRA and DoRA layers beside PEFT's, and the bare layer, on a Llama's shapes.

Times: contenders take turns in one process, the median of the repeats counts. Memory: each contender in a process of
its own, the largest resident size above that before the step (on a GPU: the allocator's own peak).
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from adapter_benchmarks.rows import Row
from torch import nn

from smartinit import LoraConfig
from smartinit.adapters.kinds import wrap

if TYPE_CHECKING:
    import argparse

RANK = 16
# (out, in): the attention and the feed-forward projections of an 8-billion model.
SHAPES = ((4096, 4096), (14336, 4096), (1024, 4096))
QUICK_SHAPES = ((1024, 1024),)
KINDS = ("lora", "dora")


def run(options: argparse.Namespace) -> list[Row]:
    """One row per kind of adapter, shape and dtype."""
    return [
        _compare(kind, shape, dtype, training, options)
        for shape in (QUICK_SHAPES if options.quick else SHAPES)
        for dtype in (("float32",) if options.device == "cpu" else ("float32", "bfloat16"))
        for kind in KINDS
        for training in (True, False)
    ]


def _compare(kind: str, shape: tuple[int, int], dtype: str, training: bool, options: argparse.Namespace) -> Row:
    tokens = 256 if options.quick else 512
    contenders = {name: _layer(name, kind, shape, dtype, options.device) for name in ("ours", "peft", "bare")}
    x = torch.randn(1, tokens, shape[1], device=options.device, dtype=getattr(torch, dtype))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(options.repeats + 2):
        for name, layer in contenders.items():
            seconds = _step(layer, x, training)
            if repeat > 1:
                times[name].append(1e3 * seconds)
    del contenders
    gc.collect()
    peak = {name: _peak(name, kind, shape, dtype, tokens, training, options) for name in ("ours", "peft")}
    what = f"{kind.replace('lora', 'LoRA').replace('dora', 'DoRA')}, {'forward + backward' if training else 'forward'}"
    medians = {name: statistics.median(values) for name, values in times.items()}
    return Row(
        what,
        f"{shape[0]}x{shape[1]}, r={RANK}, {tokens} tokens, {dtype}",
        medians["ours"],
        medians["peft"],
        medians["bare"],
        peak["ours"],
        peak["peft"],
    )


def _layer(name: str, kind: str, shape: tuple[int, int], dtype: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=getattr(torch, dtype)).requires_grad_(False)
    if name == "bare":
        return base
    layer: Any
    options: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "use_dora": kind == "dora"}
    if name == "ours":
        layer = wrap("layer", base)
        layer.update_layer("default", RANK, 2 * RANK, LoraConfig(**options))
        layer.set_adapter(["default"])
    else:
        from peft import LoraConfig as PeftConfig
        from peft.tuners.lora.layer import Linear

        layer = Linear(base, "default", config=PeftConfig(**options), r=RANK, lora_alpha=2 * RANK)
        for part in (layer.lora_A, layer.lora_B):
            part.float()
    nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
    return layer


def _step(layer: nn.Module, x: torch.Tensor, training: bool) -> float:
    layer.train(training)
    rows = x.clone().requires_grad_(training)
    _wait(x.device)
    start = time.perf_counter()
    with torch.set_grad_enabled(training):
        y = layer(rows)
        if training:
            y.backward(torch.ones_like(y))
    _wait(x.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak(
    name: str, kind: str, shape: tuple[int, int], dtype: str, tokens: int, training: bool, options: argparse.Namespace
) -> float:
    task = {
        "name": name,
        "kind": kind,
        "shape": shape,
        "dtype": dtype,
        "tokens": tokens,
        "training": training,
        "device": options.device,
        "threads": options.threads,
    }
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(task)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def _status(field: str) -> float:
    """A size from Linux's status file, in 10^6 bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1.024e-3


def main() -> None:
    """One contender: its peak memory on stdout."""
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    layer = _layer(task["name"], task["kind"], tuple(task["shape"]), task["dtype"], task["device"])
    x = torch.randn(1, task["tokens"], task["shape"][1], device=task["device"], dtype=getattr(torch, task["dtype"]))
    small = torch.randn(1, 8, task["shape"][1], device=task["device"], dtype=x.dtype)
    _step(nn.Linear(task["shape"][1], 8, device=task["device"], dtype=x.dtype), small, True)  # imports, first calls
    if task["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
        _step(layer, x, task["training"])
        print(torch.cuda.max_memory_allocated() / 1e6 - before)
        return
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = _status("VmRSS:")
    _step(layer, x, task["training"])
    print(_status("VmHWM:") - before)


if __name__ == "__main__":
    main()
