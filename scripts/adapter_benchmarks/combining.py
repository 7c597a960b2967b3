"""Two adapters on one square layer made into one, beside PEFT: the low-rank sum, and a pruned dense one.

Every contender runs in a process of its own, which measures the time of the call and the largest resident size above
that before it (on a GPU: the allocator's own peak). The note tells how far the two products are apart.

    .venv/bin/python scripts/bench_adapters.py --only combining
    .venv/bin/python scripts/adapter_benchmarks/combining.py [--quick]      # this table alone
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    HERE = Path(__file__).resolve().parent
    sys.path[0] = str(HERE.parent)  # instead of this folder, whose modules have names that others have too
    sys.path.insert(1, str(HERE.parents[1]))

import torch
from adapter_benchmarks.rows import Row
from torch import nn

RANK = 16
WEIGHTS = [0.7, -0.4]
# The type, and the side of the layer; PEFT's full decomposition of the larger takes a quarter of a minute.
CASES = (("svd", 4096), ("ties_svd", 2048))
QUICK_CASES = (("svd", 1024), ("ties_svd", 512))


def run(options: argparse.Namespace) -> list[Row]:
    """One row per combination type; PEFT's is run once, ours as often as is asked for, and the fastest counts."""
    rows = []
    for kind, side in QUICK_CASES if options.quick else CASES:
        found = {name: _measured(name, kind, side, options) for name in ("ours", "peft")}
        ours, theirs = (torch.tensor(found[name]["probe"], dtype=torch.float64) for name in ("ours", "peft"))
        apart = float(torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs))
        rows.append(
            Row(
                f"add_weighted_adapter, {kind}",
                f"{side}×{side}, 2 adapters of rank {RANK} to one, float32",
                found["ours"]["ms"],
                found["peft"]["ms"],
                ours_mb=found["ours"]["mb"],
                theirs_mb=found["peft"]["mb"],
                note=f"products {apart:.0e} apart",
            )
        )
    return rows


def _measured(name: str, kind: str, side: int, options: argparse.Namespace) -> dict[str, Any]:
    task = {
        "name": name,
        "kind": kind,
        "side": side,
        "device": options.device,
        "threads": options.threads,
        "repeats": options.repeats if name == "ours" else 1,
    }
    done = subprocess.run(
        [sys.executable, __file__, "--task", json.dumps(task)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _model(name: str, side: int, device: str) -> Any:  # noqa: ANN401 - ours or PEFT's
    """A layer with two adapters "0" and "1" whose matrices are the same whoever wrapped it."""
    base = nn.Sequential(nn.Linear(side, side, bias=False, device=device))
    config: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["0"]}
    if name == "ours":
        import smartinit as si

        model: Any = si.LoraModel(base, si.LoraConfig(**config), "0")
        model.add_adapter("1", si.LoraConfig(**config))
        layer = model.model[0]
    else:
        import peft

        model = peft.get_peft_model(base, peft.LoraConfig(**config), "0")
        model.add_adapter("1", peft.LoraConfig(**config))
        layer = model.base_model.model[0]
    generator = torch.Generator().manual_seed(0)
    # Singular values that decay, as those of trained adapters do.
    decay = torch.arange(1, RANK + 1) ** -0.5
    with torch.no_grad():
        for adapter in ("0", "1"):
            layer.lora_A[adapter].weight.copy_(torch.randn(RANK, side, generator=generator) * decay[:, None])
            layer.lora_B[adapter].weight.copy_(torch.randn(side, RANK, generator=generator))
    return model, layer


def _status(field: str) -> float:
    """A size from Linux's status file, in 10^6 bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1.024e-3


def _contend(task: dict[str, Any]) -> dict[str, Any]:
    """One contender: milliseconds, peak memory, and what its product makes of a few vectors."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(task["threads"])
    cuda = task["device"] == "cuda"
    small, _ = _model(task["name"], 64, task["device"])  # imports, first calls
    small.add_weighted_adapter(["0", "1"], WEIGHTS, "new", task["kind"], density=0.5)
    model, layer = _model(task["name"], task["side"], task["device"])
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        before = _status("VmRSS:")
    seconds = []
    for repeat in range(task["repeats"]):
        if repeat:
            model.delete_adapter("new")
        start = time.perf_counter()
        model.add_weighted_adapter(["0", "1"], WEIGHTS, "new", task["kind"], density=0.5)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else _status("VmHWM:")
    generator = torch.Generator().manual_seed(1)
    probes = torch.randn(2, 8, task["side"], generator=generator, dtype=torch.float64)
    a, b = (getattr(layer, part)["new"].weight.detach().cpu().double() for part in ("lora_A", "lora_B"))
    probe = (probes[0] @ b) @ (a @ probes[1].mT)
    return {"ms": 1e3 * min(seconds), "mb": peak - before, "probe": probe.tolist()}


def main() -> None:
    """One contender's figures, or the rows of this benchmark alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--repeats", type=int, default=5, help="of ours")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(_contend(options.task)))
        return
    from bench_adapters import table

    print(table(run(options)))


if __name__ == "__main__":
    main()
