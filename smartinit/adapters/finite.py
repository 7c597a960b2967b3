"""Whether all that merging adapters puts into a model is finite: ``safe_merge``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smartinit.adapters.base_bias import biases_of
from smartinit.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from torch import nn

    from smartinit.adapters.part import AdapterPart


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether there is neither NaN nor Inf in it; true without values, or of integers."""
    return tensor.is_meta or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def require_finite(what: str, adapter_names: Iterable[str], tensor: torch.Tensor) -> None:
    """Refuse a tensor that merging would leave in a model.

    Args:
        what: which one, for the message.
        adapter_names: whose.
        tensor: its values.

    Raises:
        ModelError: NaN or Inf in it.
    """
    if not is_finite(tensor):
        raise ModelError(
            f"{what} would hold NaN or Inf with adapter {', '.join(dict.fromkeys(adapter_names))} merged into it, so "
            "nothing is merged; load an adapter (and a base model) whose values are finite"
        )


def require_finite_replacements(
    root: nn.Module, parts: Mapping[str, AdapterPart], adapter_names: Collection[str]
) -> None:
    """Refuse values of adapters that merging takes as they are: trained copies of modules, and trained biases.

    Args:
        root: the model.
        parts: its parts by module name.
        adapter_names: which adapters.

    Raises:
        ModelError: NaN or Inf in one.
    """
    for path, part in parts.items():
        for adapter_name in adapter_names:
            for name, tensor in part.replacements(adapter_name).items():
                require_finite(f"'{path}.{name}'", [adapter_name], tensor)
    for adapter_name, biases in biases_of(root).items():
        for name, bias in biases.parameters().items() if adapter_name in adapter_names else ():
            require_finite(f"'{name}'", [adapter_name], bias)


def require_finite_merged(parts: Mapping[str, AdapterPart]) -> None:
    """Refuse what adapters were merged into already.

    Args:
        parts: the model's parts by module name.

    Raises:
        ModelError: NaN or Inf in such a parameter.
    """
    for path, part in parts.items():
        for weight in part.merged_weights:
            module, name = weight.places[0]
            require_finite(f"the {name} of layer '{path}'", part.merged_adapters, getattr(module, name))
