"""The starts that decompose a weight, the slow way in float64: one textbook decomposition of the whole matrix each.

``product_*`` is what the base gives up, ``s·B A``.
"""

from __future__ import annotations

import numpy as np
import torch


def matrix(weight: torch.Tensor) -> np.ndarray:
    return weight.detach().double().cpu().numpy()


def product_of_top_triplets(weight: torch.Tensor, rank: int) -> np.ndarray:
    """PiSSA, arXiv 2404.02948, eq. 2-4: the r largest singular triplets."""
    u, s, vt = np.linalg.svd(matrix(weight), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def product_of_bottom_triplets(weight: torch.Tensor, rank: int) -> np.ndarray:
    """MiLoRA, arXiv 2406.09044, sec. 3: the r smallest singular triplets of the thin decomposition."""
    u, s, vt = np.linalg.svd(matrix(weight), full_matrices=False)
    first = len(s) - rank
    return (u[:, first:] * s[first:]) @ vt[first:]


def projector_on_minor_left(weight: torch.Tensor, rank: int) -> np.ndarray:
    """MiCA, arXiv 2604.01694: ``B Bᵀ`` of the r minor left singular vectors."""
    u, _, _ = np.linalg.svd(matrix(weight), full_matrices=False)
    b = u[:, u.shape[1] - rank :]
    return b @ b.T


def factors_of_qr(weight: torch.Tensor, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """OLoRA, arXiv 2406.01775, alg. 1: ``(B, A) = (Q_r, R_r)`` of the full QR decomposition."""
    q, r = np.linalg.qr(matrix(weight))
    return q[:, :rank], r[:rank]


def greedy_columns(weight: torch.Tensor, rank: int) -> list[int]:
    """Column pivoting by its definition: every time, the column farthest from the span of those chosen."""
    w = matrix(weight)
    chosen: list[int] = []
    for _ in range(rank):
        q = np.linalg.qr(w[:, chosen])[0] if chosen else np.zeros((w.shape[0], 0))
        chosen.append(int(np.argmax(np.linalg.norm(w - q @ (q.T @ w), axis=0))))
    return chosen


def decaying_weight(
    out: int, features: int, *, decay: float = 0.5, seed: int = 0, size: float = 1.0, rank: int | None = None
) -> torch.Tensor:
    """``(out, in)`` float64 with singular values ``size·i^-decay`` (zeros beyond ``rank``), random vectors."""
    generator = np.random.default_rng(seed)
    k = min(out, features)
    u, v = (np.linalg.qr(generator.standard_normal((n, k)))[0] for n in (out, features))
    s = size * np.arange(1, k + 1, dtype=float) ** -decay
    s[k if rank is None else rank :] = 0
    return torch.from_numpy((u * s) @ v.T)


def relative_error(ours: torch.Tensor, theirs: np.ndarray) -> float:
    """``‖ours - theirs‖_F / ‖theirs‖_F``."""
    return float(np.linalg.norm(matrix(ours) - theirs) / np.linalg.norm(theirs))
