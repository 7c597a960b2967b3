"""Which parameters of a model ``target_parameters`` means, and their parts put around the modules that own them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from smartinit.adapters.experts import ParameterLora, parameter_names
from smartinit.adapters.part import AdapterPart
from smartinit.config.checks import closest, require
from smartinit.errors import ConfigError, TargetError
from smartinit.targets.patterns import alpha_for, rank_for
from smartinit.targets.weight import host_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from torch import nn

    from smartinit.config import LoraConfig

_DIMENSIONS = (2, 3)
# What can be trained through: in float8 a weight has scales of its own, which a sum would ignore.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def add_parameter_layers(
    root: nn.Module, adapter_name: str, config: LoraConfig, *, device: torch.device | str | None = None
) -> None:
    """Put the parts of one adapter into a model; nothing where the configuration asks for none.

    An entry of ``target_parameters`` is the whole name of a parameter or a dotted ending of it, as in PEFT;
    ``rank_pattern`` and ``alpha_pattern`` are matched with the parameter's name. ``exclude_modules`` and
    ``layers_to_transform`` choose among layers only.

    Args:
        root: the model, possibly with parts of other adapters in it.
        adapter_name: which adapter.
        config: its configuration.
        device: where its weights lie; None: where the base's do.

    Raises:
        TargetError: no parameter has such a name, or it is one that cannot get an adapter.
        ConfigError: a combination that cannot be: dropout, DoRA, a LoRA bias; other parameters than those of the
            model's other adapters, since files number parts of one module by their nesting.

    Warns:
        UserWarning: an entry that matches nothing while others do.
    """
    if not config.target_parameters:
        return
    _check_options(config)
    known = dict(_parameters(root))
    chosen = [name for name in known if any(_means(entry, name) for entry in config.target_parameters)]
    _check_entries(config.target_parameters, known, chosen)
    for name in chosen:
        _check_parameter(name, *known[name])
    _check_others(root, chosen)
    for name in chosen:
        path, outer = known[name]
        module = root.get_submodule(path)
        layer = _part_on(module, name) or ParameterLora(module, _last(name))
        layer.training = outer.training  # not train(), which would tell the modules inside as well
        layer.update_layer(adapter_name, rank_for(config, name), alpha_for(config, name), config, device=device)
        if layer.base_layer is module:
            root.set_submodule(path, layer)


def _parameters(root: nn.Module) -> Iterator[tuple[str, tuple[str, nn.Module]]]:
    """Name of every parameter that the model has of its own -> name of the module that owns it, and what is there."""
    inside: str | None = None
    for path, module in root.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        inside = f"{path}." if isinstance(module, AdapterPart) else None
        base = module.get_base_layer() if isinstance(module, AdapterPart) else module
        for name, _ in base.named_parameters(recurse=False):
            yield f"{path}.{name}" if path else name, (path, module)


def _part_on(module: nn.Module, name: str) -> ParameterLora | None:
    """The part on this parameter among those around its module."""
    while isinstance(module, ParameterLora):
        if module.parameter_name == _last(name):
            return module
        module = module.base_layer
    return None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _means(entry: str, name: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _check_options(config: LoraConfig) -> None:
    said = "target_parameters cannot be used with {}: the adapter is added to a weight and sees no input"
    require(config.lora_dropout == 0, said.format(f"lora_dropout={config.lora_dropout}"))
    require(not config.use_dora, "target_parameters cannot be used with use_dora: stacked weights have no row norms")
    require(not config.lora_bias, said.format("lora_bias"))
    require(not config.fan_in_fan_out, "target_parameters cannot be used with fan_in_fan_out, which is for layers")


def _check_entries(entries: Sequence[str], known: Collection[str], chosen: Sequence[str]) -> None:
    for entry in sorted(set(entries)):
        if any(_means(entry, name) for name in chosen):
            continue
        parts = entry.count(".") + 1
        near = closest(entry, {".".join(name.split(".")[-parts:]) for name in known})
        if not chosen:
            raise TargetError(f"target_parameters={list(entries)} matched none of {len(known)} parameters{near}")
        warnings.warn(f"target_parameters entry {entry!r} matched no parameter{near}", stacklevel=5)


def _check_parameter(name: str, path: str, outer: nn.Module) -> None:
    """Refuse what cannot get an adapter."""
    if not path:
        raise TargetError(f"parameter '{name}' belongs to the model itself, around which no part can be put")
    if isinstance(outer, AdapterPart) and not isinstance(outer, ParameterLora):
        raise TargetError(
            f"parameter '{name}' belongs to a module that already has an adapter; name it either in target_modules "
            "(or modules_to_save) or in target_parameters"
        )
    base = outer.get_base_layer() if isinstance(outer, AdapterPart) else outer
    weight = getattr(base, _last(name))
    if weight.ndim not in _DIMENSIONS:
        raise TargetError(
            f"parameter '{name}' has shape {tuple(weight.shape)}; target_parameters takes matrices and stacks of them"
        )
    if weight.dtype not in _DTYPES:
        raise TargetError(
            f"parameter '{name}' is {weight.dtype}, to which no update can be added; load the model in bfloat16"
        )
    inner = next((child for child, module in base.named_modules() if child and host_of(module) is not None), None)
    if inner is not None:  # its name in files would change with the part around it
        raise TargetError(
            f"parameter '{name}' belongs to a module with layers in it, such as '{inner}'; name those in "
            "target_modules instead"
        )


def _check_others(root: nn.Module, chosen: Sequence[str]) -> None:
    taken = set(parameter_names(root).values())
    if taken and taken != set(chosen):
        odd = min(taken ^ set(chosen))
        raise ConfigError(
            f"all adapters with target_parameters must have the same ones, but '{odd}' is only in "
            f"{'the others' if odd in taken else 'the new one'}: their places in files depend on each other"
        )
