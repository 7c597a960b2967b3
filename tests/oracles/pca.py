"""Principal components the slow and obvious way: float64, all rows at once."""

from __future__ import annotations

import numpy as np
import torch


def scatter(rows: torch.Tensor, *, centred: bool = True) -> np.ndarray:
    """``Σ (x-μ)(x-μ)ᵀ`` of rows ``(n, d)`` in float64."""
    x = rows.double().cpu().numpy()
    if centred:
        x = x - x.mean(0)
    return x.T @ x


def best_values(matrix: np.ndarray, k: int) -> np.ndarray:
    """The ``k`` largest eigenvalues, descending."""
    return np.linalg.eigvalsh(matrix)[::-1][:k]


def captured(matrix: np.ndarray, directions: torch.Tensor) -> float:
    """Variance on the span of ``directions`` (rows), as a share of the best any subspace of that size can do."""
    q, _ = np.linalg.qr(directions.double().cpu().numpy().T)
    return float(np.trace(q.T @ matrix @ q) / best_values(matrix, q.shape[1]).sum())


def decaying_rows(
    n: int, d: int, *, decay: float = 0.5, spike: float = 1.0, offset: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """Rows with singular values ``i^-decay`` in random directions; one direction ``spike`` times larger; a mean."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    scales = torch.arange(1, d + 1).float() ** -decay
    scales[0] *= spike
    rows = (torch.randn(n, d, generator=generator) * scales) @ turn.mT
    return rows + offset * torch.randn(d, generator=generator)
