"""EVA's redistribution: ranks go where the explained variance is (Paischer et al., arXiv 2410.07170, section 3.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from smartinit.errors import ConfigError
from smartinit.planning.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


def component_limit(rank: int, rho: float, cap: int) -> int:
    """Directions that a target of ``rank`` competes with: ``round(rank·rho)`` as PEFT rounds, at most ``cap``.

    Args:
        rank: the rank asked for.
        rho: how far redistribution may raise it, at least 1.
        cap: ``min(in_features, out_features)``.
    """
    return min(round(rank * rho), cap)


def variance_ranks(
    ratios: Mapping[str, Sequence[float] | NDArray[np.float64]],
    ranks: Mapping[str, int],
    costs: Mapping[str, int],
    limits: Limits | None = None,
) -> dict[str, int]:
    """Keep the best directions of all targets together, up to the budget.

    Every direction is worth the share of its own layer's variance that it explains; with a budget in parameters,
    that share per parameter. Equal values go to the earlier target, so that of targets which share an input the
    first gets the most. With ``multiple_of`` m, runs of m directions compete by their mean.

    Args:
        ratios: target -> explained shares, descending; as many as the target may get.
        ranks: target -> the rank asked for; their sum is the default budget.
        costs: target -> parameters per rank, ``in + out``.
        limits: budget and bounds.

    Returns:
        target -> rank, in the order of ``ratios``; the total never exceeds the budget.

    Raises:
        ConfigError: ``min_rank`` alone exceeds the budget or a target.

    Cost: one sort of all directions.
    """
    limits = limits or Limits()
    names = list(ratios)
    budget, price = limits.allowance(ranks, costs)
    step = limits.multiple_of
    given = {name: limits.floor(name, len(ratios[name])) for name in names}
    spent = sum(given[name] * price[name] for name in names)
    if spent > budget:
        msg = f"min_rank={limits.min_rank} takes {spent} for {len(names)} layers, above the budget of {budget}"
        raise ConfigError(msg)
    values, owners = [], []
    for position, name in enumerate(names):
        top = limits.ceiling(len(ratios[name]))
        shares = np.asarray(ratios[name], dtype=np.float64)[given[name] : top]
        # Round-off must not let a later run overtake an earlier one of the same target.
        runs = np.minimum.accumulate(shares.reshape(-1, step).mean(1) / price[name])
        values.append(runs)
        owners.append(np.full(len(runs), position))
    value, owner = np.concatenate(values), np.concatenate(owners)
    component = np.concatenate([np.arange(len(v)) for v in values])
    shut: set[int] = set()
    for index in np.lexsort((owner, component, -value)):
        position = int(owner[index])
        name = names[position]
        if position in shut:
            continue
        if spent + step * price[name] > budget:
            shut.add(position)
            if len(shut) == len(names):
                break
            continue
        given[name] += step
        spent += step * price[name]
    return given
