"""From a split start to plain LoRA: ``B A - B₀ A₀`` as one pair of factors, and of a smaller rank.

A split start takes ``s·B₀ A₀`` from the base weight. What training has changed is therefore
``s·(B A - B₀ A₀) = s·[B, -B₀] [A; A₀]``: an adapter of twice the rank on the base as it was. The dense product, of
``out × in`` values, is never formed.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from smartinit.factors import Factors


def subtract_start(trained: Factors, start: Factors, ratio: float = 1.0) -> Factors:
    """``[B, -ratio·B₀] [A; A₀]``, in the wider dtype of the two; what else the trained layer has stays.

    Args:
        trained: ``a (r, in)``, ``b (out, r)``.
        start: ``a (r₀, in)``, ``b (out, r₀)``, what the base has given up.
        ratio: scaling of the start over that of the trained layer.
    """
    dtype = torch.promote_types(trained.a.dtype, start.a.dtype)
    b0 = start.b.to(dtype) if ratio == 1 else (start.b.double() * ratio).to(dtype)
    return replace(
        trained,
        a=torch.cat([trained.a.to(dtype), start.a.to(dtype)]),
        b=torch.cat([trained.b.to(dtype), -b0], dim=1),
        effect="keeps",
        base=None,
    )


def has_product(pair: Factors) -> bool:
    """Whether ``B A`` can be anything but zero, judged by the factors alone."""
    return bool(pair.a.count_nonzero()) and bool(pair.b.count_nonzero())


def first_half(pair: Factors) -> Factors | None:
    """The start whose doubling (`subtract_start` from itself) this is; None if it is no such thing."""
    half, odd = divmod(pair.rank, 2)
    if odd or not torch.equal(pair.a[:half], pair.a[half:]) or not torch.equal(pair.b[:, :half], -pair.b[:, half:]):
        return None
    return replace(pair, a=pair.a[:half].contiguous(), b=pair.b[:, :half].contiguous())


def recompress(pair: Factors, rank: int) -> Factors:
    """The best pair of at most ``rank`` (Eckart-Young) for the same product, in the same dtype, evenly balanced.

    QR of both factors, then the SVD of a ``2r × 2r`` matrix, in float64. A pair that is small enough already is
    returned as it is. Cost: O((in + out)·r² + r³).
    """
    if pair.rank <= rank:
        return pair
    left, upper = torch.linalg.qr(pair.b.double())
    right, lower = torch.linalg.qr(pair.a.double().T)
    u, values, vt = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    root = values[:rank].sqrt()
    a = (root[:, None] * vt[:rank]) @ right.T
    b = (left @ u[:, :rank]) * root
    if len(root) < rank:  # a layer narrower than the rank: what is missing adds nothing
        a = torch.cat([a, a.new_zeros(rank - len(root), a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], rank - len(root))], dim=1)
    return replace(pair, a=a.to(pair.a.dtype), b=b.to(pair.b.dtype))


def product_norm(pair: Factors) -> float:
    """``‖B A‖_F`` in float64, without the product. Cost: O((in + out)·r²)."""
    upper = torch.linalg.qr(pair.b.double(), mode="r").R
    lower = torch.linalg.qr(pair.a.double().T, mode="r").R
    return float(torch.linalg.matrix_norm(upper @ lower.T))


def distance(pair: Factors, other: Factors) -> float:
    """``‖B A - B' A'‖_F`` in float64, without a product."""
    if pair is other:
        return 0.0
    return product_norm(subtract_start(_double(pair), _double(other)))


def _double(pair: Factors) -> Factors:
    return Factors(pair.a.double(), pair.b.double())
