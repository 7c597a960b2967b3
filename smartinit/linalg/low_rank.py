"""Truncated singular value decompositions of sums of low-rank products, and of dense matrices of which few ranks count.

A sum ``Σ Lᵢ Rᵢ = [L₁ L₂ …] [R₁; R₂; …]`` of products of ranks rᵢ has at most rank ``q = Σ rᵢ``. QR of both stacks
leaves a ``q×q`` core with the same singular values: nothing of the size of the dense sum is ever formed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smartinit.linalg.krylov import top_triplets
from smartinit.linalg.triplets import with_fixed_signs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def truncated_sum(lefts: Sequence[Tensor], rights: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of ``Σ Lᵢ Rᵢ`` of one rank (Eckart-Young), as ``(U Σ, Vᵀ)``, in float64.

    Args:
        lefts: ``(out, rᵢ)`` each.
        rights: ``(rᵢ, in)`` each.
        rank: k, at most ``min(out, in, Σ rᵢ)``.

    Returns:
        ``(out, k)`` and ``(k, in)`` with orthonormal rows, the largest singular value first; in every row the entry of
        largest size is positive.

    Cost: O((out + in)·q² + q³) with ``q = Σ rᵢ``.
    """
    outer, upper = torch.linalg.qr(torch.cat([left.double() for left in lefts], dim=1))
    inner, lower = torch.linalg.qr(torch.cat([right.double() for right in rights]).mT)
    u, sigma, vt = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    left, right = with_fixed_signs(outer @ u[:, :rank], vt[:rank] @ inner.mT)
    return left * sigma[:rank], right


def truncated(matrix: Tensor, rank: int, *, driver: str | None = None) -> tuple[Tensor, Tensor]:
    """The best approximation of a dense matrix of one rank, as ``(U Σ, Vᵀ)`` in its dtype.

    Args:
        matrix: ``(out, in)`` float32 or float64.
        rank: k, at most ``min(out, in)``.
        driver: cuSOLVER's routine (``gesvd``, ``gesvdj``, ``gesvda``) for a matrix on CUDA, which then is decomposed
            densely; elsewhere it means nothing.

    Returns:
        As `truncated_sum`.

    Cost: that of `smartinit.linalg.krylov.top_triplets`, which falls back on a dense routine where its residuals do
    not certify the result.
    """
    if driver is not None and matrix.is_cuda:
        u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
        left, right = with_fixed_signs(u[:, :rank], vt[:rank])
        return left * sigma[:rank], right
    found = top_triplets(matrix[None], rank, seeds=[0])
    return found.left[0] * found.values[0].to(matrix.dtype), found.right[0]


def clamped(left: Tensor, right: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Both factors with their entries limited to ``±t``, t the quantile ``share`` of all entries of both.

    Singular vectors have no sign of their own, and the quantile of the entries as they happen to come would depend on
    it. So every entry counts with both signs.

    Args:
        left: ``(out, k)``.
        right: ``(k, in)``.
        share: above 0.5, at most 1, which limits nothing.

    Cost: O(n log n) with ``n = (out + in)·k``.
    """
    sizes = torch.cat([left.flatten(), right.flatten()]).abs().sort().values
    # The 2n entries with both signs, in ascending order, are the sizes negated and then the sizes.
    upper = torch.cat([-sizes[:1], sizes])
    place = share * (2 * sizes.numel() - 1) - (sizes.numel() - 1)
    below = int(place)
    limit = float(torch.lerp(upper[below], upper[min(below + 1, sizes.numel())], place - below))
    return left.clamp(-limit, limit), right.clamp(-limit, limit)
