"""Start layers again: what an adapter still holds as it was started goes back to its base before another start."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from smartinit.adapters.parallel.dtensors import to_local
from smartinit.errors import ModelError
from smartinit.factors import Factors
from smartinit.megatron.agreement import everyone, failing_together
from smartinit.megatron.writing import (
    check_restorable,
    give_back,
    given_up,
    joined,
    noted,
    own_shards,
    renew_magnitudes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from smartinit.artefact import Artefact
    from smartinit.factors import Trains
    from smartinit.megatron.sharded_target import ShardedTarget
    from smartinit.megatron.writing import GivenUp
    from smartinit.methods.base import Method

# What the starts of live models came with; factors are left out, as the models hold them.
_MADE: WeakKeyDictionary[GivenUp, Artefact] = WeakKeyDictionary()


def check_as_started(targets: Sequence[ShardedTarget]) -> None:
    """Whether every base weight is the original one, or its adapter still holds, bit by bit, what it gave up.

    Raises:
        ModelError: an adapter that was trained, or loaded, beside a weight that has given up an earlier start.
    """
    for target in targets:
        start = given_up(target.layer, target.note)
        if start is not None and not _holds(target, start):
            raise ModelError(
                f"the weight of '{target.name}' has given up an earlier start, and its adapter has been trained or "
                "loaded since, so neither is the original any more; load the base model again, or give the weights "
                "back first (restore_base)"
            )


def remember(targets: Sequence[ShardedTarget], artefact: Artefact) -> None:
    """Note by what the weights of these layers have given up something."""
    about = replace(artefact, factors={})
    for target in targets:
        start = given_up(target.layer, target.note)
        if start is not None:
            _MADE[start] = about


def earlier(
    targets: Sequence[ShardedTarget], method: Method, seed: int, provenance: Mapping[str, Any]
) -> Artefact | None:
    """The start that all layers have, if it is what the method would give; collective.

    Args:
        targets: as `check_as_started` allows.
        method: one that needs no data.
        seed: of its random numbers, if it has any.
        provenance: to be added.
    """
    starts = [given_up(target.layer, target.note) for target in targets]
    about = next((_MADE.get(start) for start in starts if start is not None), None)
    same = (
        about is not None
        and all(s is not None and s.effect == "splits" and _MADE.get(s) is about for s in starts)
        and (about.recipe.method, dict(about.recipe.options)) == (method.name, method.options())
        and (method.needs_weight or about.recipe.seed == seed)
        and set(about.plan.ranks) == {target.name for target in targets}
    )
    if not all(everyone("same" if same else "")):
        return None
    assert about is not None  # noqa: S101 - see `same`
    factors = {}
    for target, start in zip(targets, starts, strict=True):
        assert start is not None  # noqa: S101 - see `same`
        a, b = joined(target, start.a, "in").float().clone(), joined(target, start.b, "out").float().clone()
        factors[target.name] = Factors(a, b, "splits", trains=_trains(target))
    renew_magnitudes(targets)
    return replace(about, factors=factors, provenance={**about.provenance, **provenance})


@torch.no_grad()
def has_this_start(targets: Sequence[ShardedTarget], factors: Mapping[str, Factors]) -> bool:
    """Whether the layers of all ranks have given up, and hold, just these factors; collective."""

    def same(target: ShardedTarget) -> bool:
        start, pair = given_up(target.layer, target.note), factors[target.name]
        if start is None or (start.effect, pair.effect, start.scaling) != ("splits", "splits", target.adapter.scaling):
            return False
        return all(map(torch.equal, (start.a, start.b), own_shards(target, pair)))

    has = all(everyone("same" if all(map(same, targets)) else ""))
    if has:
        renew_magnitudes(targets)
    return has


@contextmanager
def given_back(targets: Sequence[ShardedTarget]) -> Iterator[None]:
    """Weights have what they gave up, to a rounding; after an error in the block all is as it was. Collective.

    Cost: a copy of the weights concerned, in the CPU's memory, for as long as the block takes.

    Raises:
        ModelError: a weight was quantised.
    """
    changed = [target for target in targets if given_up(target.layer, target.note) is not None]
    with failing_together():
        check_restorable(changed)
    kept = [
        (target, given_up(target.layer, target.note), target.changeable_weight().detach().to("cpu", copy=True))
        for target in changed
    ]
    try:
        give_back(changed)
        yield
    except BaseException:
        with torch.no_grad():
            for target, start, weight in kept:
                target.change_weight(weight)
                noted(target, start)
        raise


def _holds(target: ShardedTarget, start: GivenUp) -> bool:
    """Whether an adapter is what it was when its weight gave that up."""
    factors = (to_local(f.weight.detach()) for f in (target.adapter.linear_in, target.adapter.linear_out))
    own = (factor if target.expert is None else factor[target.expert] for factor in factors)
    return all(torch.equal(now, then) for now, then in zip(own, (start.a, start.b), strict=True))


def _trains(target: ShardedTarget) -> Trains:
    a, b = target.adapter.linear_in.trained, target.adapter.linear_out.trained
    return "both" if a and b else "a" if a else "b"
