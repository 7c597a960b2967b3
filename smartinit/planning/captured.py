"""Ranks from a target: the fewest directions of each layer that capture a share of its spectrum."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from smartinit.errors import ConfigError
from smartinit.planning.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


def captured_ranks(
    ratios: Mapping[str, Sequence[float] | NDArray[np.float64]],
    captured: float,
    costs: Mapping[str, int],
    limits: Limits | None = None,
) -> dict[str, int]:
    """The smallest rank of each target whose leading directions explain at least ``captured``.

    Args:
        ratios: target -> explained shares, descending; as many as the target may get.
        captured: the share, above 0 and at most 1.
        costs: target -> parameters per rank, ``in + out``.
        limits: bounds; ranks are rounded up to ``multiple_of``.

    Returns:
        target -> rank, in the order of ``ratios``; all its candidates where they do not reach the share (a warning
        names these).

    Raises:
        ConfigError: a share that cannot be; or the ranks take more than an explicit budget.
    """
    limits = limits or Limits()
    if not 0 < captured <= 1:
        raise ConfigError(f"captured={captured!r} cannot be: expected a share above 0, at most 1")
    step, ranks, short = limits.multiple_of, {}, []
    for name, shares in ratios.items():
        reached = np.cumsum(np.asarray(shares, dtype=np.float64))
        # A sum of shares is 1 only up to round-off.
        enough = np.flatnonzero(reached >= captured - 1e-9)
        if not len(enough):
            short.append(name)
        wanted = (int(enough[0]) + 1) if len(enough) else len(reached)
        ceiling = limits.ceiling(len(reached))
        ranks[name] = max(limits.floor(name, len(reached)), min(-(-wanted // step) * step, ceiling))
    if short:
        warnings.warn(
            f"{len(short)} of {len(ranks)} layers do not capture {captured:g} of their spectrum with all the directions "
            f"they may have, for instance '{short[0]}'; raise max_rank",
            stacklevel=2,
        )
    if limits.budget is not None or limits.params is not None:
        budget, price = limits.allowance(ranks, costs)
        spent = sum(rank * price[name] for name, rank in ranks.items())
        if spent > budget:
            raise ConfigError(
                f"to capture {captured:g} of every layer takes {spent}, above the budget of {budget}; lower one of them"
            )
    return ranks
