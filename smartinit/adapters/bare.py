"""A model's modules as they were before adapters came around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartinit.adapters.part import AdapterPart

if TYPE_CHECKING:
    from torch import nn


def is_lora_layer(module: nn.Module) -> bool:
    """Whether a module is a LoRA layer, of this package or of PEFT."""
    parts = module._modules  # noqa: SLF001  (hasattr would ask modules that answer for the one they wrap)
    return "base_layer" in parts and "lora_A" in parts


def bare_module_names(root: nn.Module) -> list[str]:
    """Names of a model's modules as they were before wrapping: nothing from inside its adapter parts."""
    names = []
    inside: str | None = None
    for name, module in root.named_modules():  # depth first: what is inside a layer follows it at once
        if name and not (inside is not None and name.startswith(inside)):
            names.append(name)
            inside = f"{name}." if isinstance(module, AdapterPart) or is_lora_layer(module) else None
    return names
