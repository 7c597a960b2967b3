"""The two matrices that an adapter starts from, and what they do to the base layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Effect = Literal["keeps", "splits", "shifts", "quantises"]
"""What a start does to the model: see `Factors.effect`."""
Trains = Literal["both", "a", "b"]


@dataclass(frozen=True)
class Factors:
    """Starting point of one layer: ``h = W x + s·B A x``.

    Attributes:
        a: ``(rank, in_features)``.
        b: ``(out_features, rank)``.
        effect: ``"keeps"`` when ``B A = 0``: the layer computes what it did before;
            ``"splits"`` when the base must give up ``s·B A`` for that;
            ``"shifts"`` when the base is kept although ``B A`` is not zero: the model starts elsewhere, on purpose;
            ``"quantises"`` when the base becomes `base`, which ``s·B A`` corrects as well as its rank allows.
        base: ``(out_features, in_features)``, what the base weight becomes; only with ``"quantises"``.
        trains: which matrices are trained; the other stays as it starts.
        magnitude: ``(out_features,)`` DoRA's row norms of ``W + s·B A`` at the start (arXiv 2402.09353, eq. 5).
    """

    a: torch.Tensor
    b: torch.Tensor
    effect: Effect = "keeps"
    base: torch.Tensor | None = None
    trains: Trains = "both"
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of rows of ``a``; 0 means the layer gets no adapter."""
        return int(self.a.shape[0])

    def delta(self, scaling: float) -> torch.Tensor:
        """``s·B A`` of shape ``(out_features, in_features)``, in ``a``'s dtype."""
        product = self.b @ self.a
        return product if scaling == 1 else product.mul_(scaling)  # one matrix of the weight's size, not two


def default_factors(rank: int, in_features: int, out_features: int, *, seed: int) -> Factors:
    """LoRA's own start (arXiv 2106.09685, sec. 4.1): ``a`` Kaiming-uniform with ``a=√5``, U(±1/√in), ``b`` zeros.

    Args:
        rank: rows of ``a``.
        in_features: columns of ``a``.
        out_features: rows of ``b``.
        seed: of ``a``.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = in_features**-0.5
    a = torch.empty(rank, in_features, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
    return Factors(a=a, b=torch.zeros(out_features, rank, dtype=torch.float32, device="cpu"))
