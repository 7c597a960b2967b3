"""Write a start into the adapters beside parallel layers, and take it out of their base weights again."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from smartinit.adapters.parallel.decomposed import DecomposedLayer
from smartinit.adapters.parallel.dtensors import to_local
from smartinit.adapters.parallel.weights import weight_names
from smartinit.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from smartinit.adapters.parallel.adapter import LowRankAdapter, Side
    from smartinit.adapters.parallel.layer import AdaptedLayer
    from smartinit.factors import Effect, Factors, Trains
    from smartinit.megatron.sharded_target import ShardedTarget

_PART = "given_up"
_CHANGING = ("splits", "quantises")


class GivenUp(nn.Module):
    """What a base weight gave up to its adapter's start: this rank's shards, rounding included. In no state dict.

    Args:
        a: of ``A₀``.
        b: of ``B₀``.
        scaling: ``s₀``.
        effect: ``"splits"``: the weight is the original without ``s₀·B₀ A₀``; ``"quantises"``: something else.
    """

    a: torch.Tensor
    b: torch.Tensor

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scaling: float, effect: Effect) -> None:
        super().__init__()
        self.register_buffer("a", a.clone(), persistent=False)
        self.register_buffer("b", b.clone(), persistent=False)
        self.scaling, self.effect = scaling, effect


def check_restorable(targets: Iterable[ShardedTarget]) -> None:
    """Whether base weights can be given back what they gave up.

    Raises:
        ModelError: a weight was quantised, and nobody has its original.
    """
    for target in targets:
        start = given_up(target.layer, target.note)
        if start is not None and start.effect == "quantises":
            raise ModelError(
                f"the weight of '{target.name}' was quantised by its start, and the original is gone; load the base "
                "model again"
            )


@torch.no_grad()
def check_writable(targets: Sequence[ShardedTarget], factors: Mapping[str, Factors]) -> None:
    """Whether everything can be written: so that nothing is, if something cannot.

    Raises:
        ModelError: a weight that must change cannot, or numbers that its dtype, or that of the factors, cannot hold.
    """
    for target in targets:
        pair = factors[target.name]
        a, b = rounded(target, pair)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ModelError(
                f"the start of '{target.name}' holds numbers that {a.dtype} cannot; use a wider lora_dtype"
            )
        if pair.effect in _CHANGING:
            changed = _changed(target, pair, a, b)
            if not changed.isfinite().all():
                raise ModelError(
                    f"the base weight of '{target.name}' would not be finite in {changed.dtype} after its start"
                )


@torch.no_grad()
def write(targets: Sequence[ShardedTarget], factors: Mapping[str, Factors]) -> None:
    """Write every rank's shards: of A and B, and of what the base weight becomes, rounded once.

    A split takes from the weight what the *rounded* factors give, so that both together are the original. Collective
    beside weight-decomposed layers, whose magnitudes are set anew.

    Args:
        targets: the layers.
        factors: by name, of whole layers.
    """
    for target in targets:
        pair, adapter = factors[target.name], target.adapter
        a, b = rounded(target, pair)
        own = own_shards(target, pair)
        if pair.effect in _CHANGING:
            target.change_weight(_changed(target, pair, a, b))
            noted(target, GivenUp(*own, adapter.scaling, pair.effect))
        for factor, shard in zip((adapter.linear_in, adapter.linear_out), own, strict=True):
            (factor.weight if target.expert is None else factor.weight[target.expert]).copy_(shard)
        _set_trained(adapter, pair.trains)
    renew_magnitudes(targets)


@torch.no_grad()
def give_back(targets: Iterable[ShardedTarget]) -> None:
    """Give base weights back what splits took from them, to a rounding; adapters stay as they are. Collective."""
    for target in targets:
        if (start := given_up(target.layer, target.note)) is None:
            continue
        stored = target.changeable_weight()
        delta = target.delta(joined(target, start.a, "in"), joined(target, start.b, "out"), start.scaling)
        target.change_weight(stored + delta)
        noted(target, None)


def given_up(layer: AdaptedLayer, note: str) -> GivenUp | None:
    """What one of a layer's base weights gave up; None if it is the original. ``note``: see `ShardedTarget.note`."""
    notes = layer._modules.get(_PART)  # noqa: SLF001
    found = notes[note] if isinstance(notes, nn.ModuleDict) and note in notes else None
    return found if isinstance(found, GivenUp) else None


