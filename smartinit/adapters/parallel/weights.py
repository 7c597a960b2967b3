"""The weights of a base layer on this rank as matrices: one, or one for each of its experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from smartinit.adapters.dequantise import dequantised_weight, is_quantised
from smartinit.adapters.parallel.dtensors import to_local
from smartinit.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from smartinit.adapters.parallel.base import ParallelBase


@dataclass(frozen=True)
class LocalWeight:
    """One weight as this rank has it.

    Attributes:
        matrix: ``(out, in)`` or this rank's shard of it; gradients go through it to the parameter.
        stored: the tensor whose change means that `matrix` has changed; None: nobody can tell.
    """

    matrix: torch.Tensor
    stored: torch.Tensor | None


def weight_names(base: ParallelBase) -> list[str]:
    """The names of its weights in a layer."""
    return [f"weight{i}" for i in range(base.experts)] if base.experts else ["weight"]


def bias_names(module: nn.Module, base: ParallelBase) -> list[str]:
    """The names of its biases, one for all or one for each expert; none if it adds none to what it returns."""
    if any(getattr(module, word, False) for word in ("skip_bias_add", "te_return_bias", "return_bias")):
        return []
    names = [f"bias{i}" for i in range(base.experts)] if hasattr(module, "bias0") else ["bias"]
    biases = [getattr(module, name, None) for name in names]
    # Transformer Engine has an empty tensor where there is no bias.
    return names if all(isinstance(bias, torch.Tensor) and bias.numel() for bias in biases) else []


def local_weights(module: nn.Module, base: ParallelBase, name: str) -> list[LocalWeight]:
    """Its weights, read only: those of a quantised layer are dequantised.

    Raises:
        ModelError: weights that are no matrices of floating-point numbers, of a layer of no known quantised kind.
    """
    found = []
    for attribute in weight_names(base):
        parameter = getattr(module, attribute)
        local = to_local(parameter)
        if not is_ordinary(local):
            if base.experts or not is_quantised(module):
                raise ModelError(
                    f"the weight of '{name}' ({type(module).__name__}) cannot be read as a matrix: it is stored as "
                    f"{type(local).__name__} of shape {tuple(local.shape)}, {local.dtype}; expected floating-point "
                    "numbers, or a layer of a kind that smartinit.adapters.dequantise knows; use LoRA for it, or load "
                    "the model unquantised"
                )
            return [LocalWeight(dequantised_weight(module), None)]
        stored = getattr(parameter, "_local_tensor", parameter)  # what a DTensor holds, the same object every time
        found.append(LocalWeight(local, None if parameter.requires_grad else stored))
    return found


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a matrix of floating-point numbers, which means what it holds.

    Not so float8, which comes with a scale of its own, tensor subclasses that keep their numbers in their own way, and
    bitsandbytes' parameters, which may be four-bit codes in a floating-point tensor.
    """
    ordinary = tensor.is_floating_point() and tensor.element_size() > 1 and tensor.dim() == 2  # noqa: PLR2004 - a matrix
    return ordinary and type(tensor.data) is torch.Tensor and getattr(tensor, "quant_state", None) is None
