"""Write computed factors into a model that carries adapters: a `LoraModel` or a ``peft.PeftModel``."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch

from smartinit.adapters.host import adapter_parameters, find_host, parts_of
from smartinit.adapters.layer import bare_module_names
from smartinit.adapters.rollback import undone_on_error
from smartinit.errors import ArtefactError, ConfigError, UnknownNameError
from smartinit.formats.patterns import compact_patterns, exact_target_modules
from smartinit.planning.plan import Plan
from smartinit.targets.names import match_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from smartinit.adapters.host import Host
    from smartinit.factors import Factors


def write_factors(
    model: nn.Module, factors: Mapping[str, Factors], plan: Plan, adapter_name: str = "default"
) -> nn.Module:
    """Give one adapter of ``model`` the ranks and alphas of ``plan`` and the values of ``factors``, in place.

    A layer of rank 0 loses the adapter, and its LoRA layer if no other adapter is on it. A layer that the plan does
    not name starts by default, and one warning names all of these. Dtype, device and ``requires_grad`` of the adapter
    stay what they were, and its configuration is replaced by one that says what is now in the model. Values are
    copied: factors may share memory, the adapter's weights do not.

    Args:
        model: a `LoraModel`, a ``peft.PeftModel``, or a model in which PEFT injected layers.
        factors: target name -> ``a (rank, in)``, ``b (out, rank)``; not needed where the rank is 0.
        plan: rank and alpha by the same names, which may have prefixes that wrappers put before them.
        adapter_name: which adapter.

    Returns:
        ``model``. After an error it is as it was.

    Raises:
        ModelError: the model carries no adapters.
        UnknownNameError: there is no such adapter, or no such layer.
        ArtefactError: a matrix does not fit its layer, or has another rank than the plan says.
        ConfigError: plan and adapter differ in ``use_rslora``; no layer would be left.
    """
    host = find_host(model)
    config = host.config(adapter_name)
    if bool(config.use_rslora) != plan.use_rslora:
        raise ConfigError(
            f"the factors are planned for use_rslora={plan.use_rslora}, but adapter '{adapter_name}' has "
            f"use_rslora={config.use_rslora}; make both the same"
        )
    layers = host.layers(adapter_name)
    layer_of = match_names(plan.ranks, layers)
    _check_names(host, plan, layer_of, adapter_name)
    for name, layer_name in layer_of.items():
        if plan.ranks[name] > 0:
            _check_shapes(layer_name, layers[layer_name], adapter_name, factors.get(name), plan.ranks[name])
    planned = set(layer_of.values())
    unplanned = [name for name in layers if name not in planned]
    if not unplanned and not any(plan.ranks[name] for name in layer_of):
        raise ConfigError(f"all {len(layer_of)} layers have rank 0, so no adapter would be left; give a larger rank")

    start = copy.copy(config)
    start.init_lora_weights = True  # creates a layer of another rank, without running the method the config names
    with torch.no_grad(), undone_on_error(host, layers, adapter_name):
        for name, layer_name in layer_of.items():
            layer = layers[layer_name]
            if plan.ranks[name] == 0:
                _remove(host.root, layer_name, layer, adapter_name)
            else:
                _resize(layer, adapter_name, plan.ranks[name], plan.alphas[name], start)
                layer.scaling[adapter_name] = plan.scaling(name)  # type: ignore[index, operator]
                layer.lora_A[adapter_name].weight.copy_(factors[name].a)  # type: ignore[index, union-attr]
                layer.lora_B[adapter_name].weight.copy_(factors[name].b)  # type: ignore[index, union-attr]
        for name in unplanned:
            _reset(layers[name], adapter_name, start)
        host.configs[adapter_name] = _describe(host, config, adapter_name)
    if unplanned:
        warnings.warn(
            f"{len(unplanned)} layers with adapter '{adapter_name}' had no factors and start by default (A random, B "
            f"zero): {', '.join(unplanned)}",
            stacklevel=3,  # the caller of `Artefact.apply` or `initialize_lora_eva_weights`
        )
    return model


def _check_names(host: Host, plan: Plan, layer_of: Mapping[str, str], adapter_name: str) -> None:
    """Every planned layer must be there; one of rank 0 may have lost its adapter already."""
    absent = [name for name in plan.ranks if name not in layer_of]
    bare = match_names(absent, bare_module_names(host.root)) if absent else {}
    for name in absent:
        if name not in bare:
            raise UnknownNameError(f"the model has no layer '{name}'; are the factors for another model?")
        if plan.ranks[name] > 0:
            raise UnknownNameError(
                f"layer '{bare[name]}' has no adapter '{adapter_name}' to write {plan.ranks[name]} ranks into; name it "
                "in the adapter's target_modules"
            )


def _check_shapes(name: str, layer: Any, adapter_name: str, pair: Factors | None, rank: int) -> None:  # noqa: ANN401
    if pair is None:
        raise ArtefactError(f"the plan gives layer '{name}' rank {rank}, but there are no factors for it")
    if adapter_name not in layer.lora_A or layer.lora_A[adapter_name].weight.ndim != 2:  # noqa: PLR2004  (a matrix)
        raise ArtefactError(f"layer '{name}' wraps a {type(layer.get_base_layer()).__name__}, which is no linear layer")
    for label, matrix, fits in (
        ("A", pair.a, (rank, layer.in_features)),
        ("B", pair.b, (layer.out_features, rank)),
    ):
        if tuple(matrix.shape) != fits:
            raise ArtefactError(
                f"{label} of layer '{name}' has shape {tuple(matrix.shape)}, but {fits} is needed for rank {rank}; are "
                "the factors for another model?"
            )


def _resize(layer: Any, adapter_name: str, rank: int, alpha: float, start: Any) -> None:  # noqa: ANN401
    if layer.r[adapter_name] == rank and not layer.lora_A[adapter_name].weight.is_meta:
        layer.lora_alpha[adapter_name] = alpha
    else:
        _renew(layer, adapter_name, rank, alpha, start)


def _reset(layer: Any, adapter_name: str, start: Any) -> None:  # noqa: ANN401
    if any(parameter.is_meta for parameter in adapter_parameters(layer, adapter_name)):
        _renew(layer, adapter_name, layer.r[adapter_name], layer.lora_alpha[adapter_name], start)
    else:
        layer.reset_lora_parameters(adapter_name, True)


def _renew(layer: Any, adapter_name: str, rank: int, alpha: float, start: Any) -> None:  # noqa: ANN401
    """Make new matrices that start by default; what `update_layer` takes from the base layer is put back as it was.

    PEFT's takes the base layer's dtype, which leaves half precision beside the float32 of the layers whose rank stays.
    """
    former = adapter_parameters(layer, adapter_name)[0]
    trained = {parameter: parameter.requires_grad for parameter in layer.parameters()}
    layer.update_layer(adapter_name=adapter_name, r=rank, lora_alpha=alpha, config=start)
    for parameter, requires_grad in trained.items():
        parameter.requires_grad_(requires_grad)
    device = adapter_parameters(layer, adapter_name)[0].device if former.is_meta else former.device
    for part in parts_of(layer):
        kept = getattr(layer, part)
        if adapter_name not in kept:
            continue
        made = kept[adapter_name]
        if isinstance(made, torch.nn.Module):
            made.to(device=device, dtype=former.dtype).requires_grad_(former.requires_grad).train(layer.training)
        elif isinstance(made, torch.nn.Parameter):
            made = made.to(device=device, dtype=former.dtype)
            kept[adapter_name] = torch.nn.Parameter(made, requires_grad=former.requires_grad)


def _remove(root: nn.Module, name: str, layer: Any, adapter_name: str) -> None:  # noqa: ANN401
    for part in parts_of(layer):
        kept = getattr(layer, part)
        if adapter_name in kept:
            del kept[adapter_name]
    if not layer.r:
        root.set_submodule(name, layer.get_base_layer())


def _describe(host: Host, config: Any, adapter_name: str) -> Any:  # noqa: ANN401
    """A configuration that makes a loader build exactly the layers that the adapter now has."""
    layers: dict[str, Any] = dict(host.layers(adapter_name))
    patterns = compact_patterns(
        Plan(
            {name: layer.r[adapter_name] for name, layer in layers.items()},
            {name: layer.lora_alpha[adapter_name] for name, layer in layers.items()},
            use_rslora=bool(config.use_rslora),
        )
    )
    modules = exact_target_modules(layers, bare_module_names(host.root), complete=True)
    described = copy.copy(config)
    described.r = patterns.r
    described.lora_alpha = patterns.lora_alpha
    described.rank_pattern = patterns.rank_pattern
    described.alpha_pattern = patterns.alpha_pattern
    # A set, as PEFT keeps it itself: merging adapters refuses a list.
    described.target_modules = modules if isinstance(modules, str) else set(modules)
    described.layers_to_transform = described.layers_pattern = None  # the names say it
    return described
