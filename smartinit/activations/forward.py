"""The default forward pass: the user's own model inside its wrappers, and what of it need not run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from smartinit.activations.selection import HookTarget


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model inside wrappers (PEFT, DistributedDataParallel, torch.compile)."""
    for _ in range(8):  # a bound, not a depth anyone has seen
        inner = getattr(model, "_orig_mod", None)
        if inner is None and hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None)):
            inner = model.get_base_model()  # type: ignore[operator]  # checked above
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner
    return model


def trunk_below_head(model: nn.Module, targets: Sequence[HookTarget]) -> nn.Module | None:
    """The part of a transformers model below its head, if it holds every target: the head need never run."""
    inner = unwrap(model)
    trunk = getattr(inner, "base_model", None) if hasattr(inner, "base_model_prefix") else None
    if not isinstance(trunk, nn.Module) or trunk is inner:
        return None
    inside = {id(module) for module in trunk.modules()}
    return trunk if all(id(target.module) in inside for target in targets) else None


def without_cache(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401 - whatever the data loader yields
    """The batch, with the key-value cache switched off where the model would fill one for nothing."""
    if not isinstance(batch, Mapping) or "use_cache" in batch:
        return batch
    if "use_cache" not in inspect.signature(unwrap(model).forward).parameters:
        return batch
    return {**batch, "use_cache": False}


def move_to_device(inputs: Any, device: torch.device) -> Any:  # noqa: ANN401 - any nesting of tensors
    """``inputs`` with every tensor on ``device``; containers keep their type, other values pass through."""
    if hasattr(inputs, "to") and callable(inputs.to):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: move_to_device(value, device) for key, value in inputs.items()}
    if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):
        return type(inputs)(*(move_to_device(value, device) for value in inputs))
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(move_to_device(value, device) for value in inputs)
    return inputs
