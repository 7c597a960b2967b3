"""Output-optimal split: the adapter starts as the part of a layer that makes most of its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from smartinit.linalg.products import top_left
from smartinit.methods.base import Method
from smartinit.methods.second_moment import checked_statistic, even_projection, finite_weight, mean_root, product_energy
from smartinit.spectrum import Certificate, Spectrum

if TYPE_CHECKING:
    from torch import Tensor

    from smartinit.factors import Effect, Factors
    from smartinit.methods.base import Needs


@dataclass(frozen=True)
class OutputPca(Method):
    """``s·B A = U_r U_rᵀ W``, U the leading eigenvectors of ``W C Wᵀ``: the principal components of the outputs.

    Of all matrices of rank r it has the least ``Σ ‖W x - s·B A x‖²`` over the data (Eckart-Young in the norm of C), so
    it stands between PiSSA (the same with ``C = I``) and CorDA (``W C² Wᵀ``).
    """

    name: ClassVar[str] = "output_pca"
    summary: ClassVar[str] = "principal components of the layer's outputs; the base keeps the rest"
    source: ClassVar[str] = "Eckart & Young, doi 10.1007/BF02288367, in the norm of the inputs' second moment"
    needs: ClassVar[Needs | None] = "covariance"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "splits"
    ranked: ClassVar[bool] = True

    def spectrum(
        self,
        weight: Tensor | None,
        statistic: Any,  # noqa: ANN401 - a SecondMoment
        limit: int,
        shape: tuple[int, int],
        *,
        seed: int = 0,
    ) -> Spectrum:
        """Leading eigenvectors of ``W C Wᵀ``, as left singular directions of ``W L`` with ``C = L Lᵀ``.

        Returns:
            ``left = U (out, k)``, ``directions = Uᵀ W (k, in)``, ``values``: the mean squares of the outputs along U,
            ``total``: of all outputs. The certificate's ``damping`` is the share of its diagonal that C needed.

        Raises:
            ConfigError: no weight, no second moment, or one of another shape.
            DataError: no tokens.
            ModelError: the weight holds NaN or Inf.

        Cost: ``d³/3`` flops per site, see `top_left`, and one float32 product for the total.
        """
        kept = finite_weight(weight, shape, self.name)
        statistic = checked_statistic(statistic, shape, self.name)
        root = mean_root(statistic)
        factor = root.factor.to(kept.device)
        w, count = kept.double(), min(limit, *shape)
        found = top_left(w, factor, count, seed=seed)
        total = product_energy(kept, factor)
        values = found.values.cpu() ** 2
        certificate = Certificate(
            rows=statistic.rows,
            residual=found.residual,
            captured=min(1.0, float(values.sum()) / total) if total > 0 else None,
            damping=root.damping,
            components=count,
        )
        left = found.vectors.float().contiguous()
        return Spectrum((found.vectors.mT @ w).float(), values, total, shape, certificate, left)

    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """``a``, ``b`` with ``s·B A = U_r U_rᵀ W``, its singular values shared evenly.

        Raises:
            ConfigError: a rank beyond the spectrum, or a scaling that is not positive.
        """
        return even_projection(spectrum, rank, scaling, self.name)
