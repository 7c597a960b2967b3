"""What writing an adapter does to the base weight: checked for all layers first, then done once for every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from smartinit.adapters.host import adapters_of, factor_parameters
from smartinit.adapters.layer import LoraLayer
from smartinit.adapters.start import start_of
from smartinit.adapters.weight_change import blocks, wide
from smartinit.errors import ConfigError, ModelError
from smartinit.targets.sharing import shared_weights, users_of_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from smartinit.adapters.host import Host
    from smartinit.adapters.start import Base
    from smartinit.factors import Factors
    from smartinit.targets.weight import Target

# Two layers that share a weight can give up one product only; what their own factors say may differ by as much.
_SAME = 1e-3
# `init_lora_weights` with which PEFT changes the base weight while it makes the adapter.
_PEFT_SPLITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_OTHERWISE = "or use base='offset', which leaves the base weights alone"


@dataclass(frozen=True)
class Written:
    """One layer that gets factors.

    Attributes:
        target: its base layer.
        layer: its LoRA layer.
        factors: what is written, before rounding to the adapter's dtype.
        scaling: ``s`` of ``s·B A``.
    """

    target: Target
    layer: nn.Module
    factors: Factors
    scaling: float

    def rounded(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors as the adapter will hold them, on the base weight's device."""
        kept = factor_parameters(self.layer, adapter_name)
        device = self.target.device
        return (
            self.factors.a.to(device, kept[0].dtype),
            self.factors.b.to(device, kept[1].dtype),
        )


def changes_of_base(
    host: Host, written: Mapping[str, Written], adapter_name: str, base: Base
) -> tuple[tuple[Written, ...], ...]:
    """The layers whose base weight must change, grouped by the weight; changes nothing itself.

    Args:
        host: the model.
        written: layer name -> what it gets.
        adapter_name: which adapter.
        base: what a split does to the base layer.

    Raises:
        ModelError: a weight that must be changed cannot be.
        ConfigError: the change would alter what another layer or another adapter computes; or the layer has given up
            a product already.
    """
    _refuse_second_split(host, written, adapter_name, base)
    for name, one in written.items():
        if one.factors.effect == "quantises" and base == "offset" and one.factors.base is not None:
            raise ConfigError(f"the start of '{name}' quantises its base weight, so base='offset' cannot keep it")
        if one.factors.effect == "splits" and base == "offset" and _has_magnitude(one.layer, adapter_name):
            raise ConfigError(
                f"layer '{name}' has DoRA, whose norm is that of base + s·B A, so a split cannot be applied with "
                "base='offset'; use base='residual'"
            )
    changing = {
        name: one
        for name, one in written.items()
        if (one.factors.effect == "splits" and base == "residual" and not _is_residual(one.layer, adapter_name))
        or (one.factors.effect == "quantises" and one.factors.base is not None)
    }
    if not changing:
        return ()
    _refuse_pefts_own_split(host, changing, adapter_name)
    for name, one in changing.items():
        if one.target.changeable_weight().is_inference():
            raise ModelError(
                f"the base weight of '{name}' was made in torch's inference mode, so it cannot be changed; load the "
                f"model outside of it, {_OTHERWISE}"
            )
        others = [other for other in adapters_of(one.layer) if other != adapter_name]
        if others:
            raise ConfigError(
                f"changing the base weight of '{name}' would change what its adapter '{others[0]}' computes; use a "
                f"model without it, {_OTHERWISE}"
            )
    by_target = {id(one.target): one for one in changing.values()}
    groups = tuple(
        tuple(by_target[id(target)] for target in targets)
        for targets in shared_weights([one.target for one in changing.values()]).values()
    )
    _refuse_other_users(host, groups)
    for group in groups:
        for other in group[1:]:
            _require_same_change(group[0], other, adapter_name)
    return groups


