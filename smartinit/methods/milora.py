"""MiLoRA: the adapter starts as the minor part of the weight (Wang et al., arXiv 2406.09044, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from smartinit.methods.base import ALL_HOSTS, Method
from smartinit.methods.split import minor_spectra, split_triplets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from smartinit.factors import Effect, Factors
    from smartinit.methods.base import Hosts
    from smartinit.spectrum import Spectrum


@dataclass(frozen=True)
class MiLoRA(Method):
    """Minor singular components: ``s·B A`` = the r smallest triplets of W, the base keeps the principal part.

    ``values`` are ``σ²`` with the smallest first, which is the best here.
    """

    name: ClassVar[str] = "milora"
    summary: ClassVar[str] = "minor singular triplets of the weight; the base keeps the principal part"
    source: ClassVar[str] = "arXiv 2406.09044, sec. 3"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "splits"
    hosts: ClassVar[Hosts] = ALL_HOSTS

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
        """``b = U √(Σ/s)``, ``a = √(Σ/s) Vᵀ``.

        Raises:
            ConfigError: a rank beyond the spectrum, or a scaling that is not positive.
        """
        return split_triplets(spectrum, rank, scaling, self.name)
