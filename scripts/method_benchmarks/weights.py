"""The methods that read weights only, beside PEFT's on the same weights: seconds to A, B and residual base; error."""

from __future__ import annotations

import math
import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from method_benchmarks.rows import Row
from safetensors import safe_open
from torch import nn

from smartinit.demo import model_folder
from smartinit.methods.mica import Mica
from smartinit.methods.milora import MiLoRA
from smartinit.methods.olora import Olora
from smartinit.methods.pissa import Pissa
from smartinit.targets.weight import Target

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from torch import Tensor

    from smartinit.methods.base import Method

# The projections of Llama-3-8B: q and o, gate and up, k and v.
LLAMA_SHAPES = ((4096, 4096), (14336, 4096), (1024, 4096))
QUICK_SHAPES = ((1024, 1024), (2048, 1024), (256, 1024))
DECAYS = (0.3, 0.6)
RANK = 16
ASSETS = Path(os.environ.get("SMARTINIT_ASSETS", Path(__file__).resolve().parents[3] / "shared" / "assets"))
TRAINED = (ASSETS / "gpt2-attn-cproj" / "tensors.safetensors", ASSETS / "all-minilm-l6-v2" / "model.safetensors")


class Known(NamedTuple):
    """A weight with the decomposition that it was made from: ``W = U diag(σ) Vᵀ``."""

    weight: Tensor
    left: Tensor
    sigma: Tensor
    right: Tensor


def run(options: argparse.Namespace) -> list[Row]:
    """All rows; ``options.quick`` takes quarter-size weights and one decay."""
    rows = []
    shapes, decays = (QUICK_SHAPES, DECAYS[:1]) if options.quick else (LLAMA_SHAPES, DECAYS)
    if "pissa" in options.methods:
        for shape in shapes:
            for decay in decays:
                known = power_law_weight(*shape, decay, seed=options.seed)
                rows += _pissa(known, f"{shape[0]}×{shape[1]}, r={RANK}, σ ∝ i^-{decay}", options)
        for name, weight in trained_weights():
            rows += _pissa(decomposed(weight), f"{name}, {weight.shape[0]}×{weight.shape[1]}, r={RANK}", options)
    side = 512 if options.quick else 2048
    if "olora" in options.methods:
        rows += _olora(side, options)
    if {"milora", "mica"}.intersection(options.methods):
        rows += _minor(side, options)
    return rows


def trained_weights() -> list[tuple[str, Tensor]]:
    """The largest matrix of each trained model that is there, as float32."""
    files = [file for file in TRAINED if file.is_file()] or [model_folder() / "model.safetensors"]
    weights = []
    for path in files:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
            projections = [
                n for n in shapes if n.endswith(("c_proj.weight", "dense.weight", "proj.weight")) and len(shapes[n]) > 1
            ]
            name = max(projections, key=lambda n: math.prod(shapes[n]))
            weights.append((f"{path.parent.name}, {name.removesuffix('.weight')}", file.get_tensor(name).float()))
    return weights


def decomposed(weight: Tensor) -> Known:
    """Its singular triplets in float64, by LAPACK."""
    left, sigma, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return Known(weight, left, sigma, right)


