"""LoRAM: sines of PiSSA's magnitude instead of singular vectors (Zhang et al., arXiv 2507.06558, section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from smartinit.errors import ConfigError, ModelError
from smartinit.factors import Factors
from smartinit.methods.base import ALL_HOSTS, Method
from smartinit.spectrum import Spectrum

if TYPE_CHECKING:
    from torch import Tensor

    from smartinit.factors import Effect
    from smartinit.methods.base import Hosts


@dataclass(frozen=True)
class Loram(Method):
    """``B = β Φ_out``, ``A = β Φ_inᵀ``: the first r columns of sine transforms, ``‖B A‖² = Q[r]·‖W‖²``.

    ``β⁴ = Q[r]·ν[W] / ν[Φ_out Φ_inᵀ]`` with ``ν[M] = ‖M‖_F² / size`` (eq. 11). The columns of ``Φ`` (eq. 12) are
    orthonormal, so that ``ν[Φ_out Φ_inᵀ] = r / (out·in)`` and ``β⁴ = Q[r]·‖W‖_F² / r``. The gain factor
    ``Q[r] = log r / log min(out, in)`` (algorithm 1) stands for the share of ``‖W‖²`` that PiSSA's product would hold.
    The logarithm of rank 1 is 0, an adapter that could never train; there Q is the share that a leading direction
    has at least, ``1/min(out, in)``.

    Nothing is random and nothing is decomposed. The base gives up ``B A``, as with PiSSA.
    """

    name: ClassVar[str] = "loram"
    summary: ClassVar[str] = "sines scaled to the magnitude that PiSSA would give"
    source: ClassVar[str] = "arXiv 2507.06558, eq. 11-12, algorithm 1"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "splits"
    hosts: ClassVar[Hosts] = ALL_HOSTS

    def spectrum(
        self, weight: Tensor | None, statistic: object, limit: int, shape: tuple[int, int], *, seed: int = 0
    ) -> Spectrum:
        """Sines for both sides; ``total = ‖W‖_F²``, of which each direction gets the mean.

        Raises:
            ConfigError: no weight.
            ModelError: the weight is zero or not finite.

        Cost: one pass over ``W`` and ``O(limit·(in + out))``.
        """
        del statistic, seed
        if weight is None:
            msg = "LoRAM needs the base weight, whose magnitude it takes"
            raise ConfigError(msg)
        out_features, in_features = shape
        # Squares of float16 overflow, and their sum may overflow in float32.
        energy = float(weight.detach().float().norm(dim=1).double().square().sum())
        if not math.isfinite(energy) or energy == 0:
            fault = (
                "is zero, so that LoRAM's start would be zero and never train" if energy == 0 else "holds NaN or Inf"
            )
            msg = f"the weight of shape {tuple(shape)} {fault}; check the model, or use the method 'kaiming' there"
            raise ModelError(msg)
        right, left = (sines(limit, width).to(weight.device) for width in (in_features, out_features))
        return Spectrum.of_equals(right, shape, left.mT, total=energy)

    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """``β/√s`` times the first sines, so that ``s·B A`` is the paper's product.

        Raises:
            ConfigError: more ranks than the spectrum has directions, a spectrum of another method, or a scaling that
                is not positive.
        """
        spectrum.require(rank)
        if spectrum.left is None:
            msg = "the spectrum has no left side, so it is not one of the method 'loram'"
            raise ConfigError(msg)
        if rank and not scaling > 0:
            msg = f"scaling={scaling}: a start that splits the weight needs a positive one; give a positive lora_alpha"
            raise ConfigError(msg)
        beta = (gain_factor(rank, min(spectrum.shape)) * spectrum.total / rank) ** 0.25 / scaling**0.5 if rank else 0.0
        return Factors(
            a=spectrum.directions[:rank] * beta, b=(spectrum.left[:, :rank] * beta).contiguous(), effect="splits"
        )


def gain_factor(rank: int, most: int) -> float:
    """``Q[r] = log_most(rank)``, at least ``1/most`` (which matters for rank 1 only), at most 1."""
    if most == 1:
        return 1.0
    return min(1.0, max(math.log(rank) / math.log(most), 1 / most))


def sines(rows: int, width: int) -> Tensor:
    """``(rows, width)`` float32, orthonormal: ``√(2/(m+1)) sin((i+1)(j+1)π/(m+1))``, the paper's eq. 12 transposed."""
    i, j = torch.arange(1, rows + 1).unsqueeze(1), torch.arange(1, width + 1)
    # The angle is reduced in integers: in floating point, large ones would lose their digits.
    turns = (i * j % (2 * (width + 1))).double() / (width + 1)
    return (torch.sin(turns * math.pi) * math.sqrt(2 / (width + 1))).float()
