"""LoRA's own start, Kaiming noise and zeros, and the random one of ``init_lora_weights=False`` (arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from smartinit.errors import ConfigError
from smartinit.factors import Factors
from smartinit.linalg.noise import normal_rows, uniform_rows
from smartinit.methods.base import ALL_HOSTS, Method
from smartinit.spectrum import Spectrum

if TYPE_CHECKING:
    from torch import Tensor

    from smartinit.factors import Effect
    from smartinit.methods.base import Hosts


@dataclass(frozen=True)
class Kaiming(Method):
    """``A ~ U(±1/√in)``, ``B = 0``: Kaiming's uniform law with ``a = √5``, as ``nn.Linear`` starts.

    Attributes:
        embedding: the layers are embedding tables, where PEFT exchanges the roles: ``A = 0``, ``B ~ N(0, 1)``.
    """

    embedding: bool = False

    name: ClassVar[str] = "kaiming"
    summary: ClassVar[str] = "LoRA's own: uniform noise and zeros"
    source: ClassVar[str] = "arXiv 2106.09685, sec. 4.1; arXiv 1502.01852, eq. 10"
    hosts: ClassVar[Hosts] = ALL_HOSTS
    random: ClassVar[bool] = True

    def spectrum(
        self, weight: Tensor | None, statistic: object, limit: int, shape: tuple[int, int], *, seed: int = 0
    ) -> Spectrum:
        """``limit`` rows of noise; each is worth the same. Cost: ``O(limit·in)``."""
        del weight, statistic
        out_features, in_features = shape
        if self.embedding:
            left = normal_rows(limit, out_features, seed=seed).mT
            return Spectrum.of_equals(
                torch.zeros(limit, in_features, dtype=torch.float32), shape, left, total=in_features
            )
        a = uniform_rows(limit, in_features, seed=seed) * in_features**-0.5
        return Spectrum.of_equals(a, shape, total=in_features)

    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """The first ``rank`` rows of noise, and zeros. The same at any scaling.

        Raises:
            ConfigError: more ranks than the spectrum has directions.
        """
        del scaling
        spectrum.require(rank)
        a = spectrum.directions[:rank].clone()
        if spectrum.left is not None:
            return Factors(a=a, b=spectrum.left[:, :rank].clone())
        return Factors(a=a, b=a.new_zeros(spectrum.shape[0], rank))


@dataclass(frozen=True)
class Random(Method):
    """``A ~ U(±1/√in)`` and ``B ~ U(±1/√r)``: both as ``nn.Linear`` starts: the model starts elsewhere.

    What PEFT does for ``init_lora_weights=False``: for tests, which a neutral adapter would pass untouched.

    Attributes:
        embedding: the layers are embedding tables, where PEFT draws both from N(0, 1).
    """

    embedding: bool = False

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "noise in both matrices: the model starts elsewhere (for tests)"
    source: ClassVar[str] = "PEFT, init_lora_weights=False; arXiv 1502.01852, eq. 10"
    effect: ClassVar[Effect] = "shifts"
    hosts: ClassVar[Hosts] = ALL_HOSTS
    random: ClassVar[bool] = True

    def spectrum(
        self, weight: Tensor | None, statistic: object, limit: int, shape: tuple[int, int], *, seed: int = 0
    ) -> Spectrum:
        """Noise for both sides; the bound of B needs the rank. Cost: ``O(limit·(in + out))``."""
        del weight, statistic
        out_features, in_features = shape
        if self.embedding:
            a, left = normal_rows(limit, in_features, seed=seed), normal_rows(limit, out_features, seed=seed + 1)
            return Spectrum.of_equals(a, shape, left.mT, total=in_features)
        a = uniform_rows(limit, in_features, seed=seed) * in_features**-0.5
        return Spectrum.of_equals(a, shape, uniform_rows(limit, out_features, seed=seed + 1).mT, total=in_features)

    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """The first ``rank`` rows and columns of noise. The same at any scaling.

        Raises:
            ConfigError: more ranks than the spectrum has directions, or a spectrum of another method.
        """
        del scaling
        spectrum.require(rank)
        if spectrum.left is None:
            msg = "the spectrum has no left side, so it is not one of the method 'random'"
            raise ConfigError(msg)
        bound = 1.0 if self.embedding else max(rank, 1) ** -0.5
        return Factors(
            a=spectrum.directions[:rank].clone(), b=(spectrum.left[:, :rank] * bound).contiguous(), effect="shifts"
        )