@torch.no_grad()
def give_up(target: Target, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    """``W -= s·B A`` in place: the difference in at least float32, rounded once to the stored dtype.

    Args:
        target: the layer.
        a: ``(rank, in)``, as the adapter holds it: a residual of unrounded factors would not start where ``W`` was.
        b: ``(out, rank)``, likewise.
        scaling: ``s``.

    Cost: ``2·rank·in·out`` and work space for some million numbers.

    Raises:
        ModelError: ``W`` is not finite, or the difference is not in the stored dtype. ``W`` is then half written.
    """
    stored = target.changeable_weight()
    dtype = wide(stored.dtype, stored.device)
    left, right = _in_storage(target, a.to(stored.device, dtype), b.to(stored.device, dtype))
    left = left * scaling
    for rows in blocks(stored):
        block = stored[rows]
        difference = block.flatten(1).to(dtype) - left[rows] @ right
        _write(target, block, difference)


@torch.no_grad()
def become(target: Target, weight: torch.Tensor) -> None:
    """``W = weight (out, in)`` in place, rounded once to the stored dtype.

    Raises:
        ModelError: as `give_up`.
    """
    stored = target.changeable_weight()
    if tuple(weight.shape) != target.shape:
        raise ModelError(f"'{target.name}' is {target.shape}, but its new base weight is {tuple(weight.shape)}")
    oriented = weight.T if target.is_transposed else weight
    for rows in blocks(stored):
        _write(target, stored[rows], oriented[rows].to(stored.device))


def _write(target: Target, block: torch.Tensor, values: torch.Tensor) -> None:
    rounded = values.to(block.dtype)
    if not torch.isfinite(rounded).all():
        if not target.has_finite_weight():
            raise ModelError(f"the weight of '{target.name}' holds NaN or Inf; load a sound model")
        raise ModelError(
            f"the new base weight of '{target.name}' does not fit into {str(block.dtype).removeprefix('torch.')}: it "
            f"reaches {values.abs().max():.3g}; load the base model in bfloat16 or float32, {_OTHERWISE}"
        )
    block.copy_(rounded.reshape(block.shape))


def _in_storage(target: Target, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``B, A`` in the order of the weight's dimensions: their product is what the stored weight gives up."""
    return (a.T, b.T) if target.is_transposed else (b, a)


def _has_magnitude(layer: nn.Module, adapter_name: str) -> bool:
    return adapter_name in getattr(layer, "lora_magnitude_vector", ())


def _is_residual(layer: nn.Module, adapter_name: str) -> bool:
    start = start_of(layer, adapter_name)
    return start is not None and start.base == "residual"


def _refuse_second_split(host: Host, written: Mapping[str, Written], adapter_name: str, base: Base) -> None:
    """A base that is a residual already must not give up anything else, nor be taken for the original."""
    for name, layer in host.layers(adapter_name).items():
        start = start_of(layer, adapter_name)
        if start is None or start.base == "offset":
            continue
        one = written.get(name)
        again = one is not None and one.factors.effect == "splits" and base == "residual"
        if one is None or not again or not start.equals(*one.rounded(adapter_name), one.scaling):
            raise ConfigError(
                f"the base weight of '{name}' has given up the start of adapter '{adapter_name}' already, so it is no "
                "longer the original; load the base model again before writing another start"
            )


def _refuse_pefts_own_split(host: Host, changing: Mapping[str, Written], adapter_name: str) -> None:
    said = getattr(host.configs[adapter_name], "init_lora_weights", True)
    theirs = [name for name, one in changing.items() if not isinstance(one.layer, LoraLayer)]
    if theirs and isinstance(said, str) and said.startswith(_PEFT_SPLITS):
        raise ConfigError(
            f"PEFT has changed the base weight of '{theirs[0]}' when it made adapter '{adapter_name}' with "
            f"init_lora_weights={said!r}; make the adapter with init_lora_weights=True and write the factors then"
        )


def _refuse_other_users(host: Host, groups: tuple[tuple[Written, ...], ...]) -> None:
    """A weight that a module without this adapter uses as well cannot be changed for the adapter's sake."""
    users = users_of_weights(host.root)
    inside = {id(one.target.module): one.target.name for group in groups for one in group}
    expected: dict[int, set[str]] = {}
    layer_names = {id(module): name for name, module in host.root.named_modules()}
    for group in groups:
        for one in group:
            storage = one.target.storage
            if storage is not None:
                path = f"{layer_names[id(one.target.module)]}.weight"
                expected.setdefault(storage[0], set()).add(path)
    for group in groups:
        storage = group[0].target.storage
        for path, layout in users.get(storage[0], ()) if storage is not None else ():
            if path not in expected[layout[0]] or layout != storage:
                name = inside[id(group[0].target.module)]
                raise ConfigError(
                    f"'{name}' shares its weight with '{path}', which is not written together with it, so a changed "
                    f"weight would change what that computes; adapt both alike, leave '{name}' out, {_OTHERWISE}"
                )


def _require_same_change(first: Written, other: Written, adapter_name: str) -> None:
    names = f"'{first.target.name}' and '{other.target.name}' share one weight"
    if first.factors.effect != other.factors.effect:
        raise ConfigError(f"{names}, but their starts do different things to it; adapt one of them only")
    ours, theirs = _new_base(first), _new_base(other)
    if ours is not None and theirs is not None:
        same = ours.shape == theirs.shape and torch.equal(ours, theirs)
    else:
        same = _distance(first, other, adapter_name) <= _SAME
    if not same:
        raise ConfigError(
            f"{names}, but their starts would change it in different ways; give both the same rank and alpha, adapt "
            f"one of them only, {_OTHERWISE}"
        )


def _new_base(one: Written) -> torch.Tensor | None:
    """What the stored weight becomes, if it is given."""
    base = one.factors.base
    return base.T if base is not None and one.target.is_transposed else base


def _distance(first: Written, other: Written, adapter_name: str) -> float:
    """``‖D₁ − D₂‖ / ‖D₁‖`` (Frobenius) of what both would give up, from matrices of the factors' size."""
    sides: list[Any] = []
    for sign, one in ((1, first), (-1, other)):
        a, b = (matrix.double() for matrix in one.rounded(adapter_name))
        left, right = _in_storage(one.target, a, b)
        sides.append((sign * one.scaling * left, right))
    (left, right), (minus, also) = sides

    def norm(left: torch.Tensor, right: torch.Tensor) -> float:
        return float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt())

    apart = norm(torch.cat([left, minus], dim=1), torch.cat([right, also]))
    return apart / max(norm(left, right), torch.finfo(torch.float64).tiny)
