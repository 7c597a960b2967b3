"""OLoRA: the adapter starts as a partial QR decomposition of the weight (Büyükakyüz, arXiv 2406.01775, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from smartinit.factors import Factors
from smartinit.linalg.partial_qr import leading_qr, pivoted_qr
from smartinit.linalg.triplets import working_copy
from smartinit.methods.base import ALL_HOSTS, Method
from smartinit.methods.split import checked_rank, checked_weight, energies, positive_scaling
from smartinit.spectrum import Certificate, Spectrum

if TYPE_CHECKING:
    from torch import Tensor

    from smartinit.factors import Effect
    from smartinit.methods.base import Hosts


@dataclass(frozen=True)
class Olora(Method):
    """Orthonormal start: ``W = Q R``, ``B = Q_r``, ``A = R_r``, the base gives up ``s·Q_r R_r``.

    As published (and in PEFT) the scaling is not divided out: with ``s ≠ 1`` the adapter takes s times the part.

    Attributes:
        pivoted: choose the columns that span ``Q_r`` by the energy they have left, so that the order of the features
            does not matter; the paper takes the first r, whatever they are.
    """

    pivoted: bool = False

    name: ClassVar[str] = "olora"
    summary: ClassVar[str] = "orthonormal B and its share of the weight, from a QR decomposition"
    source: ClassVar[str] = "arXiv 2406.01775, alg. 1"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "splits"
    hosts: ClassVar[Hosts] = ALL_HOSTS

    def spectrum(
        self, weight: Tensor | None, statistic: object, limit: int, shape: tuple[int, int], *, seed: int = 0
    ) -> Spectrum:
        """Rows of R as ``directions`` (not orthonormal), columns of Q as ``left``, in the order of the decomposition.

        ``values`` are ``‖R_i‖²``, the energy that each adds, in that order: not sorted. ``total = ‖W‖_F²``.

        Raises:
            ConfigError: no weight, or one of another shape.
            ModelError: the weight holds NaN or Inf.

        Cost: see `smartinit.linalg.partial_qr`.
        """
        del statistic, seed
        sound = working_copy(checked_weight(weight, shape, self.name))
        (total,) = energies(sound.unsqueeze(0), self.name)
        found = (pivoted_qr if self.pivoted else leading_qr)(sound, min(limit, *shape))
        values = torch.linalg.vector_norm(found.rows, dim=1, dtype=torch.float64).cpu() ** 2
        captured = min(1.0, float(values.sum()) / total) if total > 0 else None
        certificate = Certificate(rows=0, captured=captured, components=values.numel())
        return Spectrum(found.rows.float(), values, total, shape, certificate, found.basis.float())

    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """``b = Q_r``, ``a = R_r``.

        Raises:
            ConfigError: a rank beyond the spectrum, or a scaling that is not positive.
        """
        directions, left = checked_rank(spectrum, rank, self.name)
        positive_scaling(scaling, self.name)
        return Factors(a=directions.clone(), b=left.clone(), effect="splits")
