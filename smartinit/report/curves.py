"""Captured variance against rank, one curve per input tensor."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smartinit.artefact import Artefact
    from smartinit.report.grid import Grid


@dataclass(frozen=True)
class Curve:
    """How much of one input's variance its leading directions hold.

    Attributes:
        names: the targets that read this input, in model order.
        rows: their rows in the grid, ascending, each once.
        percent: share of the total variance that 0, 1, 2, … directions capture, 0..100.
        ranks: the ranks that its targets were given, ascending, each once.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    percent: tuple[float, ...]
    ranks: tuple[int, ...]


def variance_curves(artefact: Artefact, grid: Grid) -> list[Curve]:
    """The curve of every site, and of every target that belongs to none, in model order.

    Targets of one site have equal shares, of which some may know more than others: the longest is taken. A target
    whose shares are not known (its method does not rank directions by variance) has no curve.
    """
    planned = artefact.plan.ranks
    in_a_site = {name for site in artefact.sites for name in site}
    groups = [[name for name in site if name in planned] for site in artefact.sites]
    groups += [[name] for name in planned if name not in in_a_site]
    curves = []
    for names in groups:
        ratios = max((artefact.layers[name].ratios for name in names), key=len, default=())
        if not ratios:
            continue
        curves.append(
            Curve(
                names=tuple(names),
                rows=tuple(sorted({grid.row_of[name] for name in names})),
                percent=tuple(min(100.0, 100.0 * share) for share in accumulate(ratios, initial=0.0)),  # round-off
                ranks=tuple(sorted({planned[name] for name in names})),
            )
        )
    position = {name: i for i, name in enumerate(planned)}
    return sorted(curves, key=lambda curve: min(position[name] for name in curve.names))
