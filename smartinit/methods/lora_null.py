"""LoRA-Null: the adapter starts in the directions that the data use least (Tang et al., arXiv 2503.02659)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from smartinit.factors import Factors
from smartinit.linalg.products import LeftDirections, bottom_left_of_triangle
from smartinit.linalg.psd import psd_eigh
from smartinit.methods.base import Method
from smartinit.methods.second_moment import checked_statistic, finite_weight, mean_moment, mean_root
from smartinit.methods.split import checked_rank, positive_scaling
from smartinit.spectrum import Certificate, Spectrum
from smartinit.statistics.derived import Derived

if TYPE_CHECKING:
    from torch import Tensor

    from smartinit.factors import Effect
    from smartinit.methods.base import Needs

_eigen: Derived[tuple[Tensor, Tensor]] = Derived(lambda statistic: psd_eigh(mean_moment(statistic)))


@dataclass(frozen=True)
class LoraNull(Method):
    """``s·B A = W U₀ U₀ᵀ``, U₀ the last r eigenvectors of the inputs' second moment.

    The base keeps what it does to the data; the adapter, whose A reads (almost) nothing of them, is free to learn
    something else.

    Attributes:
        frozen_a: train B alone, so that the adapter never reads what the data use: the paper's variant with frozen
            down-projections.
    """

    frozen_a: bool = False

    name: ClassVar[str] = "lora_null"
    summary: ClassVar[str] = "the weight on the directions that the data use least; the base keeps the rest"
    source: ClassVar[str] = "arXiv 2503.02659v1, sec. 3.2"
    needs: ClassVar[Needs | None] = "covariance"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "splits"

    def spectrum(
        self,
        weight: Tensor | None,
        statistic: Any,  # noqa: ANN401 - a SecondMoment
        limit: int,
        shape: tuple[int, int],
        *,
        seed: int = 0,
    ) -> Spectrum:
        """The last eigenvectors of C, and what the weight makes of them.

        Returns:
            ``directions = U₀ᵀ (k, in)`` orthonormal, ``left = W U₀ (out, k)``, ``values``: the mean squares of the
            inputs along U₀, the smallest first, ``total = tr C``.

        Raises:
            ConfigError: no weight, no second moment, or one of another shape.
            DataError: fewer tokens than features.
            ModelError: the weight holds NaN or Inf.

        Cost: ``d³/3`` flops per site and ``2 d²`` per step and direction; ``O(d³)`` once per site where C is singular.
        """
        kept = finite_weight(weight, shape, self.name)
        statistic = checked_statistic(statistic, shape, self.name, least=shape[1])
        count = min(limit, *shape)
        root = mean_root(statistic)
        # Substitution with the factor finds small eigenvalues to their own precision, eigh to that of the largest.
        if root.damping == 0 and bool(root.factor.diagonal().all()):
            found = bottom_left_of_triangle(root.factor, count, upper=False, seed=seed)
            vectors, values = found.vectors, found.values.square()
        else:
            values, vectors = (part[..., :count] for part in _eigen(statistic))
            found = LeftDirections(vectors, values, 0.0)
        total = float(torch.linalg.vector_norm(root.factor)) ** 2
        vectors = vectors.to(kept.device)
        certificate = Certificate(
            rows=statistic.rows,
            residual=found.residual,
            captured=min(1.0, float(values.sum()) / total) if total > 0 else None,
            damping=0.0,
            components=count,
        )
        left = (kept.double() @ vectors).float()
        return Spectrum(vectors.mT.float().contiguous(), values.cpu(), total, shape, certificate, left)

    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """From ``W U₀ = P S Qᵀ``: ``b = P √(S/s)``, ``a = √(S/s) Qᵀ U₀ᵀ``, the SVD of ``W U₀ U₀ᵀ`` shared evenly.

        Raises:
            ConfigError: a rank beyond the spectrum, or a scaling that is not positive.
        """
        directions, left = checked_rank(spectrum, rank, self.name)
        p, s, qh = torch.linalg.svd(left.double(), full_matrices=False)
        root = (s / positive_scaling(scaling, self.name)).sqrt()
        a = (root.unsqueeze(1) * qh) @ directions.double()
        return Factors(a=a.float(), b=(p * root).float(), effect="splits", trains="b" if self.frozen_a else "both")
