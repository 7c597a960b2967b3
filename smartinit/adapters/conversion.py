"""A trained split as plain LoRA on the unmodified base: values in, values out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from smartinit.errors import ArtefactError, ConfigError, VerificationError
from smartinit.formats.convert import distance, has_product, product_norm, recompress, subtract_start
from smartinit.formats.tensors import PREFIX
from smartinit.planning.plan import Plan
from smartinit.targets.patterns import alpha_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smartinit.config import LoraConfig
    from smartinit.factors import Factors
    from smartinit.formats.peft import StoredAdapter
    from smartinit.formats.start import Start

_BASE_WEIGHT = ".base_layer.weight"
_NOTHING = 1e-13  # of the products that cancel, in float64
_A, _B = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")


@dataclass(frozen=True, eq=False)
class Conversion:
    """Plain LoRA on the unmodified base.

    Attributes:
        plan: rank and alpha by module name; every layer's scaling is the trained one's.
        factors: module name -> matrices, magnitudes included.
        others: biases, modules_to_save, trained tokens, by their keys.
        dropped: keys of frozen base weights that were in the trained folder; the base model has its own.
        errors: module name -> ``‖ΔW - ΔW'‖_F / ‖ΔW‖_F`` of what is written against the exact update.
        error: the same over all layers together.
    """

    plan: Plan
    factors: Mapping[str, Factors]
    others: Mapping[str, torch.Tensor]
    dropped: tuple[str, ...]
    errors: Mapping[str, float]
    error: float


def convert(
    trained: StoredAdapter,
    start: Start,
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    fused: bool = False,
) -> Conversion:
    """``s·B A - s₀·B₀ A₀`` of every layer as one pair of factors; everything else that was trained stays as it is.

    The rank doubles where the start has split the base. With DoRA the result is still exact: the direction
    ``W - s₀·B₀ A₀ + s·B A`` is the same sum on either base, and the magnitude is its own parameter.

    Args:
        trained: what training left.
        start: what it began with.
        rank: recompress every layer to at most this rank, with the error in the result; None keeps it exact.
        dtype: of the matrices; None: the wider of the two that come in.
        fused: it was trained in layers that are several of the start's, which gives them a larger rank.

    Raises:
        ArtefactError: the two are for different models or layers.
        ConfigError: ``rank`` below 1; the start quantises the base, or adapts bare parameters.
        VerificationError: a value is not finite.

    Cost: O((in + out)·r²) per layer.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank={rank}: expected at least 1")
    if trained.config.target_parameters:
        raise ConfigError(
            f"'{trained.folder}' adapts bare parameters (target_parameters), whose factors cannot be converted yet"
        )
    _check_layers(trained, start, fused=fused)
    ranks, alphas, errors, factors = {}, {}, {}, {}
    missing = total = 0.0
    for name, pair in trained.factors.items():
        scaling = scaling_for(trained.config, name, pair.rank)
        exact = pair
        if _gives_up(start, name):
            before = scaling_for(start.config, name, start.factors[name].rank)  # type: ignore[arg-type]  # it splits
            if not scaling:
                raise ConfigError(f"layer '{name}' of '{trained.folder}' has lora_alpha=0, so nothing can be converted")
            exact = subtract_start(_wide(pair), _wide(start.factors[name]), before / scaling)
        kept = _rounded(exact if rank is None else recompress(exact, rank), dtype or _stored_dtype(pair, start, name))
        growth = kept.rank / pair.rank
        ranks[name] = kept.rank
        alphas[name] = alpha_for(trained.config, name) * (math.sqrt(growth) if trained.config.use_rslora else growth)
        factors[name] = kept
        norm = product_norm(exact)
        if norm <= _NOTHING * product_norm(pair):  # not trained at all: what is left is rounding
            norm = 0.0
        gap = distance(exact, kept) if norm and not _same(exact, kept) else 0.0
        errors[name] = gap / norm if norm else 0.0
        missing += (scaling * gap) ** 2
        total += (scaling * norm) ** 2
    others, dropped = without_base_weights(trained)
    return Conversion(
        Plan(ranks, alphas, trained.config.use_rslora),
        factors,
        others,
        dropped,
        errors,
        math.sqrt(missing / total) if total else 0.0,
    )


def subtract_mutated_init(
    output_state_dict: Mapping[str, torch.Tensor], initial_state_dict: Mapping[str, torch.Tensor], config: LoraConfig
) -> dict[str, torch.Tensor]:
    """PEFT's conversion in memory: ``[A; A₀]`` and ``[B, -B₀]`` for every layer, and everything else as it is.

    Scaling, and so the configuration, must be the same at the start and now; `doubled_config` gives the one that goes
    with the result.

    Args:
        output_state_dict: the trained adapter by PEFT's keys, of any kind of layer.
        initial_state_dict: the same adapter before training; keys may lack the leading ``base_model.model.``.
        config: the adapter's configuration.

    Raises:
        ArtefactError: a matrix has no partner at the start, or one of another shape.
        ConfigError: the adapter has ``target_parameters``.
    """
    if config.target_parameters:
        raise ConfigError("factors of bare parameters (target_parameters) cannot be converted yet")
    initial = {_bare(key): tensor for key, tensor in initial_state_dict.items()}
    converted: dict[str, torch.Tensor] = {}
    for key, tensor in output_state_dict.items():
        dim = 0 if _is_part(key, _A) else 1 if _is_part(key, _B) else None
        if dim is None:
            if not _is_copy_of_base(key, output_state_dict):
                converted[key] = tensor
            continue
        start = initial.get(_bare(key))
        if start is None or tensor.shape != start.shape:
            other = "is not in it" if start is None else f"has shape {tuple(start.shape)} there"
            raise ArtefactError(f"the start is of another adapter: '{key}' {other}, {tuple(tensor.shape)} now")
        start = start.to(tensor.device)
        converted[key] = torch.cat([tensor, start if dim == 0 else -start], dim=dim)
    return converted


