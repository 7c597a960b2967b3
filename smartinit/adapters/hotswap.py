"""Replacing an adapter's weights in place, so that compiled code and captured graphs stay valid.

Compiled code is made for shapes and for the numbers that it has read from Python. So, before compiling, every matrix is
widened to one rank with zeros, which add nothing to ``B A`` and get no gradient, and scalings become tensors; a swap
then writes into the same memory only. The adapter is from then on one of that rank: its alpha is such that the scaling
is what it was, and it is saved so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from smartinit.adapters.base_bias import trained_biases
from smartinit.adapters.conversion import scaling_for
from smartinit.adapters.experts import ParameterLora
from smartinit.adapters.loading import put_others_in
from smartinit.adapters.start import start_of
from smartinit.adapters.state import stored_layers, stored_others, stored_parts
from smartinit.adapters.storage import read_plain_adapter
from smartinit.adapters.tied_factors import is_tied
from smartinit.adapters.trained_alike import difference
from smartinit.errors import ArgumentError, ArtefactError, ConfigError
from smartinit.formats.kept_start import kept_start
from smartinit.formats.patterns import compact_patterns
from smartinit.formats.tensors import PREFIX
from smartinit.planning.plan import Plan

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from smartinit.adapters.adapted import AdaptedModel
    from smartinit.adapters.layer import LoraLayer
    from smartinit.factors import Factors
    from smartinit.formats.peft import StoredAdapter

_MAGNITUDE = "lora_magnitude_vector"
_BIAS = "lora_B.bias"


@torch.no_grad()
def prepare_for_hotswap(model: AdaptedModel, target_rank: int) -> None:
    """See `smartinit.LoraModel.prepare_for_hotswap`."""
    if isinstance(target_rank, bool) or not isinstance(target_rank, int):
        raise ArgumentError(f"target_rank={target_rank!r} is a {type(target_rank).__name__}; expected an integer")
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        raise ConfigError("the model is compiled already: prepare it for swaps first, and compile it then")
    layers = [
        (name, path, layer)
        for name in model.peft_config
        for path, layer in stored_layers(model.model, name).items()
        if not isinstance(layer, ParameterLora)  # of stacked experts only the same rank is swapped
    ]
    for name, path, layer in layers:
        _require_unmerged(model, name)
        if layer.r[name] > target_rank:
            raise ConfigError(
                f"adapter '{name}' has rank {layer.r[name]} in layer '{path}', above target_rank={target_rank}; give "
                "the largest rank of all adapters that are to be swapped"
            )
    for name, _, layer in layers:
        _widen(layer, name, target_rank)
    for name in model.peft_config:
        for layer in stored_layers(model.model, name).values():
            scaling = torch.tensor(float(layer.scaling[name]), dtype=layer.matrices(name)[0].dtype)
            layer.scaling[name] = scaling.to(layer.matrices(name)[0].device)  # type: ignore[assignment]
        _describe(model, name)


@torch.no_grad()
def hotswap_adapter(model: AdaptedModel, folder: str | os.PathLike[str], adapter_name: str) -> None:
    """See `smartinit.LoraModel.hotswap_adapter`."""
    config = model.config_of(adapter_name)
    _require_unmerged(model, adapter_name)
    stored = read_plain_adapter(folder)
    if found := difference(config, stored.config):
        raise ArtefactError(
            f"adapter '{adapter_name}' has {found[0]}, but the one in '{stored.folder}' has {found[1]}; load it under "
            "another name instead"
        )
    layers = stored_layers(model.model, adapter_name)
    _check_starts(layers, adapter_name, stored)
    _check_layers(layers, adapter_name, stored)
    _check_others(model, adapter_name, stored, layers)
    for name, layer in layers.items():
        _swap(layer, adapter_name, name, stored)
    parts = stored_parts(model.model, adapter_name)
    put_others_in(model.model, adapter_name, stored.others, parts, trained_biases(model.model, config, adapter_name))
    _describe(model, adapter_name)


def _widen(layer: LoraLayer, adapter_name: str, rank: int) -> None:
    """Give one adapter of a layer matrices of a larger rank that compute the same; they are new parameters."""
    former = layer.matrices(adapter_name)
    # A tied layer's are the embedding's, which are widened where they are.
    if layer.r[adapter_name] != rank and not is_tied(layer, adapter_name):
        bias = layer.lora_B[adapter_name].bias if layer.lora_bias[adapter_name] else None
        layer.new_matrices(adapter_name, rank, device=former[0].device, dtype=former[0].dtype)
        a, b = layer.matrices(adapter_name)
        _write(a, b, *former)
        for made, old in zip((a, b), former, strict=True):
            made.requires_grad_(old.requires_grad)
        if bias is not None:
            layer.lora_B[adapter_name].bias = bias
        for modules in (layer.lora_A, layer.lora_B):
            if adapter_name in modules:
                modules[adapter_name].train(layer.training)
    layer.r[adapter_name] = rank
    _set_scaling(layer, adapter_name, float(layer.scaling[adapter_name]))


def _write(a: torch.Tensor, b: torch.Tensor, new_a: torch.Tensor, new_b: torch.Tensor) -> None:
    """Put matrices of a smaller or equal rank into wider ones, zeros into what is left."""
    rank = new_a.shape[0]
    a[:rank].copy_(new_a.reshape(rank, *a.shape[1:]))
    a[rank:].zero_()
    b[:, :rank].copy_(new_b.reshape(b.shape[0], rank, *b.shape[2:]))
    b[:, rank:].zero_()


def _set_scaling(layer: LoraLayer, adapter_name: str, scaling: float) -> None:
    """Set one adapter's scaling, and the alpha that gives it for the rank that it has here."""
    rank = layer.r[adapter_name]
    layer.lora_alpha[adapter_name] = scaling * (math.sqrt(rank) if layer.use_rslora[adapter_name] else rank)
    kept: Any = layer.scaling[adapter_name]
    if isinstance(kept, torch.Tensor):
        kept.fill_(scaling)
    else:
        layer.scaling[adapter_name] = scaling


