"""What a layer's inputs are like, as far as the first step of training depends on it: ``Σ = E[x xᵀ]``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from smartinit.linalg.noise import uniform_rows

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLE = 512  # coordinates whose pairs are looked at; half of them are those of the largest variance
_NODES = (0.25, 0.5, 0.75, 1.0)
_ARCSINE = 2 / torch.pi
_VECTORS = 512


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """``Σ = E[x xᵀ]``, about zero: whole, or as leading directions, a mean, and a rest spread evenly.

    Attributes:
        features: n.
        directions: ``(k, n)`` float64 orthonormal rows.
        values: ``(k,)`` float64 variance along each of them.
        mean: ``(n,)`` float64.
        rest: variance along every direction orthogonal to ``directions``.
        whole: ``(n, n)`` float64, in place of all these.
        measured: False for `isotropic`, which is an assumption.
    """

    features: int
    directions: Tensor
    values: Tensor
    mean: Tensor
    rest: float
    whole: Tensor | None = None
    measured: bool = True

    @classmethod
    def isotropic(cls, features: int) -> SecondMoment:
        """``Σ = I``: all that can be said of inputs nobody looked at."""
        none = torch.zeros(0, features, dtype=torch.float64)
        return cls(features, none, none[:, 0], torch.zeros(features, dtype=torch.float64), 1.0, measured=False)

    @classmethod
    def of(cls, statistic: Any) -> SecondMoment:  # noqa: ANN401 - a Statistic, or a Gram with its second_moment()
        """From a statistic of activations: exact if it holds the whole moment; `isotropic` if it saw no row.

        Args:
            statistic: see `smartinit.statistics.base.Statistic`; left as it is, but for pending rows being folded in.

        Cost: ``O(n²)`` memory if it holds the whole moment, else ``O(k n)``.
        """
        features, rows = int(statistic.features), statistic.rows
        if not rows:
            return cls.isotropic(features)
        none = torch.zeros(0, features, dtype=torch.float64)
        if hasattr(statistic, "second_moment"):
            whole = statistic.second_moment() / rows
            zero = torch.zeros(features, dtype=torch.float64, device=whole.device)
            return cls(features, none.to(zero.device), none[:, 0].to(zero.device), zero, 0.0, whole)
        directions, values = statistic.principal(statistic.components)
        values = values.double().to(directions.device) / rows
        left_over = max(0.0, statistic.total / rows - float(values.sum()))
        rest = left_over / (features - len(values)) if len(values) < features else 0.0
        return cls(features, directions.double(), values, statistic.mean.double().to(directions.device), rest)

    @cached_property
    def trace(self) -> float:
        """``tr Σ = E‖x‖²``."""
        return float(self.diagonal.sum())

    @cached_property
    def diagonal(self) -> Tensor:
        """``(n,)`` float64 mean squares of the coordinates."""
        if self.whole is not None:
            return self.whole.diagonal().clamp_min(0)
        return ((self.values - self.rest) @ self.directions.square() + self.rest + self.mean.square()).clamp_min(0)

    @cached_property
    def square_trace(self) -> float:
        """``tr Σ²``."""
        if self.whole is not None:
            return float(self.whole.square().sum())
        energy = float(self.mean.square().sum())
        along = float((self.values - self.rest) @ (self.directions @ self.mean).square()) + self.rest * energy
        others = self.rest**2 * (self.features - len(self.values))
        return float(self.values.square().sum()) + others + 2 * along + energy**2

    @cached_property
    def attraction(self) -> float:
        """``E[C·(2/π) arcsin(corr C)]``, ``C = aᵀΣ b``, over pairs of independent uniform vectors of unit variance.

        What makes two random rows move together: close to ``(2/π) tr Σ²/tr Σ`` where many directions share the
        variance, up to a third less where one prevails. By 512 fixed vectors, all their pairs, and what is known of
        their mean ``aᵀΣ a``: within a few per cent.
        """
        rows = uniform_rows(_VECTORS, self.features, seed=0).double().to(self.mean.device) * 3**0.5
        C = self.times(rows) @ rows.mT
        pairs = (C * arcsine_law(C)).fill_diagonal_(0.0).sum(1) / (_VECTORS - 1)
        own = C.diagonal() - C.diagonal().mean()
        spread = float(own.square().sum())
        slope = float((own * pairs).sum()) / spread if spread > 0 else 0.0
        excess = float(C.diagonal().mean()) - self.trace
        return max(0.0, float(pairs.mean()) - 2 * slope * excess)

    def times(self, rows: Tensor) -> Tensor:
        """``rows Σ`` for rows ``(r, n)``, in float64."""
        rows = rows.detach().double().to(self.mean.device)
        if self.whole is not None:
            return rows @ self.whole
        spread = (rows @ self.directions.mT) * (self.values - self.rest)
        return spread @ self.directions + self.rest * rows + torch.outer(rows @ self.mean, self.mean)

    def coherence(self, correlations: Tensor) -> Tensor:
        """``φ(t) = Σ_jk Σ_jk·(2/π) arcsin(t·ρ_jk)``, ρ the correlations of the coordinates, for every entry t.

        The covariance of the signs of two Gaussians of correlation t is ``(2/π) arcsin t``: this is ``E[(aᵀx)(bᵀx)]``
        for a and b the signs of two Gaussian vectors of covariance Σ each, correlated by t.

        Pairs of different coordinates enter through an odd polynomial in t (exact at ¼, ½, ¾ and 1), and for more than
        512 coordinates through a sample that keeps the 256 largest.
        """
        t = correlations.double().clamp(-1, 1)
        powers = torch.stack([t, t**3, t**5, t**7], dim=-1)
        return self.trace * _ARCSINE * torch.arcsin(t) + powers @ self._pairs.to(t.device)

    @cached_property
    def _pairs(self) -> Tensor:
        """Coefficients of the polynomial."""
        chosen, large = self._chosen
        block = self._block(chosen)
        rho = correlation(block)
        weight = self._pair_weights(len(chosen), large).to(block) * block
        nodes = torch.tensor(_NODES, dtype=torch.float64)
        sums = torch.stack([(weight * torch.arcsin(t * rho)).sum() for t in _NODES]).cpu() * _ARCSINE
        coefficients: Tensor = torch.linalg.solve(torch.stack([nodes, nodes**3, nodes**5, nodes**7], dim=-1), sums)
        return coefficients

    @cached_property
    def _chosen(self) -> tuple[Tensor, int]:
        """Coordinates that are looked at, and how many of them are the largest (all, if none is left out)."""
        if self.features <= _SAMPLE:
            return torch.arange(self.features, device=self.diagonal.device), self.features
        order = self.diagonal.argsort(descending=True, stable=True)
        large = _SAMPLE // 2
        others = torch.randperm(self.features - large, generator=torch.Generator().manual_seed(0))[: _SAMPLE - large]
        return torch.cat([order[:large], order[large:][others.to(order.device)]]), large

    def _pair_weights(self, count: int, large: int) -> Tensor:
        """``(count, count)``: of how many pairs of different coordinates each one is the sample."""
        drawn, all_others = count - large, self.features - large
        weights = torch.ones(count, count, dtype=torch.float64)
        if drawn:
            weights[:large, large:] = weights[large:, :large] = all_others / drawn
            weights[large:, large:] = all_others * (all_others - 1) / (drawn * (drawn - 1))
        return weights.fill_diagonal_(0.0)

    def _block(self, chosen: Tensor) -> Tensor:
        """Rows and columns of Σ."""
        if self.whole is not None:
            return self.whole[chosen][:, chosen]
        part, mean = self.directions[:, chosen], self.mean[chosen]
        block = part.mT @ ((self.values - self.rest).unsqueeze(1) * part) + torch.outer(mean, mean)
        block.diagonal().add_(self.rest)
        return block


def correlation(covariance: Tensor) -> Tensor:
    """Entries of a symmetric matrix divided by the roots of its diagonal; 0 where there is no variance."""
    deviation = covariance.diagonal().clamp_min(0).sqrt()
    scale = torch.outer(deviation, deviation)
    found: Tensor = torch.where(scale > 0, covariance / scale.clamp_min(1e-300), 0.0).clamp(-1, 1)
    return found


def arcsine_law(covariance: Tensor) -> Tensor:
    """Covariance of the signs of Gaussian variables with this covariance: ``(2/π) arcsin(correlation)``."""
    return torch.arcsin(correlation(covariance)) * _ARCSINE
