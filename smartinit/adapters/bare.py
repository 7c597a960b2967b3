"""A model's modules as they were before adapters came around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartinit.adapters.part import AdapterPart

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def bare_modules(root: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A model's modules by their names before wrapping, each with its outermost adapter part if it has one.

    A module that stands in several places comes once for each, unlike in `bare_module_names`. What parts hold of
    adapters is left out, and what they wrap has the part's name.

    Args:
        root: the model.
        name: its own name, which comes before the others.
    """
    yield name, root
    inner = root
    while isinstance(inner, AdapterPart):
        inner = inner.base_layer
    for child_name, child in inner._modules.items():  # noqa: SLF001 - named_children leaves out the repeated
        if child is not None:
            yield from bare_modules(child, f"{name}.{child_name}" if name else child_name)
