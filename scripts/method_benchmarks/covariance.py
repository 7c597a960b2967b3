"""CorDA, output-optimal and LoRA-Null beside PEFT's CorDA: covariances, decompositions and factors of one block.

Each side runs in a process of its own, so that the peak of its memory is its own: a block of a Llama (seven
projections), the same random weights with decaying spectra, the same batches of one sample. The clock runs from the
first batch to the last A and B, less what the bare forward passes take, which both need; weights and inputs are made
before. Errors are those of ``B A`` against the paper's in float64 of the same inputs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from method_benchmarks.rows import Row
from torch import nn

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

RANK = 16
BATCHES, TOKENS = 4, 1024
OURS = ("corda", "corda-kpm", "output_pca", "lora_null")
CHECKED = "o_proj"  # the layer whose B A is compared


def run(options: argparse.Namespace) -> list[Row]:
    """One row per method."""
    hidden = 512 if options.quick else 2048
    wanted = set(options.only or OURS)
    chosen = [m for m in OURS if not wanted.intersection(OURS) or m.partition("-")[0] in wanted]
    theirs = {kind: _in_process(kind, hidden, options) for kind in ("peft", "peft-kpm") if "corda" in str(chosen)}
    rows = []
    for method in chosen:
        ours = _in_process(method, hidden, options)
        rival = theirs.get("peft-kpm" if method == "corda-kpm" else "peft", {}) if "corda" in method else {}
        rows.append(
            Row(
                method=method.partition("-")[0],
                setting=f"{'kpm, ' if 'kpm' in method else ''}hidden {hidden}, r={RANK}, {BATCHES}x{TOKENS} tokens",
                ours_seconds=ours["seconds"],
                theirs_seconds=rival.get("seconds"),
                ours_error=ours["error"],
                theirs_error=rival.get("error"),
                ours_mb=ours["mb"],
                theirs_mb=rival.get("mb"),
                note=f"covariances {ours['covariance']:.2f} s"
                + (f" against {rival['covariance']:.2f} s" if rival else "")
                + f"; forward passes ({ours['forward']:.2f} s) not counted",
            )
        )
    return rows


class Block(nn.Module):
    """The projections of a Llama's block, fed by what they read: four inputs, of which one has massive features."""

    def __init__(self, hidden: int, seed: int) -> None:
        super().__init__()
        wide = hidden * 11 // 8
        self.shapes = {
            "q_proj": (hidden, hidden),
            "k_proj": (hidden, hidden),
            "v_proj": (hidden, hidden),
            "o_proj": (hidden, hidden),
            "gate_proj": (wide, hidden),
            "up_proj": (wide, hidden),
            "down_proj": (hidden, wide),
        }
        generator = torch.Generator().manual_seed(seed)
        for name, (out, features) in self.shapes.items():
            layer = nn.Linear(features, out, bias=False)
            layer.weight.data = torch.randn(out, features, generator=generator) / features**0.5
            self.add_module(name, layer)

    def forward(self, inputs: dict[str, torch.Tensor]) -> None:
        """Run every projection on the input of its site."""
        for names, tensor in zip(SITES, inputs.values(), strict=True):
            for name in names:
                self.get_submodule(name)(tensor)


