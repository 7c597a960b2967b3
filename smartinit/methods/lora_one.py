"""LoRA-One: starts one low-rank step of full fine-tuning ahead (Zhang, Liu & Chen, arXiv 2502.01235)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from smartinit.errors import ConfigError
from smartinit.factors import Factors
from smartinit.methods.base import ALL_HOSTS, Method
from smartinit.methods.gradient_spectrum import checked_triplets, gradient_spectrum

if TYPE_CHECKING:
    from torch import Tensor

    from smartinit.factors import Effect
    from smartinit.methods.base import Hosts, Needs
    from smartinit.methods.gradient_spectrum import GradientSpectrum
    from smartinit.spectrum import Spectrum
    from smartinit.statistics.gradient import GradientSketch


@dataclass(frozen=True)
class LoraOne(Method):
    """``B = U √Σ / √γ``, ``A = √Σ Vᵀ / √γ`` of the leading triplets of ``-G``; the base is kept.

    ``s·B A`` is a gradient step with the best approximation of ``G`` of rank r, so the model starts elsewhere than the
    base: the effect is "shifts". ``Σ`` is divided by its largest entry, as in the authors' code, so that the size of
    the step does not depend on that of the gradient: ``‖s·B A‖₂ = s/γ``.

    Attributes:
        stable_gamma: ``γ``.
        normalise: divide ``Σ`` by its largest entry; False: the formula as it stands, a step of learning rate ``s/γ``.

    Raises:
        ConfigError: ``stable_gamma`` is not positive.
    """

    stable_gamma: float = 128.0
    normalise: bool = True

    name: ClassVar[str] = "lora_one"
    summary: ClassVar[str] = "one low-rank step against the loss's gradient is taken; the model starts from there"
    source: ClassVar[str] = "arXiv 2502.01235, alg. 1"
    needs: ClassVar[Needs | None] = "gradients"
    effect: ClassVar[Effect] = "shifts"
    ranked: ClassVar[bool] = True
    hosts: ClassVar[Hosts] = ALL_HOSTS

    def __post_init__(self) -> None:
        """Check the fields."""
        if not 0 < self.stable_gamma < math.inf:
            raise ConfigError(f"LoRA-One's stable_gamma is a positive number, not {self.stable_gamma!r}")

    def spectrum(
        self,
        weight: Tensor | None,
        statistic: GradientSketch | None,
        limit: int,
        shape: tuple[int, int],
        *,
        seed: int = 0,
    ) -> GradientSpectrum:
        """The leading triplets of the mean gradient. Cost: that of `GradientSketch.triplets`.

        Raises:
            ConfigError: no gradient.
            DataError: a gradient of zeros.
        """
        del weight, seed
        return gradient_spectrum(statistic, limit, shape, self.name)

    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """``a (rank, in)``, ``b (out, rank)``; the sign is ``b``'s.

        Raises:
            ConfigError: a rank beyond the spectrum.
        """
        del scaling
        u, s, v = checked_triplets(spectrum, rank, self.name)
        sigma = s[:rank] / s[0] if self.normalise and rank else s[:rank]
        root = (sigma / self.stable_gamma).sqrt()
        return Factors(a=root.to(v).unsqueeze(1) * v[:rank], b=-u[:, :rank] * root.to(u), effect="shifts")
