"""Sums of squares: where NaN and Inf are seen, and where round-off is told from variance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Squared round-off of a float32 mean, relative to its square.
_ROUND_OFF = 1e-13


def finite_energy(rows: Tensor) -> float:
    """Sum of squares, added up in float64; the one place where NaN and Inf are seen.

    Raises:
        FloatingPointError: the sum is not finite.
    """
    energy = float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())
    if not math.isfinite(energy):
        raise FloatingPointError
    return energy


def without_round_off(scatter: float, rows: int, mean: Tensor) -> float:
    """0 for what is left of constant rows: the round-off of their mean, and no variance."""
    return scatter if scatter > _ROUND_OFF * rows * float(mean @ mean) else 0.0
