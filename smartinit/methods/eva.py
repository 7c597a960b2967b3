"""EVA: A spans the directions in which a layer's inputs vary most (Paischer et al., arXiv 2410.07170, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from smartinit.errors import ConfigError
from smartinit.factors import Factors
from smartinit.methods.base import Method
from smartinit.spectrum import Spectrum

if TYPE_CHECKING:
    from torch import Tensor

    from smartinit.factors import Effect
    from smartinit.methods.base import Needs
    from smartinit.statistics.base import Statistic


@dataclass(frozen=True)
class Eva(Method):
    """Explained-variance adaptation: ``A`` = leading principal directions of the inputs, ``B = 0``.

    Attributes:
        whiten: divide direction j by ``√σⱼ``, σ the singular values of the centred rows.
    """

    whiten: bool = False

    name: ClassVar[str] = "eva"
    summary: ClassVar[str] = "principal directions of the layer's inputs; ranks go where variance is"
    source: ClassVar[str] = "arXiv 2410.07170, sec. 3"
    needs: ClassVar[Needs | None] = "activations"
    effect: ClassVar[Effect] = "keeps"
    ranked: ClassVar[bool] = True
    centred: ClassVar[bool] = True
    planner: ClassVar[Literal["variance", "uniform"]] = "variance"

    def spectrum(
        self, weight: Tensor | None, statistic: Statistic | None, limit: int, shape: tuple[int, int], *, seed: int = 0
    ) -> Spectrum:
        """Principal directions ``(k, in)`` with ``values = σ²``; cost: none beyond the statistic's.

        Raises:
            ConfigError: no statistic.
        """
        del weight, seed
        if statistic is None:
            msg = "EVA needs activations: pass a data loader"
            raise ConfigError(msg)
        directions, values = statistic.principal(limit)
        return Spectrum(directions, values, statistic.total, shape, statistic.certificate(limit))

    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """``a``: the first ``rank`` directions (divided by ``√σ`` once if whitened), ``b``: zeros."""
        del scaling
        a = spectrum.directions[:rank].clone()
        if self.whiten:
            sigma = spectrum.values[:rank].sqrt()
            # A direction without variance has no scale to be divided out.
            root = torch.where(sigma > 0, sigma, 1.0).sqrt()
            a = (a.double() / root.to(a.device).unsqueeze(1)).to(a.dtype)
        return Factors(a=a, b=a.new_zeros(spectrum.shape[0], rank), effect="keeps")
