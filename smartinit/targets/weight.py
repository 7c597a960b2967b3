"""One layer that gets an adapter, with its weight seen as ``(out_features, in_features)`` whatever stores it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

from smartinit.errors import ModelError

Host = Literal["linear", "conv1d"]


def host_of(module: nn.Module) -> Host | None:
    """How a module stores the weight of ``y = W x``; None if it is not such a layer.

    Linear: ``nn.Linear`` and its subclasses, and the classes with "Linear" in their name that have ``in_features``
    and ``out_features``, which is how quantisation libraries write theirs. Conv1D: transformers' class (by name,
    so that transformers is not imported), which stores ``W`` transposed.
    """
    if isinstance(module, nn.Linear):
        return "linear"
    ancestors = [kind.__name__ for kind in type(module).__mro__]
    weight = getattr(module, "weight", None)
    if "Conv1D" in ancestors and hasattr(module, "nf") and isinstance(weight, torch.Tensor) and weight.dim() == 2:  # noqa: PLR2004 - a matrix
        return "conv1d"
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if any("Linear" in name for name in ancestors) and all(isinstance(size, int) for size in sizes):
        return "linear"
    return None


def _matrix(module: nn.Module) -> torch.Tensor | None:
    """The stored weight if it is an ordinary matrix of numbers; None if it is packed, sharded or elsewhere."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.is_meta:  # noqa: PLR2004 - a matrix
        return None
    # float8 comes with a scale of its own; a tensor subclass (torchao, DTensor) keeps its numbers in its own way.
    ordinary = weight.is_floating_point() and weight.element_size() > 1 and type(weight.data) is torch.Tensor
    return weight.detach() if ordinary else None


@dataclass(frozen=True)
class Target:
    """A layer that gets an adapter.

    Attributes:
        name: dotted name in the base model, without wrappers.
        module: the base layer: hook this one for its input.
        out_features: rows of ``W``.
        in_features: columns of ``W``.
        host: how the module stores ``W``.
        path: dotted path in the model that was given: the adapter layer's if it has one, else the layer's.
        aliases: further names of the same module in the base model.
    """

    name: str
    module: nn.Module
    out_features: int
    in_features: int
    host: Host
    path: str = ""
    aliases: tuple[str, ...] = ()

    @classmethod
    def of(cls, module: nn.Module, name: str, path: str = "", aliases: tuple[str, ...] = ()) -> Target:
        """The target for a linear layer.

        Raises:
            ModelError: it is not one (see `host_of`).
        """
        host = host_of(module)
        if host is None:
            raise ModelError(f"'{name}' is a {type(module).__name__}: expected a linear layer or a Conv1D")
        matrix = _matrix(module)
        # The module's own word counts only where the weight cannot tell: pruning leaves it outdated.
        sizes = tuple(matrix.shape) if matrix is not None else _declared_sizes(module, host)
        out_features, in_features = sizes if host == "linear" else sizes[::-1]
        return cls(name, module, int(out_features), int(in_features), host, path or name, aliases)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return (self.out_features, self.in_features)

    @property
    def dtype(self) -> torch.dtype:
        """What the layer stores: the weight's dtype, an integer type if it is quantised."""
        return self._stored().dtype

    @property
    def device(self) -> torch.device:
        """Where the layer's weight lies."""
        return self._stored().device

    @property
    def is_readable(self) -> bool:
        """Whether `weight` gives the numbers: not for quantised, sharded and meta weights."""
        return _matrix(self.module) is not None

    def weight(self) -> torch.Tensor:
        """``W``, ``(out_features, in_features)``: a view of the stored weight, without gradient. No copy.

        Raises:
            ModelError: the layer stores something else than an ordinary matrix.
        """
        matrix = _matrix(self.module)
        if matrix is None:
            stored = self._stored()
            raise ModelError(
                f"the weight of '{self.name}' ({type(self.module).__name__}) cannot be read as a matrix: it is stored "
                f"as {type(stored).__name__} of shape {tuple(stored.shape)}, {stored.dtype}, on {stored.device}; "
                "load the model unquantised, whole and on a device, or use a method that needs no weights"
            )
        return matrix if self.host == "linear" else matrix.T

    @torch.no_grad()
    def subtract_(self, delta: torch.Tensor) -> None:
        """``W -= delta`` in place, ``delta`` being ``(out_features, in_features)``; rounds once, to the stored dtype.

        Raises:
            ModelError: the weight cannot be read, or is not stored but computed from other parameters.
        """
        weight = self.weight()
        if self.module._parameters.get("weight") is None:  # noqa: SLF001 - torch has no public way to ask
            raise ModelError(
                f"the weight of '{self.name}' ({type(self.module).__name__}) is not a parameter but computed "
                "(a parametrisation?), so it cannot be changed in place: remove the parametrisation first"
            )
        if delta.shape != weight.shape:
            raise ModelError(f"'{self.name}' is {self.shape}, but what is to be subtracted is {tuple(delta.shape)}")
        # The difference is taken in the wider of the two dtypes; copy_ does the one rounding.
        weight.copy_(weight - delta.to(weight.device))

    def has_finite_weight(self) -> bool:
        """Whether the weight is free of NaN and Inf; True when it `is_readable` not. One pass, no temporary."""
        matrix = _matrix(self.module)
        if matrix is None or matrix.numel() == 0:
            return True
        low, high = matrix.aminmax()  # NaN in any entry makes both NaN
        return bool(low.isfinite() and high.isfinite())

    def _stored(self) -> torch.Tensor:
        weight = getattr(self.module, "weight", None)
        if isinstance(weight, torch.Tensor):
            return weight
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            return tensor
        raise ModelError(f"the layer '{self.name}' ({type(self.module).__name__}) holds no tensor")


def _declared_sizes(module: nn.Module, host: Host) -> tuple[int, int]:
    """What the module says of its weight, in the order of the storage."""
    if host == "conv1d":
        rows, columns = cast("torch.Tensor", module.weight).shape
        return int(rows), int(columns)
    return int(cast("int", module.out_features)), int(cast("int", module.in_features))
