"""Adapters on a quantised model, started as what the quantiser took from the original weights (LoftQ)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from smartinit.adapters.dequantise import dequantised_weight, is_quantised
from smartinit.adapters.host import adapter_parameters, find_host
from smartinit.adapters.rollback import undone_on_error
from smartinit.errors import ModelError
from smartinit.methods.residual import residual_factors
from smartinit.streaming import find_weight_folder, open_weights
from smartinit.targets.names import normalise_name

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from torch import nn

    from smartinit.streaming import WeightFiles


@torch.no_grad()
def replace_lora_weights_loftq(
    model: nn.Module,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Start an adapter on a quantised model as the best correction of the quantiser's errors.

    Layer by layer, in model order, ``s·B A`` becomes the best rank-r part of ``W - Q``: ``W`` is read from the files
    of the original model, one tensor at a time, ``Q`` is what the quantised layer computes with (bitsandbytes 4 and 8
    bits, torchao, HQQ, GPTQ, AWQ, and `smartinit.adapters.fake_quant.FakeQuantLinear`). As ``peft``'s function of this
    name, with the layer's scaling taken into account.

    Args:
        model: with adapters on quantised layers: a ``peft.PeftModel`` or a `smartinit.LoraModel`; changed in place.
            Adapter layers around other layers are left alone.
        model_path: folder (or safetensors file) of the original; None: what the model was loaded from, if that is a
            folder or in the local cache of the Hugging Face hub. Nothing is downloaded.
        adapter_name: the adapter that is started.
        callback: called as ``callback(model, module_name)`` after each layer; with False the layer gets back what it
            had. A callback that compares the model's output with the original's makes this a greedy descent.

    Returns:
        ``model``.

    Raises:
        ModelError: no adapter, no adapter layer around a quantised one, or original weights that do not fit; the
            adapter is then as it was, as after any exception in ``callback``.
        UnknownNameError: no such adapter, or a layer that the files do not have.
        MissingFileError: no such folder, or no safetensors in it.

    Source: arXiv 2310.08659, alg. 1 with ``T = 1``. Cost: O(Σ out · in · r), one original and one quantised weight in
    memory at a time.
    """
    host = find_host(model)
    host.config(adapter_name)
    layers = {name: layer for name, layer in host.layers(adapter_name).items() if is_quantised(_innermost(layer))}
    if not layers:
        raise ModelError(
            f"no layer of adapter '{adapter_name}' is around a quantised one, so there is nothing to correct; load the "
            "base model quantised, or compute an adapter with init_lora_weights='loftq'"
        )
    folder = _folder_of(host.root) if model_path is None else Path(model_path)
    prefixes = [str(getattr(host.root, "base_model_prefix", "") or "")]
    with open_weights(folder, prefixes=prefixes) as weights, undone_on_error(host, layers, adapter_name):
        for name, layer in tqdm(layers.items(), desc="loftq", unit="layer"):
            before = [(p, p.detach().clone()) for p in adapter_parameters(layer, adapter_name)] if callback else []
            _start(name, layer, adapter_name, weights)
            if callback is not None and not callback(model, name):
                for parameter, value in before:
                    parameter.copy_(value)
    return model


def _start(name: str, layer: Any, adapter_name: str, weights: WeightFiles) -> None:  # noqa: ANN401 - ours or PEFT's
    """Write one layer's factors."""
    base = _innermost(layer)
    dequantised = dequantised_weight(base)
    original = _original(name, base, tuple(dequantised.shape), weights).to(dequantised.device)
    a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if a.is_meta or b.is_meta:
        raise ModelError(f"adapter '{adapter_name}' of '{name}' has no memory yet (low_cpu_mem_usage); load it first")
    scaling = float(layer.scaling[adapter_name])
    factors = residual_factors(original, dequantised, int(a.shape[0]), scaling)
    a.copy_(factors.a)
    b.copy_(factors.b)
    magnitudes = getattr(layer, "lora_magnitude_vector", None)
    if magnitudes is not None and adapter_name in magnitudes:
        # DoRA starts neutral: m = ‖Q + s·B A‖ by rows, of the adapter as it is now.
        magnitude = magnitudes[adapter_name]
        norms = torch.linalg.vector_norm(
            dequantised.float() + scaling * (b.float() @ a.float()).to(dequantised.device), dim=1
        )
        getattr(magnitude, "weight", magnitude).copy_(norms)


def _original(name: str, base: nn.Module, shape: tuple[int, ...], weights: WeightFiles) -> torch.Tensor:
    """``W`` as ``(out, in)``.

    Raises:
        ModelError: another shape, or a file of weights that are quantised themselves.
        UnknownNameError: not in the files.
    """
    stored = weights.read(f"{normalise_name(name)}.weight")
    # What is left of a Conv1D in a quantised model is a linear layer that notes its class: a square weight cannot tell.
    if getattr(getattr(base, "source_cls", None), "__name__", "") == "Conv1D":
        stored = stored.T
    if not stored.is_floating_point() or stored.element_size() == 1:
        raise ModelError(
            f"the file's weight of '{name}' is stored as {stored.dtype}, so it is quantised itself; pass the folder of "
            "the original model as model_path"
        )
    if tuple(stored.shape) != shape:
        raise ModelError(
            f"the file's weight of '{name}' is {tuple(stored.shape)}, the quantised layer's {shape}: model_path names "
            "another model"
        )
    return stored


def _innermost(layer: nn.Module) -> nn.Module:
    while isinstance(inner := layer._modules.get("base_layer"), torch.nn.Module):  # noqa: SLF001 - see is_lora_layer
        layer = inner
    return layer


def _folder_of(root: nn.Module) -> Path:
    """The folder that a transformers model was loaded from."""
    config: Any = getattr(root, "config", None)
    found = getattr(root, "name_or_path", None) or getattr(config, "_name_or_path", None)
    if not isinstance(found, str) or not found:
        raise ModelError(
            f"a {type(root).__name__} does not say where it was loaded from: pass the folder with the original's "
            "safetensors files as model_path"
        )
    return find_weight_folder(found, getattr(config, "_commit_hash", None))
