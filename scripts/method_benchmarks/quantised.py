"""LoftQ beside PEFT's on the same weights: time to Q, A and B, and how much of the quantisation error they leave."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, cast

import torch
from method_benchmarks.rows import Row

from smartinit.linalg.quantisers import Quantiser
from smartinit.methods.loftq import Loftq

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from torch import Tensor

# Llama-3-8B's q and o, then k and v, where several iterations are affordable for a full SVD.
SETTINGS = (((4096, 4096), 1), ((1024, 4096), 1), ((1024, 4096), 5))
QUICK_SETTINGS = (((1024, 1024), 1), ((256, 1024), 5))
RANK = 16
BITS = (4, 8)


def run(options: argparse.Namespace) -> list[Row]:
    """All rows; ``options.quick`` takes quarter-size weights."""
    rows = []
    for shape, iterations in QUICK_SETTINGS if options.quick else SETTINGS:
        weight = column_scaled_weight(*shape, seed=options.seed)
        rows += [_row(weight, bits, iterations, options) for bits in BITS[: 1 if iterations > 1 else 2]]
    return rows


def column_scaled_weight(out: int, features: int, *, seed: int) -> Tensor:
    """Normal numbers whose columns differ in size, as the features of trained models do."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(0.5 * torch.randn(features, generator=generator))
    return torch.randn(out, features, generator=generator) * 0.02 * sizes


def _row(weight: Tensor, bits: int, iterations: int, options: argparse.Namespace) -> Row:
    method, shape = Loftq(bits, iterations), (weight.shape[0], weight.shape[1])

    def ours() -> tuple[Tensor, Tensor]:
        factors = method.factors(method.spectrum(weight, None, RANK, shape, seed=options.seed), RANK, 1.0)
        return cast("Tensor", factors.base), factors.delta(1.0)

    quantise, source = _their_quantiser(bits)
    seconds, found = _best_of(options.repeats, ours)
    their_seconds, theirs = _best_of(1, lambda: _peft(weight, iterations, quantise))
    whole = float(torch.linalg.vector_norm((weight - Quantiser(bits)(weight)).double()))
    left, their_left = (float(torch.linalg.vector_norm((weight - q - p).double())) / whole for q, p in (found, theirs))
    steps = "1 step" if iterations == 1 else f"{iterations} steps"
    return Row(
        "loftq",
        f"{shape[0]}×{shape[1]}, r={RANK}, {bits} bits, {steps}",
        seconds,
        their_seconds,
        note=f"PEFT's decomposition, {source}; left of ‖W - Q‖: ours {left:.6f}, theirs {their_left:.6f}",
    )


def _their_quantiser(bits: int) -> tuple[Callable[[Tensor], Tensor], str]:
    """bitsandbytes, which PEFT calls; where it is not installed, ours, so that only the rest is compared."""
    try:
        import bitsandbytes.functional as library
    except ImportError:
        return Quantiser(bits), "our quantiser (no bitsandbytes here)"

    def four(weight: Tensor) -> Tensor:
        packed, state = library.quantize_4bit(weight, quant_type="nf4", blocksize=64)
        dequantised: Tensor = library.dequantize_4bit(packed, state)
        return dequantised

    def eight(weight: Tensor) -> Tensor:
        codes, scales, _ = library.int8_vectorwise_quant(weight.half())
        dequantised: Tensor = library.int8_vectorwise_dequant(codes, scales)
        return dequantised

    return four if bits == BITS[0] else eight, f"bitsandbytes {bits} bits"


def _peft(weight: Tensor, iterations: int, quantise: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """PEFT's steps with its own decomposition; its `loftq_init` as a whole insists on a GPU."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    rest = weight.clone()
    for _ in range(iterations):
        dequantised = quantise(rest)
        parts = _low_rank_decomposition(weight - dequantised, reduced_rank=RANK)
        product = parts["L"] @ parts["R"]
        rest = weight - product
    return dequantised, product


def _best_of(repeats: int, work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[float, tuple[Tensor, Tensor]]:
    """The fastest of some runs, and what the last one gave."""
    seconds = math.inf
    for _ in range(max(1, repeats)):
        start = time.perf_counter()
        result = work()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, result
