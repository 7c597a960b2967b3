"""A stored adapter put into the parts that were made for it: first everything is compared, then everything copied."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from smartinit.adapters.base_bias import load_biases, trained_biases
from smartinit.adapters.filling import fill_tensors
from smartinit.adapters.magnitude import set_magnitude
from smartinit.adapters.state import as_matrices, layers_among, others_among, stored_parts
from smartinit.errors import ArtefactError
from smartinit.formats.tensors import PREFIX, Form, shaped

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from smartinit.adapters.layer import LoraLayer
    from smartinit.adapters.part import AdapterPart
    from smartinit.config import LoraConfig
    from smartinit.factors import Factors
    from smartinit.formats.peft import StoredAdapter

_MAGNITUDE = "lora_magnitude_vector"
_WRAPPED = ".base_layer"
# Where PEFT keeps a module that it trains whole, and its copy: with bias="all" it saves biases from there as well.
_DEBRIS = (".original_module.", ".modules_to_save.")


@torch.no_grad()
def put_in(root: nn.Module, adapter_name: str, stored: StoredAdapter, config: LoraConfig) -> None:
    """Copy a file's tensors into an adapter that was made from the same file's configuration.

    Values go into the dtype and onto the device that the adapter has here; parameters on the meta device become real
    ones where their base layer is. A file without any magnitude leaves those of DoRA to the layers, as a computed
    start does where it cannot read the base weight; one without any bias leaves the base model's own.

    Args:
        root: the model, with the adapter's parts in it.
        adapter_name: which adapter.
        stored: what the folder holds.
        config: the adapter's configuration.

    Raises:
        ArtefactError: a tensor is missing, or has no place here, or another shape; the first is named, and nothing was
            changed. Base embeddings that PEFT saves along must be this model's.
    """
    parts = stored_parts(root, adapter_name)
    biases = trained_biases(root, config, adapter_name)
    others = _fitting_others(root, adapter_name, stored, parts, biases)
    for name, layer in layers_among(parts).items():
        fill_layer(layer, adapter_name, name, stored.factors[name])
    put_others_in(root, adapter_name, others, parts, biases)


def require_fitting(root: nn.Module, adapter_name: str, stored: StoredAdapter, config: LoraConfig) -> None:
    """What `put_in` checks, without changing anything.

    Raises:
        As `put_in`.
    """
    biases = trained_biases(root, config, adapter_name)
    _fitting_others(root, adapter_name, stored, stored_parts(root, adapter_name), biases)


def require_finite(stored: StoredAdapter) -> None:
    """Refuse NaN and Inf, which would spread from one layer to everything that the model computes.

    Raises:
        ArtefactError: a tensor holds one; its layer is named.

    Cost: one pass over the file.
    """
    tensors = {
        f"{part} of layer '{name}'": tensor
        for name, pair in stored.factors.items()
        for part, tensor in (("lora_A", pair.a), ("lora_B", pair.b), (_MAGNITUDE, pair.magnitude))
        if tensor is not None
    }
    tensors |= {f"'{key}'": tensor for key, tensor in stored.others.items() if tensor.is_floating_point()}
    for what, tensor in tensors.items():
        values = tensor.float() if tensor.element_size() == 1 else tensor  # of bytes torch compares nothing
        # Without a second tensor of that size, as isfinite would make.
        if values.numel() and not all(math.isfinite(end) for end in values.aminmax()):
            raise ArtefactError(f"{what} in '{stored.folder}' holds NaN or Inf; it is not loaded, so save it again")


def put_others_in(
    root: nn.Module,
    adapter_name: str,
    others: Mapping[str, torch.Tensor],
    parts: Sequence[tuple[str, AdapterPart]],
    biases: Iterable[str],
) -> None:
    """Copy what an adapter has besides LoRA's matrices and magnitudes; parts and biases without a tensor stay.

    Args:
        root: the model.
        adapter_name: which adapter.
        others: tensors by their full keys.
        parts: the adapter's `stored_parts`.
        biases: keys of the biases that it trains.
    """
    for name, part in parts:
        keys = {key: f"{PREFIX}{name}.{key}" for key in part.other_tensors(adapter_name)}
        if keys and all(key in others for key in keys.values()):
            part.load_others(adapter_name, {key: others[full] for key, full in keys.items()})
    given = {key: others[PREFIX + key] for key in biases if PREFIX + key in others}
    if given:
        load_biases(root, given)


def fill_layer(layer: LoraLayer, adapter_name: str, name: str, pair: Factors) -> None:
    """Copy A, B and a magnitude into a LoRA layer whose matrices have these shapes; ``name`` is for messages."""
    matrices = dict(zip("AB", layer.matrices(adapter_name), strict=True))
    values = {"A": pair.a.reshape(matrices["A"].shape), "B": pair.b.reshape(matrices["B"].shape)}
    if adapter_name in layer.lora_magnitude_vector:
        magnitude: nn.Parameter = layer.lora_magnitude_vector[adapter_name].weight  # type: ignore[assignment]
        matrices[_MAGNITUDE] = magnitude
        norms = torch.empty(magnitude.shape, dtype=magnitude.dtype) if pair.magnitude is None else pair.magnitude
        values[_MAGNITUDE] = norms.reshape(magnitude.shape)
    base = layer.get_base_layer()
    first = next(itertools.chain(base.parameters(), base.buffers()), None)
    fill_tensors(matrices, values, f"layer '{name}'", None if first is None else first.device)
    if adapter_name in layer.lora_magnitude_vector and pair.magnitude is None:
        set_magnitude(layer, adapter_name)


def _fitting_others(
    root: nn.Module,
    adapter_name: str,
    stored: StoredAdapter,
    parts: Sequence[tuple[str, AdapterPart]],
    trained: Mapping[str, torch.Tensor],
) -> Mapping[str, torch.Tensor]:
    """What is to be loaded besides LoRA's matrices, if names and shapes are those of the adapter.

    Raises:
        ArtefactError: as of `put_in`.
    """
    pairs = {name: as_matrices(layer, adapter_name) for name, layer in layers_among(parts).items()}
    wanted = _tensors(pairs)
    given = _tensors({name: (pair, stored.forms.get(name, Form())) for name, pair in stored.factors.items()})
    if not any(key.endswith(_MAGNITUDE) for key in given):
        wanted = {key: tensor for key, tensor in wanted.items() if not key.endswith(_MAGNITUDE)}
    others = others_among(parts, adapter_name, trained)
    biases = {PREFIX + key for key in trained}
    # PEFT writes base_layer around every layer that has any adapter, and here or there other adapters may be around.
    alone = {key.replace(_WRAPPED, ""): key for key in others if key in biases}
    named = {key if key in others else alone.get(key.replace(_WRAPPED, ""), key): key for key in stored.others}
    loaded = {key: stored.others[name] for key, name in named.items() if key in others}
    if not biases & loaded.keys():
        others = {key: tensor for key, tensor in others.items() if key not in biases}
    wanted |= others
    given |= loaded
    _check_names(stored, wanted, given)
    for key, tensor in wanted.items():
        if tensor.shape != given[key].shape:
            layer, parameter = _layer_and_parameter(key.removeprefix(PREFIX))
            raise ArtefactError(
                f"the adapter in '{stored.folder}' holds a tensor of shape {tuple(given[key].shape)} for layer "
                f"'{layer}' ({parameter}), where this model takes {tuple(tensor.shape)}; was it made for another model?"
            )
    for key, name in named.items():
        if key not in loaded:
            _check_spare(root, stored, name, stored.others[name])
    return loaded


def _layer_and_parameter(key: str) -> tuple[str, str]:
    layer, lora, parameter = key.partition(".lora_")
    if lora:
        return layer, f"lora_{parameter.removesuffix('.weight')}"
    layer, _, parameter = key.rpartition(".")
    return layer, parameter


def _tensors(pairs: Mapping[str, tuple[Factors, Form]]) -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{name}{suffix}": tensor
        for name, (pair, form) in pairs.items()
        for suffix, tensor in shaped(name, pair, form).items()
    }


def _check_names(stored: StoredAdapter, wanted: Mapping[str, object], given: Mapping[str, torch.Tensor]) -> None:
    missing = [key for key in wanted if key not in given]
    unknown = [key for key in given if key not in wanted]
    if not missing and not unknown:
        return
    several = f" and {len(missing or unknown) - 1} more" if len(missing or unknown) > 1 else ""
    said = (
        f"lacks '{missing[0]}'{several}, for which this model has a place"
        if missing
        else f"holds '{unknown[0]}'{several}, for which this model has no place"
    )
    raise ArtefactError(f"the adapter in '{stored.folder}' {said}; was it made for another model?")


def _check_spare(root: nn.Module, stored: StoredAdapter, key: str, tensor: torch.Tensor) -> None:
    """A tensor that nobody trains here: PEFT's debris, or a copy of the base model's own."""
    name = key.removeprefix(PREFIX)
    if any(piece in name for piece in _DEBRIS):
        return
    own = _own_tensor(root, name)
    if own is None:
        raise ArtefactError(
            f"the adapter in '{stored.folder}' holds '{key}' of shape {tuple(tensor.shape)}, for which this model has "
            "no place; was it made for another model, or with options that its configuration does not say?"
        )
    if own.is_meta:
        return
    if own.shape != tensor.shape:
        raise ArtefactError(
            f"the adapter in '{stored.folder}' holds the base model's own '{name}' in shape {tuple(tensor.shape)}, "
            f"where this model has {tuple(own.shape)}: its vocabulary was extended, so do the same "
            f"(resize_token_embeddings({tensor.shape[0]})) and copy that tensor into the model before loading"
        )
    if not torch.equal(own, tensor.to(own)):
        raise ArtefactError(
            f"the adapter in '{stored.folder}' holds the base model's own '{name}' with other values than this model "
            "has: it was trained on another base or after its vocabulary was extended; copy that tensor into the "
            "model before loading, if it is meant"
        )


def _own_tensor(root: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter of the base model, whatever parts are around its module."""
    path, _, parameter = name.replace(".base_layer", "").rpartition(".")
    try:
        module = root.get_submodule(path)
    except AttributeError:
        return None
    inner = getattr(module, "get_base_layer", None)
    base = inner() if callable(inner) else module
    found = getattr(base, parameter, None)
    return found.detach() if isinstance(found, nn.Parameter) else None
