"""Nyström/Rayleigh-Ritz: the leading eigenpairs of a symmetric C ⪰ 0 from ``Y = C W`` alone.

With ``M = WᵀY`` the Nyström approximation of C on the range of W is ``Y M⁻¹ Yᵀ``. Its eigenpairs are found
without ever factoring a tall matrix: ``M = L Lᵀ``, and the small ``K = L⁻¹ (YᵀY) L⁻ᵀ = U Λ Uᵀ`` gives
``V = Y L⁻ᵀ U Λ^{-1/2}``. Gittens & Mahoney (arXiv 1303.1849); Tropp et al. (arXiv 1706.05736, alg. 3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

from smartinit.linalg.threads import small_eigh

# Directions whose value is below this share of the largest are round-off of the fp32 products.
_RELATIVE_FLOOR = 1e-12
# The same for M once its diagonal is scaled to ones: what a dot product of d fp32 terms leaves behind.
_SCALED_FLOOR = 1e-5
# Smallest squared pivot of a scaled Gram at which its Cholesky factor is as good as an eigendecomposition.
_SAFE_PIVOT = 1e-3
_SAMPLE_ROWS = 512


class NystromStep(NamedTuple):
    """One step for a stack of s problems.

    Attributes:
        basis: ``(s, d, q)`` orthonormal columns, best first; columns of zeros where the rank ended.
        values: ``(s, q)`` float64, descending, zeros where the rank ended.
        overlap: ``(s, q, q)`` float64, ``Wᵀ basis``; its diagonal is the cosine between a column of W
            and the direction that replaced it.
        gram: ``(s, q, q)`` float64, ``YᵀY``.
        small: ``(s, q, q)`` float64, ``M = WᵀY``, symmetrised.
    """

    basis: Tensor
    values: Tensor
    overlap: Tensor
    gram: Tensor
    small: Tensor


def nystrom_step(product: Tensor, sketch: Tensor) -> NystromStep:
    """Leading eigenpairs of s symmetric positive semi-definite matrices C from ``Y = C W``.

    The tall products run in the dtype of ``product``; everything q×q runs in float64. Columns are scaled by
    ``M_jj^{-1/2}`` first: with W close to the eigenvectors this makes M close to the identity, so that fp32
    products lose no more than ``eps·√(λ₁/λⱼ)`` of direction j.

    Args:
        product: ``(s, d, q)``, ``Y = C W``.
        sketch: ``(s, d, q)``, ``W`` with orthonormal (or zero) columns.

    Returns:
        The new basis and values, see `NystromStep`.

    Cost: three tall products, ``6 s d q²`` flops, and two q×q decompositions per problem.
    """
    small = (sketch.mT @ product).double()
    small = (small + small.mT) / 2
    gram = (product.mT @ product).double()
    gram = (gram + gram.mT) / 2
    whitener = _inverse_root(small)
    core = whitener.mT @ gram @ whitener
    values, vectors = small_eigh((core + core.mT) / 2)
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    alive = values > _RELATIVE_FLOOR * values[..., :1]
    root = torch.where(alive, values, 1).rsqrt() * alive
    transform = (whitener @ vectors) * root.unsqueeze(-2)
    basis = _polish(product @ transform.to(product.dtype), alive)
    return NystromStep(basis, values * alive, small @ transform, gram, small)


def _polish(basis: Tensor, alive: Tensor) -> Tensor:
    """One Cholesky QR: takes the basis from fp32 products back to orthonormal, keeping the order best first."""
    basis = basis * alive.unsqueeze(-2)  # what the floor cut off may be Inf in fp32
    gram = (basis.mT @ basis).double() + torch.diag_embed((~alive).double())
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed.any()):
        factor = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
        basis = torch.linalg.qr(basis).Q * alive.unsqueeze(-2)
    polished: Tensor = torch.linalg.solve_triangular(factor.mT.to(basis.dtype), basis, upper=True, left=False)
    return polished


def _inverse_root(small: Tensor) -> Tensor:
    """``R`` (q×q) with ``Rᵀ M R = I`` on the range of M; the null space is mapped to zero."""
    diagonal = small.diagonal(dim1=-2, dim2=-1)
    alive = diagonal > _RELATIVE_FLOOR * diagonal.amax(-1, keepdim=True).clamp_min(0)
    scale = torch.where(alive, diagonal, 1).rsqrt() * alive
    scaled = scale.unsqueeze(-1) * small * scale.unsqueeze(-2)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if not bool(failed.any()) and bool((factor.diagonal(dim1=-2, dim2=-1) ** 2 > _SAFE_PIVOT).all()):
        # The usual case, a sketch close to the eigenvectors: a tenth of the eigenproblem's time.
        identity = torch.eye(small.shape[-1], dtype=small.dtype, device=small.device).expand_as(small)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
        cheap: Tensor = scale.unsqueeze(-1) * inverse.mT
        return cheap
    values, vectors = small_eigh(scaled)
    # An eigenvalue near the round-off of fp32 products says: these columns of W see the same direction. Its
    # inverse root would blow that round-off up.
    alive = values > _SCALED_FLOOR * values[..., -1:].clamp_min(0)
    root = torch.where(alive, values, 1).rsqrt() * alive
    whitener: Tensor = scale.unsqueeze(-1) * (vectors * root.unsqueeze(-2))
    return whitener


def leading_directions(
    rows: Tensor, start: Tensor, generator: torch.Generator, *, steps: int = 6, tolerance: float = 0.02
) -> tuple[Tensor, Tensor]:
    """Right singular directions of rows at hand: subspace iteration on a sample, then one Nyström step on all.

    The iteration is made orthonormal in every step, by Householder QR where that is needed: from a random start all
    columns of ``XᵀX W`` may lean towards the first direction (a thousandfold in a language model's residual stream),
    which no Gram of them in fp32 survives.
    The sample's directions are close enough to the answer for the Nyström step to be safe.

    Args:
        rows: ``(b, d)`` float32, already centred if wanted.
        start: ``(d, q)`` orthonormal columns.
        generator: fills up the basis of a sample whose rank is below q.
        steps: power steps on the sample at most.
        tolerance: stop when a step lowers the energy that is not captured by less than this share.

    Returns:
        ``(d, q)`` orthonormal basis and ``(q,)`` float64 squared singular values, descending; zeros (and zero
        columns) beyond the rank of the rows.

    Cost: ``4 steps·d q`` flops per row of the sample and ``4 d q`` per row.
    """
    sample = rows[:: max(1, rows.shape[0] // _SAMPLE_ROWS)]
    total = float(torch.linalg.vector_norm(sample)) ** 2
    basis, projected, captured = start, sample @ start, 0.0
    for _ in range(steps):
        basis = _orthonormal((projected.mT @ sample).mT)
        projected = sample @ basis
        before, captured = captured, float(torch.linalg.vector_norm(projected)) ** 2
        if captured - before <= tolerance * (total - captured):
            break
    values, vectors = small_eigh((projected.mT @ projected).double())
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    alive = values > _RELATIVE_FLOOR * values[:1]
    alive[min(sample.shape) :] = False
    basis, values = (basis @ vectors.to(basis.dtype)) * alive, values * alive
    if sample.shape[0] == rows.shape[0]:
        return basis, values
    sketch = fill_basis(basis, values, generator)
    step = nystrom_step(((rows @ sketch).mT @ rows).mT.unsqueeze(0), sketch.unsqueeze(0))
    return step.basis[0], step.values[0]


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns of one span: by Cholesky where they are well apart, else by Householder QR, slower."""
    scaled = columns / torch.linalg.vector_norm(columns, dim=0).clamp_min(1e-30)
    factor, failed = torch.linalg.cholesky_ex((scaled.mT @ scaled).double())
    if bool(failed) or float(factor.diagonal().min()) ** 2 < _SAFE_PIVOT:
        householder: Tensor = torch.linalg.qr(columns).Q
        return householder
    basis: Tensor = torch.linalg.solve_triangular(factor.mT.to(scaled.dtype), scaled, upper=True, left=False)
    return basis


def fill_basis(basis: Tensor, values: Tensor, generator: torch.Generator) -> Tensor:
    """Replace dead columns (value 0) by random directions orthonormal to the living ones.

    A sketch that keeps zero columns could never see a direction that appears later in the data.

    Args:
        basis: ``(d, q)``, living columns orthonormal.
        values: ``(q,)``, 0 marks a dead column.
        generator: source of randomness on the CPU.

    Returns:
        ``(d, q)``; the same object when nothing was dead.
    """
    dead = values <= 0
    count = int(dead.sum())
    if count == 0:
        return basis
    fresh = torch.randn(basis.shape[0], count, generator=generator, dtype=torch.float32, device="cpu").to(basis)
    living = basis[:, ~dead]
    for _ in range(2):  # twice is enough (Kahan): the second pass removes the round-off of the first
        fresh = fresh - living @ (living.mT @ fresh)
    filled = basis.clone()
    filled[:, dead] = torch.linalg.qr(fresh).Q
    return filled


def random_basis(features: int, columns: int, seed: int) -> Tensor:
    """``(features, columns)`` float32 orthonormal columns, uniformly random, equal on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(features, columns, generator=generator, dtype=torch.float32, device="cpu")
    basis: Tensor = torch.linalg.qr(noise).Q
    return basis
