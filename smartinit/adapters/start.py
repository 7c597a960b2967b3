"""The matrices that an adapter started from, kept on its layer as they are trained away from.

Of a split ``W = residual + s·B A`` they are what the base gave up: without them nobody can say any more what the
original weight was, nor express the trained adapter on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from smartinit.targets.weight import Target

Base = Literal["residual", "offset"]
"""How a split treats the base layer: it becomes the residual, or stays and the layer subtracts the start."""

_PART = "start"


class Start(nn.Module):
    """``A₀ (r, in)``, ``B₀ (out, r)`` as they were written, rounding included, and ``s₀``. Buffers: never trained.

    Args:
        a: ``A₀``.
        b: ``B₀``.
        scaling: ``s₀``.
        base: whether the base gave them up, or the layer subtracts them.
        persistent: whether they are in the state dict.
    """

    a: torch.Tensor
    b: torch.Tensor

    def __init__(
        self, a: torch.Tensor, b: torch.Tensor, scaling: float, base: Base, *, persistent: bool = False
    ) -> None:
        super().__init__()
        self.register_buffer("a", a, persistent=persistent)
        self.register_buffer("b", b, persistent=persistent)
        self.scaling = scaling
        self.base: Base = base

    def equals(self, a: torch.Tensor, b: torch.Tensor, scaling: float) -> bool:
        """Whether it holds these very matrices."""
        return (
            self.scaling == scaling
            and torch.equal(self.a, a.to(self.a.device, self.a.dtype))
            and torch.equal(self.b, b.to(self.b.device, self.b.dtype))
        )

    def delta(self, target: Target, dtype: torch.dtype) -> torch.Tensor:
        """``s₀·B₀ A₀`` in the shape in which the base layer stores its weight."""
        wide = torch.promote_types(dtype, torch.float32)
        product = (self.b.to(wide) @ self.a.to(wide)) * self.scaling
        if target.is_transposed:
            return product.T.to(dtype)
        return product.reshape(target.stored_shape).to(dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"rank={self.a.shape[0]}, scaling={self.scaling}, base={self.base!r}"


class OriginalWeight:
    """A base weight as it was before an adapter's start changed it: its bits, in the host's memory, never written to.

    In no state dict, since nobody could load it; copies of a model share it.

    Args:
        values: the weight as its layer stores it.
        adapter_name: whose start.
    """

    def __init__(self, values: torch.Tensor, adapter_name: str) -> None:
        self.values = values
        self.adapter_name = adapter_name

    def __deepcopy__(self, memo: object) -> OriginalWeight:
        """The same object."""
        return self


def starts_of(layer: nn.Module) -> nn.ModuleDict:
    """Adapter -> `Start` of a LoRA layer; one of PEFT has none at first."""
    found = layer._modules.get(_PART)  # noqa: SLF001
    if isinstance(found, nn.ModuleDict):
        return found
    made = nn.ModuleDict()
    # Not among its `other_param_names`: what is there, PEFT casts to the base layer's dtype when it loads weights.
    layer.add_module(_PART, made)
    return made


def start_of(layer: nn.Module, adapter_name: str) -> Start | None:
    """The start of one adapter on a layer, if one is kept."""
    found = layer._modules.get(_PART)  # noqa: SLF001
    start = found[adapter_name] if isinstance(found, nn.ModuleDict) and adapter_name in found else None
    return start if isinstance(start, Start) else None


def forget_start(layer: nn.Module, adapter_name: str) -> None:
    """Drop the start of one adapter."""
    if start_of(layer, adapter_name) is not None:
        del starts_of(layer)[adapter_name]
