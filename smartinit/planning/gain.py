"""How much further a start goes in its first step than LoRA's own does, and the learning rate that makes up for it.

The yardstick is LoRA's own start (A uniform in ±1/√in, B zero) at the same rank and scaling, in expectation: under
Adam ``out·r/(3 in)·[tr Σ + (r-1)·attraction]``, where `SecondMoment.attraction` is close to ``(2/π) tr Σ²/tr Σ``; under
SGD ``out·r/(3 in)²·[(tr Σ)² + (r+1) tr Σ²]``. For embedding tables, whose inputs are unit vectors, it is A zero and B
normal: ``r·[out + (2/π)(r-1)]·tr Σ`` and ``r·out·(out+r+1)·tr Σ²``.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from smartinit.factors import Factors
    from smartinit.planning.moment import SecondMoment


@dataclass(frozen=True)
class Gain:
    """The first step of one layer, against that of LoRA's own start at the same rank and scaling.

    Attributes:
        step: expected root-mean-square change of the layer's output vector per unit of learning rate, under Adam.
        reference: the same for LoRA's own start.
        by_a: the part of ``step²`` that A's update makes: 0 where B starts at zero.
        by_b: the part of ``step²`` that B's update makes.
        relative_sgd: the ratio of the two starts under SGD, where the step is quadratic in the start.
        measured: False where Σ = I was assumed, because no data was looked at.
    """

    step: float
    reference: float
    by_a: float
    by_b: float
    relative_sgd: float
    measured: bool

    @property
    def relative(self) -> float:
        """How many times further than LoRA's own start the first step goes under Adam; 1.0 where neither moves."""
        return self.step / self.reference if self.reference > 0 else 1.0

    @property
    def matching_lr(self) -> float:
        """What to multiply a learning rate for LoRA's own start with, under Adam, so that the first step is as long."""
        return 1 / self.relative if self.relative > 0 else math.inf

    def as_dict(self) -> dict[str, float | bool]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Gain:
        """The inverse of `as_dict`."""
        numbers = {name: float(data[name]) for name in ("step", "reference", "by_a", "by_b", "relative_sgd")}
        return cls(**numbers, measured=bool(data["measured"]))


@dataclass(frozen=True)
class GainSummary:
    """The gains of several layers.

    Attributes:
        layers: how many have an adapter.
        median: of the layers' relative gains.
        lowest: of them.
        highest: of them.
        overall: ``√(Σ step² / Σ reference²)``: layers count by how much they move.
        measured: whether all were.
    """

    layers: int
    median: float
    lowest: float
    highest: float
    overall: float
    measured: bool

    @property
    def matching_lr(self) -> float:
        """What to multiply a learning rate for LoRA's own start with, going by the median layer."""
        return 1 / self.median if self.median > 0 else math.inf

    def as_dict(self) -> dict[str, float | bool | None]:
        """Plain values for JSON."""
        matching = self.matching_lr
        return asdict(self) | {"matching_lr": matching if math.isfinite(matching) else None}


def gain_of(factors: Factors, scaling: float, moment: SecondMoment, *, embedding: bool = False) -> Gain:
    """The gain of one layer's start; see `smartinit.planning.first_step`.

    Args:
        factors: ``a (r, in)``, ``b (out, r)``; matrices that are not trained make no step.
        scaling: the layer's s.
        moment: of the layer's inputs; `SecondMoment.isotropic` for data-free starts that nothing is known of.
        embedding: the layer is an embedding table, where LoRA itself starts with A zero and B normal.

    Cost: ``O(r n k)`` with k known directions, or ``O(r n²)`` with the whole moment; where B is not zero, ``O(m²)``
    for ``m = min(n, 512)``, once per moment.
    """
    from smartinit.planning.first_step import adam_terms, sgd_energy  # torch: stored gains are read without it

    terms = adam_terms(factors, moment)
    reference, reference_sgd = _yardstick(factors.b.shape[0], factors.rank, moment, embedding=embedding)
    return Gain(
        step=abs(scaling) * math.sqrt(sum(terms)),
        reference=abs(scaling) * math.sqrt(reference),
        by_a=scaling**2 * terms.by_a,
        by_b=scaling**2 * terms.by_b,
        relative_sgd=math.sqrt(sgd_energy(factors, moment) / reference_sgd) if reference_sgd > 0 else 1.0,
        measured=moment.measured,
    )


