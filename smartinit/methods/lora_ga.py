"""LoRA-GA: the adapter's first step goes where full fine-tuning's would (Wang, Yu & Li, arXiv 2407.05000)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from smartinit.errors import ConfigError
from smartinit.factors import Factors
from smartinit.linalg.krylov import top_triplets
from smartinit.methods.base import ALL_HOSTS, Method
from smartinit.methods.gradient_spectrum import checked_triplets, gradient_spectrum
from smartinit.methods.split import positive_scaling

if TYPE_CHECKING:
    from torch import Tensor

    from smartinit.factors import Effect
    from smartinit.methods.base import Hosts, Needs
    from smartinit.methods.gradient_spectrum import GradientSpectrum
    from smartinit.spectrum import Spectrum
    from smartinit.statistics.gradient import GradientSketch

_DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
_SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@dataclass(frozen=True)
class LoraGa(Method):
    """With ``G = U Σ Vᵀ``, ``A = ζ V[:, :r]ᵀ``, ``B = ζ U[:, r:2r]``; ``W`` gives up ``s·B A``.

    The rows of ``A`` and the columns of ``B`` are 2r *different* triplets, so that ``∂B ∝ G Aᵀ`` and ``∂A ∝ Bᵀ G``
    together are the best approximation of ``G`` of rank 2r (theorem 3.1). ``ζ = ⁴√out / √γ`` keeps the scale of
    forward and backward signals independent of rank and width (theorem 3.2). Singular values play no part.

    Where ``min(out, in) < 2r``, the two sets overlap as little as possible.

    Attributes:
        direction: which of the first 2r triplets go where. ``"ArB2r"``: ``A`` takes the first r, ``B`` the next;
            ``"A2rBr"``: the other way round; ``"ArBr"``: ``A`` takes the 2nd, 4th, …, ``B`` the 1st, 3rd, …;
            ``"random"``: a random half each.
        scale: ``ζ``. ``"stable"``: as above; ``"weight_svd"``: the mean of ``√(σᵢ/s)`` over the weight's r largest
            singular values; ``"gd_scale"``: ``1/s``; ``"unit"``: 1. (The authors say ``weightS`` and ``gd``.)
        stable_gamma: ``γ`` of ``"stable"``.
        peft_compatible: what PEFT computes under this name instead, which is not the published start: column j of
            ``B`` is multiplied by its triplet's singular value of the mean gradient; ``"stable"`` then scales ``B``
            only, ``"weight_svd"`` multiplies ``B`` by the ratio of the weight's largest singular value to that of B's
            first triplet, and ``"random"`` gives both the same triplets. (PEFT's draw cannot be repeated.)

    Raises:
        ConfigError: an option that does not exist.
    """

    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: float = 16.0
    peft_compatible: bool = False

    name: ClassVar[str] = "lora_ga"
    summary: ClassVar[str] = "singular directions of the loss's gradient; the first step approximates full fine-tuning"
    source: ClassVar[str] = "arXiv 2407.05000, alg. 1"
    needs: ClassVar[Needs | None] = "gradients"
    effect: ClassVar[Effect] = "splits"
    ranked: ClassVar[bool] = True
    hosts: ClassVar[Hosts] = ALL_HOSTS

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.direction not in _DIRECTIONS:
            raise ConfigError(f"LoRA-GA's direction is one of {', '.join(_DIRECTIONS)}, not {self.direction!r}")
        if self.scale not in _SCALES:
            raise ConfigError(f"LoRA-GA's scale is one of {', '.join(_SCALES)}, not {self.scale!r}")
        if not 0 < self.stable_gamma < math.inf:
            raise ConfigError(f"LoRA-GA's stable_gamma is a positive number, not {self.stable_gamma!r}")
        object.__setattr__(self, "needs_weight", self.scale == "weight_svd")

    def spectrum(
        self,
        weight: Tensor | None,
        statistic: GradientSketch | None,
        limit: int,
        shape: tuple[int, int],
        *,
        seed: int = 0,
    ) -> GradientSpectrum:
        """Triplets of the mean gradient: ``limit`` candidates, and up to ``2·limit`` in `GradientSpectrum.whole`.

        Raises:
            ConfigError: no gradient, or no weight where the scale needs it.
            DataError: a gradient of zeros.

        Cost: that of `GradientSketch.triplets`, and of the weight's ``limit`` largest triplets for ``"weight_svd"``.
        """
        weight_values = None
        if self.scale == "weight_svd":
            if weight is None:
                raise ConfigError("LoRA-GA with scale='weight_svd' needs the base weight")
            weight_values = top_triplets(weight.detach().unsqueeze(0), min(limit, *shape), seeds=[seed]).values[0].cpu()
        return gradient_spectrum(statistic, limit, shape, self.name, per_rank=2, weight_values=weight_values)

    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """``a (rank, in)``, ``b (out, rank)``; ``s·B A`` is to be subtracted from the base.

        Raises:
            ConfigError: a rank beyond the spectrum, or a scaling that is not positive.
        """
        positive_scaling(scaling, self.name)
        u, s, v = checked_triplets(spectrum, rank, self.name)
        for_a, for_b = self._choice(rank, min(int(s.numel()), 2 * rank))
        zeta_a, zeta_b = self._scales(spectrum, rank, scaling, s[for_b])
        a, b = v[for_a.to(v.device)] * zeta_a, u[:, for_b.to(u.device)]
        return Factors(a=a.contiguous(), b=(b * zeta_b.to(b)).contiguous(), effect="splits")

    def _choice(self, rank: int, available: int) -> tuple[Tensor, Tensor]:
        """Indices of the triplets for ``A`` and for ``B``."""
        first, last = torch.arange(rank), torch.arange(available - rank, available)
        if self.direction == "ArB2r":
            return first, last
        if self.direction == "A2rBr":
            return last, first
        if self.direction == "ArBr":
            odd, even = torch.arange(1, available, 2), torch.arange(0, available, 2)
            # Filled up from the other half where there are fewer than 2r.
            return torch.cat([odd, even.flip(0)])[:rank], torch.cat([even, odd.flip(0)])[:rank]
        drawn = torch.randperm(available, generator=torch.Generator("cpu").manual_seed(available), device="cpu")
        return drawn[:rank], drawn[:rank] if self.peft_compatible else drawn[available - rank :]

    def _scales(self, spectrum: Spectrum, rank: int, scaling: float, sigma: Tensor) -> tuple[float, Tensor]:
        """What multiplies ``A``, and the columns of ``B``; ``sigma`` belongs to the latter."""
        ones = torch.ones_like(sigma)
        stable = spectrum.shape[0] ** 0.25 / self.stable_gamma**0.5
        if self.scale == "gd_scale":
            zeta_a = zeta_b = 1.0 / scaling
        elif self.scale == "unit":
            zeta_a = zeta_b = 1.0
        elif self.scale == "stable":
            zeta_a, zeta_b = (1.0 if self.peft_compatible else stable), stable
        else:
            known = getattr(spectrum, "weight_values", None)
            if known is None:
                raise ConfigError("this spectrum was computed without the weight, which scale='weight_svd' needs")
            if self.peft_compatible:
                largest = float(sigma[0]) if rank else 0.0
                zeta_a, zeta_b = 1.0, float(known[0]) / largest if largest > 0 else 1.0
            else:
                zeta_a = zeta_b = float((known[:rank] / scaling).sqrt().mean()) if rank else 1.0
        return zeta_a, (sigma if self.peft_compatible else ones) * zeta_b
