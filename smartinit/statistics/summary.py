"""The leading principal directions of some rows, without the rows: what two streams exchange when they merge."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from smartinit.linalg.nystrom import fill_basis

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """Rank-q summary of ``rows`` rows: ``basis diag(values) basisᵀ`` about ``mean``."""

    rows: int
    mean: Tensor
    basis: Tensor
    values: Tensor

    def product(self, sketch: Tensor) -> Tensor:
        """The summary times ``sketch``, ``(d, q)``."""
        return self.basis @ (self.values.to(self.basis.dtype).unsqueeze(-1) * (self.basis.mT @ sketch))

    def leading(self, width: int) -> Summary:
        """The best ``width`` directions."""
        return Summary(self.rows, self.mean, self.basis[:, :width].contiguous(), self.values[:width].clone())

    def revived(self, generator: torch.Generator) -> Summary:
        """With fresh random directions in place of dead ones, see `fill_basis`."""
        return replace(self, basis=fill_basis(self.basis, self.values, generator))

    def joined_by(self, product: Tensor, sketch: Tensor, mean: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The product of this summary and more rows together with ``sketch``, and their common mean.

        Args:
            product: ``(d, q)`` of the other rows, about their own mean.
            sketch: ``(d, q)``.
            mean: ``(d,)`` of the other rows.
            rows: their number.
        """
        gap = (self.mean - mean).float()
        weight = self.rows * rows / (self.rows + rows)
        together = product + self.product(sketch) + torch.outer(gap, (sketch.mT @ gap) * weight)
        return together, (self.mean * self.rows + mean * rows) / (self.rows + rows)


def angle_between(a: Summary, b: Summary, components: int) -> float:
    """Root-mean-square principal angle, in degrees, between the leading directions of two summaries."""
    cosines = torch.linalg.svdvals((a.basis[:, :components].mT @ b.basis[:, :components]).double()).clamp(0, 1)
    return math.degrees(math.acos(min(1.0, float(cosines.square().mean().sqrt()))))


def fit_width(values: Tensor, width: int) -> Tensor:
    """``values`` cut or padded (by its last entry) to ``width``: sketches of two statistics may differ in width."""
    return torch.cat([values[:width], values[-1:].expand(max(0, width - values.numel()))])


def merge_summaries(a: Summary, b: Summary, width: int) -> Summary:
    """Exact principal directions of two rank-q summaries and the gap of their means, cut to ``width``."""
    rows = a.rows + b.rows
    if b.rows == 0:
        return a
    basis, mean = b.basis.to(a.basis), b.mean.to(a.mean)
    gap = (a.mean - mean) * math.sqrt(a.rows * b.rows / rows)
    stacked = torch.cat(
        [a.basis.double() * a.values.sqrt(), basis.double() * b.values.to(a.values).sqrt(), gap.unsqueeze(1)], dim=1
    )
    u, s, _ = torch.linalg.svd(stacked, full_matrices=False)
    mean = (a.mean * a.rows + mean * b.rows) / rows
    values = torch.zeros(width, dtype=torch.float64, device=u.device)
    kept = min(width, s.numel())
    values[:kept] = s[:kept].square()
    out = torch.zeros(u.shape[0], width, dtype=a.basis.dtype, device=u.device)
    out[:, :kept] = u[:, :kept].to(out)
    values[values <= 1e-14 * values[0]] = 0
    return Summary(rows, mean, out * (values > 0), values)
