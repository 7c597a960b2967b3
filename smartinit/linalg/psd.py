"""Positive semi-definite matrices: a root where one is needed, and damping only where nothing else helps."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

_EPS = torch.finfo(torch.float64).eps
# Squared pivots of a matrix with ones on the diagonal are round-off below this times d.
_PIVOT_FLOOR = 8 * _EPS


class PsdRoot(NamedTuple):
    """``C + damping·diag(C) = L Lᵀ``.

    Attributes:
        factor: ``(d, d)`` float64, lower triangular.
        damping: share of every diagonal entry that was added; 0 unless C is singular to working precision.
    """

    factor: Tensor
    damping: float


def psd_root(matrix: Tensor) -> PsdRoot:
    """Cholesky factor of a symmetric positive semi-definite matrix, singular ones included.

    The diagonal is scaled to ones first, so that a feature a million times larger than the others decides nothing
    about them (van der Sluis, 1969: no diagonal scaling is much better). Where C is singular, each diagonal entry
    grows by the least share, in steps of ten from ``32 d·eps``, that makes the factorisation succeed; features that are
    zero throughout need none.

    Args:
        matrix: ``(d, d)``.

    Returns:
        See `PsdRoot`.

    Raises:
        ValueError: not positive semi-definite: a negative diagonal entry, or an eigenvalue that no small damping
            makes positive.

    Cost: ``d³/3`` flops per attempt, one attempt unless C is singular.
    """
    scaled = matrix.double()
    diagonal = scaled.diagonal()
    if bool((diagonal < 0).any()) or not bool(torch.isfinite(diagonal).all()):
        msg = "a second moment has a negative or non-finite diagonal entry; it must be positive semi-definite"
        raise ValueError(msg)
    scale = diagonal.sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    scaled = inverse.unsqueeze(1) * scaled * inverse
    scaled.diagonal().fill_(1.0)  # exact, and features without any value get an independent dummy
    damping, floor = 0.0, _PIVOT_FLOOR * scaled.shape[0]
    while damping < 1e-4:  # noqa: PLR2004 - ten attempts at most
        scaled.diagonal().fill_(1.0 + damping)
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if not bool(failed) and float(factor.diagonal().min()) ** 2 > max(floor, damping / 2):
            return PsdRoot(scale.unsqueeze(1) * factor, damping)
        damping = max(10 * damping, 4 * floor)
    msg = "a second moment is not positive semi-definite: its scaled eigenvalues go below -1e-4"
    raise ValueError(msg)


def damped(matrix: Tensor, share: float) -> Tensor:
    """``C + share·mean(diag C)·I``: the second moment of inputs with a little white noise (arXiv 2406.05223, sec. 3.2).

    Args:
        matrix: ``(d, d)``; it is left as it is.
        share: of the mean of the diagonal.
    """
    whole = matrix.clone()
    whole.diagonal().add_(share * float(matrix.diagonal().mean()))
    return whole


def psd_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(d,)`` ascending, none below 0, and eigenvectors ``(d, d)``, float64.

    Cost: ``O(d³)``.
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.clamp_min(0), vectors
