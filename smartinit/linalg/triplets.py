"""Singular triplets of a stack of matrices, and the dense routine that finds any of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from smartinit.linalg.threads import small_eigh

if TYPE_CHECKING:
    from torch import Tensor

# Squared singular values below this share of the largest are round-off of a float64 Gram: the vectors that belong to
# them on the side which the Gram is not of cannot be had by a product with W.
_GRAM_FLOOR = 1e-13
# σ² below this share of σ₁² is zero as far as float32 weights can tell.
_VISIBLE_SHARE = 1e-14
# Round-off of a float64 Gram and its eigenvalues as a share of σ₁², and the share of the product it may change.
_GRAM_ROUND_OFF, _MIXING = 1e-15, 1e-6
# Norms of rows whose squares float32 can hold without losing digits.
_SQUARES_FROM, _SQUARES_TO = 1e-12, 1e18


class Triplets(NamedTuple):
    """Singular triplets of s matrices ``W (out, in)``: ``W v = σ u``, ``Wᵀ u = σ v``.

    Attributes:
        left: ``(s, out, k)``, columns u.
        values: ``(s, k)`` float64, σ.
        right: ``(s, k, in)``, rows v.
        residual: ``(s,)`` float64, ``‖Wᵀ U - V Σ‖_F / ‖Σ‖_F`` as measured before the last, improving product.
        settled: ``(s,)`` bool, whether the accuracy asked for is certified.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    residual: Tensor
    settled: Tensor


def working_copy(weight: Tensor) -> Tensor:
    """``weight`` in the precision of its products: float64 stays, everything else becomes float32."""
    weight = weight.detach()
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


def frobenius_norms(weight: Tensor) -> Tensor:
    """``(s,)`` float64 norms of ``(s, out, in)``; NaN or Inf where an entry is."""
    # Row by row in the working precision, then in float64: no float64 copy of the whole.
    rows = torch.linalg.vector_norm(working_copy(weight), dim=-1).double()
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    lost = ~((norms > _SQUARES_FROM) & (norms < _SQUARES_TO))
    for i in lost.nonzero().flatten().tolist():
        norms[i] = torch.linalg.vector_norm(weight[i], dtype=torch.float64)
    return norms


def dense_triplets(weight: Tensor, k: int, *, smallest: bool = False) -> Triplets:
    """The k largest (descending) or smallest (ascending) triplets, through eigh of the smaller Gram in float64.

    The smallest are those of the thin decomposition: of ``min(out, in)`` triplets. Where squaring loses what separates
    them (σ and gaps small beside σ₁), they come from a float64 singular value decomposition instead. Vectors of σ that
    float32 cannot tell from zero are orthonormal all the same.

    Args:
        weight: ``(s, out, in)``; read in float64, one matrix at a time.
        k: at most ``min(out, in)``.
        smallest: which end of the spectrum.

    Cost: ``2 out·in·min(out, in)`` flops for the Gram and about ``9 min(out, in)³`` for eigh, in float64;
    three times as much for the singular value decomposition.
    """
    lefts, values, rights = [], [], []
    for matrix in weight.detach():
        wide = matrix.shape[0] < matrix.shape[1]
        tall = (matrix.mT if wide else matrix).double()
        squared, vectors = small_eigh(tall.mT @ tall)
        if smallest and _squaring_loses(squared, k):
            u, s, vt = torch.linalg.svd(tall, full_matrices=False)
            first = s.numel() - k
            outer, sigma, inner = u[:, first:].flip(1), s[first:].flip(0), vt[first:].mT.flip(1)
        elif smallest:
            inner = vectors[:, :k]
            outer, sigma = _partners(tall, inner, float(squared[-1]))
        else:
            inner = vectors[:, squared.numel() - k :]
            outer, sigma = _partners(tall, inner, float(squared[-1]))
            inner, outer, sigma = inner.flip(1), outer.flip(1), sigma.flip(0)
        lefts.append(inner if wide else outer)
        rights.append((outer if wide else inner).mT)
        values.append(sigma)
    dtype = working_copy(weight[:0]).dtype
    zero = torch.zeros(len(lefts), dtype=torch.float64, device=weight.device)
    left, right, sigmas = torch.stack(lefts).to(dtype), torch.stack(rights).to(dtype), torch.stack(values)
    left, right = with_fixed_signs(left, right)
    return Triplets(left, sigmas, right, zero, torch.ones_like(zero, dtype=torch.bool))


def _squaring_loses(squared: Tensor, k: int) -> bool:
    """Whether round-off of the Gram mixes the k smallest of the ascending ``squared`` by more than the tolerance."""
    largest, low = float(squared[-1]), squared[:k]
    following = squared[1 : k + 1] if k < squared.numel() else torch.cat([squared[1:], squared[-1:] * 2])
    visible = low > _VISIBLE_SHARE * largest
    # Equal values mix at will: see the gap's floor in `smartinit.linalg.krylov`.
    gap = torch.maximum(following - low, 1e-2 * low).clamp_min(1e-300)
    mixed = torch.where(visible, low * (_GRAM_ROUND_OFF * largest / gap) ** 2, 0).sum()
    return bool(mixed > _MIXING**2 * torch.where(visible, low, 0).sum())


def _partners(tall: Tensor, inner: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """``(m, k)`` orthonormal u with ``W v = σ u`` for eigenvectors v, ascending, and the ``(k,)`` σ."""
    image = tall @ inner
    sigma = torch.linalg.vector_norm(image, dim=0)
    sound = sigma**2 > _GRAM_FLOOR * largest
    if bool(sound.all()):
        return image / sigma, sigma
    # QR from the largest σ down: sound columns come out as they are, up to sign, and the others orthonormal to them.
    basis, corner = torch.linalg.qr(image.flip(1))
    signs = torch.where(corner.diagonal() < 0, -1.0, 1.0).to(basis.dtype)
    return (basis * signs).flip(1), sigma


def with_fixed_signs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides with the entry of largest size in every row of ``right`` positive, so that equal runs agree."""
    largest = right.gather(-1, right.abs().argmax(-1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(right.dtype)
    return left * sign.mT, right * sign
