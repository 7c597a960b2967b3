"""Everything that looking at a model changes, and puts back."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smartinit.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode for the block; every flag as it was afterwards, whatever happened."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def preserved_rng(model: nn.Module) -> Iterator[None]:
    """The random streams of torch (CPU and the model's GPUs), NumPy and Python as they were, after the block."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - a user's stream
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def trainable_flags(model: nn.Module) -> Iterator[None]:
    """Every parameter's ``requires_grad`` as it was, after the block: PEFT sets it when adapters are switched."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def refuse_merged(model: nn.Module) -> None:
    """Switching adapters off would unmerge them, which changes the base weights by round-off.

    Raises:
        ModelError: an adapter is merged.
    """
    for name, module in model.named_modules():
        merged: Any = getattr(module, "merged", False) if hasattr(module, "base_layer") else False
        if merged is True:
            raise ModelError(
                f"the adapter in '{name}' is merged into its base layer; unmerge it first (model.unmerge_adapter()), "
                "so that the activations are the base model's"
            )


def model_device(model: nn.Module) -> torch.device | None:
    """Where batches go: the device of the first parameter that has data; None when there is none."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), None)
