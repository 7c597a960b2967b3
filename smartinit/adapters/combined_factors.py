"""A and B of one layer for a weighted combination of adapters: what `add_weighted_adapter` computes.

The types differ in what they add up and in what they drop before that:

====================  =========================  ==================================  ==============
type                  adds up                    drops first                         signs elected
====================  =========================  ==================================  ==============
cat                   products, exactly          -                                   -
svd                   products, then truncates   -                                   -
linear                A's and B's on their own   -                                   -
magnitude_prune       A's and B's                the smallest entries                no
ties                  A's and B's                the smallest entries                yes
dare_linear           A's and B's                entries at random, rescaled         no
dare_ties             A's and B's                entries at random, rescaled         yes
the last four + _svd  dense products, truncated  as above                            as above
====================  =========================  ==================================  ==============

Products are what adapters add to their layers, ``s·B A``; with ``base="offset"`` that is ``s·B A - s₀·B₀ A₀``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from smartinit.linalg.low_rank import clamped, truncated, truncated_sum
from smartinit.linalg.pruning import keep_largest, keep_random, sum_of_agreeing, weighted_sum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from smartinit.adapters.start import Start
    from smartinit.linalg.pruning import MajoritySign

Combination = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


class Kind(NamedTuple):
    """One combination type.

    Attributes:
        adds: ``stacks`` of factors; low-rank ``products``; ``factors``, A's and B's each on their own; ``dense``
            products.
        prune: what is done to every summand, given the density; None: nothing.
        elects: whether the entries of a sum must agree in sign.
    """

    adds: Literal["stacks", "products", "factors", "dense"]
    prune: Callable[[torch.Tensor, float], torch.Tensor] | None = None
    elects: bool = False

    @property
    def truncates(self) -> bool:
        """Whether the result has a rank of its own."""
        return self.adds in ("products", "dense")


KINDS: Mapping[str, Kind] = {
    "linear": Kind("factors"),
    "cat": Kind("stacks"),
    "svd": Kind("products"),
    "ties": Kind("factors", keep_largest, elects=True),
    "ties_svd": Kind("dense", keep_largest, elects=True),
    "dare_linear": Kind("factors", keep_random),
    "dare_ties": Kind("factors", keep_random, elects=True),
    "dare_linear_svd": Kind("dense", keep_random),
    "dare_ties_svd": Kind("dense", keep_random, elects=True),
    "magnitude_prune": Kind("factors", keep_largest),
    "magnitude_prune_svd": Kind("dense", keep_largest),
}


@dataclass(frozen=True)
class Rules:
    """How to combine, everywhere in a model.

    Attributes:
        kind: the combination type.
        rank: upper limit of the result's rank, where the type truncates.
        clamp: see `smartinit.linalg.low_rank.clamped`; None: no limit.
        driver: see `smartinit.linalg.low_rank.truncated`.
        density: share of the entries that pruning keeps.
        majority: how signs are elected.
    """

    kind: Kind
    rank: int
    clamp: float | None = None
    driver: str | None = None
    density: float = 1.0
    majority: MajoritySign = "total"


@dataclass(frozen=True, eq=False)
class Summand:
    """One adapter on one layer, in float32 or wider.

    Attributes:
        adapter: its name.
        weight: its weight w in the combination.
        scaling: its s.
        a: ``(r, in)``, a convolution's ``(r, in, *kernel)``.
        b: ``(out, r)``, a convolution's ``(out, r, 1, …)``.
        start: the start that the layer subtracts from its product, if any.
    """

    adapter: str
    weight: float
    scaling: float
    a: torch.Tensor
    b: torch.Tensor
    start: Start | None = None

    @property
    def rank(self) -> int:
        """r, and that of the start."""
        return int(self.a.shape[0]) + (0 if self.start is None else int(self.start.a.shape[0]))

    def products(self) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
        """``s``, ``B (out, r)`` and ``A (r, in)`` of every low-rank product in it, kernels flattened."""
        yield self.scaling, self.b.flatten(1), self.a.flatten(1)
        if self.start is not None:
            a, b = self.start.a.to(self.a), self.start.b.to(self.b)
            yield -self.start.scaling, b.flatten(1), a.flatten(1)

    def dense(self) -> torch.Tensor:
        """``s·B A`` less the start, ``(out, in)``."""
        return weighted_sum((b @ a for _, b, a in self.products()), [scaling for scaling, _, _ in self.products()])


def largest_rank(kind: Kind, summands: Sequence[Summand]) -> int:
    """The rank above which the result of a type that truncates has nothing left: of the sum, or of a dense matrix."""
    features = min(summands[0].b.shape[0], summands[0].a[0].numel())
    return features if kind.adds == "dense" else min(features, sum(one.rank for one in summands))


def combined_rank(rules: Rules, summands: Sequence[Summand]) -> int:
    """The rank of what `combined_factors` gives."""
    if rules.kind.truncates:
        return min(rules.rank, largest_rank(rules.kind, summands))
    if rules.kind.adds == "stacks":
        return sum(one.rank for one in summands)
    return summands[0].rank


@torch.no_grad()
def combined_factors(
    rules: Rules, summands: Sequence[Summand], *, transposed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, of scaling 1, of a combination on one layer.

    Args:
        rules: how to combine.
        summands: the adapters that are there, in the order in which they were given.
        transposed: whether the layer stores its weight as ``(in, out)``, which decides the order of random numbers.

    Returns:
        ``(k, in)`` and ``(out, k)``, kernels flattened or not, k as of `combined_rank`.

    Cost: ``stacks`` and ``factors`` one pass over the factors; ``products`` O((out + in)·q²), q the sum of the ranks;
    ``dense`` about five matrices of ``out × in`` in memory at once (with elected signs one more for every adapter)
    and a truncated decomposition.
    """
    kind = rules.kind
    if kind.adds == "factors":
        # One root of the weight on each side; its sign on one of them only.
        roots = [math.sqrt(abs(one.weight * one.scaling)) for one in summands]
        signed = [math.copysign(root, one.weight * one.scaling) for root, one in zip(roots, summands, strict=True)]
        return _added(rules, (one.a for one in summands), signed), _added(rules, (one.b for one in summands), roots)
    if kind.adds == "dense":
        deltas = (one.dense().T if transposed else one.dense() for one in summands)
        delta = _added(rules, deltas, [one.weight for one in summands])
        rank = combined_rank(rules, summands)
        left, right = truncated(delta.T if transposed else delta, rank, driver=rules.driver)
    else:
        weighted = [(b, a * one.weight * scaling) for one in summands for scaling, b, a in one.products()]
        lefts, rights = [b for b, _ in weighted], [a for _, a in weighted]
        if kind.adds == "stacks":
            return torch.cat(rights), torch.cat(lefts, dim=1)
        left, right = truncated_sum(lefts, rights, combined_rank(rules, summands))
    return (right, left) if rules.clamp is None else clamped(left, right, rules.clamp)[::-1]


def _added(rules: Rules, tensors: Iterator[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    prune = rules.kind.prune
    pruned = tensors if prune is None else (prune(tensor, rules.density) for tensor in tensors)
    if rules.kind.elects:
        return sum_of_agreeing(list(pruned), weights, rules.majority)
    return weighted_sum(pruned, weights)