def power_law_weight(out: int, features: int, decay: float, *, seed: int) -> Known:
    """A float32 weight with σ ∝ i^-decay, as trained projections have, and dense, incoherent singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    k = min(out, features)
    left, right = _cosines(out, k, generator), _cosines(features, k, generator)
    sigma = torch.arange(1, k + 1, dtype=torch.float64) ** -decay
    weight = (left * sigma.float()) @ right.mT
    return Known(weight, left, sigma, right.mT)


def _cosines(size: int, columns: int, generator: torch.Generator) -> Tensor:
    """``(size, columns)`` orthonormal: random columns of the cosine transform, each row with a random sign."""
    chosen = torch.randperm(size, generator=generator)[:columns]
    angle = (torch.arange(size, dtype=torch.float64) + 0.5).unsqueeze(1) * chosen * (math.pi / size)
    scale = torch.where(chosen == 0, 1.0, 2.0).double().div(size).sqrt()
    sign = torch.randint(0, 2, (size, 1), generator=generator) * 2 - 1
    return (angle.cos_() * scale * sign).float()


def product_error(b: Tensor, a: Tensor, left: Tensor, right: Tensor) -> float:
    """``‖B A - L R‖_F / ‖L R‖_F`` through the small Grams, in float64."""
    tall = torch.cat([b.double(), -left.double()], 1)
    wide = torch.cat([a.double(), right.double()], 0)
    # A QR first: the difference of two equal products would drown in the round-off of their Grams.
    small = torch.linalg.qr(tall).R @ torch.linalg.qr(wide.mT).R.mT
    return float(
        torch.linalg.matrix_norm(small) / torch.linalg.matrix_norm(torch.linalg.qr(left.double()).R @ right.double())
    )


def _best_of(
    repeats: int, weight: Tensor, work: Callable[[nn.Linear], tuple[Tensor, Tensor]]
) -> tuple[float, tuple[Tensor, Tensor]]:
    """The fastest of some runs, each on a layer of its own that is there before the clock starts; the last result."""
    runs = []
    for _ in range(repeats):
        layer = _layer(weight)
        start = time.perf_counter()
        result = work(layer)
        runs.append((time.perf_counter() - start, result))
    return min(seconds for seconds, _ in runs), runs[-1][1]


def _ours(method: Method, linear: nn.Linear, rank: int) -> tuple[Tensor, Tensor]:
    """B and A, with the residual written into the layer, as PEFT does it."""
    target = Target.of(linear, "layer")
    factors = method.factors(method.spectrum(target.weight(), None, rank, target.shape, seed=0), rank, 1.0)
    if factors.effect == "splits":
        target.subtract_(factors.delta(1.0))
    return factors.b, factors.a


def _peft(init: str, linear: nn.Linear, rank: int) -> tuple[Tensor, Tensor]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=init)
    layer = get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    return layer.lora_B["default"].weight.data, layer.lora_A["default"].weight.data


def _layer(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear


def _pissa(known: Known, setting: str, options: argparse.Namespace) -> list[Row]:
    left, right = known.left[:, :RANK] * known.sigma[:RANK], known.right[:RANK]
    rows = []
    theirs: dict[str, tuple[float, float]] = {}
    for init, repeats in (("pissa", 1), ("pissa_niter_16", options.repeats)):
        seconds, found = _best_of(repeats, known.weight, partial(_peft, init, rank=RANK))
        theirs[init] = seconds, product_error(*found, left, right)
    for name, method in (("pissa", Pissa()), ("pissa, 16 steps", Pissa(iterations=16))):
        seconds, found = _best_of(options.repeats, known.weight, partial(_ours, method, rank=RANK))
        error = product_error(*found, left, right)
        for init, (their_seconds, their_error) in theirs.items():
            if name == "pissa" or init == "pissa_niter_16":
                rows.append(Row(name, setting, seconds, their_seconds, error, their_error, note=f"PEFT {init}"))
    return rows


def _olora(side: int, options: argparse.Namespace) -> list[Row]:
    weight = torch.randn(side, side, generator=torch.Generator().manual_seed(options.seed)) * 0.02
    q, r = torch.linalg.qr(weight.double())
    left, right = q[:, :RANK], r[:RANK]
    setting = f"{side}×{side}, r={RANK}"
    their_seconds, found = _best_of(options.repeats, weight, partial(_peft, "olora", rank=RANK))
    their_error = product_error(*found, left, right)
    seconds, found = _best_of(options.repeats, weight, partial(_ours, Olora(), rank=RANK))
    rows = [
        Row(
            "olora", setting, seconds, their_seconds, product_error(*found, left, right), their_error, note="PEFT olora"
        )
    ]
    seconds, found = _best_of(options.repeats, weight, partial(_ours, Olora(pivoted=True), rank=RANK))
    return [*rows, Row("olora", setting, seconds, their_seconds, note="pivoted; PEFT olora")]


def _minor(side: int, options: argparse.Namespace) -> list[Row]:
    weight = torch.randn(side, side, generator=torch.Generator().manual_seed(options.seed)) * 0.02
    u, s, vt = torch.linalg.svd(weight.double())
    left, right = u[:, -RANK:] * s[-RANK:], vt[-RANK:]
    setting = f"{side}×{side}, r={RANK}, Gaussian"

    def by_svd(linear: nn.Linear) -> tuple[Tensor, Tensor]:
        u, s, vt = torch.linalg.svd(linear.weight, full_matrices=False)
        return u[:, -RANK:] * s[-RANK:], vt[-RANK:]

    their_seconds, found = _best_of(1, weight, by_svd)
    their_error = product_error(*found, left, right)
    seconds, found = _best_of(1, weight, partial(_ours, MiLoRA(), rank=RANK))
    rows = [Row("milora", setting, seconds, their_seconds, product_error(*found, left, right), their_error,
                note="torch.linalg.svd")]  # fmt: skip
    basis = u[:, -RANK:]
    their_seconds, (theirs, _) = _best_of(1, weight, partial(_peft, "mica", rank=RANK))
    seconds, (ours, _) = _best_of(1, weight, partial(_ours, Mica(), rank=RANK))
    errors = [product_error(b, b.mT, basis, basis.mT) for b in (ours, theirs)]
    return [*rows, Row("mica", setting, seconds, their_seconds, *errors, note="PEFT mica; error of B Bᵀ")]
