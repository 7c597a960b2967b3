"""The base model's own biases, trained with an adapter: ``bias="all"`` and ``bias="lora_only"``.

PEFT trains the base model's biases where they are: without the adapter the model is then no longer the base, of which
it warns. Here the adapter has biases of its own, which stand in the base's places, under the same names, while it is
active. Without it (another adapter, ``disable_adapter()``, ``unload()``) the model has its originals, the very objects.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from smartinit.adapters.bare import bare_modules
from smartinit.adapters.filling import fill_tensors
from smartinit.adapters.layer import LoraLayer
from smartinit.adapters.part import AdapterPart
from smartinit.adapters.saved_modules import SavedModule
from smartinit.adapters.trained_tokens import TrainedTokens
from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch

    from smartinit.adapters.part import BaseBiases
    from smartinit.config import LoraConfig

# What PEFT calls the module inside such a part, where it has another name for it.
_BASE_IN_PEFT: dict[type[AdapterPart], str] = {
    SavedModule: "original_module",
    TrainedTokens: "token_adapter.base_layer",
}


@dataclass(eq=False)
class _Place:
    """A module's bias: its key, the module, and whichever of the two parameters is not in the module at present."""

    key: str
    module: nn.Module
    other: nn.Parameter


class TrainedBiases:
    """The biases that one adapter trains.

    They start as the base model's. A bias that several modules share is one here as well.

    Args:
        root: the model, with the adapter's parts in it.
        adapter_name: which adapter.
        config: its configuration; ``bias="none"`` gives no biases.

    Attributes:
        installed: whether the model has these biases at present, in place of its own.
    """

    def __init__(self, root: nn.Module, adapter_name: str, config: LoraConfig) -> None:
        self.adapter_name = adapter_name
        self.installed = False
        self._places: list[_Place] = []
        if config.bias == "none":
            return
        copies: dict[int, nn.Parameter] = {}
        for key, module, bias in _biases(root, adapter_name, only_lora=config.bias == "lora_only"):
            made = copies.setdefault(id(bias), nn.Parameter(bias.detach().clone(), requires_grad=False))
            self._places.append(_Place(key, module, made))

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._places)

    def modules(self) -> list[nn.Module]:
        """The modules that have them."""
        return [place.module for place in self._places]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained biases by their keys in PEFT's file without the leading ``base_model.model.``."""
        return {place.key: _own(place.module) if self.installed else place.other for place in self._places}

    def originals(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Pairs of a trained bias and the base model's own."""
        pairs = [(place.other, _own(place.module)) for place in self._places]
        return [(two, one) for one, two in pairs] if self.installed else pairs

    def install(self, *, installed: bool = True) -> None:
        """Put these biases in their places, or the model's own back."""
        if installed == self.installed:
            return
        for place in self._places:
            now = _own(place.module)
            if (place.other.device, place.other.dtype) != (now.device, now.dtype):  # the model was moved meanwhile
                place.other.data = place.other.data.to(now.device, now.dtype)
            place.module._parameters["bias"], place.other = place.other, now  # noqa: SLF001 - the objects themselves
        self.installed = installed


def check_biases(config: LoraConfig, configs: Mapping[str, LoraConfig]) -> None:
    """A model has one set of biases, so only one of its adapters can train them, as in PEFT.

    Args:
        config: of the adapter that is to be added.
        configs: of those that are there, by name.

    Raises:
        ConfigError: a second one.
    """
    others = [name for name, other in configs.items() if other.bias != "none"]
    if config.bias != "none" and others:
        raise ConfigError(
            f"adapter '{others[0]}' trains the model's biases already (bias={configs[others[0]].bias!r}), and only one "
            "adapter can: set bias='none' for the other one"
        )


def add_biases(root: nn.Module, adapter_name: str, config: LoraConfig) -> None:
    """Give one adapter its biases; nothing with ``bias="none"``. They stay out until `show_biases` installs them.

    Its parts keep them, so that they live as long as the adapter, in copies of the model as well.

    Args:
        root: the model, with the adapter's parts in it.
        adapter_name: which adapter.
        config: its configuration.

    Warns:
        UserWarning: there is no bias to train; then none is, as in PEFT.
    """
    if config.bias == "none":
        return
    biases = TrainedBiases(root, adapter_name, config)
    if not biases:
        where = "the layers with it have" if config.bias == "lora_only" else "the model has"
        warnings.warn(
            f"bias={config.bias!r} of adapter '{adapter_name}' trains nothing: {where} no biases", stacklevel=3
        )
        return
    for part in _parts(root):
        if part.has(adapter_name):
            part.base_biases[adapter_name] = biases


def biases_of(root: nn.Module) -> dict[str, BaseBiases]:
    """Adapter -> its biases, of those adapters that train any: at most one."""
    return {name: biases for part in _parts(root) for name, biases in part.base_biases.items()}


def trained_biases(root: nn.Module, config: LoraConfig, adapter_name: str) -> dict[str, nn.Parameter]:
    """The biases that one adapter trains, by their keys in PEFT's file without the leading ``base_model.model.``."""
    if config.bias == "none":
        return {}
    biases = biases_of(root).get(adapter_name)
    return {} if biases is None else biases.parameters()


def load_biases(root: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy biases of a file into those of the adapter that trains them.

    Args:
        root: the model.
        tensors: by the keys of `trained_biases`.

    Raises:
        ArtefactError: a tensor is missing, too many, or of another shape.
    """
    for name, biases in biases_of(root).items():
        fill_tensors(biases.parameters(), tensors, f"the biases that adapter '{name}' trains")


def in_effect(parts: Collection[AdapterPart], active: Sequence[str], merged: Sequence[str]) -> list[str]:
    """The adapters whose biases a model is to have: those that are merged, and active ones that take part beside them.

    A layer with merged adapters computes with these alone. An active adapter all of whose layers are such takes no
    part at all, and its biases would only make the output nobody's.

    Args:
        parts: the model's.
        active: the active adapters.
        merged: those that are merged, or are about to be.
    """
    free = [part for part in parts if isinstance(part, LoraLayer) and not any(map(part.has, merged))]
    return [*merged, *(name for name in active if not merged or any(part.has(name) for part in free))]


def show_biases(root: nn.Module, adapter_names: Collection[str]) -> None:
    """Let the model have the biases of the one of these adapters that trains any, or else its own.

    Raises:
        ConfigError: see `check_biases_can_change`; nothing has changed then.
    """
    check_biases_can_change(root, adapter_names)
    for name, biases in biases_of(root).items():
        biases.install(installed=name in adapter_names)


def check_biases_can_change(root: nn.Module, adapter_names: Collection[str]) -> None:
    """Refuse that biases come or go while an adapter with a bias of its own is merged into those that are there.

    Args:
        root: the model.
        adapter_names: the adapters whose biases it is to have.

    Raises:
        ConfigError: the model would lose what was merged.
    """
    for name, biases in biases_of(root).items():
        if biases.installed == (name in adapter_names):
            continue
        modules = set(biases.modules())
        for part in _parts(root):
            if any(module in modules and key == "bias" for w in part.merged_weights for module, key in w.places):
                raise ConfigError(
                    f"the biases of adapter '{name}' cannot be {'taken out' if biases.installed else 'put in'} while "
                    f"adapter {', '.join(map(repr, part.merged_adapters))} is merged into those that the model has now "
                    "(lora_bias=True): call unmerge_adapter() first"
                )


def drop_biases(root: nn.Module, adapter_name: str | None = None) -> None:
    """Give the model its own biases back and forget an adapter's; None: all adapters'."""
    for part in _parts(root):
        for name in [adapter_name] if adapter_name is not None else list(part.base_biases):
            biases = part.base_biases.pop(name, None)
            if biases is not None:
                biases.install(installed=False)


def _parts(root: nn.Module) -> list[AdapterPart]:
    return [module for module in root.modules() if isinstance(module, AdapterPart)]


def _biases(root: nn.Module, adapter_name: str, *, only_lora: bool) -> list[tuple[str, nn.Module, nn.Parameter]]:
    """Key, module and bias of every bias that is trained; those of modules that are trained whole are in the copies."""
    found = []
    whole = [name for name, part in bare_modules(root) if isinstance(part, SavedModule) and part.has(adapter_name)]
    for name, part in bare_modules(root):
        if any(name == one or name.startswith(f"{one}.") for one in whole):
            continue
        if only_lora and not (isinstance(part, LoraLayer) and part.has(adapter_name)):
            continue
        module, path = part, [name] if name else []
        while isinstance(module, AdapterPart):
            if module.has(adapter_name):  # whatever other adapters are here, the key is the one of this adapter alone
                path.append(_BASE_IN_PEFT.get(type(module), "base_layer"))
            module = module.base_layer
        bias = module._parameters.get("bias")  # noqa: SLF001 - the module's own, not one that it answers for
        if bias is not None and bias.is_floating_point():
            found.append((".".join([*path, "bias"]), module, bias))
    return found


def _own(module: nn.Module) -> nn.Parameter:
    bias = module._parameters["bias"]  # noqa: SLF001 - the object itself
    if bias is None:
        raise ConfigError(f"the bias of a {type(module).__name__} was removed while an adapter trains it")
    return bias
