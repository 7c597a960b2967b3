"""Gaussian noise and zeros, PEFT's ``init_lora_weights="gaussian"`` (arXiv 2106.09685, sec. 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from smartinit.factors import Factors
from smartinit.linalg.noise import normal_rows
from smartinit.methods.base import ALL_HOSTS, Method
from smartinit.spectrum import Spectrum

if TYPE_CHECKING:
    from torch import Tensor

    from smartinit.methods.base import Hosts


@dataclass(frozen=True)
class Gaussian(Method):
    """``A ~ N(0, 1/r²)``, ``B = 0``: deviation ``1/r``, whatever the width of the layer.

    Attributes:
        embedding: the layers are embedding tables, where PEFT exchanges the roles: ``A = 0``, ``B ~ N(0, 1)``.
    """

    embedding: bool = False

    name: ClassVar[str] = "gaussian"
    summary: ClassVar[str] = "normal noise of deviation 1/r and zeros"
    source: ClassVar[str] = "arXiv 2106.09685, sec. 4.1; deviation as in PEFT"
    hosts: ClassVar[Hosts] = ALL_HOSTS
    random: ClassVar[bool] = True

    def spectrum(
        self, weight: Tensor | None, statistic: object, limit: int, shape: tuple[int, int], *, seed: int = 0
    ) -> Spectrum:
        """``limit`` rows of unit normals; the deviation needs the rank. Cost: ``O(limit·in)``."""
        del weight, statistic
        out_features, in_features = shape
        if self.embedding:
            left = normal_rows(limit, out_features, seed=seed).mT
            return Spectrum.of_equals(
                torch.zeros(limit, in_features, dtype=torch.float32), shape, left, total=in_features
            )
        return Spectrum.of_equals(normal_rows(limit, in_features, seed=seed), shape, total=in_features)

    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """The first ``rank`` rows divided by ``rank``, and zeros. The same at any scaling.

        Raises:
            ConfigError: more ranks than the spectrum has directions.
        """
        del scaling
        spectrum.require(rank)
        a = spectrum.directions[:rank] / max(rank, 1)
        if spectrum.left is not None:
            return Factors(a=a, b=spectrum.left[:, :rank].clone())
        return Factors(a=a, b=a.new_zeros(spectrum.shape[0], rank))
