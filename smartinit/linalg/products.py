"""Left singular directions of a product ``W F``, to a tolerance relative to the smallest singular value wanted.

`smartinit.linalg.krylov` finds singular triplets such that ``U Σ Vᵀ`` is right. A projection ``U Uᵀ W`` asks for more:
every direction counts the same, and singular values of a weight times a second moment spread over eight orders of
magnitude where a feature is massive. So nothing is squared here, everything runs in float64, and the basis grows by
the residuals ``M v - σ u`` of the single triplets, whose round-off is relative to their own σ (block Golub-Kahan with
Rayleigh-Ritz: Golub, Luk & Overton, doi 10.1145/355945.355946). The product is never formed for leading directions.
Vectors are rows here: a few rows times a matrix take half the time of a matrix times a few columns.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from smartinit.linalg.threads import small_eigh

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_EPS = torch.finfo(torch.float64).eps
# Residuals over σ_k: with a gap of 1 % behind it the span is then known to 1e-5.
_TOLERANCE = 1e-7
_STEPS = 24
# A basis wider than this share of the space costs more than the dense decomposition, which for small spaces is cheap.
_WIDEST, _WIDEST_SMALL, _SMALL = 0.25, 0.5, 256
# Least ``σ_k / σ₁`` at which the eigenvectors of a float64 Gram are exact enough: squaring leaves eps·σ₁².
_SAFE_RATIO = 1e-4


class LeftDirections(NamedTuple):
    """Some left singular directions of a matrix M.

    Attributes:
        vectors: ``(m, k)`` float64 orthonormal columns.
        values: ``(k,)`` float64 singular values.
        residual: largest ``‖M v - σ u‖`` over the smallest σ (for trailing directions: of the inverse); 0 where they
            were computed densely.
    """

    vectors: Tensor
    values: Tensor
    residual: float


class _Operator(NamedTuple):
    """``apply``: rows ``(b, n)`` to ``(M x)ᵀ (b, m)``; ``adjoint``: ``(b, m)`` to ``(b, n)``."""

    apply: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    shape: tuple[int, int]


def top_left(weight: Tensor, factor: Tensor, count: int, *, seed: int = 0) -> LeftDirections:
    """The ``count`` leading left singular directions of ``W F``, largest first.

    Args:
        weight: ``(m, d)`` float64.
        factor: ``(d, n)`` float64.
        count: at most ``min(m, n)``.
        seed: of the random start, which changes the result by round-off only.

    Cost: ``4 d (m + n)`` flops per step and direction, 4 to 10 steps of about ``count + 8`` directions; the dense SVD
    of the product where the spectrum is too flat for that.
    """
    operator = _Operator(
        lambda rows: (rows @ factor.mT) @ weight.mT,
        lambda rows: (rows @ weight) @ factor,
        (weight.shape[0], factor.shape[1]),
    )
    found = _iterate(operator, count, weight, seed)
    return _dense_top(weight @ factor, count) if found is None else found


def bottom_left(product: Tensor, count: int, *, seed: int = 0) -> LeftDirections:
    """The last ``count`` of the ``min(m, n)`` left singular directions of M, smallest first.

    The leading directions of the inverse are wanted. A square M is solved with by its LU decomposition; of any other
    (and where that fails) one QR decomposition leaves a triangle with the same singular values. Squaring M instead
    would lose all σ below ``1e-8 σ₁``.

    Args:
        product: ``(m, n)`` float64.
        count: at most ``min(m, n)``.
        seed: as of `top_left`.

    Cost: ``2 m³/3`` flops for a square M, ``2 m n min(m, n)`` else; a dense SVD where M is singular.
    """
    if product.shape[0] == product.shape[1] and (found := _bottom_left_of_square(product, count, seed)) is not None:
        return found
    wide = product.shape[0] < product.shape[1]
    factors = torch.linalg.qr(product.mT if wide else product)
    found = bottom_left_of_triangle(factors.R.mT if wide else factors.R, count, upper=not wide, seed=seed)
    return found if wide else found._replace(vectors=factors.Q @ found.vectors)


def _bottom_left_of_square(product: Tensor, count: int, seed: int) -> LeftDirections | None:
    """`bottom_left` of a matrix that can be inverted; None if it cannot, or if the steps do not settle."""
    lu, pivots, failed = torch.linalg.lu_factor_ex(product)
    if int(failed):
        return None
    # M⁻ᵀ = U Σ⁻¹ Vᵀ, applied to rows.
    operator = _Operator(
        lambda rows: torch.linalg.lu_solve(lu, pivots, rows, left=False),
        lambda rows: torch.linalg.lu_solve(lu, pivots, rows, left=False, adjoint=True),
        (product.shape[0], product.shape[0]),
    )
    found = _iterate(operator, count, product, seed)
    return None if found is None else found._replace(values=1 / found.values)


def bottom_left_of_triangle(triangle: Tensor, count: int, *, upper: bool, seed: int = 0) -> LeftDirections:
    """The last ``count`` left singular directions of a triangle, smallest first.

    Those of a Cholesky factor are the last eigenvectors of the matrix.

    Args:
        triangle: ``(m, m)`` float64; its other half is zero.
        count: at most ``m``.
        upper: which half is not zero.
        seed: as of `top_left`.

    Cost: ``2 m²`` flops per step and direction; a dense SVD where the triangle is singular.
    """
    diagonal = triangle.diagonal().abs()
    if float(diagonal.min()) > 0:
        # T⁻ᵀ = U Σ⁻¹ Vᵀ: its leading left directions are the trailing ones of T.
        operator = _Operator(
            lambda rows: torch.linalg.solve_triangular(triangle, rows, upper=upper, left=False),
            lambda rows: torch.linalg.solve_triangular(triangle.mT, rows, upper=not upper, left=False),
            (triangle.shape[0], triangle.shape[0]),
        )
        found = _iterate(operator, count, triangle, seed)
        if found is None:
            identity = torch.eye(triangle.shape[0], dtype=triangle.dtype, device=triangle.device)
            found = _gram_top(torch.linalg.solve_triangular(triangle.mT, identity, upper=not upper), count)
        if found is not None:
            return found._replace(values=1 / found.values)
    u, s, _ = torch.linalg.svd(triangle)
    first = triangle.shape[0] - count
    return LeftDirections(u[:, first:].flip(1), s[first:].flip(0), 0.0)


def _iterate(operator: _Operator, count: int, like: Tensor, seed: int) -> LeftDirections | None:
    """Leading left directions; None if they cannot be had within the bounds."""
    m, n = operator.shape
    if count == 0:
        return LeftDirections(like.new_empty(m, 0), like.new_empty(0), 0.0)
    width = -(-(count + 8) // 8) * 8
    widest = int(max(_WIDEST * min(m, n), min(_WIDEST_SMALL * min(m, n), _SMALL)))
    if 2 * width > widest:
        return None
    generator = torch.Generator("cpu").manual_seed(seed)
    start = torch.randn(width, n, generator=generator, dtype=torch.float64, device="cpu").to(like.device)
    fresh = _orthonormal(operator.apply(_orthonormal(start)))
    basis, images = fresh, operator.adjoint(fresh)
    for _ in range(_STEPS):
        factors = torch.linalg.qr(images.mT)
        small = torch.linalg.svd(factors.R)
        values = small.S[:width]
        left, right = small.Vh[:width] @ basis, (factors.Q @ small.U[:, :width]).mT
        gaps = operator.apply(right) - values.unsqueeze(1) * left
        worst = float(torch.linalg.vector_norm(gaps[:count], dim=1).max())
        smallest, largest = float(values[count - 1]), float(values[0])
        if not (smallest > 0 and math.isfinite(worst)):  # a rank below count, or a triangle that is all but singular
            return None
        # Below the products' round-off nothing is to be gained.
        if worst <= max(_TOLERANCE * smallest, 4 * _EPS * max(m, n) ** 0.5 * largest):
            return LeftDirections(left[:count].mT, values[:count], worst / smallest)
        if basis.shape[0] + width > widest:
            return None
        for _ in range(2):  # twice is enough (Kahan): the second pass removes the round-off of the first
            gaps = _orthonormal(gaps - (gaps @ basis.mT) @ basis)
        basis, images = torch.cat([basis, gaps]), torch.cat([images, operator.adjoint(gaps)])
    return None


def _dense_top(product: Tensor, count: int) -> LeftDirections:
    """Leading left singular directions: by the Gram of the shorter side where that is safe, else the SVD."""
    wide = product.shape[0] <= product.shape[1]
    if wide:
        found = _gram_top(product, count)
    else:
        factors = torch.linalg.qr(product)
        found = _gram_top(factors.R, count)
        found = None if found is None else found._replace(vectors=factors.Q @ found.vectors)
    if found is None:
        u, s, _ = torch.linalg.svd(product, full_matrices=False)
        found = LeftDirections(u[:, :count], s[:count], 0.0)
    return found


def _gram_top(product: Tensor, count: int) -> LeftDirections | None:
    """Leading eigenvectors of ``P Pᵀ``; None where squaring would cost digits that are wanted."""
    gram = product @ product.mT
    if not bool(gram.diagonal().isfinite().all()):
        return None
    squares, vectors = small_eigh(gram)
    squares, vectors = squares.flip(0)[:count], vectors.flip(1)[:, :count]
    if count and not float(squares[-1]) > _SAFE_RATIO**2 * float(squares[0]):
        return None
    return LeftDirections(vectors, squares.sqrt(), 0.0)


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows of the same span."""
    basis: Tensor = torch.linalg.qr(rows.mT).Q.mT
    return basis
