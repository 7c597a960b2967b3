"""Putting the parts of an adapter into a model, and taking them out."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from smartinit.adapters.base_bias import add_biases, drop_biases
from smartinit.adapters.experts import ParameterLora
from smartinit.adapters.kinds import wrap
from smartinit.adapters.layer import LoraLayer
from smartinit.adapters.parameter_targets import add_parameter_layers
from smartinit.adapters.part import AdapterPart
from smartinit.adapters.saved_modules import add_saved_modules
from smartinit.adapters.stand_in import Places
from smartinit.adapters.trained_tokens import add_trained_tokens
from smartinit.adapters.tying import embedding_ties, tie_factors
from smartinit.errors import TargetError
from smartinit.targets.patterns import alpha_finder, rank_finder
from smartinit.targets.select import select_targets
from smartinit.targets.weight import ALL_HOSTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

    from smartinit.config import LoraConfig


def parts_of_model(root: nn.Module) -> dict[str, AdapterPart]:
    """Module name -> adapter part, in model order; what a part wraps comes right after it.

    As with ``named_modules``, a module with several names has its first. There are no parts within what adapters have
    in a part, and that is most of an adapted model's modules: they are not looked at.
    """
    found: dict[str, AdapterPart] = {}
    seen: set[nn.Module] = set()
    pending: list[tuple[str, nn.Module]] = [("", root)]
    while pending:
        name, module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        inside: dict[str, nn.Module | None] = module._modules  # noqa: SLF001
        if isinstance(module, AdapterPart):
            found[name] = module
            inside = {"base_layer": module.base_layer}
        prefix = f"{name}." if name else ""
        pending += [(prefix + child, inner) for child, inner in reversed(inside.items()) if inner is not None]
    return found


def inject(root: nn.Module, adapter_name: str, config: LoraConfig, *, device: torch.device | str | None = None) -> None:
    """Put all parts of one adapter into a model; after an error the model is as it was.

    Args:
        root: the model, possibly with parts of other adapters in it.
        adapter_name: a new name.
        config: what to put where.
        device: where the weights lie; None: where the base's do.

    Raises:
        TargetError: ``target_modules`` or another list of names matches nothing.
        ConfigError: a combination that cannot be.
    """
    try:
        if config.target_modules or not config.target_parameters:  # PEFT's users write target_modules=[] with them
            _add_lora_layers(root, adapter_name, config, device)
        add_parameter_layers(root, adapter_name, config, device=device)
        add_saved_modules(root, adapter_name, config, device=device)
        add_trained_tokens(root, adapter_name, config, device=device)
        add_biases(root, adapter_name, config)
    except BaseException:
        drop(root, adapter_name)
        raise


def drop(root: nn.Module, adapter_name: str) -> None:
    """Take one adapter off every part; a part without adapters gives its base layer back."""
    drop_biases(root, adapter_name)
    for name, part in reversed(parts_of_model(root).items()):
        part.remove(adapter_name)
        if not part.adapters():
            root.set_submodule(name, part.base_layer)


def unwrap(root: nn.Module) -> None:
    """Put every part's base layer in its place."""
    for name, part in reversed(parts_of_model(root).items()):
        root.set_submodule(name, part.base_layer)


@contextmanager
def bare(root: nn.Module) -> Iterator[None]:
    """Inside, the model has its own modules in place, so that targets are chosen as for the first adapter."""
    parts = parts_of_model(root)
    try:
        unwrap(root)
        yield
    finally:
        for name, part in parts.items():
            root.set_submodule(name, part)


def _add_lora_layers(root: nn.Module, adapter_name: str, config: LoraConfig, device: torch.device | str | None) -> None:
    layers = config.copy()
    layers.target_parameters = layers.layer_replication = None  # seen to by others
    with bare(root):
        names = [target.name for target in select_targets(root, layers, hosts=ALL_HOSTS)]
    ties = embedding_ties(root) if config.ensure_weight_tying else None
    tied = ties.tied if ties is not None and ties.embedding in names else ()
    places = Places(parts_of_model(root))
    rank_of, alpha_of = rank_finder(config), alpha_finder(config)
    for name in [*(name for name in names if name not in tied), *tied]:
        places.check(name, LoraLayer, adapter_name)
        module = root.get_submodule(name)
        if isinstance(module, ParameterLora):
            raise TargetError(
                f"'{name}' has an adapter on its parameter '{module.parameter_name}': use target_parameters"
            )
        layer = module if isinstance(module, LoraLayer) else wrap(name, module)
        if layer.training != module.training:  # it tells every module inside, one by one
            layer.train(module.training)
        named = ties.embedding if ties is not None and name in tied else name
        layer.update_layer(adapter_name, rank_of(named), alpha_of(named), config, device=device)
        if named != name:
            tie_factors(layer, root.get_submodule(named), adapter_name)
        root.set_submodule(name, layer)
