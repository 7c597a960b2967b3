"""As many ranks as capture a wanted share of every layer's spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from smartinit.errors import ConfigError
from smartinit.planning.limits import Limits
from smartinit.planning.variance import variance_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Ratios = Mapping[str, Sequence[float] | NDArray[np.float64]]

_ROUND_OFF = 1e-9  # shares that add up to the target on paper may fall short of it by this much


def captured_ranks(
    ratios: Ratios, captured: float, costs: Mapping[str, int], limits: Limits | None = None
) -> dict[str, int]:
    """The smallest rank of each target whose leading directions capture a share of its total.

    Rounded up to ``multiple_of``, within the limits, and at most as many as there are candidates: see `short_targets`.
    An explicit budget that these ranks exceed is spent on the best of their directions, as `variance_ranks` does.

    Args:
        ratios: target -> explained shares, descending; as many as the target may get.
        captured: the share to reach, above 0, at most 1.
        costs: target -> parameters per rank, ``in + out``.
        limits: budget and bounds.

    Returns:
        target -> rank, in the order of ``ratios``.

    Raises:
        ConfigError: a share that cannot be, or bounds that cannot be kept.

    Cost: linear in the number of candidates.
    """
    if not 0 < captured <= 1:
        msg = f"captured={captured!r} cannot be: expected a share above 0, at most 1"
        raise ConfigError(msg)
    limits = limits or Limits()
    ranks = {}
    for name, shares in ratios.items():
        # A layer without variance has nothing to capture.
        wanted = _reach(shares, captured) if np.any(shares) else 0
        wanted = -(-wanted // limits.multiple_of) * limits.multiple_of
        ceiling = limits.ceiling(len(shares))
        ranks[name] = max(limits.floor(name, len(shares)), min(wanted, ceiling))
    if limits.budget is None and limits.params is None:
        return ranks
    budget, price = limits.allowance(ranks, costs)
    if sum(rank * price[name] for name, rank in ranks.items()) <= budget:
        return ranks
    return variance_ranks({name: ratios[name][: ranks[name]] for name in ratios}, ranks, costs, limits)


def short_targets(ratios: Ratios, captured: float, ranks: Mapping[str, int]) -> dict[str, float]:
    """Targets whose ranks capture less than the wanted share -> the share that they do capture.

    Their candidates, or the limits, end before the target is reached. A layer without any variance is not among them.
    """
    found = {name: float(np.sum(shares[: ranks[name]])) for name, shares in ratios.items() if np.any(shares)}
    return {name: share for name, share in found.items() if share < captured - _ROUND_OFF}


def _reach(shares: Sequence[float] | NDArray[np.float64], captured: float) -> int:
    """How many leading shares add up to ``captured``; all of them and one more if they never do."""
    return int(np.searchsorted(np.cumsum(np.asarray(shares, dtype=np.float64)), captured - _ROUND_OFF)) + 1
