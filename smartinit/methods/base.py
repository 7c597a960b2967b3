"""What an initialisation is: a costly, rank-free step and a cheap one, both pure. A leaf."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from smartinit.factors import Effect, Factors
    from smartinit.spectrum import Spectrum
    from smartinit.statistics.base import Statistic

Needs = Literal["activations", "gradients"]


@dataclass(frozen=True)
class Method(ABC):
    """An initialisation; its options are its fields.

    A method sees tensors and values only: no model, hook, file or configuration.

    Attributes:
        name: as written in ``init_lora_weights`` and ``--method``.
        summary: one line for the table of methods.
        source: paper and equation.
        needs: which statistic it reads, if any.
        needs_weight: whether it reads the base weight.
        effect: what its factors do to the base layer.
        centred: whether its statistic removes the mean.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[Needs | None] = None
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "keeps"
    centred: ClassVar[bool] = False

    @abstractmethod
    def spectrum(
        self, weight: Tensor | None, statistic: Statistic | None, limit: int, shape: tuple[int, int]
    ) -> Spectrum:
        """Candidate directions of one layer, at most ``limit``, best first.

        Args:
            weight: ``(out, in)`` base weight; None unless `needs_weight`.
            statistic: of the layer's input; None unless `needs`.
            limit: directions that will be asked for, at most.
            shape: ``(out_features, in_features)``.
        """

    @abstractmethod
    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """Starting matrices at ``rank``: ``a (rank, in)``, ``b (out, rank)`` float32. Pure and cheap.

        Args:
            spectrum: from `spectrum`.
            rank: at most ``len(spectrum)``; 0 gives empty matrices.
            scaling: the layer's ``s`` in ``s·B A``.
        """

    def options(self) -> dict[str, Any]:
        """Field values, for the recipe."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
