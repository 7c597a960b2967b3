"""One adapter of a model as values: what its parts hold, by the names and in the form in which files have it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smartinit.adapters.base_bias import trained_biases
from smartinit.adapters.experts import ParameterLora
from smartinit.adapters.injection import parts_of_model
from smartinit.adapters.layer import LoraLayer
from smartinit.adapters.start import Start, start_of, starts_of
from smartinit.errors import ArtefactError, ModelError
from smartinit.factors import Factors
from smartinit.formats.convert import subtract_start
from smartinit.formats.tensors import PREFIX, Form
from smartinit.planning.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from torch import nn

    from smartinit.adapters.part import AdapterPart
    from smartinit.config import LoraConfig
    from smartinit.formats.peft import StoredAdapter

_WRAPPED = ".base_layer"


@dataclass(frozen=True, eq=False)
class AdapterState:
    """One adapter.

    Attributes:
        plan: rank and alpha by module name.
        factors: module name -> matrices ``(r, in)``, ``(out, r)``; a convolution's are flattened. With DoRA, the
            magnitude ``(out,)`` is there too.
        forms: module name -> how files show them.
    """

    plan: Plan
    factors: Mapping[str, Factors]
    forms: Mapping[str, Form]


def stored_parts(root: nn.Module, adapter_name: str) -> list[tuple[str, AdapterPart]]:
    """Every part that has something of one adapter, in model order, after the name that it has in files.

    That is its place without what other parts around it add; but of several parts on the parameters of one module
    the inner ones are told apart by their nesting.
    """
    return [
        (path if isinstance(part, ParameterLora) else path.replace(_WRAPPED, ""), part)
        for path, part in parts_of_model(root).items()
        if part.has(adapter_name)
    ]


def stored_layers(root: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Name in files -> LoRA layer, of those that have one adapter."""
    return layers_among(stored_parts(root, adapter_name))


def layers_among(parts: Iterable[tuple[str, AdapterPart]]) -> dict[str, LoraLayer]:
    """The LoRA layers among `stored_parts`."""
    return {name: part for name, part in parts if isinstance(part, LoraLayer)}


def stored_others(root: nn.Module, adapter_name: str, config: LoraConfig) -> dict[str, torch.Tensor]:
    """What one adapter has besides LoRA's matrices and magnitudes, by its key in files: the very tensors.

    Args:
        root: the model.
        adapter_name: which adapter.
        config: its configuration.
    """
    return others_among(stored_parts(root, adapter_name), adapter_name, trained_biases(root, config, adapter_name))


def others_among(
    parts: Iterable[tuple[str, AdapterPart]], adapter_name: str, biases: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What `stored_parts` have of one adapter besides matrices and magnitudes, and its biases, by their full keys."""
    found = {
        f"{PREFIX}{name}.{key}": tensor
        for name, part in parts
        for key, tensor in part.other_tensors(adapter_name).items()
    }
    return found | {PREFIX + key: bias for key, bias in biases.items()}


def adapter_state(layers: Mapping[str, LoraLayer], adapter_name: str, *, plain: bool = True) -> AdapterState:
    """What layers hold of one adapter.

    Args:
        layers: those that have it, by module name.
        adapter_name: which one.
        plain: a layer that subtracts its start (``base="offset"``) gives plain LoRA of the sum of both ranks, so that
            the adapter computes the same on the same base wherever it is loaded; else only what is trained.

    Raises:
        ModelError: the adapter has no values yet.
    """
    ranks, alphas, factors, forms = {}, {}, {}, {}
    for name, layer in layers.items():
        pair, forms[name] = as_matrices(layer, adapter_name)
        if pair.a.is_meta:
            raise ModelError(
                f"adapter '{adapter_name}' has no values in layer '{name}': it lies on the meta device, so load or "
                "compute its weights first"
            )
        # Not that of the matrices: experts' have the ranks of all experts.
        ranks[name], alphas[name] = layer.r[adapter_name], layer.lora_alpha[adapter_name]
        start = start_of(layer, adapter_name)
        if plain and start is not None and start.base == "offset":
            pair = subtract_start(pair, Factors(start.a, start.b), start.scaling / float(layer.scaling[adapter_name]))
            growth = pair.rank / ranks[name]
            ranks[name] = pair.rank
            alphas[name] *= math.sqrt(growth) if layer.use_rslora[adapter_name] else growth
        factors[name] = pair
    rslora = any(layer.use_rslora[adapter_name] for layer in layers.values())
    return AdapterState(Plan(ranks, alphas, use_rslora=rslora), factors, forms)


def residual_starts(layers: Mapping[str, LoraLayer], adapter_name: str) -> AdapterState | None:
    """What base layers have given up for one adapter; None if none has."""
    found = {name: start_of(layer, adapter_name) for name, layer in layers.items()}
    starts = {name: start for name, start in found.items() if start is not None and start.base == "residual"}
    if not starts:
        return None
    ranks = {name: int(start.a.shape[0]) for name, start in starts.items()}
    rslora = any(layers[name].use_rslora[adapter_name] for name in starts)
    alphas = {
        name: start.scaling * (math.sqrt(ranks[name]) if rslora else ranks[name]) for name, start in starts.items()
    }
    forms = {name: as_matrices(layers[name], adapter_name)[1] for name in starts}
    factors = {name: Factors(start.a.flatten(1), start.b.flatten(1)) for name, start in starts.items()}
    return AdapterState(Plan(ranks, alphas, use_rslora=rslora), factors, forms)


def remember_starts(
    layers: Mapping[str, LoraLayer], adapter_name: str, starts: StoredAdapter, scalings: Mapping[str, float]
) -> None:
    """Tell layers whose base is a residual already what it gave up, so that it is kept when they are saved again.

    Raises:
        ArtefactError: names or shapes do not fit.
    """
    for name, pair in starts.factors.items():
        held = layers.get(name)
        shape = None if held is None else as_matrices(held, adapter_name)[0]
        if held is None or shape is None or (pair.a.shape[1], pair.b.shape[0]) != (shape.a.shape[1], shape.b.shape[0]):
            raise ArtefactError(f"the start in '{starts.folder}' has no fitting layer '{name}' in the adapter above it")
        device = held.weight.device
        a, b = (matrix.to(device, copy=True) for matrix in (pair.a, pair.b))
        starts_of(held)[adapter_name] = Start(a, b, scalings[name], "residual")


def as_matrices(layer: LoraLayer, adapter_name: str) -> tuple[Factors, Form]:
    """What a layer holds of one adapter, as matrices that are views of its parameters, and how files show them."""
    a, b = (matrix.detach() for matrix in layer.matrices(adapter_name))
    form = Form(adapter_name in getattr(layer, "lora_embedding_A", ()), tuple(a.shape[2:]))
    magnitudes = layer.lora_magnitude_vector
    magnitude = magnitudes[adapter_name].weight.detach().flatten() if adapter_name in magnitudes else None  # type: ignore[operator]
    return Factors(a.flatten(1), b.flatten(1), magnitude=magnitude), form
