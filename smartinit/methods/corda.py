"""CorDA: the part of a weight that the data use most, or least (Yang et al., arXiv 2406.05223, sec. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from smartinit.errors import ConfigError
from smartinit.factors import Factors
from smartinit.linalg.products import bottom_left, top_left
from smartinit.linalg.psd import damped
from smartinit.methods.base import Method
from smartinit.methods.second_moment import (
    checked_statistic,
    even_projection,
    finite_weight,
    mean_moment,
    product_energy,
)
from smartinit.methods.split import checked_rank, positive_scaling
from smartinit.spectrum import Certificate, Spectrum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from smartinit.factors import Effect
    from smartinit.linalg.products import LeftDirections
    from smartinit.methods.base import Needs

# Singular values below this share of the largest are round-off: C is singular, and says nothing about them.
_ROUND_OFF = 1e-14
# Enough to order what C says nothing about; changes what it does say something about by no more than this.
_DAMPING = 1e-8
# The paper's damping, which gives directions that the data never use a size.
_PAPER_DAMPING = 1e-2


@dataclass(frozen=True)
class Corda(Method):
    """Context-oriented split: ``W C = U Σ Vᵀ`` with the inputs' second moment C, ``s·B A = U_r U_rᵀ W``.

    The paper's ``A = Σ^½ Vᵀ C⁻¹`` equals ``Σ^-½ Uᵀ W``, since ``Uᵀ W C = Σ Vᵀ``: no inverse is needed, and no damping
    unless C is singular where it matters. ``B A`` does not depend on the scale of C; how it is shared between B and
    A does, and here ``C = Σ x xᵀ / n`` over all n tokens, whatever the batches. (PEFT divides every batch by its
    largest activation and the sum by the number of batches.)

    Attributes:
        corda_method: ``"ipm"`` takes the largest singular values (instruction-previewed), ``"kpm"`` the smallest
            (knowledge-preserved: training starts where the data are not).
        balance: ``"covariance"`` as published, ``B = U Σ^½``, ``A = Σ^-½ Uᵀ W``; ``"even"`` gives the singular values
            of ``U Uᵀ W`` to both alike, independent of the scale of C.
    """

    corda_method: Literal["ipm", "kpm"] = "ipm"
    balance: Literal["covariance", "even"] = "covariance"

    name: ClassVar[str] = "corda"
    summary: ClassVar[str] = "the part of the weight that the data use most (ipm) or least (kpm)"
    source: ClassVar[str] = "arXiv 2406.05223, eq. 1-5"
    needs: ClassVar[Needs | None] = "covariance"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "splits"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: one of them has another value.
        """
        for name, allowed in (("corda_method", ("ipm", "kpm")), ("balance", ("covariance", "even"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"CorDA's {name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")

    @property
    def has_shares(self) -> bool:
        """Only of ipm: kpm takes the smallest first, which are no one's share to keep."""
        return self.corda_method == "ipm"

    def spectrum(
        self,
        weight: Tensor | None,
        statistic: Any,  # noqa: ANN401 - a SecondMoment
        limit: int,
        shape: tuple[int, int],
        *,
        seed: int = 0,
    ) -> Spectrum:
        """Left singular directions of ``W C``.

        Returns:
            ``left = U (out, k)``, ``directions = Uᵀ W (k, in)``, ``values = σ²`` (``"kpm"``: the smallest first),
            ``total = ‖W C‖_F²``. The certificate's ``damping`` is the share of C's mean diagonal that had to be added.

        Raises:
            ConfigError: no weight, no second moment, or one of another shape.
            DataError: no tokens; for ``"kpm"`` fewer tokens than features.
            ModelError: the weight holds NaN or Inf.

        Cost: see `top_left` and `bottom_left`, one float32 product for the total, and ``O(d²)`` per site.
        """
        kept = finite_weight(weight, shape, self.name)
        least = shape[1] if self.corda_method == "kpm" else 1
        statistic = checked_statistic(statistic, shape, f"{self.name} ({self.corda_method})", least=least)
        moment = mean_moment(statistic).to(kept.device)
        w, count = kept.double(), min(limit, *shape)
        if self.corda_method == "kpm":
            found, total, singular = _least(w, moment, count, seed)
        else:
            found, total, singular = _most(w, moment, count, seed)
        rows = found.vectors.mT @ w
        sizes = found.values
        if singular:
            # How the product is shared is all that depends on these.
            idle = _PAPER_DAMPING * float(moment.diagonal().mean()) * torch.linalg.vector_norm(rows, dim=1)
            share = _DAMPING * float(moment.diagonal().mean()) * torch.linalg.vector_norm(rows, dim=1)
            sizes = torch.where(sizes <= 2 * share, idle, sizes)
        values = sizes.cpu() ** 2
        certificate = Certificate(
            rows=statistic.rows,
            residual=found.residual,
            captured=min(1.0, float(found.values.square().sum()) / total) if total > 0 else None,
            damping=_DAMPING if singular else 0.0,
            components=count,
        )
        left = found.vectors.float().contiguous()
        return Spectrum(rows.float(), values, total, shape, certificate, left)

    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """``a``, ``b`` with ``s·B A = U_r U_rᵀ W``; see `balance`.

        Raises:
            ConfigError: a rank beyond the spectrum, or a scaling that is not positive.
        """
        if self.balance == "even":
            return even_projection(spectrum, rank, scaling, self.name)
        directions, left = checked_rank(spectrum, rank, self.name)
        root = spectrum.values[:rank].to(directions.device) ** 0.25
        inverse = torch.where(root > 0, 1 / root, 0.0).unsqueeze(1)
        share = positive_scaling(scaling, self.name) ** -0.5
        a, b = inverse * directions.double() * share, left.double() * root * share
        return Factors(a=a.float(), b=b.float(), effect="splits")


def _most(weight: Tensor, moment: Tensor, count: int, seed: int) -> tuple[LeftDirections, float, bool]:
    """Leading directions of ``W C``, its energy ``‖W C‖_F²``, and whether C had to be damped."""
    total = product_energy(weight, moment)
    found = top_left(weight, moment, count, seed=seed)
    if singular := _beyond_round_off(found, total, weight.shape):
        found = top_left(weight, damped(moment, _DAMPING), count, seed=seed)
    return found, total, singular


def _least(weight: Tensor, moment: Tensor, count: int, seed: int) -> tuple[LeftDirections, float, bool]:
    """The same of the trailing directions, for which the product is formed."""
    product = weight @ moment
    total = float(torch.linalg.vector_norm(product)) ** 2
    found = bottom_left(product, count, seed=seed)
    if singular := _beyond_round_off(found, total, weight.shape):
        product.add_(weight, alpha=_DAMPING * float(moment.diagonal().mean()))  # W (C + δ I)
        found = bottom_left(product, count, seed=seed)
    return found, total, singular


def _beyond_round_off(found: LeftDirections, total: float, shape: Sequence[int]) -> bool:
    """Whether C says nothing about the last of the directions."""
    floor = _ROUND_OFF * max(shape) ** 0.5 * total**0.5
    return found.values.numel() > 0 and float(found.values.min()) <= floor
