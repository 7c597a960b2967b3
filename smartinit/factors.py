"""The two matrices that an adapter starts from, and what they do to the base layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
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
