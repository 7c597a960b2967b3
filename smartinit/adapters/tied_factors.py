"""Starts of layers with tied matrices (``ensure_weight_tying``): one for all of them, written once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from smartinit.adapters.tying import TransposedFactor
from smartinit.errors import ConfigError
from smartinit.factors import Factors
from smartinit.targets.names import match_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from smartinit.factors import Trains
    from smartinit.planning.plan import Plan

# What two decompositions of one weight may differ by, relative to their product.
_SAME = 1e-3


@dataclass(frozen=True)
class _Start:
    """What one layer is planned to get."""

    rank: int
    scaling: float
    alpha: float
    factors: Factors | None

    def transposed(self) -> _Start:
        """The same for a layer with the transposed weight."""
        return replace(self, factors=None if self.factors is None else _transposed(self.factors))


def is_tied(layer: Any, adapter_name: str) -> bool:  # noqa: ANN401  (a layer of this package or of PEFT)
    """Whether a layer's matrices are those of an embedding, transposed."""
    return adapter_name in layer.lora_A and isinstance(layer.lora_A[adapter_name], TransposedFactor)


def with_tied(
    layers: Mapping[str, nn.Module], adapter_name: str, factors: Mapping[str, Factors], plan: Plan
) -> tuple[Mapping[str, Factors], Plan]:
    """Plan and factors that give layers with tied matrices the start of the layer which has them, and after it.

    If that layer has no start, it gets the one that is given for a layer tied to it. Magnitudes of tied layers are
    computed when they are written.

    Args:
        layers: those with the adapter, by name.
        adapter_name: which adapter.
        factors: target name -> factors, see `smartinit.adapters.attach.write_factors`.
        plan: rank and alpha by the same names.

    Raises:
        ConfigError: starts for such layers that differ by more than which factors have the same product.
    """
    owner_of = _owners(layers, adapter_name)
    if not owner_of:
        return factors, plan
    names = {layer: name for name, layer in match_names(plan.ranks, layers).items()}
    ranks, alphas, given = dict(plan.ranks), dict(plan.alphas), dict(factors)

    def start_of(layer: str) -> _Start | None:
        name = names.get(layer)
        return None if name is None else _Start(ranks[name], plan.scaling(name), alphas[name], given.get(name))

    def put(layer: str, start: _Start) -> None:
        name = names.setdefault(layer, layer)
        ranks.pop(name, None)  # so that it comes last
        ranks[name], alphas[name] = start.rank, start.alpha
        given.pop(name, None)
        if start.factors is not None:
            given[name] = start.factors

    for owner in dict.fromkeys(owner_of.values()):
        tied = [layer for layer in owner_of if owner_of[layer] == owner]
        planned = {layer: start for layer in tied if (start := start_of(layer)) is not None}
        source = start_of(owner) or next((start.transposed() for start in planned.values()), None)
        if source is None:
            continue
        for layer, start in planned.items():
            _require_same(owner, source, layer, start.transposed())
        put(owner, source)
        for layer in tied:
            put(layer, source.transposed())
    return given, replace(plan, ranks=ranks, alphas=alphas)


def _owners(layers: Mapping[str, Any], adapter_name: str) -> dict[str, str]:
    """Layer with tied matrices -> the one that has them."""
    holders = {id(layer.lora_embedding_B): name for name, layer in layers.items() if hasattr(layer, "lora_embedding_B")}
    return {
        name: holders[id(layer.lora_A[adapter_name].factors)]
        for name, layer in layers.items()
        if is_tied(layer, adapter_name)
    }


def _transposed(pair: Factors) -> Factors:
    """Factors of ``(B A)ᵀ``, without a magnitude: it is of other rows."""
    trains: dict[Trains, Trains] = {"a": "b", "b": "a", "both": "both"}
    return Factors(pair.b.T, pair.a.T, pair.effect, None if pair.base is None else pair.base.T, trains[pair.trains])


def _require_same(owner: str, source: _Start, name: str, other: _Start) -> None:
    """Whether a tied layer's start, transposed, is that of the layer which has the matrices."""
    ours, theirs = source.factors, other.factors
    same = source.rank == other.rank
    if same and ours is not None and theirs is not None:
        same = ours.effect == theirs.effect and ours.a.shape == theirs.a.shape and ours.b.shape == theirs.b.shape
        same = same and ours.trains == theirs.trains and _distance(ours, source.scaling, theirs, other.scaling) <= _SAME
        if same and ours.base is not None and theirs.base is not None:
            same = torch.equal(ours.base, theirs.base)
    if not same:
        raise ConfigError(
            f"'{name}' has the matrices of '{owner}', transposed (ensure_weight_tying), but their starts differ in "
            "rank, scaling, product, effect on the base or what is trained, and there can be only one; leave one of "
            "the two out of the plan, or compute both from the same weight with the same rank and alpha"
        )


def _distance(first: Factors, first_scaling: float, other: Factors, other_scaling: float) -> float:
    """``‖D₁ - D₂‖ / ‖D₁‖`` (Frobenius) of ``D = s·B A``, from matrices of the factors' size."""
    left, right = first.b.double() * first_scaling, first.a.double()
    minus, also = other.b.to(left) * -other_scaling, other.a.to(right)

    def norm(left: torch.Tensor, right: torch.Tensor) -> float:
        return float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt())

    apart = norm(torch.cat([left, minus], dim=1), torch.cat([right, also]))
    return apart / max(norm(left, right), torch.finfo(torch.float64).tiny)
