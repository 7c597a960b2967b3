"""The leading principal directions of some rows, without the rows: what two streams exchange when they merge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

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
