"""Whole modules that are trained with an adapter: ``modules_to_save``.

In a model the copies are ``<module>.modules_to_save.<adapter>``, in a file plainly ``<module>.<parameter>``: PEFT's
names. Unlike PEFT's, the module as the model had it is ``<module>.base_layer``, as it is in every other part.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smartinit.adapters.bare import bare_modules
from smartinit.adapters.filling import fill_tensors
from smartinit.adapters.part import AdapterPart
from smartinit.adapters.stand_in import Places, StandIn
from smartinit.adapters.tying import embedding_ties
from smartinit.config.checks import closest
from smartinit.errors import ConfigError, TargetError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from smartinit.config import LoraConfig

TASK_HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Heads that a model of a task gets when it is loaded, with random weights: PEFT trains them with every adapter."""

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class SavedModule(StandIn):
    """A module, and a trained copy of it for each of any number of adapters.

    The copy of the active adapter is called in the module's place. Two adapters with copies of the same module cannot
    be active together.

    Args:
        base_layer: the module as the model had it; it is never trained.

    Attributes:
        modules_to_save: adapter -> its copy.
    """

    adapter_layer_names = ("modules_to_save",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.modules_to_save = nn.ModuleDict()
        self.training = self.modules_to_save.training = base_layer.training

    def adapters(self) -> list[str]:
        """The adapters that have a copy of this module."""
        return list(self.modules_to_save)

    def add(
        self, adapter_name: str, *, device: torch.device | str | None = None, weight: nn.Parameter | None = None
    ) -> None:
        """Give one adapter a copy of the base layer as it is: its values, dtype, mode and hooks.

        Args:
            adapter_name: which adapter.
            device: where the copy's parameters lie; None: where the base layer's do. On the meta device nothing is
                copied but buffers.
            weight: the parameter that is the copy's weight, if it is tied to another module's.
        """
        copies: dict[int, Any] = {}
        if weight is not None:
            copies[id(self.base_layer.weight)] = weight
        if device is not None:
            for parameter in self.base_layer.parameters():
                made = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
                if torch.device(device).type != "meta":
                    made.data.copy_(parameter.data)
                copies.setdefault(id(parameter), made)
        self.modules_to_save[adapter_name] = copy.deepcopy(self.base_layer, copies)

    @property
    def in_use(self) -> nn.Module:
        """The active adapter's copy, or the base layer."""
        active = self.active_here()
        return self.modules_to_save[active[0]] if active else self.base_layer

    def check_active(self, adapter_names: Sequence[str]) -> None:
        """Only one adapter's copy can be called.

        Raises:
            ConfigError: several of these have a copy.
        """
        here = [name for name in adapter_names if self.has(name)]
        if len(set(here)) > 1:
            raise ConfigError(
                f"adapters {', '.join(map(repr, here))} each have a trained copy of the same "
                f"{type(self.base_layer).__name__} (modules_to_save), so they cannot be used together"
            )

    def run(self, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """The output of one adapter's copy, or of the base layer."""
        module = self.modules_to_save[adapter_names[0]] if adapter_names else self.base_layer
        return module(*args, **kwargs)

    def replacements(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The parameters and buffers of one adapter's copy, without buffers that differ in nothing."""
        if not self.has(adapter_name):
            return {}
        made = self.modules_to_save[adapter_name]
        own = dict(self.base_layer.named_buffers())  # masks may hold -Inf
        same = {name for name, buffer in made.named_buffers() if name in own and torch.equal(buffer, own[name])}
        return dict(made.named_parameters()) | {n: b for n, b in made.named_buffers() if n not in same}

    def merged_module(self, adapter_names: Sequence[str]) -> nn.Module:
        """The copy of the one of these adapters that has one; else the base layer."""
        here = [name for name in adapter_names if self.has(name)]
        return self.modules_to_save[here[-1]] if here else self.base_layer

    def other_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """Parameters and buffers of one adapter's copy; a tied weight is there too, in its own memory or not."""
        return dict(self.modules_to_save[adapter_name].state_dict()) if self.has(adapter_name) else {}

    def load_others(self, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `other_tensors`, in place.

        Raises:
            ArtefactError: a tensor is missing, too many, or of another shape.
        """
        if not self.has(adapter_name) and not tensors:
            return
        first = next(self.base_layer.parameters(), None)
        fill_tensors(
            self.modules_to_save[adapter_name].state_dict(keep_vars=True),
            tensors,
            f"the {type(self.base_layer).__name__} that adapter '{adapter_name}' trains whole",
            device=None if first is None else first.device,
        )


def with_task_heads(config: LoraConfig) -> LoraConfig:
    """The configuration with the heads of its task in ``modules_to_save``, as PEFT's task models have it.

    Args:
        config: it is not written to.
    """
    heads = [head for head in TASK_HEADS.get(config.task_type or "", ()) if head not in (config.modules_to_save or ())]
    if heads:
        config = config.copy()
        config.modules_to_save = [*(config.modules_to_save or ()), *heads]
    return config


def add_saved_modules(
    root: nn.Module, adapter_name: str, config: LoraConfig, *, device: torch.device | str | None = None
) -> None:
    """Put the parts of one adapter into a model; nothing where the configuration asks for none.

    As in PEFT, an entry means every module whose name ends with it. A module inside another one that is meant is
    trained with that one. With ``ensure_weight_tying`` the modules that share the input embedding's weight get copies
    that share the copy's.

    Args:
        root: the model, possibly with parts of other adapters in it.
        adapter_name: which adapter.
        config: its configuration.
        device: where its weights lie; None: where the base's do.

    Raises:
        TargetError: no entry matches anything.
        ConfigError: a module that cannot be copied and trained, or one in which there are parts of another kind.
    """
    if not config.modules_to_save:
        return
    modules = dict(bare_modules(root))
    names = _matches(modules, config)
    ties = embedding_ties(root) if config.ensure_weight_tying else None
    tied = ties.tied if ties is not None and ties.embedding in names else ()
    places = Places({name: part for name, part in root.named_modules() if isinstance(part, AdapterPart)})
    for name in [*(name for name in names if name not in tied), *tied]:
        places.check(name, SavedModule, adapter_name)
        module = modules[name]
        if not isinstance(module, SavedModule):
            _check_trainable(name, module)
        part = module if isinstance(module, SavedModule) else SavedModule(module)
        if name in tied and ties is not None:
            source = root.get_submodule(ties.embedding).modules_to_save[adapter_name]  # type: ignore[index]
            part.add(adapter_name, device=device, weight=source.weight)  # type: ignore[union-attr]
        else:
            part.add(adapter_name, device=device)
        root.set_submodule(name, part)


def _matches(modules: Mapping[str, nn.Module], config: LoraConfig) -> list[str]:
    """The modules that ``modules_to_save`` means, without those inside others."""
    entries = config.modules_to_save or ()
    found = {entry: [name for name in modules if name and name.endswith(entry)] for entry in entries}
    idle = [entry for entry in entries if not found[entry]]
    heads = TASK_HEADS.get(config.task_type or "", ())
    if len(idle) == len(entries) and not set(heads) >= set(entries):
        near = next(filter(None, (closest(entry, _tails(entry, modules)) for entry in idle)), "")
        count = len(modules) - 1
        raise TargetError(f"modules_to_save={list(entries)} matched none of the model's {count} modules{near}")
    if len(idle) == len(entries):
        warnings.warn(
            f"task_type={config.task_type!r} is for models with a head named {' or '.join(map(repr, heads))}, and this "
            "one has none: name its head in modules_to_save, or it is not trained",
            stacklevel=3,
        )
    for entry in idle:
        if entry not in heads:
            near = closest(entry, _tails(entry, modules))
            warnings.warn(f"modules_to_save entry {entry!r} matched no module{near}", stacklevel=3)
    chosen = {name for some in found.values() for name in some}
    return [name for name in modules if name in chosen and not any(name.startswith(f"{one}.") for one in chosen)]


def _tails(entry: str, names: Iterable[str]) -> set[str]:
    parts = entry.count(".") + 1
    return {".".join(name.split(".")[-parts:]) for name in names if name}


def _check_trainable(name: str, module: nn.Module) -> None:
    if isinstance(module, _CONTAINERS):
        raise ConfigError(
            f"modules_to_save matched '{name}', a {type(module).__name__}, which is never called: name what is in it"
        )
    for inner, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            raise ConfigError(
                f"modules_to_save matched '{name}', whose '{inner}' holds "
                f"{str(parameter.dtype).removeprefix('torch.')}: a quantised module cannot be trained whole; give it a "
                "LoRA layer instead"
            )
