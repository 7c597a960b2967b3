"""A model's modules under the names they have without wrappers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from smartinit.targets.names import WRAPPERS

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Node:
    """A module of the base model.

    Attributes:
        module: itself.
        names: its names in the base model: more than one if it is used in several places.
        path: where it is in the model that was given.
        parent: the module that holds it under its first name.
    """

    module: nn.Module
    names: tuple[str, ...]
    path: str
    parent: nn.Module

    @property
    def name(self) -> str:
        """The first name in model order."""
        return self.names[0]


def adapter_layer(module: nn.Module) -> bool:
    """Whether a module is an adapter around a base layer, PEFT's or ours."""
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def base_model(model: nn.Module) -> tuple[nn.Module, str]:
    """The model inside its wrappers (PEFT's or our adapter model, data parallel, compiled), and its path."""
    path = ""
    while (child := _inner(model)) is not None:
        path += f"{child}."
        model = model.get_submodule(child)
    return model, path


def _inner(model: nn.Module) -> str | None:
    """Under which name a wrapper holds its model; None if it is no wrapper."""
    children = dict(model.named_children())
    for wrapper in WRAPPERS:
        if wrapper in children:
            return wrapper
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    # By what they can do: PEFT is optional, and adapters/ is none of this package's business. `peft_config` alone says
    # nothing, as PEFT also sets it on the base model.
    kind = type(model)
    if "base_model" in children and hasattr(kind, "get_base_model"):
        return "base_model"
    if "model" in children and hasattr(kind, "disable_adapter_layers"):
        return "model"
    return None


def nodes(model: nn.Module) -> list[Node]:
    """Every module below the base model once, in model order; adapter layers are not entered.

    Unlike ``named_modules`` it knows all the names of a module that is used in several places.
    """
    root, start = base_model(model)
    found: dict[int, Node] = {}
    for module, name, path, parent in _walk(root, "", start, ()):
        seen = found.get(id(module))
        names = (*seen.names, name) if seen else (name,)
        found[id(module)] = Node(module, names, seen.path if seen else path, seen.parent if seen else parent)
    return list(found.values())


def _walk(
    module: nn.Module, name: str, path: str, above: tuple[nn.Module, ...]
) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    for child_name, child in module._modules.items():  # noqa: SLF001 - named_children leaves out repeated modules
        if child is None or child is module or child in above:  # a module can hold one that holds it
            continue
        child_path = f"{path}{child_name}"
        wraps = any(wrapper in child._modules for wrapper in WRAPPERS)  # noqa: SLF001
        own = name if child_name in WRAPPERS else f"{name}.{child_name}" if name else child_name
        if not wraps:
            yield child, own, child_path, module
        if not adapter_layer(child):
            yield from _walk(child, own, f"{child_path}.", (*above, module))
