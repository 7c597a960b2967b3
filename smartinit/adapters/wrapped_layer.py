"""A part around one layer with one weight: what there is to read of that layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smartinit.adapters.dora import BaseNorms
from smartinit.adapters.part import AdapterPart

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from typing_extensions import Self


class WrappedLayer(AdapterPart):
    """Stands around a layer that multiplies by a weight ``W (out, in)``, however it stores that.

    Args:
        base_layer: the layer as the model had it; it is called, never copied.

    Attributes:
        in_features: columns of ``W``; for a convolution its input channels.
        out_features: rows of ``W``.
        base_norms: row norms of ``W``, for DoRA; see `forget_norms`.
    """

    in_features: int
    out_features: int
    base_norms: BaseNorms

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        columns, rows = self.features(self.get_base_layer())
        vars(self).update(in_features=columns, out_features=rows, base_norms=BaseNorms())  # as in AdapterPart

    @staticmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        """``(in_features, out_features)`` of a layer of this kind."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's: some models read the weight of a layer instead of calling it."""
        weight: torch.Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's."""
        bias: torch.Tensor | None = self.get_base_layer().bias  # type: ignore[assignment]
        return bias

    def base_product(self, x: torch.Tensor) -> torch.Tensor:
        """``W x`` as the base layer computes it, without its bias."""
        raise NotImplementedError

    def weight_matrix(self) -> torch.Tensor:
        """``W (out, in)``: a view of the base weight, or what a quantised one stands for."""
        raise NotImplementedError

    def stored_tensor(self) -> torch.Tensor | None:
        """The tensor whose change means that `weight_matrix` has changed; None: no single one."""
        weight = getattr(self.get_base_layer(), "weight", None)
        return weight if isinstance(weight, torch.Tensor) else None

    def forget_norms(self) -> None:
        """Compute the base weight's row norms anew when DoRA needs them next.

        To be called after writing to the base weight through ``.data``, which leaves no trace; every other way of
        changing it is noticed.
        """
        self.base_norms.forget()

    def train(self, mode: bool = True) -> Self:
        """As of every module; a switch of the mode makes the layer look at its base weight anew."""
        if mode != self.training:
            self.forget_norms()
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """As of every module: after ``to`` or ``half`` the base weight is another one."""
        self.forget_norms()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def any_tensor(self) -> torch.Tensor:
        """One that says where the base layer lies, and in which dtype."""
        weight = self.stored_tensor()
        if weight is not None:
            return weight
        base = self.get_base_layer()
        return next(iter((*base.parameters(), *base.buffers())))
