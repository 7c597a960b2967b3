"""Giving a model back what its base weights gave up for the start of an adapter."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from smartinit.adapters.injection import parts_of_model
from smartinit.adapters.layer import LoraLayer
from smartinit.adapters.rollback import BaseCopies
from smartinit.adapters.start import forget_start, start_of
from smartinit.adapters.weight_change import LowRankChange, write_changed
from smartinit.errors import ConfigError, ModelError
from smartinit.targets.weight import storage_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from smartinit.adapters.part import AdapterPart
    from smartinit.adapters.start import Start


@torch.no_grad()
def restore_base(root: nn.Module) -> None:
    """Give a model its original weights back: starts that the base has given up. No adapter is merged into it.

    Where factors were written into this model, the original bits were kept and are copied back. Where a model was
    loaded with its residual base and the start beside the adapter, there is no original: the start is added in float64
    and rounded once, which gives the original to a rounding of the residual and one of its own.

    Args:
        root: the model, with adapter parts in it.

    Warns:
        UserWarning: a residual that cannot be written to (quantised, on meta) stays one.
    """
    layers = changed_layers(parts_of_model(root))
    for name, layer in _by_weight(layers).items():  # layers that share a weight have given it up once
        if _is_writable(layer):
            _restore(layer)
        else:
            warnings.warn(f"the base weight of '{name}' cannot be written to, so it stays a residual", stacklevel=3)
    _forget(layers)


@torch.no_grad()
def restore_layers(root: nn.Module, adapter_name: str) -> None:
    """Give the layers that have changed for one adapter their original weights back, as in `restore_base`.

    Meant for an adapter that is about to be deleted; it is not merged.

    Args:
        root: the model, with adapter parts in it.
        adapter_name: which adapter.

    Raises:
        ConfigError: on such a layer, or one that shares its weight, another adapter computes with what is left of it.
        ModelError: such a weight cannot be written to (quantised, on meta).
            After any error, Ctrl-C included, the weights are as they were.
    """
    parts = parts_of_model(root)
    layers = changed_layers(parts, adapter_name)
    weights = {storage_of(layer.weight) for layer in layers.values()}
    for name, layer in _lora_layers(parts).items():
        others = [other for other in layer.adapters() if other != adapter_name]
        if layers and others and storage_of(layer.weight) in weights:
            raise ConfigError(
                f"adapter '{adapter_name}' cannot be deleted: the base weight of '{name}' was changed for its start, "
                f"and adapter '{others[0]}' on the same layer computes with what is left; delete '{others[0]}' first, "
                f"or keep '{adapter_name}' and leave it inactive"
            )
    for name, layer in layers.items():
        if not _is_writable(layer):
            raise ModelError(
                f"adapter '{adapter_name}' cannot be deleted: the base weight of '{name}' gave up its start, and a "
                f"{type(layer.weight.data).__name__} of {layer.weight.dtype} on {layer.weight.device} cannot be "
                "written to, to give it back; load the original base model instead, without this adapter"
            )
    copies = BaseCopies()
    try:
        for layer in _by_weight(layers).values():
            copies.keep(layer.weight)
            _restore(layer)
    except BaseException:
        copies.restore()
        raise
    _forget(layers, adapter_name)


def changed_layers(parts: Mapping[str, AdapterPart], adapter_name: str | None = None) -> dict[str, LoraLayer]:
    """The layers whose base weight is another one for the start of an adapter, or of one of any, by module name."""
    return {
        name: layer
        for name, layer in _lora_layers(parts).items()
        if _residuals(layer, adapter_name)
        or (layer.original_weight is not None and adapter_name in (None, layer.original_weight.adapter_name))
    }


def _lora_layers(parts: Mapping[str, AdapterPart]) -> dict[str, LoraLayer]:
    return {name: part for name, part in parts.items() if isinstance(part, LoraLayer)}


def _by_weight(layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """The first of those that share a weight."""
    firsts: dict[object, str] = {}
    for name, layer in layers.items():
        firsts.setdefault(storage_of(layer.weight), name)
    return {name: layers[name] for name in firsts.values()}


def _residuals(layer: LoraLayer, adapter_name: str | None = None) -> dict[str, Start]:
    """Adapter -> start that the base has given up."""
    starts = {name: start_of(layer, name) for name in layer.adapters() if adapter_name in (None, name)}
    return {name: start for name, start in starts.items() if start is not None and start.base == "residual"}


def _forget(layers: Mapping[str, LoraLayer], adapter_name: str | None = None) -> None:
    for layer in layers.values():
        layer.original_weight = None
        for name in _residuals(layer, adapter_name):
            forget_start(layer, name)


def _is_writable(layer: LoraLayer) -> bool:
    weight = layer.weight
    return not weight.is_meta and weight.is_floating_point() and type(weight.data) is torch.Tensor


def _restore(layer: LoraLayer) -> None:
    weight, original = layer.weight, layer.original_weight
    if original is not None and original.values.shape == weight.shape:
        weight.copy_(original.values)
        return
    base = layer.get_base_layer()
    for start in _residuals(layer).values():
        left, right = layer.stored_factors(start.a, start.b)
        change = LowRankChange(base, layer.merged_parameter, "", left * start.scaling, right)
        write_changed(weight, weight, [change])
