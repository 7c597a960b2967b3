"""What an initialisation is: a costly, rank-free step and a cheap one, both pure. A leaf."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from smartinit.factors import Effect, Factors, Trains
    from smartinit.spectrum import Spectrum

Needs = Literal["activations", "covariance", "gradients"]
Hosts = frozenset[Literal["linear", "conv1d", "convolution", "embedding"]]

LINEAR: Hosts = frozenset({"linear", "conv1d"})
ALL_HOSTS: Hosts = frozenset({"linear", "conv1d", "convolution", "embedding"})


@dataclass(frozen=True)
class Method(ABC):
    """An initialisation; its options are its fields.

    A method sees tensors and values only: no model, hook, file or configuration.

    Attributes:
        name: as written in ``init_lora_weights`` and ``--method``.
        summary: one line for the table of methods.
        source: paper and equation.
        needs: which statistic it reads, if any: principal directions of the layer's inputs (``"activations"``), their
            whole second moment (``"covariance"``), or sketches of the weight's gradient (``"gradients"``).
        needs_weight: whether it reads the base weight.
        effect: what its factors do to the base layer.
        centred: whether its statistic removes the mean.
        hosts: kinds of layers for which its mathematics makes sense.
        planner: how ranks are given out unless the caller says: by ``"variance"`` (the spectra's ratios) or
            ``"uniform"``.
        trains: which of the two matrices are trained.
        ranked: see `has_shares`.
        nested: whether the spectrum for few directions is the start of that for many.
        random: whether another seed gives another start, beyond round-off.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[Needs | None] = None
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "keeps"
    centred: ClassVar[bool] = False
    hosts: ClassVar[Hosts] = LINEAR
    planner: ClassVar[Literal["variance", "uniform"]] = "uniform"
    trains: ClassVar[Trains] = "both"
    nested: ClassVar[bool] = True
    random: ClassVar[bool] = False
    ranked: ClassVar[bool] = False

    @abstractmethod
    def spectrum(
        self,
        weight: Tensor | None,
        statistic: Any,  # noqa: ANN401 - its kind depends on `needs`
        limit: int,
        shape: tuple[int, int],
        *,
        seed: int = 0,
    ) -> Spectrum:
        """Candidate directions of one layer, at most ``limit``, best first.

        Args:
            weight: ``(out, in)`` base weight; None unless `needs_weight`.
            statistic: of the layer, of the kind that `needs` says; None if it says none.
            limit: directions that will be asked for, at most.
            shape: ``(out_features, in_features)``.
            seed: of every random choice; another one for every layer.
        """

    def spectra(
        self,
        weights: Sequence[Tensor | None],
        statistics: Sequence[Any],
        limit: int,
        shape: tuple[int, int],
        *,
        seeds: Sequence[int],
    ) -> list[Spectrum]:
        """`spectrum` of several layers of one shape; methods that can do them in one batched call override it."""
        return [
            self.spectrum(weight, statistic, limit, shape, seed=seed)
            for weight, statistic, seed in zip(weights, statistics, seeds, strict=True)
        ]

    @abstractmethod
    def factors(self, spectrum: Spectrum, rank: int, scaling: float) -> Factors:
        """Starting matrices at ``rank``: ``a (rank, in)``, ``b (out, rank)`` float32. Pure and cheap.

        Args:
            spectrum: from `spectrum`.
            rank: at most ``len(spectrum)``; 0 gives empty matrices.
            scaling: the layer's ``s`` in ``s·B A``.
        """

    def on(self, host: str) -> Method:
        """This method for one kind of layers: those that start embedding tables differently have a field for it."""
        named = any(f.name == "embedding" for f in fields(self))
        return replace(self, embedding=host == "embedding") if named else self  # type: ignore[call-arg]

    @property
    def has_shares(self) -> bool:
        """Whether a spectrum's ratios are shares of a whole, best first, so that layers can compete by them."""
        return self.ranked

    def options(self) -> dict[str, Any]:
        """Field values, for the recipe."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
