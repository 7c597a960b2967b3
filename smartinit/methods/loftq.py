"""LoftQ: the adapter starts as what quantisation took from the weight (Li et al., arXiv 2310.08659, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from smartinit.errors import ConfigError
from smartinit.linalg.nf4 import BLOCK_SIZE
from smartinit.linalg.quantisers import Quantiser
from smartinit.methods.base import ALL_HOSTS, Method
from smartinit.methods.residual import error_factors, error_spectra

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from smartinit.factors import Effect, Factors
    from smartinit.linalg.quantisers import Format
    from smartinit.methods.base import Hosts
    from smartinit.spectrum import Spectrum


@dataclass(frozen=True)
class Loftq(Method):
    """LoRA-fine-tuning-aware quantisation: base ``Q = q(W - s·B A)`` and ``s·B A`` = best rank-r part of ``W - Q``.

    With ``P₀ = 0``, step t is ``Q_t = q(W - P_{t-1})``, ``P_t = svd_r(W - Q_t)``; of all iterates the one with the
    smallest ``‖W - Q_t - P_t‖_F`` is kept, as the error may grow again. ``P`` is the whole correction ``s·B A``, so it
    is right for every ``alpha``.

    The alternation runs at rank ``limit`` of `spectrum`; a smaller rank gets the leading part of its result. That is
    the algorithm itself for one iteration, whose ``Q`` knows no rank, and an approximation for more.

    Layers with other weights than ``(out, in)`` matrices are quantised in that view of theirs: a convolution in the
    order in which it is stored; an embedding along the tokens, unlike bitsandbytes' ``Embedding4bit``.

    Attributes:
        bits: width of the quantised base: 2, 4 or 8.
        iterations: alternating steps, T.
        quantiser: storage format, see `smartinit.linalg.quantisers.Quantiser`.
        block_size: numbers that share a scale.
        double: keep those scales in 8 bits as well.

    Raises:
        ConfigError: an option that does not exist.
    """

    bits: int = 4
    iterations: int = 1
    quantiser: Format = "bitsandbytes"
    block_size: int = BLOCK_SIZE
    double: bool = False

    name: ClassVar[str] = "loftq"
    summary: ClassVar[str] = "quantised base; the adapter starts as the best correction of what that took away"
    source: ClassVar[str] = "arXiv 2310.08659, alg. 1"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "quantises"
    hosts: ClassVar[Hosts] = ALL_HOSTS

    def __post_init__(self) -> None:
        """Check the fields."""
        if type(self.iterations) is not int or self.iterations < 1:
            raise ConfigError(f"LoftQ takes a whole number of iterations, at least one, not {self.iterations!r}")
        _ = self._quantise  # which checks the rest
        # Q_1 knows no rank, the later iterates do.
        object.__setattr__(self, "nested", self.iterations == 1)

    @property
    def _quantise(self) -> Quantiser:
        return Quantiser(self.bits, self.quantiser, self.block_size, self.double)

    @property
    def has_shares(self) -> bool:
        """Only of one step: with more, a spectrum belongs to the rank that it was made for."""
        return self.iterations == 1

    def spectrum(
        self, weight: Tensor | None, statistic: object, limit: int, shape: tuple[int, int], *, seed: int = 0
    ) -> Spectrum:
        """Leading triplets of the error ``W - Q`` of the best iterate, ``values = σ²``, and ``Q`` as ``base``.

        ``Q`` comes in the weight's dtype, and the triplets correct the rounding to it as well. ``total`` is
        ``‖W - Q‖²_F``. Cost: O(iterations · out · in · limit).

        Raises:
            ConfigError: no weight.
            ModelError: NaN or Inf in the weight.
        """
        return self.spectra([weight], [statistic], limit, shape, seeds=[seed])[0]

    def spectra(
        self,
        weights: Sequence[Tensor | None],
        statistics: Sequence[object],
        limit: int,
        shape: tuple[int, int],
        *,
        seeds: Sequence[int],
    ) -> list[Spectrum]:
        """`spectrum` of several layers of one shape, decomposed in one call."""
        del statistics, shape
        originals = [weight.detach() for weight in weights if weight is not None]
        if len(originals) < len(weights):
            raise ConfigError("LoftQ quantises the base weight and so needs the original: load the model unquantised")
        best = last = error_spectra(originals, [self._base(weight) for weight in originals], limit, seeds=seeds)
        for _ in range(1, self.iterations):
            bases = [self._base(weight, after) for weight, after in zip(originals, last, strict=True)]
            last = error_spectra(originals, bases, limit, seeds=seeds)
            best = [new if _left(new) < _left(old) else old for new, old in zip(last, best, strict=True)]
        return best

    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """``s·B A`` = the error's best rank-r part, σ and 1/s shared evenly by ``a`` and ``b``; ``base`` = ``Q``.

        Raises:
            ConfigError: more than ``len(spectrum)`` asked for.
        """
        return error_factors(spectrum, rank, scaling)

    def _base(self, weight: Tensor, after: Spectrum | None = None) -> Tensor:
        """``q(W - P)`` with the correction P of the step before, in the weight's dtype."""
        exact = weight.float()
        if after is not None:
            exact = exact - error_factors(after, len(after), 1.0).delta(1.0)
        return self._quantise(exact).to(weight.dtype)


def _left(spectrum: Spectrum) -> float:
    """``‖W - Q - P‖²_F``."""
    return spectrum.total - float(spectrum.values.sum())
