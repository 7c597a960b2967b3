"""What the batches of one block add up to: all of them are seen through the same sketch, so nothing else is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Block:
    """Pending sums of rows, about a fixed shift.

    Args:
        basis: ``(d, q)`` the sketch.
        shift: ``(d,)`` float32, subtracted from all rows before they come here.

    Attributes:
        rows: how many.
        energy: their sum of squares.
        product: ``(q+1, d)``: ``(Xᵀ X W)ᵀ``, and the rows' sum in the last row. This way round is the faster one.
        captured: ``(q,)`` float64, the energy on each column of the sketch.
    """

    def __init__(self, basis: Tensor, shift: Tensor) -> None:
        self.shift = shift
        self.rows = 0
        self.energy = 0.0
        # The last column collects the rows' sum: the second product gives the mean for nothing.
        self._sketch = torch.cat([basis, basis.new_zeros(basis.shape[0], 1)], dim=1)
        self.product = torch.zeros_like(self._sketch.mT).contiguous()
        self.captured = basis.new_zeros(basis.shape[1], dtype=torch.float64)

    @property
    def offset(self) -> Tensor:
        """``(d,)`` float64 mean of the rows, relative to the shift."""
        return (self.product[-1] / self.rows).double()

    def project(self, shifted: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates ``(b, q+1)`` of rows on the sketch, and ``(q,)`` the energy on each of its columns."""
        projected = shifted @ self._sketch
        return projected, torch.linalg.vector_norm(projected[:, :-1], dim=0).double().square()

    def absorb(self, shifted: Tensor, projected: Tensor, captured: Tensor, energy: float) -> None:
        """Add rows ``(b, d)``; the other arguments are from `project`, which is overwritten, and their energy."""
        projected[:, -1] = 1
        self.product.addmm_(projected.mT, shifted)
        self.captured += captured
        self.rows += shifted.shape[0]
        self.energy += energy
