"""PiSSA: the adapter starts as the principal part of the weight (Meng et al., arXiv 2404.02948, eq. 2-4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from smartinit.errors import ConfigError
from smartinit.linalg.krylov import top_triplets
from smartinit.methods.base import ALL_HOSTS, Method
from smartinit.methods.split import checked_weight, energies, split_triplets, stacked, stacks, triplet_spectra

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from smartinit.factors import Effect, Factors
    from smartinit.methods.base import Hosts
    from smartinit.spectrum import Spectrum


@dataclass(frozen=True)
class Pissa(Method):
    """Principal singular values and vectors: ``W = U Σ Vᵀ``, ``s·B A = U_r Σ_r V_rᵀ``, the base keeps the rest.

    Attributes:
        iterations: None iterates until the residuals certify ``tolerance``; N makes exactly N steps (PEFT's
            ``pissa_niter_N``), seeded, so that loading the adapter again finds the same residual.
        oversampling: directions beyond the rank that take part; what an N-step result gains most from.
        tolerance: estimated relative error of ``B A``; the measured one is ten times smaller in most cases.
    """

    iterations: int | None = None
    oversampling: int = 8
    tolerance: float = 3e-5

    name: ClassVar[str] = "pissa"
    summary: ClassVar[str] = "principal singular triplets of the weight; the base keeps the rest"
    source: ClassVar[str] = "arXiv 2404.02948, eq. 2-4"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "splits"
    ranked: ClassVar[bool] = True
    hosts: ClassVar[Hosts] = ALL_HOSTS

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: one of them is out of range.
        """
        if self.iterations is not None and self.iterations < 0:
            raise ConfigError(f"PiSSA's iterations must be None or at least 0, not {self.iterations}")
        if self.oversampling < 0:
            raise ConfigError(f"PiSSA's oversampling must be at least 0, not {self.oversampling}")
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"PiSSA's tolerance must lie between 0 and 1, not {self.tolerance}")
        # After a fixed number of steps the width of the block shows, and that follows from the rank.
        object.__setattr__(self, "nested", self.iterations is None)

    def spectrum(
        self, weight: Tensor | None, statistic: object, limit: int, shape: tuple[int, int], *, seed: int = 0
    ) -> Spectrum:
        """The leading triplets of W: ``directions = V_kᵀ``, ``left = U_k``, ``values = Σ_k²``, ``total = ‖W‖_F²``.

        Raises:
            ConfigError: no weight, or one of another shape.
            ModelError: the weight holds NaN or Inf.

        Cost: see `smartinit.linalg.krylov.top_triplets`.
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
        """`spectrum` of several layers of one shape, in batched products."""
        del statistics
        sound = [checked_weight(weight, shape, self.name) for weight in weights]
        spectra: list[Spectrum] = []
        for part in stacks(sound):
            stack = stacked(sound[part])
            totals = energies(stack, self.name)
            found = top_triplets(
                stack,
                min(limit, *shape),
                seeds=seeds[part],
                tolerance=self.tolerance,
                iterations=self.iterations,
                oversampling=self.oversampling,
            )
            spectra += triplet_spectra(found, totals, shape)
        return spectra

    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """``b = U √(Σ/s)``, ``a = √(Σ/s) Vᵀ``.

        Raises:
            ConfigError: a rank beyond the spectrum, or a scaling that is not positive.
        """
        return split_triplets(spectrum, rank, scaling, self.name)