def match_gain(factors: Factors, gain: Gain, target: float = 1.0) -> Factors:
    """Scale a start so that its relative gain under Adam becomes ``target``: 1.0 lets LoRA's learning rate fit.

    A start with ``B A = 0`` is divided by the gain. Otherwise ``A/c`` and ``B·c`` keep ``s·B A`` while what B's update
    does shrinks and what A's does grows, by as much as that can do; for less, both are divided by one more number and
    the start's product shrinks too (a split stays one: the base gives up the smaller product), except where it corrects
    a quantised base: that one keeps its product, and may keep a higher gain. ``magnitude`` is kept, so work it out
    afterwards.

    Args:
        factors: a start; it is left as it is.
        gain: of these factors, from `gain_of`.
        target: relative gain that is wanted.

    Raises:
        ConfigError: the target is not positive.
    """
    if not 0 < target < math.inf:
        raise ConfigError(f"target={target}: the relative gain to match must be positive")
    if gain.step <= 0 or gain.reference <= 0:
        return factors
    wanted = (gain.reference * target) ** 2
    both = max(0.0, gain.step**2 - gain.by_a - gain.by_b)
    ratio, shrink = 1.0, gain.step / math.sqrt(wanted)
    if factors.effect != "keeps":
        ratio, left = _exchange(gain.by_a, gain.by_b, both, wanted)
        shrink = 1.0 if factors.effect == "quantises" else math.sqrt(left / wanted)
    a, b = (factors.a.double() / (ratio * shrink), factors.b.double() * (ratio / shrink))
    return replace(factors, a=a.to(factors.a.dtype), b=b.to(factors.b.dtype))


def summarise_gains(gains: Iterable[Gain]) -> GainSummary | None:
    """Gains of the layers with an adapter, together; None if there are none."""
    active = [gain for gain in gains if gain.reference > 0]
    if not active:
        return None
    relative = [gain.relative for gain in active]
    return GainSummary(
        layers=len(active),
        median=statistics.median(relative),
        lowest=min(relative),
        highest=max(relative),
        overall=math.hypot(*(gain.step for gain in active)) / math.hypot(*(gain.reference for gain in active)),
        measured=all(gain.measured for gain in active),
    )


def _yardstick(out_features: int, rank: int, moment: SecondMoment, *, embedding: bool) -> tuple[float, float]:
    """Expected ``E‖Δh‖² / (lr² s²)`` under Adam, and ``/ (lr² s⁴ σ²)`` under SGD, of LoRA's own start."""
    if embedding:
        adam = rank * (out_features + 2 / math.pi * max(rank - 1, 0)) * moment.trace
        return adam, rank * out_features * (out_features + rank + 1) * moment.square_trace
    variance = 1 / (3 * moment.features)  # of an entry of A
    pairs = (rank - 1) * moment.attraction if rank > 1 else 0.0
    adam = out_features * rank * variance * (moment.trace + pairs)
    return adam, out_features * rank * variance**2 * (moment.trace**2 + (rank + 1) * moment.square_trace)


def _exchange(by_a: float, by_b: float, both: float, wanted: float) -> tuple[float, float]:
    """``c`` for which ``by_b/c² + by_a·c² + both`` is ``wanted``, or least if it is always more; and what it is."""
    if not by_a:
        return math.sqrt(by_b / wanted), wanted
    if not by_b:
        return math.sqrt(wanted / by_a), wanted
    middle = (wanted - both) / 2
    inner = middle**2 - by_a * by_b
    if middle <= 0 or inner < 0:
        return (by_b / by_a) ** 0.25, 2 * math.sqrt(by_a * by_b) + both
    # Of the two solutions the one that changes less.
    roots = ((middle + sign * math.sqrt(inner)) / by_a for sign in (1, -1))
    return math.sqrt(min(roots, key=lambda square: abs(math.log(square)))), wanted