def _require_unmerged(model: AdaptedModel, adapter_name: str) -> None:
    if any(adapter_name in part.merged_adapters for part in model.parts().values()):
        raise ConfigError(f"adapter '{adapter_name}' is merged into the base weights: call unmerge_adapter() first")


def _check_starts(layers: Mapping[str, LoraLayer], adapter_name: str, stored: StoredAdapter) -> None:
    split = next((name for name, layer in layers.items() if start_of(layer, adapter_name) is not None), None)
    if split is not None or kept_start(stored) is not None:
        where = f"layer '{split}' of adapter '{adapter_name}'" if split is not None else f"'{stored.folder}'"
        raise ConfigError(
            f"{where} was split from its base, which only fits the adapter that it was split for; convert it to plain "
            "LoRA (smartinit convert) and load that instead"
        )


def _check_layers(layers: Mapping[str, LoraLayer], adapter_name: str, stored: StoredAdapter) -> None:
    unknown = next((name for name in stored.factors if name not in layers), None)
    if unknown is not None:
        raise ArtefactError(
            f"the adapter in '{stored.folder}' has layer '{unknown}', where adapter '{adapter_name}' of this model has "
            "none; load it under another name instead"
        )
    for name, layer in layers.items():
        pair = stored.factors.get(name)
        if pair is None:
            if stored.config.use_dora:
                raise ArtefactError(
                    f"the adapter in '{stored.folder}' lacks layer '{name}', and DoRA has no zero to put there; load "
                    "it under another name instead"
                )
            continue
        a, b = (matrix.flatten(1) for matrix in layer.matrices(adapter_name))
        kernel = stored.forms[name].kernel
        same = kernel == tuple(layer.matrices(adapter_name)[0].shape[2:])
        if not same or (pair.a.shape[1], pair.b.shape[0]) != (a.shape[1], b.shape[0]):
            raise ArtefactError(
                f"the adapter in '{stored.folder}' holds matrices of shapes {tuple(pair.a.shape)} and "
                f"{tuple(pair.b.shape)} for layer '{name}', where this model takes {tuple(a.shape)} and "
                f"{tuple(b.shape)}; was it made for another model?"
            )
        exact = isinstance(layer, ParameterLora)
        if pair.a.shape[0] > a.shape[0] or (exact and pair.a.shape[0] != a.shape[0]):
            raise ArtefactError(
                f"the adapter in '{stored.folder}' has rank {pair.a.shape[0]} in layer '{name}', but there is room for "
                f"{a.shape[0]}; call prepare_for_hotswap(target_rank={pair.a.shape[0]}) before the model is compiled"
            )
        if (pair.magnitude is not None) != (adapter_name in layer.lora_magnitude_vector):
            raise ArtefactError(f"'{stored.folder}' and adapter '{adapter_name}' differ in the magnitude of '{name}'")


