"""Which layers of a model get an adapter."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from smartinit.config.checks import closest
from smartinit.errors import ConfigError, TargetError
from smartinit.targets.defaults import DEFAULT_TARGETS
from smartinit.targets.patterns import in_chosen_layers, in_entries, is_excluded, match_module, rank_for
from smartinit.targets.tree import adapter_layer, base_model, nodes
from smartinit.targets.weight import LINEAR, Target, host_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from smartinit.config import LoraConfig
    from smartinit.targets.tree import Node
    from smartinit.targets.weight import Hosts

_SHOWN = 3  # names in a message
# Heads of sequence classifiers, which PEFT trains whole (`modules_to_save`) and never adapts.
_CLASSIFIER_HEADS = ("score", "classifier")

_NAMED = (nn.MultiheadAttention, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def select_targets(
    model: nn.Module,
    config: LoraConfig | None = None,
    *,
    none_means: Literal["defaults", "all"] = "defaults",
    adapter_name: str | None = None,
    hosts: Hosts = LINEAR,
) -> tuple[Target, ...]:
    """The layers that get an adapter, in model order.

    Args:
        model: a plain module, or one with adapter layers (``peft.PeftModel``, ``smartinit.LoraModel``, a model with
            injected adapters); data parallel and compiled wrappers around it do not matter.
        config: for a plain module, which layers. Not needed where the adapter layers say it.
        none_means: what ``target_modules=None`` stands for: the architecture's defaults, or all linear layers
            (as PEFT's ``get_eva_state_dict`` has it for a plain module).
        adapter_name: with adapter layers, only those that have this adapter.
        hosts: the kinds of layers that can be targets; ``"all-linear"`` and "all" mean linear ones in any case.

    Returns:
        Layers of these kinds, each once. Of adapter layers those around other modules are left out; on a plain module
        such a match is an error.

    Raises:
        TargetError: nothing matches, or something of another kind does.
        ConfigError: a plain module without config, or an architecture without defaults.

    Warns:
        UserWarning: an entry of ``target_modules`` that matches nothing while others do.
    """
    found = nodes(model)
    adapted = [node for node in found if adapter_layer(node.module)]
    # An adapter model has its base under `model`; one whose adapters are all gone is still no plain module.
    if adapted or "model." in base_model(model)[1]:
        return _adapted_targets(adapted, adapter_name, hosts)
    if config is None:
        raise ConfigError("a model without adapter layers needs a config that says which layers get an adapter")
    return _plain_targets(model, found, config, none_means, hosts)


def check_ranks(targets: Iterable[Target], config: LoraConfig) -> None:
    """Refuse a rank that a layer cannot have.

    Raises:
        ConfigError: names the first layer whose rank is above ``min(out_features, in_features)``.
    """
    too_high = [target for target in targets if rank_for(config, target.name) > min(target.shape)]
    if too_high:
        first = too_high[0]
        others = f" (and of {len(too_high) - 1} more layers)" if len(too_high) > 1 else ""
        raise ConfigError(
            f"rank {rank_for(config, first.name)} of '{first.name}'{others} is above min(out, in) = {min(first.shape)} "
            f"of its weight, {first.out_features} x {first.in_features}: lower r, or give it a rank in rank_pattern"
        )


def _adapted_targets(adapted: Sequence[Node], adapter_name: str | None, hosts: Hosts) -> tuple[Target, ...]:
    targets = []
    for node in adapted:
        if adapter_name is not None and not any(
            adapter_name in getattr(node.module, part, ()) for part in ("lora_A", "lora_embedding_A")
        ):
            continue
        base = node.module
        while adapter_layer(base):
            base = base.base_layer  # type: ignore[assignment]
        if host_of(base) in hosts:
            targets.append(Target.of(base, node.name, node.path, node.names[1:]))
    if not targets:
        of_name = "" if adapter_name is None else f" with an adapter '{adapter_name}'"
        kind = "a linear layer" if hosts == LINEAR else f"one of {_kinds(hosts)}"
        raise TargetError(f"none of the model's {len(adapted)} adapter layers is around {kind}{of_name}")
    return tuple(targets)


def _plain_targets(
    model: nn.Module,
    found: Sequence[Node],
    config: LoraConfig,
    none_means: Literal["defaults", "all"],
    hosts: Hosts,
) -> tuple[Target, ...]:
    _refuse_what_changes_the_model(config)
    root, _ = base_model(model)
    usable = [node for node in found if _problem(node, hosts) is None]
    linear = [node for node in usable if host_of(node.module) in LINEAR]
    named = config.target_modules
    if named is None and none_means == "all":
        chosen = [node for node in linear if _included(config, node)]
    elif isinstance(named, str) and named.lower() == "all-linear":
        heads = _heads(root, config.task_type)
        chosen = [node for node in linear if id(node.module) not in heads and _included(config, node)]
    else:
        if named is None:
            config = config.copy()
            config.target_modules = _defaults(root)
        chosen = [node for node in found if any(match_module(config, name) for name in node.names)]
        if named is not None:
            _warn_of_idle_entries(config, found, usable)
    if not chosen:
        raise TargetError(_no_match(config, found, usable, "linear layers" if hosts == LINEAR else "usable layers"))
    _refuse_other_kinds(chosen, hosts)
    return tuple(Target.of(node.module, node.name, node.path, node.names[1:]) for node in chosen)


def _included(config: LoraConfig, node: Node) -> bool:
    return not any(is_excluded(config, name) for name in node.names)


def _refuse_what_changes_the_model(config: LoraConfig) -> None:
    if config.layer_replication:
        raise TargetError(
            "layer_replication gives the model new layers: attach the adapters first and pass that model instead"
        )
    if config.target_parameters:
        said = f"target_parameters={config.target_parameters} are no layers, so they keep LoRA's own start"
        if not config.target_modules:
            raise TargetError(f"{said}: name linear layers in target_modules to compute one for these")
        warnings.warn(f"{said}: only the layers of target_modules get another", stacklevel=4)


def _defaults(root: nn.Module) -> Any:  # noqa: ANN401 - what target_modules takes
    model_config: Any = getattr(root, "config", None)
    is_dict = isinstance(model_config, dict)
    found = model_config.get("model_type") if is_dict else getattr(model_config, "model_type", None)
    if not isinstance(found, str) or found not in DEFAULT_TARGETS:
        kind = f"the architecture '{found}'" if found else "a model without config.model_type"
        raise ConfigError(f"no default target_modules are known for {kind}: set target_modules, e.g. to 'all-linear'")
    return DEFAULT_TARGETS[found]


def _heads(root: nn.Module, task_type: str | None) -> set[int]:
    """Ids of the modules that 'all-linear' does not mean: the output layer, and what is in a classifier's head."""
    heads: list[nn.Module | None] = []
    output_layer = getattr(root, "get_output_embeddings", None)
    if callable(output_layer):
        heads.append(output_layer())
    if task_type == "SEQ_CLS":
        heads += [getattr(root, name, None) for name in _CLASSIFIER_HEADS]
    return {id(module) for head in heads if head is not None for module in head.modules()}


def _problem(node: Node, hosts: Hosts) -> str | None:
    """Why a module cannot get an adapter, or not this one; None if it can."""
    module = node.module
    if isinstance(node.parent, nn.MultiheadAttention):
        return "part of nn.MultiheadAttention, which uses the weight without calling the layer"
    if host_of(module) in hosts:
        return None
    if host_of(module) is None and not isinstance(module, _NAMED):
        inside = " (name the linear layers inside it)" if any(True for _ in module.children()) else ""
        return f"a {type(module).__name__}{inside}"
    return _why_not(module, hosts)


def _why_not(module: nn.Module, hosts: Hosts) -> str:
    """What there is to say of a kind of module that someone may have meant."""
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention, which uses its weights without calling layers"
    if isinstance(module, nn.Embedding):
        if "embedding" in hosts:
            return "an embedding with max_norm, which rewrites its own weight"
        return "an embedding, whose input is numbers of tokens and no activations"
    if isinstance(module, _NAMED) and "convolution" not in hosts:
        return "a convolution"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return f"a convolution with groups={module.groups}"
    return f"a {type(module).__name__}, which is another kind"


def _kinds(hosts: Hosts) -> str:
    return ", ".join(sorted(hosts))


def _refuse_other_kinds(chosen: Sequence[Node], hosts: Hosts) -> None:
    refused = [(node.name, problem) for node in chosen if (problem := _problem(node, hosts)) is not None]
    if refused:
        shown = "; ".join(f"'{name}' is {problem}" for name, problem in refused[:_SHOWN])
        more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        wanted = "no linear layers" if hosts == LINEAR else f"none of {_kinds(hosts)}"
        raise TargetError(
            f"target_modules matched modules that are {wanted}: {shown}{more}; "
            "leave them out of target_modules or name them in exclude_modules"
        )


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _tails(entry: str, linear: Sequence[Node]) -> set[str]:
    """The linear layers' names, cut to as many parts as the entry has."""
    parts = entry.count(".") + 1
    return {".".join(name.split(".")[-parts:]) for node in linear for name in node.names}


def _warn_of_idle_entries(config: LoraConfig, found: Sequence[Node], linear: Sequence[Node]) -> None:
    if isinstance(config.target_modules, str):
        return
    names = [name for node in found for name in node.names]
    endings = {ending for name in names for ending in _endings(name)}
    idle = [
        entry
        for entry in sorted(config.target_modules or ())
        if entry not in endings and not ("*" in entry and any(in_entries([entry], name) for name in names))
    ]
    if len(idle) < len(config.target_modules or ()):  # all of them: the error says it
        for entry in idle:
            near = closest(entry, _tails(entry, linear))
            warnings.warn(f"target_modules entry {entry!r} matched no module{near}", stacklevel=4)


def _no_match(config: LoraConfig, found: Sequence[Node], linear: Sequence[Node], kind: str) -> str:
    """The sentence for a config that leaves no layer at all."""
    named = config.target_modules
    shown = repr(named if named is None or isinstance(named, str) else sorted(named))
    said = f"target_modules={shown} matched none of {len(linear)} {kind}"
    unrestricted = config.copy()
    unrestricted.exclude_modules = unrestricted.modules_to_save = unrestricted.layers_to_transform = None
    everything = named is None or (isinstance(named, str) and named.lower() == "all-linear")
    matched = linear if everything else [n for n in found if any(match_module(unrestricted, x) for x in n.names)]
    if matched:
        name = matched[0].name
        if not in_chosen_layers(config, name) and not is_excluded(config, name):
            return (
                f"{said}: layers_to_transform={config.layers_to_transform} leaves none of the {len(matched)} that it "
                f"names, such as '{name}'; check the numbers and layers_pattern={config.layers_pattern!r}"
            )
        return f"{said}: exclude_modules or modules_to_save excludes all {len(matched)} that it names, such as '{name}'"
    if isinstance(named, str):
        words = re.findall(r"\w+", named)
        near = next(filter(None, (closest(word, _tails(word, linear)) for word in reversed(words))), "")
        return f"{said}; a string is a regular expression for the whole name, a list holds endings of names{near}"
    near = next(filter(None, (closest(entry, _tails(entry, linear)) for entry in sorted(named or ()))), "")
    return said + near
