"""One adapter of a model as values, and back: what its layers hold, in the form in which files have it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from smartinit.adapters.magnitude import set_magnitude
from smartinit.adapters.start import Start, start_of, starts_of
from smartinit.errors import ArtefactError
from smartinit.factors import Factors
from smartinit.formats.convert import subtract_start
from smartinit.formats.tensors import Form
from smartinit.planning.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smartinit.adapters.layer import LoraLayer
    from smartinit.formats.peft import StoredAdapter


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


def adapter_state(layers: Mapping[str, LoraLayer], adapter_name: str, *, plain: bool = True) -> AdapterState:
    """What layers hold of one adapter.

    Args:
        layers: those that have it, by module name.
        adapter_name: which one.
        plain: a layer that subtracts its start (``base="offset"``) gives plain LoRA of the sum of both ranks, so that
            the adapter computes the same on the same base wherever it is loaded; else only what is trained.
    """
    ranks, alphas, factors, forms = {}, {}, {}, {}
    for name, layer in layers.items():
        pair, forms[name] = _as_matrices(layer, adapter_name)
        ranks[name], alphas[name] = pair.rank, layer.lora_alpha[adapter_name]
        start = start_of(layer, adapter_name)
        if plain and start is not None and start.base == "offset":
            pair = subtract_start(pair, Factors(start.a, start.b), start.scaling / layer.scaling[adapter_name])
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
    forms = {name: _as_matrices(layers[name], adapter_name)[1] for name in starts}
    factors = {name: Factors(start.a.flatten(1), start.b.flatten(1)) for name, start in starts.items()}
    return AdapterState(Plan(ranks, alphas, use_rslora=rslora), factors, forms)


@torch.no_grad()
def fill(layers: Mapping[str, LoraLayer], adapter_name: str, stored: StoredAdapter) -> None:
    """Copy a file's tensors into an adapter that was made from the same file's configuration.

    Raises:
        ArtefactError: names or shapes do not fit.
    """
    if layers.keys() != stored.factors.keys():
        odd = sorted(layers.keys() ^ stored.factors.keys())
        raise ArtefactError(
            f"the adapter in '{stored.folder}' does not fit this model: {len(odd)} layers have an adapter in only "
            f"one of them, for instance '{odd[0]}'; was it made for another model?"
        )
    for name, layer in layers.items():
        pair = stored.factors[name]
        held, form = _as_matrices(layer, adapter_name)
        for fits, tensor in ((held.a, pair.a), (held.b, pair.b)):
            if fits.shape != tensor.shape or form != stored.forms.get(name, Form()):
                raise ArtefactError(
                    f"the adapter in '{stored.folder}' holds a matrix of shape {tuple(tensor.shape)} for layer "
                    f"'{name}', where this model takes {tuple(fits.shape)}{_kernels(form)}; was it made for another "
                    "model?"
                )
        if held.magnitude is None and pair.magnitude is not None:
            raise ArtefactError(
                f"the adapter in '{stored.folder}' holds a magnitude for layer '{name}', but its configuration does not "
                "say use_dora"
            )
        for weight, tensor in zip(layer.matrices(adapter_name), (pair.a, pair.b), strict=True):
            weight.copy_(tensor.reshape(weight.shape))
        set_magnitude(layer, adapter_name, pair.magnitude)


def remember_starts(
    layers: Mapping[str, LoraLayer], adapter_name: str, starts: StoredAdapter, scalings: Mapping[str, float]
) -> None:
    """Tell layers whose base is a residual already what it gave up, so that it is kept when they are saved again.

    Raises:
        ArtefactError: names or shapes do not fit.
    """
    for name, pair in starts.factors.items():
        held = layers.get(name)
        shape = None if held is None else _as_matrices(held, adapter_name)[0]
        if held is None or shape is None or (pair.a.shape[1], pair.b.shape[0]) != (shape.a.shape[1], shape.b.shape[0]):
            raise ArtefactError(f"the start in '{starts.folder}' has no fitting layer '{name}' in the adapter above it")
        device = held.weight.device
        starts_of(held)[adapter_name] = Start(pair.a.to(device), pair.b.to(device), scalings[name], "residual")


def _as_matrices(layer: LoraLayer, adapter_name: str) -> tuple[Factors, Form]:
    a, b = (matrix.detach() for matrix in layer.matrices(adapter_name))
    form = Form(adapter_name in getattr(layer, "lora_embedding_A", ()), tuple(a.shape[2:]))
    magnitudes = layer.lora_magnitude_vector
    magnitude = magnitudes[adapter_name].weight.detach().flatten() if adapter_name in magnitudes else None  # type: ignore[operator, union-attr]
    return Factors(a.flatten(1), b.flatten(1), magnitude=magnitude), form


def _kernels(form: Form) -> str:
    return f" with a kernel of {form.kernel}" if form.kernel else ""
