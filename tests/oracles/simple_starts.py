"""The starts without a decomposition, entry by entry in float64, as their papers and PEFT's documentation say."""

from __future__ import annotations

import math

import numpy as np


def sine_basis(width: int) -> np.ndarray:
    """``Φ[i, j] = √(2/(m+1)) sin((i+1)(j+1)π/(m+1))``: arXiv 2507.06558, eq. 12."""
    return np.array(
        [
            [math.sqrt(2 / (width + 1)) * math.sin((i + 1) * (j + 1) * math.pi / (width + 1)) for j in range(width)]
            for i in range(width)
        ]
    )


def loram_product(weight: np.ndarray, rank: int) -> np.ndarray:
    """``B A`` of algorithm 1 of arXiv 2507.06558, with ν the mean of squared entries."""
    n, m = weight.shape
    left, right = sine_basis(n)[:, :rank], sine_basis(m)[:, :rank]
    magnitude = np.mean(weight**2)
    basis_magnitude = np.mean((left @ right.T) ** 2)
    beta = (math.log(rank) / math.log(min(n, m)) * magnitude / basis_magnitude) ** 0.25
    return (beta * left) @ (beta * right.T)


def orthogonal_variance(rank: int, draws: int, *, seed: int) -> float:
    """Mean square of the entries of ``A = Q₁ᵀ G / 10`` over random orthogonal matrices: PEFT's construction."""
    random = np.random.default_rng(seed)
    squares = []
    for _ in range(draws):
        q, _ = np.linalg.qr(random.normal(size=(rank, rank)))
        squares.append(np.mean((random.normal(size=(64, rank // 2)) @ q[0::2] / 10) ** 2))
    return float(np.mean(squares))