def _check_others(
    model: AdaptedModel, adapter_name: str, stored: StoredAdapter, layers: Mapping[str, LoraLayer]
) -> None:
    """What is beyond matrices must be the same tensors, but for the biases of layers that the new adapter lacks."""
    held = stored_others(model.model, adapter_name, model.config_of(adapter_name))
    absent = {f"{PREFIX}{name}.{_BIAS}" for name in layers if name not in stored.factors}
    odd = next((key for key in held if key not in stored.others and key not in absent), None)
    if odd is None:
        odd = next((key for key in stored.others if key not in held), None)
    if odd is not None:
        raise ArtefactError(
            f"'{odd}' is only in one of adapter '{adapter_name}' and '{stored.folder}'; load that under another name "
            "instead"
        )
    for key, tensor in held.items():
        if key in stored.others and tensor.shape != stored.others[key].shape:
            raise ArtefactError(
                f"the adapter in '{stored.folder}' holds '{key}' in shape {tuple(stored.others[key].shape)}, where "
                f"this model takes {tuple(tensor.shape)}; was it made for another model?"
            )


def _swap(layer: LoraLayer, adapter_name: str, name: str, stored: StoredAdapter) -> None:
    """Write one layer's matrices and scaling; zeros where the new adapter has none."""
    a, b = layer.matrices(adapter_name)
    pair: Factors | None = stored.factors.get(name)
    bias = layer.lora_B[adapter_name].bias if layer.lora_bias[adapter_name] else None
    if pair is None:
        a.zero_()
        b.zero_()
        if bias is not None:
            bias.zero_()  # type: ignore[operator]
        return
    _write(a, b, pair.a, pair.b)
    if pair.magnitude is not None:
        magnitude: Any = layer.lora_magnitude_vector[adapter_name].weight
        magnitude.copy_(pair.magnitude.reshape(magnitude.shape))
    experts = layer.experts if isinstance(layer, ParameterLora) else 1
    _set_scaling(layer, adapter_name, scaling_for(stored.config, stored_name(name, layer), pair.rank // experts))


def stored_name(name: str, layer: LoraLayer) -> str:
    """The name by which patterns give a layer its alpha: a parameter's own, or the module's."""
    if not isinstance(layer, ParameterLora):
        return name
    return f"{name.replace('.base_layer', '')}.{layer.parameter_name}"


def _describe(model: AdaptedModel, adapter_name: str) -> None:
    """Let the configuration say which ranks and alphas the adapter has."""
    config = model.config_of(adapter_name)
    layers = {stored_name(name, layer): layer for name, layer in stored_layers(model.model, adapter_name).items()}
    patterns = compact_patterns(
        Plan(
            {name: layer.r[adapter_name] for name, layer in layers.items()},
            {name: layer.lora_alpha[adapter_name] for name, layer in layers.items()},
        )
    )
    config.r, config.lora_alpha = patterns.r, patterns.lora_alpha
    config.rank_pattern, config.alpha_pattern = patterns.rank_pattern, patterns.alpha_pattern