def doubled_config(config: LoraConfig) -> LoraConfig:
    """The configuration of an adapter with every rank doubled and every scaling as it was."""
    growth = math.sqrt(2) if config.use_rslora else 2
    twin = config.copy()
    twin.init_lora_weights = True
    twin.r = 2 * config.r
    twin.lora_alpha = config.lora_alpha * growth
    twin.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    twin.alpha_pattern = {key: alpha * growth for key, alpha in config.alpha_pattern.items()}
    return twin


def scaling_for(config: LoraConfig, name: str, rank: int) -> float:
    """The factor ``s`` that a configuration gives to a module whose adapter has this rank."""
    return alpha_for(config, name) / (math.sqrt(rank) if config.use_rslora else rank)


def without_base_weights(trained: StoredAdapter) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """What an adapter has besides its matrices, and the keys of frozen base weights among that, which are left out.

    PEFT saves the frozen weights of embeddings that it adapts: of the residual base, which must not be loaded.

    A weight that is tied to such an embedding goes with it.
    """
    adapted = {
        key: tensor
        for key, tensor in trained.others.items()
        if key.endswith(_BASE_WEIGHT) and _bare(key).removesuffix(_BASE_WEIGHT) in trained.factors
    }
    dropped = {
        key
        for key, tensor in trained.others.items()
        if key in adapted
        or (key.endswith(".weight") and any(torch.equal(tensor, weight) for weight in adapted.values()))
    }
    kept = {key: tensor for key, tensor in trained.others.items() if key not in dropped}
    return kept, tuple(sorted(dropped))


def _check_layers(trained: StoredAdapter, start: Start, *, fused: bool) -> None:
    quantised = next((name for name, effect in start.effects.items() if effect == "quantises"), None)
    if quantised is not None:
        raise ConfigError(
            f"the start in '{start.folder}' quantises the base of layer '{quantised}', so the trained adapter belongs "
            "to that base and to no other; there is nothing to convert"
        )
    unknown = [name for name in trained.factors if name not in start.effects]
    lost = [name for name in start.effects if _gives_up(start, name) and name not in trained.factors]
    if unknown or lost:
        name = (unknown or lost)[0]
        without, having = (start.folder, trained.folder) if unknown else (trained.folder, start.folder)
        raise ArtefactError(
            f"'{trained.folder}' was not trained from '{start.folder}': layer '{name}' is in '{having}' but not in "
            f"'{without}'; name the start of this very training"
        )
    for name, pair in trained.factors.items():
        _require_finite(pair, trained, name)
        if not _gives_up(start, name):
            continue
        first = start.factors[name]
        _require_finite(first, start, name)
        ours, theirs = ((p.b.shape[0], p.a.shape[1]) for p in (pair, first))
        same_form = trained.forms.get(name) == start.forms.get(name)
        if pair.rank == 2 * first.rank and not fused:
            raise ArtefactError(
                f"'{trained.folder}' has twice the rank of '{start.folder}' in layer '{name}': it is plain LoRA for "
                "the unmodified base already (doubled, converted, or saved from an offset); use it as it is"
            )
        if ours != theirs or not same_form:
            raise ArtefactError(
                f"'{trained.folder}' was not trained from '{start.folder}': layer '{name}' is {ours} in one and "
                f"{theirs} in the other{'' if ours != theirs else ', of another kind'}; name the start of this very "
                "training"
            )


def _require_finite(pair: Factors, of: StoredAdapter | Start, name: str) -> None:
    if not all(torch.isfinite(matrix).all() for matrix in (pair.a, pair.b)):
        raise VerificationError(f"layer '{name}' of the adapter in '{of.folder}' holds NaN or Inf; it is not converted")


def _gives_up(start: Start, name: str) -> bool:
    """Whether the base of this layer has given anything up."""
    return start.effects.get(name) == "splits" and name in start.factors and has_product(start.factors[name])


def _wide(pair: Factors) -> Factors:
    return replace(pair, a=pair.a.double(), b=pair.b.double())


def _rounded(pair: Factors, dtype: torch.dtype) -> Factors:
    return replace(pair, a=pair.a.to(dtype), b=pair.b.to(dtype), effect="keeps", base=None)


def _stored_dtype(pair: Factors, start: Start, name: str) -> torch.dtype:
    return torch.promote_types(pair.a.dtype, start.factors[name].a.dtype) if name in start.factors else pair.a.dtype


def _same(pair: Factors, other: Factors) -> bool:
    """Whether nothing was lost: the same rank, and every value survived its rounding."""
    return pair.rank == other.rank and bool((pair.a == other.a).all()) and bool((pair.b == other.b).all())


def _is_copy_of_base(key: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    layer = key.removesuffix(_BASE_WEIGHT)
    return layer != key and any(other.startswith(f"{layer}.lora_") for other in tensors)


def _is_part(key: str, parts: tuple[str, ...]) -> bool:
    """``….lora_A.weight`` or ``….lora_embedding_A``, not ``….lora_B.bias``."""
    return key.removesuffix(".weight").endswith(tuple(f".{part}" for part in parts))


def _bare(key: str) -> str:
    return key.removeprefix(PREFIX)