def noted(target: ShardedTarget, start: GivenUp | None) -> None:
    """Note what a weight has given up; None: nothing, it is the original."""
    notes = _notes(target.layer)
    if start is not None:
        notes[target.note] = start
    elif target.note in notes:
        del notes[target.note]


def own_shards(target: ShardedTarget, pair: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's shards of whole A and B, as the adapter will hold them."""
    a, b = rounded(target, pair)
    return _own(target, a, "in"), _own(target, b, "out")


def rounded(target: ShardedTarget, pair: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole A and B as the adapter will hold them."""
    like = target.adapter.linear_in.weight
    return pair.a.to(like), pair.b.to(like)


def _changed(target: ShardedTarget, pair: Factors, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """This rank's shard of what the base weight becomes, in its dtype."""
    stored = target.changeable_weight()
    if pair.base is not None:
        return target.own(pair.base).to(stored)
    # In float32 at least; one rounding.
    return (stored - target.delta(a, b, target.adapter.scaling).to(stored.device)).to(stored.dtype)


def _own(target: ShardedTarget, whole: torch.Tensor, side: Side) -> torch.Tensor:
    """This rank's shard of one pair's A or B."""
    if target.expert is None:
        return target.adapter.own(whole, side)
    return target.adapter.own(whole.unsqueeze(0), side)[0]


def joined(target: ShardedTarget, shard: torch.Tensor, side: Side) -> torch.Tensor:
    """One pair's whole A or B; collective over the group."""
    if target.expert is None:
        return target.adapter.joined(shard, side)
    return target.adapter.joined(shard.unsqueeze(0), side)[0]


def _set_trained(adapter: LowRankAdapter, trains: Trains) -> None:
    """Freeze the factor that the method does not train, if the adapter is trained at all."""
    factors = adapter.linear_in, adapter.linear_out
    training = any(factor.weight.requires_grad for factor in factors)
    for factor, name in zip(factors, ("a", "b"), strict=True):
        factor.trained = trains in ("both", name)
        factor.weight.requires_grad_(training and factor.trained)


def renew_magnitudes(targets: Iterable[ShardedTarget]) -> None:
    """Set the magnitudes of weight-decomposed layers anew; collective."""
    layers = {id(layer): layer for target in targets for layer in target.layers}
    for layer in layers.values():
        if isinstance(layer, DecomposedLayer):
            layer.adapter.reset(layer.weights())


def _notes(layer: AdaptedLayer) -> nn.ModuleDict:
    notes = layer._modules.get(_PART)  # noqa: SLF001
    if not isinstance(notes, nn.ModuleDict):
        notes = nn.ModuleDict()
        layer.add_module(_PART, notes)
        layer.register_load_state_dict_pre_hook(_forget_what_goes)  # type: ignore[no-untyped-call]
    return notes


def _forget_what_goes(layer: AdaptedLayer, state: Mapping[str, torch.Tensor], prefix: str, *_: object) -> None:
    """Drop the notes of a layer if a state dict brings it other base weights: nobody knows what those have given up.

    Warns:
        UserWarning: it does.
    """
    notes = _notes(layer)
    for name in weight_names(layer.base):
        comes, now = state.get(f"{prefix}to_wrap.{name}"), to_local(getattr(layer.to_wrap, name).detach())
        if comes is None or not len(notes):
            continue
        comes = to_local(comes.detach())
        if comes.shape == now.shape and torch.equal(comes.to(now), now):
            continue
        for note in list(notes):
            del notes[note]
        warnings.warn(
            f"'{layer.name}' had given up its adapter's start, and other base weights were loaded into it: they are "
            "taken to be as the adapter expects them; if they are the original ones, load them before adapting, or "
            "start the adapter anew (initialize, apply)",
            stacklevel=2,
        )