SITES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def make_inputs(hidden: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Batches of one sample: the spectrum of a residual stream, ``i^-0.7``, in random directions."""
    generator = torch.Generator().manual_seed(seed + 1)
    mixers = []
    for names in SITES:
        d = hidden * 11 // 8 if names == ("down_proj",) else hidden
        turn = torch.randn(d, d, generator=generator) / d**0.5
        mixers.append((torch.arange(1, d + 1) ** -0.7).unsqueeze(1) * turn)
    return [
        {
            names[0]: torch.randn(1, TOKENS, len(mixer), generator=generator) @ mixer
            for names, mixer in zip(SITES, mixers, strict=True)
        }
        for _ in range(BATCHES)
    ]


@dataclass
class Measured:
    """What one side gave."""

    covariance: float
    seconds: float
    products: dict[str, torch.Tensor]


def ours(block: Block, batches: list[dict[str, torch.Tensor]], kind: str) -> Measured:
    """Statistics through the package's own capture of inputs, then one spectrum and one pair of factors per layer."""
    from smartinit.activations.capture import Capture
    from smartinit.methods import available_methods
    from smartinit.statistics.gram import GramStatistic

    name, _, mode = kind.partition("-")
    method = available_methods()[name](**({"corda_method": mode} if mode else {}))
    targets = [
        SimpleNamespace(name=layer, path=layer, module=block.get_submodule(layer), in_features=shape[1])
        for layer, shape in block.shapes.items()
    ]
    start = time.perf_counter()
    capture = Capture(
        block,
        targets,
        lambda target, device: GramStatistic(target.in_features, centred=False, device=device, moments_only=True),
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
    )
    with capture:
        for batch in batches:
            capture.run(batch)
    covariance = time.perf_counter() - start
    products = {}
    assert len(capture.sites) == len(SITES)  # noqa: S101 - four matrices, not seven
    while capture.sites:
        site = capture.sites.pop(0)
        for layer in site.names:
            weight = block.get_submodule(layer).weight
            spectrum = method.spectrum(weight, site.statistic, RANK, tuple(weight.shape))
            factors = method.factors(spectrum, RANK, 1.0)
            if layer == CHECKED:
                products[layer] = (factors.b, factors.a)
        del site
    return Measured(covariance, time.perf_counter() - start, products)


def peft(block: Block, batches: list[dict[str, torch.Tensor]], kind: str) -> Measured:
    """`preprocess_corda` as PEFT's documentation has it, and the factors as its layer makes them."""
    if (
        "attr" not in sys.modules and importlib.util.find_spec("attr") is None
    ):  # imported there, and no requirement of PEFT's
        from dataclasses import dataclass as data

        sys.modules["attr"] = SimpleNamespace(dataclass=data)  # type: ignore[assignment]
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=list(block.shapes),
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm" if "kpm" in kind else "ipm"),
    )
    after: list[float] = []
    start = time.perf_counter()

    def run_model() -> None:
        with torch.no_grad():
            for batch in batches:
                block(batch)
        after.append(time.perf_counter())

    preprocess_corda(block, config, run_model=run_model)
    products = {}
    for name in block.shapes:
        eigens = block.get_submodule(name).eigens
        root = eigens.S_WC.sqrt()
        b, a = eigens.U_WC * root, eigens.V_WC.mT * root.unsqueeze(1)
        if name == CHECKED:
            products[name] = (b, a)
    return Measured(after[0] - start, time.perf_counter() - start, products)


def expected(block: Block, batches: list[dict[str, torch.Tensor]], kind: str) -> torch.Tensor:
    """``B A`` of the paper for the checked layer, dense and in float64."""
    weight = block.get_submodule(CHECKED).weight.detach().double()
    rows = torch.cat([batch[CHECKED][0] for batch in batches]).double()
    moment = rows.mT @ rows / len(rows)
    if kind == "lora_null":
        null = torch.linalg.eigh(moment).eigenvectors[:, :RANK]
        return weight @ null @ null.mT
    if kind == "output_pca":
        left = torch.linalg.eigh(weight @ moment @ weight.mT).eigenvectors[:, -RANK:]
    else:
        u = torch.linalg.svd(weight @ moment, full_matrices=False).U
        left = u[:, -RANK:] if "kpm" in kind else u[:, :RANK]
    return left @ (left.mT @ weight)


@torch.no_grad()
def _forward_seconds(block: Block, batches: list[dict[str, torch.Tensor]]) -> float:
    start = time.perf_counter()
    for batch in batches:
        block(batch)
    return time.perf_counter() - start


def _in_process(kind: str, hidden: int, options: argparse.Namespace) -> dict[str, float]:
    """Run this file for one side."""
    done = subprocess.run(
        [sys.executable, __file__, kind, str(hidden), str(options.seed), str(options.threads)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if done.returncode:
        raise RuntimeError(f"{kind} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


@contextlib.contextmanager
def _peak() -> Iterator[Callable[[], float]]:
    """Most resident memory above that at the start, in 10^6 bytes; sampled: the system's own peak has no reset."""
    base, most, stop = _resident(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            most[0] = max(most[0], _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: (max(most[0], _resident()) - base) / 1e6
    finally:
        stop.set()
        watcher.join()


def main() -> None:
    """One side: its figures as JSON on stdout."""
    kind, hidden, seed, threads = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    block, batches = Block(hidden, seed).eval(), make_inputs(hidden, seed)
    side: Any = peft if kind.startswith("peft") else ours
    warm = Block(64, seed).eval()  # imports and first calls
    side(warm, make_inputs(64, seed), kind)
    forward = min(_forward_seconds(block, batches) for _ in range(2))
    with _peak() as peak:
        measured = side(block, batches, kind)
        mb = peak()
    b, a = measured.products[CHECKED]
    best = expected(block, batches, kind)
    error = float(torch.linalg.norm(b.detach().double() @ a.detach().double() - best) / torch.linalg.norm(best))
    seconds, covariance = measured.seconds - forward, measured.covariance - forward
    print(
        json.dumps({"seconds": seconds, "covariance": covariance, "forward": forward, "mb": mb, "error": error}),
    )


if __name__ == "__main__":
    main()
