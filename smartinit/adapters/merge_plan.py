"""Which parameters of a model change when adapters are merged, and which of them are one and the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from smartinit.adapters.dequantise import is_quantised
from smartinit.adapters.part import AdapterPart
from smartinit.errors import ConfigError, ModelError
from smartinit.targets.weight import storage_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from smartinit.adapters.weight_change import WeightChange

_INSIDE = ".base_layer"


@dataclass(eq=False)
class Slot:
    """One parameter of one base layer, and what happens to it.

    Attributes:
        path: of the outermost part around the layer.
        module: the layer.
        parameter: the parameter's name.
        changes: in order.
        parts: whose they are.
    """

    path: str
    module: nn.Module
    parameter: str
    changes: list[WeightChange] = field(default_factory=list)
    parts: list[AdapterPart] = field(default_factory=list)

    @property
    def value(self) -> nn.Parameter:
        """The parameter."""
        return cast("nn.Parameter", self.module._parameters[self.parameter])  # noqa: SLF001

    def equals(self, other: Slot) -> bool:
        """Whether the same happens to both."""
        return len(self.changes) == len(other.changes) and all(
            one.equals(two) for one, two in zip(self.changes, other.changes, strict=True)
        )


def slots_of(parts: Mapping[str, AdapterPart], names: Sequence[str]) -> list[Slot]:
    """All parameters that change, in model order; an inner part changes them before an outer one."""
    slots: dict[tuple[int, str], Slot] = {}
    for path, part in reversed(list(parts.items())):
        for change in _changes(path, part, names):
            key = (id(change.module), change.parameter)
            slot = slots.setdefault(key, Slot(path, change.module, change.parameter))
            slot.path = path
            slot.changes.append(change)
            if part not in slot.parts:
                slot.parts.append(part)
    return list(reversed(slots.values()))


def _changes(path: str, part: AdapterPart, names: Sequence[str]) -> list[WeightChange]:
    try:
        return [change for name in names if part.has(name) for change in part.changes(name)]
    except ConfigError as error:  # a part does not know where it is
        raise ConfigError(f"layer '{path}': {error}") from error


def require_changeable(slot: Slot) -> None:
    """Refuse a parameter that is no ordinary tensor of numbers, or that the layer computes from others."""
    kind, names = type(slot.module).__name__, ", ".join(dict.fromkeys(change.adapter_name for change in slot.changes))
    if is_quantised(slot.module):
        raise ModelError(
            f"adapter {names} cannot be merged into layer '{slot.path}', a {kind} whose weight is quantised: the sum "
            "would have to be quantised again; load the base model unquantised, load the adapter onto it and merge "
            "there, or use the adapter unmerged"
        )
    stored = slot.module._parameters.get(slot.parameter)  # noqa: SLF001 - torch has no public way to ask
    ordinary = stored is not None and stored.is_floating_point() and stored.element_size() > 1
    if stored is None or not ordinary or stored.is_meta or type(stored.data) is not torch.Tensor:
        found = "no parameter of its own" if stored is None else f"{type(stored.data).__name__}, {stored.dtype}"
        raise ModelError(
            f"adapter {names} cannot be merged into layer '{slot.path}': the {slot.parameter} of the {kind} is "
            f"{found}{', on meta' if stored is not None and stored.is_meta else ''}, expected an ordinary tensor in "
            "memory; load the base model whole, unquantised and without parametrisations, or use the adapter unmerged"
        )


def groups_of(root: nn.Module, slots: Sequence[Slot]) -> list[tuple[list[Slot], bool]]:
    """Slots that become one parameter, and whether nothing else uses the one that they have now.

    Raises:
        ModelError: a layer stands in the model a second time, without the adapter.
    """
    users = _users(root)
    made: dict[tuple[int, torch.Size, tuple[int, ...]], list[list[Slot]]] = {}
    for slot in slots:
        alike = made.setdefault(storage_of(slot.value), [])
        same = next((group for group in alike if group[0].equals(slot)), None)
        if same is None:
            alike.append([slot])
        else:
            same.append(slot)
    groups = []
    for storage, alike in made.items():
        expected = {(id(slot.module), slot.parameter) for group in alike for slot in group}
        others = False
        for path, module, name, layout, around in users.get(storage[0], ()):
            slot_of = next((s for group in alike for s in group if s.module is module and s.parameter == name), None)
            if slot_of is not None and not any(part in slot_of.parts for part in around):
                raise ModelError(
                    f"the layer '{slot_of.path}' also stands as '{path}', where it has no such adapter, so merging "
                    "would change what that computes; adapt both alike, or give one of them a layer of its own"
                )
            others = others or (id(module), name) not in expected or layout != storage
        alone = len(alike) == 1 and not others
        groups += [(group, alone) for group in alike]
    return groups


def _users(root: nn.Module) -> dict[int, list[tuple[str, nn.Module, str, Any, list[nn.Module]]]]:
    """Address of a parameter -> where it is used: path, module, name, layout, and all the parts around it."""
    found: dict[int, list[tuple[str, nn.Module, str, Any, list[nn.Module]]]] = {}
    modules = dict(root.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        outer, around = path, []
        while f".{outer}".endswith(_INSIDE) and isinstance(modules[outer[: -len(_INSIDE)]], AdapterPart):
            outer = outer[: -len(_INSIDE)]
            around.append(modules[outer])
        for name, parameter in module._parameters.items():  # noqa: SLF001 - named_parameters leaves out the repeated
            if parameter is not None and not parameter.is_meta and parameter.numel():
                layout = storage_of(parameter)
                found.setdefault(layout[0], []).append((path, module, name, layout, around))
    return found
