"""One layer that gets an adapter, with its weight seen as ``(out_features, in_features)`` whatever stores it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

from smartinit.errors import ModelError

Host = Literal["linear", "conv1d", "convolution", "embedding"]
Hosts = frozenset[Host]

LINEAR: Hosts = frozenset({"linear", "conv1d"})
ALL_HOSTS: Hosts = frozenset({"linear", "conv1d", "convolution", "embedding"})
Storage = tuple[int, torch.Size, tuple[int, ...]]
"""Where a weight lies: address, shape, strides."""

_TRANSPOSED: Hosts = frozenset({"conv1d", "embedding"})
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def host_of(module: nn.Module) -> Host | None:
    """How a module stores the weight of ``y = W x``; None if it is not such a layer.

    - linear: ``nn.Linear`` and its subclasses, and the classes with "Linear" in their name that have ``in_features``
      and ``out_features``, which is how quantisation libraries write theirs; ``W`` is the weight.
    - conv1d: transformers' class (by name, so that transformers is not imported); ``W`` is the weight transposed.
    - convolution: ``nn.Conv1d``, ``Conv2d``, ``Conv3d`` without groups; ``W`` is the weight ``(out, in, *kernel)`` as
      ``(out, in·∏ kernel)``.
    - embedding: ``nn.Embedding``, which multiplies one-hot rows; ``W (embedding_dim, num_embeddings)`` is the weight
      transposed. One with ``max_norm`` rewrites its own weight when it is called, and is none of these.
    """
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, _CONVOLUTIONS):
        return "convolution" if module.groups == 1 else None
    if isinstance(module, nn.Embedding):
        return "embedding" if module.max_norm is None else None
    ancestors = [kind.__name__ for kind in type(module).__mro__]
    weight = getattr(module, "weight", None)
    if "Conv1D" in ancestors and hasattr(module, "nf") and isinstance(weight, torch.Tensor) and weight.dim() == 2:  # noqa: PLR2004 - a matrix
        return "conv1d"
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if any("Linear" in name for name in ancestors) and all(isinstance(size, int) for size in sizes):
        return "linear"
    return None


def _stored_weight(module: nn.Module, host: Host) -> torch.Tensor | None:
    """The stored weight, if it is an `ordinary` one."""
    dimensions = 2 + len(cast("tuple[int, ...]", module.kernel_size)) if host == "convolution" else 2
    return ordinary(getattr(module, "weight", None), dimensions)


def ordinary(weight: object, dimensions: int = 2) -> torch.Tensor | None:
    """A weight without gradient, if it is an ordinary tensor of numbers; None if it is packed, sharded or elsewhere."""
    if not isinstance(weight, torch.Tensor) or weight.dim() != dimensions or weight.is_meta:
        return None
    # float8 comes with a scale of its own; a tensor subclass (torchao, DTensor) keeps its numbers in its own way, and
    # bitsandbytes' parameters may lie in a floating-point tensor while they are four-bit codes.
    ordinary = weight.is_floating_point() and weight.element_size() > 1 and type(weight.data) is torch.Tensor
    ordinary = ordinary and getattr(weight, "quant_state", None) is None
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
        """The target for a layer.

        Raises:
            ModelError: a kind of module that has no ``W`` (see `host_of`).
        """
        host = host_of(module)
        if host is None:
            raise ModelError(
                f"'{name}' is a {type(module).__name__}: expected a linear layer, a Conv1D, a convolution without "
                "groups or an Embedding without max_norm"
            )
        stored = _stored_weight(module, host)
        # The module's own word counts only where the weight cannot tell: pruning leaves it outdated.
        sizes = tuple(stored.shape) if stored is not None else _declared_sizes(module, host)
        rows, columns = int(sizes[0]), math.prod(int(size) for size in sizes[1:])
        out_features, in_features = (columns, rows) if host in _TRANSPOSED else (rows, columns)
        return cls(name, module, out_features, in_features, host, path or name, aliases)

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
        return self.numbers() is not None

    @property
    def is_transposed(self) -> bool:
        """Whether the module stores ``W`` transposed: the first dimension of its weight is then ``in_features``."""
        return self.host in _TRANSPOSED

    @property
    def stored_shape(self) -> torch.Size:
        """The shape of the weight as the module stores it; for a packed one, the shape that it stands for."""
        stored = self.numbers()
        return torch.Size(_declared_sizes(self.module, self.host)) if stored is None else stored.shape

    @property
    def storage(self) -> Storage | None:
        """Where the weight lies, equal for modules that use one weight; None where it is not an ordinary one."""
        stored = self.numbers()
        return None if stored is None else storage_of(stored)

    @property
    def counts(self) -> bool:
        """Whether what this process sees of its input is nothing that another one has seen as well."""
        return True

    def numbers(self) -> torch.Tensor | None:
        """The weight as this process stores it, without gradient; None unless it is an ordinary tensor."""
        return _stored_weight(self.module, self.host)

    def weight(self) -> torch.Tensor:
        """``W``, ``(out_features, in_features)``, without gradient: a view of the stored weight.

        Only of a convolution that is not stored row by row (``channels_last``) it is a copy.

        Raises:
            ModelError: the layer stores something else than an ordinary matrix.
        """
        stored = self.stored_weight()
        return stored.T if self.is_transposed else stored.flatten(1)

    def stored_weight(self) -> torch.Tensor:
        """The weight as the module stores it, without gradient: the very memory.

        Raises:
            ModelError: the layer stores something else than an ordinary weight of its kind.
        """
        weight = self.numbers()
        if weight is None:
            stored = self._stored()
            raise ModelError(
                f"the weight of '{self.name}' ({type(self.module).__name__}) cannot be read as a matrix: it is stored "
                f"as {type(stored).__name__} of shape {tuple(stored.shape)}, {stored.dtype}, on {stored.device}; "
                "load the model unquantised, whole and on a device, or use a method that needs no weights"
            )
        return weight

    def changeable_weight(self) -> torch.Tensor:
        """`stored_weight`, to be written to.

        Raises:
            ModelError: it cannot be read, or is not stored but computed from other parameters.
        """
        weight = self.stored_weight()
        if self.module._parameters.get("weight") is None:  # noqa: SLF001 - torch has no public way to ask
            raise ModelError(
                f"the weight of '{self.name}' ({type(self.module).__name__}) is not a parameter but computed "
                "(a parametrisation?), so it cannot be changed in place: remove the parametrisation first"
            )
        return weight

    @torch.no_grad()
    def subtract_(self, delta: torch.Tensor) -> None:
        """``W -= delta`` in place, ``delta`` being ``(out_features, in_features)``; rounds once, to the stored dtype.

        Raises:
            ModelError: the weight cannot be read, or is not stored but computed from other parameters.
        """
        stored = self.changeable_weight()
        if delta.shape != self.shape:
            raise ModelError(f"'{self.name}' is {self.shape}, but what is to be subtracted is {tuple(delta.shape)}")
        delta = delta.to(stored.device)
        delta = delta.T if self.is_transposed else delta.reshape(stored.shape)
        if delta.dtype == stored.dtype:
            stored.sub_(delta)  # the same numbers without a copy of the weight
        else:  # the difference is taken in the wider of the two dtypes; copy_ does the one rounding
            stored.copy_(stored - delta)

    def has_finite_weight(self) -> bool:
        """Whether the weight is free of NaN and Inf; True when it `is_readable` not. One pass, no temporary."""
        stored = self.numbers()
        if stored is None or stored.numel() == 0:
            return True
        low, high = stored.aminmax()  # NaN in any entry makes both NaN
        return bool(low.isfinite() and high.isfinite())

    def _stored(self) -> torch.Tensor:
        weight = getattr(self.module, "weight", None)
        if isinstance(weight, torch.Tensor):
            return weight
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            return tensor
        raise ModelError(f"the layer '{self.name}' ({type(self.module).__name__}) holds no tensor")


def storage_of(tensor: torch.Tensor) -> Storage:
    """Where a tensor lies: equal for two names of one weight."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _declared_sizes(module: nn.Module, host: Host) -> tuple[int, ...]:
    """What the module says of its weight, in the order of the storage."""
    if host == "linear":
        return int(cast("int", module.out_features)), int(cast("int", module.in_features))
    if host == "embedding":
        return int(cast("int", module.num_embeddings)), int(cast("int", module.embedding_dim))
    return tuple(int(size) for size in cast("torch.Tensor", module.weight).shape)
