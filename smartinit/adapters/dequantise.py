"""The weight of a quantised layer as a matrix, whoever quantised it.

A table of kinds of layers, in order; the libraries are never imported for a layer that is not theirs. Another kind
is added with `register_dequantiser`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from smartinit.adapters.fake_quant import FakeQuantLinear
from smartinit.errors import MissingDependencyError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

_PROBE_ROWS = 1024


@dataclass(frozen=True)
class Dequantiser:
    """How one kind of quantised layer gives its weight.

    Attributes:
        name: of the kind, for messages.
        fits: whether a layer is of this kind.
        weight: the layer's weight as ``(out_features, in_features)``.
    """

    name: str
    fits: Callable[[Any], bool]
    weight: Callable[[Any], Tensor]


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer is of a kind whose weight `dequantised_weight` can give."""
    return _find(module) is not None


@torch.no_grad()
def dequantised_weight(module: nn.Module) -> Tensor:
    """``Q``: the weight that a quantised layer computes with, ``(out_features, in_features)``, on its device.

    Args:
        module: the layer itself, not the adapter around it.

    Raises:
        ModelError: it is of no known kind, or not loaded yet.
        MissingDependencyError: the library that it is from cannot be imported.
    """
    found = _find(module)
    kinds = ", ".join(kind.name for kind in _KINDS)
    if found is None:
        raise ModelError(
            f"a {type(module).__name__} is no quantised layer of a known kind ({kinds}); give its kind to "
            "smartinit.adapters.dequantise.register_dequantiser"
        )
    try:
        weight = found.weight(module).detach()
    except ImportError as error:
        raise MissingDependencyError(
            f"the weight of a {type(module).__name__} ({found.name}) cannot be read here: {error}"
        ) from error
    declared = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if all(isinstance(size, int) for size in declared) and tuple(weight.shape) != declared:
        raise ModelError(
            f"the weight of a {type(module).__name__} ({found.name}) came out as {tuple(weight.shape)} instead of "
            f"{declared}: its library has changed; give its kind to register_dequantiser"
        )
    return weight


def register_dequantiser(name: str, fits: Callable[[Any], bool], weight: Callable[[Any], Tensor]) -> None:
    """Add a kind of quantised layer, which is asked before those that are there. See `Dequantiser`."""
    _KINDS.insert(0, Dequantiser(name, fits, weight))


def weight_by_probing(module: Any) -> Tensor:  # noqa: ANN401 - any layer
    """The weight of any linear layer, by running it on the unit vectors: column j is ``f(e_j) - f(0)``.

    Each output is one weight plus zeros, so nothing is lost but what the layer's own kernel rounds. For packed
    formats whose layout is their library's affair. Cost: O(out · in²), in pieces of 1024 vectors.
    """
    like = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
    device = like.device if like is not None else next(iter((*module.parameters(), *module.buffers()))).device
    dtype = torch.float16 if like is None else like.dtype
    size = int(module.in_features)
    bias = module(torch.zeros(1, size, dtype=dtype, device=device))
    columns = []
    for start in range(0, size, _PROBE_ROWS):
        units = torch.zeros(min(_PROBE_ROWS, size - start), size, dtype=dtype, device=device)
        units[torch.arange(len(units)), start + torch.arange(len(units))] = 1
        columns.append(module(units) - bias)
    return torch.cat(columns).T


def _kind_of_weight(module: Any) -> str:  # noqa: ANN401 - any layer
    return type(getattr(module, "weight", None)).__name__


def _is_torchao(module: Any) -> bool:  # noqa: ANN401 - any layer
    weight = getattr(module, "weight", None)
    # A parameter of such a tensor keeps its class; its data does too where Parameter hides it.
    kinds = (type(weight), type(getattr(weight, "data", None)))
    return any(kind.__module__.startswith("torchao.") for kind in kinds)


def _bitsandbytes_4bit(module: Any) -> Tensor:  # noqa: ANN401 - bitsandbytes' layer
    state = getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        raise ModelError("a Linear4bit of bitsandbytes is not quantised yet: move the model to its device first")
    functional = import_module("bitsandbytes.functional")
    return functional.dequantize_4bit(module.weight.data, state)  # type: ignore[no-any-return]


def _bitsandbytes_8bit(module: Any) -> Tensor:  # noqa: ANN401 - bitsandbytes' layer
    # The scales move from the weight to the layer's state at the first forward pass.
    scales = getattr(module.weight, "SCB", None)
    scales = module.state.SCB if scales is None else scales
    if scales is None or module.weight.dtype != torch.int8:
        raise ModelError("a Linear8bitLt of bitsandbytes is not quantised yet: move the model to its device first")
    return module.weight.data.float() * (scales.to(module.weight.device) / 127.0).unsqueeze(1)  # type: ignore[no-any-return]


def _torchao(module: Any) -> Tensor:  # noqa: ANN401 - any layer with a tensor of torchao
    weight = module.weight
    return (weight if hasattr(weight, "dequantize") else weight.data).dequantize()  # type: ignore[no-any-return]


_KINDS = [
    Dequantiser("smartinit", lambda m: isinstance(m, FakeQuantLinear), lambda m: m.dequantise()),
    Dequantiser("bitsandbytes 4-bit", lambda m: _kind_of_weight(m) == "Params4bit", _bitsandbytes_4bit),
    Dequantiser("bitsandbytes 8-bit", lambda m: _kind_of_weight(m) == "Int8Params", _bitsandbytes_8bit),
    Dequantiser("torchao", _is_torchao, _torchao),
    Dequantiser("HQQ", lambda m: hasattr(m, "W_q") and hasattr(m, "dequantize"), lambda m: m.dequantize()),
    Dequantiser("GPTQ, AWQ", lambda m: hasattr(m, "qweight") and hasattr(m, "in_features"), weight_by_probing),
    Dequantiser("AQLM", lambda m: hasattr(m, "codebooks") and hasattr(m, "in_features"), weight_by_probing),
]


def _find(module: nn.Module) -> Dequantiser | None:
    return next((kind for kind in _KINDS if kind.fits(module)), None)
