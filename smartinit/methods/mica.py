"""MiCA: B spans the minor left singular directions and stays; A starts at zero and trains (arXiv 2604.01694)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from smartinit.factors import Factors
from smartinit.methods.base import ALL_HOSTS, Method
from smartinit.methods.split import checked_rank, minor_spectra

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from smartinit.factors import Effect, Trains
    from smartinit.methods.base import Hosts
    from smartinit.spectrum import Spectrum


@dataclass(frozen=True)
class Mica(Method):
    """Minor component adaptation: ``B = U`` of the r smallest triplets of W, frozen; ``A = 0``, trained.

    The layer starts as it was. ``values`` are ``σ²`` with the smallest first, which is the best here.
    """

    name: ClassVar[str] = "mica"
    summary: ClassVar[str] = "B fixed to the minor left singular directions of the weight; only A is trained"
    source: ClassVar[str] = "arXiv 2604.01694"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "keeps"
    hosts: ClassVar[Hosts] = ALL_HOSTS
    trains: ClassVar[Trains] = "a"

    def spectrum(
        self, weight: Tensor | None, statistic: object, limit: int, shape: tuple[int, int], *, seed: int = 0
    ) -> Spectrum:
        """The smallest triplets of W, ascending: ``directions = Vᵀ``, ``left = U``, ``values = σ²``.

        Raises:
            ConfigError: no weight, or one of another shape.
            ModelError: the weight holds NaN or Inf.

        Cost: see `smartinit.linalg.bottom.bottom_triplets`.
        """
        return self.spectra([weight], [statistic], limit, shape, seeds=[seed])[0]

    def spectra(
        self,
        weights: Sequence[Tensor | None],
        statistics: Sequence[Any],
        limit: int,
        shape: tuple[int, int],
        *,
        seeds: Sequence[int],
    ) -> list[Spectrum]:
        """`spectrum` of several layers of one shape."""
        del statistics
        return minor_spectra(weights, limit, shape, seeds, self.name)

    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """``b``: the ``rank`` minor left directions, orthonormal; ``a``: zeros. The scaling does not enter.

        Raises:
            ConfigError: a rank beyond the spectrum.
        """
        del scaling
        directions, left = checked_rank(spectrum, rank, self.name)
        return Factors(a=torch.zeros_like(directions), b=left.clone(), effect="keeps", trains="a")
