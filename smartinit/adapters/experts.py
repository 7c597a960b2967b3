"""LoRA on bare parameters, such as the fused weights of experts: ``target_parameters``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartinit.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from smartinit.config import LoraConfig


def add_parameter_layers(
    root: nn.Module, adapter_name: str, config: LoraConfig, *, device: torch.device | str | None = None
) -> None:
    """Put the parts of one adapter into a model; nothing where the configuration asks for none.

    Args:
        root: the model, possibly with parts of other adapters in it.
        adapter_name: which adapter.
        config: its configuration.
        device: where its weights lie; None: where the base's do.

    Raises:
        TargetError: a name that matches nothing.
        ConfigError: a combination that cannot be.
    """
    del root, adapter_name, device
    if config.target_parameters:
        raise ConfigError(f"target_parameters={config.target_parameters!r} is not supported yet")
