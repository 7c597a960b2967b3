"""Bring many statistics up to date at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartinit.statistics.subspace import SubspacePCA, settle_all

if TYPE_CHECKING:
    from collections.abc import Iterable

    from smartinit.statistics.base import Statistic


def settle_full(statistics: Iterable[Statistic], *, everything: bool = False) -> int:
    """End the block of every statistic that has one full; sketches of equal shape in one batched call.

    Args:
        statistics: each settled in place.
        everything: also those whose block is not full yet (at the end of the data).

    Returns:
        How many were brought up to date.
    """
    due = [s for s in statistics if everything or s.full]
    settle_all([s for s in due if isinstance(s, SubspacePCA)])
    for statistic in due:
        if everything or not isinstance(statistic, SubspacePCA):
            statistic.settle()
    return len(due)
