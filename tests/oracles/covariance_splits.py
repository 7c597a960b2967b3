"""Splits by the inputs' second moment, written as in the papers: numpy float64, full SVDs, explicit inverses."""

from __future__ import annotations

import numpy as np
import torch


def second_moment(rows: torch.Tensor) -> np.ndarray:
    """``Σ x xᵀ / n`` of rows ``(n, d)``."""
    x = rows.double().cpu().numpy()
    return x.T @ x / len(x)


def corda(weight: torch.Tensor, moment: np.ndarray, rank: int, mode: str = "ipm") -> tuple[np.ndarray, np.ndarray]:
    """A and B of arXiv 2406.05223, eq. 4: ``B = U Σ^½``, ``A = Σ^½ Vᵀ C⁻¹``, of the first or last triplets of W C."""
    w = weight.double().cpu().numpy()
    u, s, vt = np.linalg.svd(w @ moment, full_matrices=False)
    kept = slice(rank) if mode == "ipm" else slice(len(s) - rank, None)
    root = np.sqrt(s[kept])
    return root[:, None] * (vt[kept] @ np.linalg.inv(moment)), u[:, kept] * root


def projection(weight: torch.Tensor, left: np.ndarray) -> np.ndarray:
    """``U Uᵀ W``."""
    return left @ (left.T @ weight.double().cpu().numpy())


def corda_product(weight: torch.Tensor, moment: np.ndarray, rank: int, mode: str = "ipm") -> np.ndarray:
    """``B A`` of `corda`, also where C is singular."""
    u, s, _ = np.linalg.svd(weight.double().cpu().numpy() @ moment, full_matrices=False)
    return projection(weight, u[:, :rank] if mode == "ipm" else u[:, len(s) - rank :])


def output_product(weight: torch.Tensor, rows: torch.Tensor, rank: int) -> np.ndarray:
    """The best rank-r layer for the outputs ``X Wᵀ``: their principal components, from the outputs themselves."""
    outputs = rows.double().cpu().numpy() @ weight.double().cpu().numpy().T
    _, _, vt = np.linalg.svd(outputs, full_matrices=False)
    return projection(weight, vt[:rank].T)


def output_error(weight: torch.Tensor, product: np.ndarray, rows: torch.Tensor) -> float:
    """``Σ ‖W x - P x‖²`` over the rows."""
    return float(np.square(rows.double().cpu().numpy() @ (weight.double().cpu().numpy() - product).T).sum())


def null_product(weight: torch.Tensor, moment: np.ndarray, rank: int) -> np.ndarray:
    """``W U₀ U₀ᵀ`` of arXiv 2503.02659, U₀ the last r singular vectors of C."""
    u, _, _ = np.linalg.svd(moment)
    null = u[:, len(u) - rank :]
    return weight.double().cpu().numpy() @ null @ null.T


def relative(found: torch.Tensor, expected: np.ndarray) -> float:
    """``‖found - expected‖_F / ‖expected‖_F``."""
    return float(np.linalg.norm(found.double().cpu().numpy() - expected) / max(np.linalg.norm(expected), 1e-300))


def graded_rows(n: int, d: int, *, decay: float = 0.5, massive: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Float64 rows with spectrum ``i^-decay`` in random directions; features 3 and 7 ``massive`` times larger."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    scales = torch.arange(1, d + 1, dtype=torch.float64) ** -decay
    rows = (torch.randn(n, d, generator=generator, dtype=torch.float64) * scales) @ turn.mT
    rows[:, 3] *= massive
    rows[:, 7] *= massive / 2
    return rows


def graded_weight(out: int, d: int, *, decay: float = 0.3, seed: int = 0) -> torch.Tensor:
    """Float32 ``(out, d)`` weight with singular values ``i^-decay`` in random directions."""
    generator = torch.Generator().manual_seed(seed + 1)
    k = min(out, d)
    u = torch.linalg.qr(torch.randn(out, k, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q
    return ((u * torch.arange(1, k + 1) ** -decay) @ v.mT).float()
