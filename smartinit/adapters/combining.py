"""A new adapter as a weighted combination of others: PEFT's ``add_weighted_adapter``.

What is computed for each layer is in `smartinit.adapters.combined_factors`. The new adapter has scaling 1 everywhere
(``lora_alpha = r``, never rank-stabilised), sits where any of the others sits, and is neither active nor trainable. Its
configuration is the first one's but for rank, alpha, targets and whatever has had its say when the others were made.

What a layer subtracts for an adapter (``base="offset"``) belongs to what the adapter does; a start that the base has
given up does not, and the base stays as it is. Biases of adapters are added up whatever the type. A module that one of
the adapters trains whole, or tokens that one of them trains, are taken over unweighted. Refused is what has no sum:
weight-decomposed adapters (their magnitudes), biases of the base, bare parameters as targets, and several adapters that
train the same module.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from smartinit.adapters.adapter_names import check_adapter_name
from smartinit.adapters.bare import bare_module_names
from smartinit.adapters.combined_factors import (
    KINDS,
    Combination,
    Rules,
    Summand,
    combined_factors,
    combined_rank,
    largest_rank,
)
from smartinit.adapters.injection import drop
from smartinit.adapters.layer import LoraLayer
from smartinit.adapters.saved_modules import add_saved_modules
from smartinit.adapters.start import start_of
from smartinit.adapters.trained_tokens import add_trained_tokens
from smartinit.config import checks
from smartinit.errors import ArgumentError, ConfigError, ModelError
from smartinit.formats.patterns import compact_patterns, exact_target_modules
from smartinit.planning.plan import Plan
from smartinit.targets.patterns import match_module
from smartinit.targets.weight import Target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from smartinit.adapters.adapted import AdaptedModel
    from smartinit.adapters.combined_factors import Kind
    from smartinit.adapters.part import AdapterPart
    from smartinit.config import LoraConfig

__all__ = ["Combination", "add_weighted_adapter"]

DRIVERS = ("gesvd", "gesvdj", "gesvda")
# Of the entries with both signs this share is below zero: PEFT's limit would be negative, and every entry equal to it.
_LEAST_CLAMP = 0.5


def add_weighted_adapter(
    model: AdaptedModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: Combination = "svd",
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> None:
    """See `smartinit.LoraModel.add_weighted_adapter`."""
    del svd_full_matrices  # which vectors beyond the thin decomposition there are makes no difference to what is kept
    check_adapter_name(adapter_name)
    if adapter_name in model.peft_config:
        raise ConfigError(f"the model already has an adapter '{adapter_name}'; choose another name or delete it first")
    weights = _check_weights(adapters, weights)
    for name in adapters:
        _check_adapter(name, model.config_of(name))
    checks.choice("combination_type", combination_type, KINDS)
    checks.choice("majority_sign_method", majority_sign_method, ("total", "frequency"))
    checks.choice("svd_driver", svd_driver, (None, *DRIVERS))

    layers = {name: layer for name, layer in model.lora_layers().items() if any(map(layer.has, adapters))}
    summands = {name: _summands(name, layer, adapters, weights) for name, layer in layers.items()}
    if not summands:
        raise ConfigError(f"none of the adapters {', '.join(adapters)} has matrices in any layer: nothing to combine")
    started = any(one.start is not None for there in summands.values() for one in there)
    # As PEFT: whatever the type, one adapter is only scaled.
    kind = KINDS["linear" if len(adapters) == 1 and not started else combination_type]
    _check_density(kind, density, combination_type)
    _check_truncation(kind, svd_rank, svd_clamp, summands)
    for name, there in summands.items():
        _check_alike(kind, name, there, combination_type)
    # As PEFT: the largest rank that a configuration mentions, whether a layer has it or not.
    widest = max(rank for name in adapters for rank in _ranks(model.config_of(name)))
    rules = Rules(kind, svd_rank or widest, svd_clamp, svd_driver, density or 1.0, majority_sign_method)
    ranks = {name: combined_rank(rules, there) for name, there in summands.items()}
    others = _other_parts(model, adapters)
    config = _new_config(model, adapters, ranks)
    try:
        _make(model, adapter_name, config, ranks)
        for name, there in summands.items():
            _fill(name, layers[name], adapter_name, rules, there)
        for part, owner in others.items():
            part.load_others(adapter_name, part.other_tensors(owner))
    except BaseException:
        drop(model.model, adapter_name)
        raise
    config.init_lora_weights = True
    model.peft_config[adapter_name] = config


# -- what is asked for ------------------------------------------------------------------------------------------------


def _check_weights(adapters: Sequence[str], weights: Sequence[float]) -> list[float]:
    if isinstance(adapters, str):
        raise ArgumentError(f"adapters={adapters!r} is one string; expected a list of names: [{adapters!r}]")
    if len(adapters) == 0:
        raise ConfigError("adapters is empty: name at least one adapter to combine")
    if len(adapters) != len(weights):
        raise ConfigError(
            f"{len(adapters)} adapters and {len(weights)} weights: every adapter needs exactly one weight"
        )
    numbers = []
    for name, weight in zip(adapters, weights, strict=True):
        try:
            numbers.append(float(weight))
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"the weight of adapter '{name}' must be a number, not {weight!r}") from error
        if not math.isfinite(numbers[-1]):
            raise ConfigError(f"the weight of adapter '{name}' is {weight}; it must be finite")
    return numbers


def _check_adapter(name: str, config: LoraConfig) -> None:
    """Refuse what has no combination."""
    obstacles = {
        f"target_parameters={config.target_parameters!r}": bool(config.target_parameters),
        "use_dora=True, whose magnitudes do not add up": config.use_dora,
        f"bias={config.bias!r}, and the base model has only one set of biases": config.bias != "none",
    }
    for obstacle, stands in obstacles.items():
        if stands:
            raise ConfigError(
                f"adapter '{name}' cannot be combined, because it has {obstacle}; merge it into the base model "
                "instead, or leave it out"
            )


def _check_density(kind: Kind, density: float | None, combination_type: str) -> None:
    if kind.prune is not None and (density is None or not 0 < density <= 1):
        raise ConfigError(
            f"density={density!r} cannot be: combination_type={combination_type!r} drops entries and needs the share "
            "that it keeps, above 0 and at most 1"
        )


def _check_truncation(
    kind: Kind, rank: int | None, clamp: float | None, summands: Mapping[str, Sequence[Summand]]
) -> None:
    if not kind.truncates:
        return
    if clamp is not None and not _LEAST_CLAMP < clamp <= 1:
        raise ConfigError(
            f"svd_clamp={clamp!r} cannot be: expected the share of entries that stay below the limit, above "
            f"{_LEAST_CLAMP} and at most 1"
        )
    if rank is None:
        return
    checks.integer("svd_rank", rank, 1)
    most = max(largest_rank(kind, there) for there in summands.values())
    if rank > most:
        raise ConfigError(
            f"svd_rank={rank} is more than there is: no layer's combination has a rank above {most}; give at most "
            "that, or None for the largest rank of the adapters"
        )


def _ranks(config: LoraConfig) -> list[int]:
    return [config.r, *config.rank_pattern.values()]


# -- what is there ----------------------------------------------------------------------------------------------------


def _summands(name: str, layer: LoraLayer, adapters: Sequence[str], weights: Sequence[float]) -> list[Summand]:
    found = []
    for adapter, weight in zip(adapters, weights, strict=True):
        if not layer.has(adapter):
            continue
        a, b = (matrix.detach() for matrix in layer.matrices(adapter))
        if a.is_meta or b.is_meta:
            raise ModelError(f"adapter '{adapter}' has no weights yet in layer '{name}' (meta device): load them first")
        if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
            raise ModelError(f"adapter '{adapter}' holds NaN or Inf in layer '{name}', so it cannot be combined")
        dtype = torch.promote_types(a.dtype, torch.float32)
        start = start_of(layer, adapter)
        found.append(
            Summand(
                adapter,
                weight,
                float(layer.scaling[adapter]),  # a tensor where adapters are to be swapped
                a.to(dtype),
                b.to(dtype),
                start if start is not None and start.base == "offset" else None,
            )
        )
    return found


def _check_alike(kind: Kind, layer: str, summands: Sequence[Summand], combination_type: str) -> None:
    """Refuse factors that cannot be added entry by entry."""
    if kind.adds != "factors":
        return
    first = summands[0]
    for one in summands:
        if one.start is not None:
            raise ConfigError(
                f"combination_type={combination_type!r} adds up A's and B's on their own, which says nothing where "
                f"the layer subtracts a start, as '{layer}' does for adapter '{one.adapter}': use 'cat', 'svd' or a "
                "type that ends in '_svd'"
            )
        if one.rank != first.rank:
            raise ConfigError(
                f"combination_type={combination_type!r} adds up A's and B's of one rank, but in layer '{layer}' "
                f"adapter '{first.adapter}' has rank {first.rank} and adapter '{one.adapter}' rank {one.rank}: use "
                "'cat', 'svd' or a type that ends in '_svd'"
            )


def _other_parts(model: AdaptedModel, adapters: Sequence[str]) -> dict[AdapterPart, str]:
    """What is no LoRA layer -> the one adapter of these that has it."""
    found = {}
    for name, part in model.parts().items():
        owners = [adapter for adapter in dict.fromkeys(adapters) if part.has(adapter)]
        if isinstance(part, LoraLayer) or not owners:
            continue
        if len(owners) > 1:
            raise ConfigError(
                f"adapters '{owners[0]}' and '{owners[1]}' both have trained weights of their own for '{name}', and "
                "those cannot be combined: only one of the adapters may have them"
            )
        found[part] = owners[0]
    return found


# -- the new adapter --------------------------------------------------------------------------------------------------


def _new_config(model: AdaptedModel, adapters: Sequence[str], ranks: Mapping[str, int]) -> LoraConfig:
    configs = [model.config_of(name) for name in adapters]
    config = configs[0].copy()
    # A start from data or from the base weight has been made, and may not be made again. One without: as PEFT, so that
    # the same numbers of the random generator are left for types that drop entries at random.
    if not isinstance(config.init_lora_weights, bool) and config.init_lora_weights != "gaussian":
        config.init_lora_weights = True
    config.loftq_config = config.eva_config = config.corda_config = config.lora_ga_config = None
    config.init_options, config.frozen_a, config.match_gain = {}, False, None
    config.use_rslora = False
    config.lora_bias = any(one.lora_bias for one in configs)
    config.modules_to_save = sorted({module for one in configs for module in one.modules_to_save or ()}) or None
    tokens = [one.trainable_token_indices for one in configs if one.trainable_token_indices]
    config.trainable_token_indices = tokens[0] if tokens else None
    config.ensure_weight_tying = any(one.ensure_weight_tying for one in configs)

    patterns = compact_patterns(Plan(ranks, ranks))
    config.r, config.lora_alpha = patterns.r, patterns.lora_alpha
    config.rank_pattern, config.alpha_pattern = patterns.rank_pattern, patterns.alpha_pattern
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    modules = bare_module_names(model.model)
    named = [one.target_modules for one in configs]
    sets = [names for names in named if isinstance(names, set)]
    config.target_modules = set().union(*sets)
    if len(sets) < len(named) or {name for name in modules if match_module(config, name)} != ranks.keys():
        exact = exact_target_modules(ranks, modules, complete=True)
        config.target_modules = exact if isinstance(exact, str) else set(exact)
    return config


def _make(model: AdaptedModel, adapter_name: str, config: LoraConfig, ranks: Mapping[str, int]) -> None:
    """Put an adapter, without values, where it is to be; which adapters are active stays as it is."""
    layers = model.lora_layers()
    for name, rank in ranks.items():
        layers[name].update_layer(adapter_name, rank, rank, config)
    add_saved_modules(model.model, adapter_name, config)
    add_trained_tokens(model.model, adapter_name, config)
    for part in model.parts().values():
        if part.has(adapter_name):
            for parameter in part.parameters_of(adapter_name):
                parameter.requires_grad_(False)


@torch.no_grad()
def _fill(name: str, layer: LoraLayer, adapter_name: str, rules: Rules, summands: Sequence[Summand]) -> None:
    transposed = Target.of(layer.get_base_layer(), name).is_transposed
    overflow = ModelError(f"the combination is not finite in layer '{name}': give smaller weights")
    try:
        found = combined_factors(rules, summands, transposed=transposed)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # finite factors, so a weight is too large
        raise overflow from error
    for weight, values in zip(layer.matrices(adapter_name), found, strict=True):
        weight.copy_(values.reshape(weight.shape))
        if not bool(weight.isfinite().all()):
            raise overflow
    if layer.lora_bias[adapter_name]:
        bias: torch.Tensor = layer.lora_B[adapter_name].bias  # type: ignore[assignment]
        for one in summands:
            if layer.lora_bias[one.adapter]:
                bias += layer.lora_B[one.adapter].bias * (one.weight * one.scaling)  # type: ignore[operator]
