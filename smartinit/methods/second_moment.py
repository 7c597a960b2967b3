"""What the methods that read the inputs' whole second moment share: the matrix itself, and splits by projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from smartinit.errors import ConfigError, DataError, ModelError
from smartinit.factors import Factors
from smartinit.linalg.psd import psd_root
from smartinit.methods.split import checked_rank, checked_weight, positive_scaling
from smartinit.statistics.derived import Derived

if TYPE_CHECKING:
    from torch import Tensor

    from smartinit.linalg.psd import PsdRoot
    from smartinit.spectrum import Spectrum

# Rows of a product that exist at a time where only its norm is wanted.
_ROWS = 1024


class SecondMoment(Protocol):
    """The part of a statistic that is read here."""

    features: int

    @property
    def rows(self) -> int:
        """How many rows went in."""
        ...

    def second_moment(self, centred: bool = False) -> Tensor:
        """``(d, d)`` ``Σ x xᵀ``."""
        ...


def finite_weight(weight: Tensor | None, shape: tuple[int, int], method: str) -> Tensor:
    """The weight as a method can use it.

    Raises:
        ConfigError: there is none, or it has another shape.
        ModelError: it holds NaN or Inf, is not of floating point, or has no numbers yet.
    """
    kept = checked_weight(weight, shape, method)
    if kept.numel() and not all(bool(bound.isfinite()) for bound in kept.aminmax()):  # NaN makes both NaN
        raise ModelError(f"'{method}' cannot decompose a weight of shape {shape} that holds NaN or Inf")
    return kept


def checked_statistic(
    statistic: SecondMoment | None, shape: tuple[int, int], method: str, *, least: int = 1
) -> SecondMoment:
    """The statistic as a method can use it.

    Raises:
        ConfigError: there is none, it is of another kind, or for another number of features.
        DataError: fewer than ``least`` rows went in.
    """
    if statistic is None or not hasattr(statistic, "second_moment"):
        got = "nothing" if statistic is None else type(statistic).__name__
        raise ConfigError(f"'{method}' needs the second moment of the layer's inputs and got {got}: pass a data loader")
    if statistic.features != shape[1]:
        raise ConfigError(
            f"'{method}' was given the statistic of {statistic.features} features for a layer with {shape[1]}"
        )
    if statistic.rows < least:
        raise DataError(
            f"'{method}' looks for the directions that the data use least: with {statistic.rows} tokens for {shape[1]} "
            f"features most directions are not used at all; pass at least {least} tokens"
        )
    return statistic


def _mean_moment(statistic: SecondMoment) -> Tensor:
    moment = statistic.second_moment(centred=False).double()
    if not float(moment.diagonal().sum()) > 0:
        # Inputs that are zero throughout say nothing: every direction counts alike.
        return torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    return moment.div_(statistic.rows)


def _mean_root(statistic: SecondMoment) -> PsdRoot:
    return psd_root(_mean_moment(statistic))


mean_moment: Derived[Tensor] = Derived(_mean_moment)
"""Statistic -> ``C = Σ x xᵀ / n``, ``(d, d)`` float64; shared by the layers of a site, not to be written to."""

mean_root: Derived[PsdRoot] = Derived(_mean_root)
"""Statistic -> a root of ``C``; shared likewise."""


def product_energy(weight: Tensor, factor: Tensor) -> float:
    """``‖W F‖_F²``. Cost: one product in float32."""
    narrow = factor.float()
    return sum(
        float(torch.linalg.vector_norm(rows.float() @ narrow, dtype=torch.float64)) ** 2 for rows in weight.split(_ROWS)
    )


def even_projection(spectrum: Spectrum, rank: int, scaling: float, method: str) -> Factors:
    """``s·B A = U Uᵀ W`` for ``left = U`` and ``directions = Uᵀ W``, its singular values shared evenly.

    With ``Uᵀ W = P S Vᵀ``: ``B = U P √(S/s)``, ``A = √(S/s) Vᵀ``, so that ``BᵀB = A Aᵀ``.

    Raises:
        ConfigError: a rank beyond the spectrum, or a scaling that is not positive.
    """
    directions, left = checked_rank(spectrum, rank, method)
    p, s, vh = torch.linalg.svd(directions.double(), full_matrices=False)
    root = (s / positive_scaling(scaling, method)).sqrt()
    a = (root.unsqueeze(1) * vh).float()
    return Factors(a=a, b=((left.double() @ p) * root).float(), effect="splits")
