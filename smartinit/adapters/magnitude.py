"""Setting DoRA's magnitudes, of this package's layers and of PEFT's (arXiv 2402.09353, eq. 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from smartinit.adapters.dora import Magnitude
from smartinit.adapters.host import factor_parameters

if TYPE_CHECKING:
    from torch import nn


@torch.no_grad()
def set_magnitude(layer: nn.Module, adapter_name: str, given: torch.Tensor | None = None) -> None:
    """Set ``m = ‖W + s·B A‖`` (by rows) of what base layer and adapter hold now; nothing where there is no DoRA.

    Computed by the layer itself, which divides by the same norm in its forward pass: the quotient is then exactly one,
    and the layer computes what it would without DoRA. The parameter stays the same object.

    Args:
        layer: a LoRA layer.
        adapter_name: which adapter.
        given: ``(out,)`` instead.
    """
    magnitudes: Any = getattr(layer, "lora_magnitude_vector", None)
    if magnitudes is None or adapter_name not in magnitudes:
        return
    made = magnitudes[adapter_name]
    kept = made.weight
    if given is not None:
        kept.copy_(given.reshape(kept.shape))
        return
    of: Any = layer
    if isinstance(made, Magnitude):
        made.reset(of, adapter_name)
        return
    a, b = factor_parameters(layer, adapter_name)
    try:
        made.update_layer(
            base_layer=of.get_base_layer(), lora_A=a.detach(), lora_B=b.detach(), scaling=of.scaling[adapter_name]
        )
        values = made.weight.detach()
    finally:
        made.weight = kept
    kept.copy_(values)
