"""Two non-zero matrices whose product is zero, PEFT's ``init_lora_weights="orthogonal"``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from smartinit.errors import ConfigError
from smartinit.factors import Factors
from smartinit.linalg.noise import normal_rows
from smartinit.methods.base import ALL_HOSTS, Method
from smartinit.spectrum import Spectrum

if TYPE_CHECKING:
    from torch import Tensor

    from smartinit.methods.base import Hosts


@dataclass(frozen=True)
class Orthogonal(Method):
    """``A = c·Q₁ᵀ G`` and ``B = c·H Q₂``: normal ``G, H``, and ``Q₁, Q₂`` complementary rows of one orthogonal matrix.

    ``B A = c²·H Q₂ Q₁ᵀ G = 0`` while both matrices are trained from the first step on. PEFT draws ``Q`` at random, for
    even ranks only, and its product is zero up to round-off: about 1e-3 of ``‖B‖‖A‖`` in bfloat16. Here ``Q`` turns
    pairs of axes by 45°: rows 2i and 2i+1 of ``A`` are equal, columns 2i and 2i+1 of ``B`` opposite, so that the
    product stays zero when both are rounded to any type. Turned pairs give entries of PEFT's variance, c²/2. With an
    odd rank the last row of ``A`` has no partner, and the last column of ``B`` is zero.

    Attributes:
        deviation: c; PEFT's is 0.1.
    """

    deviation: float = 0.1

    name: ClassVar[str] = "orthogonal"
    summary: ClassVar[str] = "noise in both matrices whose product is zero"
    source: ClassVar[str] = "datta0.github.io/posts/rethink-lora-init, 'Orthogonal initialisation'; PEFT"
    hosts: ClassVar[Hosts] = ALL_HOSTS
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not 0 < self.deviation < float("inf"):
            msg = f"deviation={self.deviation} of the method 'orthogonal': expected a positive number"
            raise ConfigError(msg)

    def spectrum(
        self, weight: Tensor | None, statistic: object, limit: int, shape: tuple[int, int], *, seed: int = 0
    ) -> Spectrum:
        """``directions``: rows of ``A`` at ``c = 1``; ``left``: columns of ``B``. Cost: ``O(limit·(in + out))``."""
        del weight, statistic
        out_features, in_features = shape
        pairs = (limit + 1) // 2
        right, left = (
            normal_rows(pairs, width, seed=seed + i).repeat_interleave(2, 0) * 2**-0.5
            for i, width in enumerate((in_features, out_features))
        )
        left[1::2] *= -1
        return Spectrum.of_equals(right[:limit].clone(), shape, left[:limit].mT, total=in_features)

    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """The first pairs, and for an odd rank one row of ``A`` without a partner. The same at any scaling.

        Raises:
            ConfigError: more ranks than the spectrum has directions, or a spectrum of another method.
        """
        del scaling
        spectrum.require(rank)
        if spectrum.left is None:
            msg = "the spectrum has no left side, so it is not one of the method 'orthogonal'"
            raise ConfigError(msg)
        b = (spectrum.left[:, :rank] * self.deviation).contiguous()
        b[:, rank - rank % 2 :] = 0
        return Factors(a=spectrum.directions[:rank] * self.deviation, b=b)
