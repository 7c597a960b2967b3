"""The base model's own biases, trained with an adapter: ``bias="all"`` and ``bias="lora_only"``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from smartinit.config import LoraConfig


def trained_biases(root: nn.Module, config: LoraConfig, adapter_name: str) -> dict[str, nn.Parameter]:
    """The biases that one adapter trains, by their keys in PEFT's file without the leading ``base_model.model.``."""
    del root, adapter_name
    if config.bias != "none":
        raise ConfigError(f"bias={config.bias!r} is not supported yet")
    return {}


def check_biases(root: nn.Module, config: LoraConfig, configs: Mapping[str, LoraConfig]) -> None:
    """Biases belong to the base model, so only one adapter can train them.

    Raises:
        ConfigError: a second one.
    """
    del configs
    trained_biases(root, config, "")


def load_biases(root: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy biases of a file into the base model."""
    raise NotImplementedError
