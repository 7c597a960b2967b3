"""The ranks that were asked for, kept within the bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartinit.errors import ConfigError
from smartinit.planning.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Mapping


def uniform_ranks(
    ranks: Mapping[str, int], caps: Mapping[str, int], costs: Mapping[str, int], limits: Limits | None = None
) -> dict[str, int]:
    """The ranks asked for, scaled down by one common factor if they exceed the budget.

    Args:
        ranks: target -> the rank asked for.
        caps: target -> ``min(in_features, out_features)``.
        costs: target -> parameters per rank.
        limits: budget and bounds.

    Returns:
        target -> rank.

    Raises:
        ConfigError: ``min_rank`` alone exceeds the budget or a target.
    """
    limits = limits or Limits()
    budget, price = limits.allowance(ranks, costs)
    asked = sum(rank * price[name] for name, rank in ranks.items())
    share = min(1.0, budget / asked) if asked else 1.0
    step = limits.multiple_of
    out = {}
    for name, rank in ranks.items():
        wanted = int(rank * share + 1e-9) // step * step
        out[name] = max(limits.floor(name, caps[name]), min(wanted, limits.ceiling(caps[name])))
    if sum(rank * price[name] for name, rank in out.items()) > budget:
        msg = f"min_rank={limits.min_rank} for {len(ranks)} layers takes more than the budget of {budget}"
        raise ConfigError(msg)
    return out
