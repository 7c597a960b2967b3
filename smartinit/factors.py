"""The two matrices that an adapter starts from, and what they do to the base layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Effect = Literal["keeps", "splits"]


@dataclass(frozen=True)
class Factors:
    """Starting point of one layer: ``h = W x + s·B A x``.

    Attributes:
        a: ``(rank, in_features)``.
        b: ``(out_features, rank)``.
        effect: ``"keeps"`` when ``B A = 0``: the layer computes what it did before;
            ``"splits"`` when the base must give up ``s·B A`` for that.
    """

    a: torch.Tensor
    b: torch.Tensor
    effect: Effect = "keeps"

    @property
    def rank(self) -> int:
        """Number of rows of ``a``; 0 means the layer gets no adapter."""
        return int(self.a.shape[0])

    def delta(self, scaling: float) -> torch.Tensor:
        """``s·B A`` of shape ``(out_features, in_features)``, in ``a``'s dtype."""
        return (self.b @ self.a) * scaling


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
