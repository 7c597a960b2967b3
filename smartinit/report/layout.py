"""Where the panels stand, in inches."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from smartinit.report.curves import variance_curves
from smartinit.report.gain_panel import GainPanel
from smartinit.report.grid import arrange
from smartinit.report.rank_panel import RankPanel
from smartinit.report.variance_panel import VariancePanel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from smartinit.artefact import Artefact

NARROWEST, LOWEST = 4.4, 2.8  # of the lower panel
HEADING = 0.5  # of the lower panel: its title and the label of its dashed line
TITLE_SIZE = 10  # points


def draw(artefact: Artefact, title: str | None = None) -> Figure:
    """The figure; what stands outside its axes is left to a tight bounding box."""
    grid = arrange(artefact.plan.ranks)
    ranks = RankPanel(grid, artefact.plan.ranks)
    variance = VariancePanel(variance_curves(artefact, grid), grid, artefact.config.r, shared=bool(artefact.sites))
    gain = GainPanel(
        grid,
        {name: layer.gain for name, layer in artefact.layers.items() if layer.gain and name in artefact.plan.ranks},
    )
    width = max(NARROWEST, ranks.cells.width)
    height = max(LOWEST, variance.legend_height)
    middle = gain.below_the_others
    upper = middle + height + HEADING + ranks.below
    figure = Figure(figsize=(width, upper + ranks.cells.height))
    FigureCanvasAgg(figure)
    ranks.draw(_axes(figure, upper, ranks.cells.width, ranks.cells.height))
    variance.draw(_axes(figure, middle, width, height), width)
    if gain.height:
        gain.draw(_axes(figure, 0, width, gain.height))
    if title:
        lines = textwrap.wrap(title, round(width * 72 / (0.65 * TITLE_SIZE)))
        place = 1 + 0.34 / figure.get_figheight()
        figure.text(0, place, "\n".join(lines), size=TITLE_SIZE, weight="bold", va="bottom")
    return figure


def _axes(figure: Figure, bottom: float, width: float, height: float) -> Axes:
    """Axes at the left edge, measured in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((0, bottom / up, width / across, height / up))
