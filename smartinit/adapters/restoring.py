"""Giving a model its own weights back: without adapters that are merged, with what its base gave up for a split."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from smartinit.adapters.injection import parts_of_model
from smartinit.adapters.layer import LoraLayer
from smartinit.adapters.merging import unmerge_adapters
from smartinit.adapters.start import forget_start, start_of
from smartinit.adapters.weight_change import LowRankChange, write_changed
from smartinit.targets.weight import storage_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from smartinit.adapters.start import Start


@torch.no_grad()
def restore_base(root: nn.Module) -> None:
    """Give a model its original weights back: adapters that are merged, and starts that the base has given up.

    Where factors were written into this model, the original bits were kept and are copied back. Where a model was
    loaded with its residual base and the start beside the adapter, there is no original: the start is added in float64
    and rounded once, which gives the original to a rounding of the residual and one of its own.

    Args:
        root: the model, with adapter parts in it.

    Warns:
        UserWarning: a residual that cannot be written to (quantised, on meta) stays one.
    """
    unmerge_adapters(root)
    done = set()
    for name, layer in parts_of_model(root).items():
        if not isinstance(layer, LoraLayer):
            continue
        starts = [start for adapter in layer.adapters() if (start := start_of(layer, adapter)) is not None]
        residual = [start for start in starts if start.base == "residual"]
        if not residual and layer.original_weight is None:
            continue
        weight = layer.weight
        if storage_of(weight) not in done:  # layers that share a weight have given it up once
            done.add(storage_of(weight))
            if not _restore(layer, weight, residual):
                warnings.warn(f"the base weight of '{name}' cannot be written to, so it stays a residual", stacklevel=3)
        layer.original_weight = None
        for adapter in layer.adapters():
            start = start_of(layer, adapter)
            if start is not None and start.base == "residual":
                forget_start(layer, adapter)


def _restore(layer: LoraLayer, weight: torch.Tensor, residual: Sequence[Start]) -> bool:
    """Whether the weight could be restored."""
    original = layer.original_weight
    if original is not None and original.values.shape == weight.shape:
        weight.copy_(original.values)
        return True
    if weight.is_meta or not weight.is_floating_point() or type(weight.data) is not torch.Tensor:
        return False
    base = layer.get_base_layer()
    for start in residual:
        left, right = layer.stored_factors(start.a, start.b)
        change = LowRankChange(base, layer.merged_parameter, "", left * start.scaling, right)
        write_changed(weight, weight, [change])
    return True
