"""The smallest singular triplets of the thin decomposition: block Krylov on the inverse, else the dense routine.

The small end of a spectrum is where float32 has no digits left (σ_min of a Gaussian 4096² is 1e-4 σ₁), so everything
runs in float64. The inverse of the smaller Gram separates its small eigenvalues as far as they are apart relatively,
and a Cholesky factor applies it for two triangular solves (Golub & Van Loan, Matrix Computations, sec. 8.2.2, 10.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smartinit.linalg.threads import small_eigh
from smartinit.linalg.triplets import Triplets, dense_triplets, with_fixed_signs, working_copy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

MAX_STEPS = 25
_FIRST_TEST = 4
_OVERSAMPLING = 8
# Below these sizes the dense eigenproblem is cheaper.
_DENSE_SIDE, _DENSE_SHARE = 1200, 8
_TOLERANCE = 1e-7
# A gap below this share of σ² counts as this share: see `smartinit.linalg.krylov`.
_GAP_FLOOR = 1e-2
# Squared singular values nearer to the round-off of the Gram than this are left to the dense routine.
_SOUND_SHARE = 1e-12


def bottom_triplets(weight: Tensor, k: int, *, seeds: Sequence[int]) -> Triplets:
    """The k smallest of the ``min(out, in)`` singular triplets of s matrices, ascending.

    Args:
        weight: ``(s, out, in)``.
        k: at most ``min(out, in)``.
        seeds: one for every matrix.

    Returns:
        See `Triplets`; orthonormal on both sides whatever the rank of W.

    Cost: ``out·in·n`` flops for the Gram (n = ``min(out, in)``), ``n³/3`` for its factor and ``4 n²(k+8)`` a step, in
    float64; ``9 n³`` where the dense routine is taken: small or (nearly) rank-deficient matrices, large k.
    """
    side = min(weight.shape[1:])
    if k == 0 or side <= max(_DENSE_SIDE, _DENSE_SHARE * (k + _OVERSAMPLING)):
        return dense_triplets(weight, k, smallest=True)
    found = [_inverse_krylov(matrix, k, seed) for matrix, seed in zip(weight.detach(), seeds, strict=True)]
    whole = [
        dense_triplets(weight[i : i + 1], k, smallest=True) if triplets is None else triplets
        for i, triplets in enumerate(found)
    ]
    return Triplets(*(torch.cat(parts) for parts in zip(*whole, strict=True)))


def _inverse_krylov(matrix: Tensor, k: int, seed: int) -> Triplets | None:
    """The k smallest triplets of one matrix; None where the certificate fails."""
    wide = matrix.shape[0] < matrix.shape[1]
    tall = (matrix.mT if wide else matrix).double()
    gram = tall.mT @ tall
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed):
        return None
    scale = float(torch.linalg.matrix_norm(gram))
    width = k + _OVERSAMPLING
    noise = torch.randn(gram.shape[0], width, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64)
    block = torch.linalg.qr(noise.to(gram.device)).Q
    basis, image = block, gram @ block
    for step in range(MAX_STEPS):
        if basis.shape[1] + width > gram.shape[0]:
            break
        product = torch.cholesky_solve(block, factor)
        for _ in range(2):
            product = torch.linalg.qr(product - basis @ (basis.mT @ product)).Q
        block = product
        basis, image = torch.cat([basis, block], 1), torch.cat([image, gram @ block], 1)
        if step < _FIRST_TEST or step % 2:
            continue
        small = basis.mT @ image
        squared, vectors = small_eigh((small + small.mT) / 2)
        chosen = vectors[:, :k]
        residual = torch.linalg.vector_norm(image @ chosen - (basis @ chosen) * squared[:k], dim=0)
        gap = torch.maximum(squared[k] - squared[:k], _GAP_FLOOR * squared[:k])
        if float(squared[0]) < _SOUND_SHARE * scale:
            return None
        # Residuals end at the round-off of the Gram; where that is too much, the dense routine shall try.
        allowed = torch.maximum(_TOLERANCE * gap, (10 * _TOLERANCE * gap).clamp_max(1e-15 * scale))
        if bool((residual <= allowed).all()):
            return _triplets(tall, basis @ chosen, wide=wide, dtype=working_copy(matrix[:0]).dtype)
    return None


def _triplets(tall: Tensor, inner: Tensor, *, wide: bool, dtype: torch.dtype) -> Triplets:
    """σ and u of orthonormal v, ascending: once more through the small Gram of ``W v``, which orders and separates."""
    image = tall @ inner
    squared, rotation = small_eigh(image.mT @ image)
    sigma = squared.clamp_min(0).sqrt()
    inner, outer = inner @ rotation, (image @ rotation) / sigma
    residual = torch.linalg.matrix_norm(tall.mT @ outer - inner * sigma) / torch.linalg.vector_norm(sigma)
    left, right = (inner, outer.mT) if wide else (outer, inner.mT)
    left, right = with_fixed_signs(left.to(dtype).unsqueeze(0), right.to(dtype).unsqueeze(0))
    return Triplets(
        left, sigma.unsqueeze(0), right, residual.reshape(1), torch.ones_like(residual, dtype=torch.bool)[None]
    )
