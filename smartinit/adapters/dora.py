"""Weight-decomposed adapters: ``h = m ⊙ (W + s·B A) x / ‖W + s·B A‖`` by rows (DoRA, arXiv 2402.09353, eq. 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Magnitude(nn.Module):
    """The trained row norms m of one adapter on one layer, at first those of ``W + s·B A``.

    Args:
        layer: the layer, with the adapter's matrices on it.
        adapter_name: which adapter.

    Attributes:
        weight: ``(out,)``; a convolution's ``(1, out, 1, …)``.
    """

    def __init__(self, layer: Any, adapter_name: str) -> None:  # noqa: ANN401 - a LoraLayer
        super().__init__()
        raise NotImplementedError


def decomposed_update(layer: Any, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """`LoraLayer.update` of an adapter with a magnitude."""
    del layer, adapter_name, x, result
    raise NotImplementedError
