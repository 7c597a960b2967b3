"""The heat map: the rank of every module, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from smartinit.report.cells import LABEL_HEIGHT, POINTS, Cells

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes

    from smartinit.report.grid import Grid

ROW_LABELS = 7.5  # largest type, in points
HIGHEST_BAR = 3.0  # colour bar, in inches
# Light to dark, even in lightness: it survives a greyscale printer and every kind of colour blindness.
COLOURS = LinearSegmentedColormap.from_list("ranks", mpl.colormaps["viridis_r"](np.linspace(0.06, 1.0, 101)))
LIGHT = 0.45  # above it, numbers are black
ZERO: dict[str, Any] = {"facecolor": "white", "edgecolor": "#555555", "linewidth": 0.6}
MISSING: dict[str, Any] = {"facecolor": "#f2f2f2", "edgecolor": "#c4c4c4", "hatch": "//////", "linewidth": 0.0}
NOTHING: dict[str, Any] = {"facecolor": "none", "edgecolor": "none"}


@dataclass(frozen=True)
class RankPanel:
    """What the heat map shows.

    Attributes:
        grid: where every target stands.
        ranks: target name -> rank.
    """

    grid: Grid
    ranks: Mapping[str, int]

    @cached_property
    def cells(self) -> Cells:
        """Its measures."""
        return Cells(self.grid)

    @property
    def below(self) -> float:
        """What labels and legend need under the cells, in inches."""
        return LABEL_HEIGHT + 0.2 + (0.2 if self._keys else 0.0)

    def draw(self, axes: Axes) -> None:
        """Draw into axes of the size of ``cells``."""
        left, rows = self.cells.left, self.grid.rows
        for row in range(len(rows)):
            for column, x in enumerate(left):
                self._draw_cell(axes, row, column, x)
        axes.set(xlim=(0, left[-1] + 1), ylim=(len(rows), 0), xlabel="layer")
        axes.set_title("(a) Rank of each module", pad=5)
        axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
        labels = self.cells.column_labels
        axes.set_xticks([left[i] + 0.5 for i in labels], list(labels.values()))
        axes.tick_params(length=0, pad=3)
        axes.tick_params(axis="y", labelsize=min(ROW_LABELS, 0.8 * self.cells.cell_height * POINTS))
        axes.spines[:].set_visible(False)
        if len(self._used) > 1:
            self._draw_colour_bar(axes)
        if self._keys:
            self._draw_legend(axes)

    @cached_property
    def _values(self) -> dict[tuple[int, int], float]:
        """(row, column) -> rank; the mean of several."""
        return {place: fmean(self.ranks[name] for name in names) for place, names in self.grid.cells.items()}

    @cached_property
    def _texts(self) -> dict[tuple[int, int], str]:
        shared = {place for place, names in self.grid.cells.items() if len(names) > 1}
        return {place: f"{v:.1f}" if v and place in shared else f"{v:.0f}" for place, v in self._values.items()}

    @cached_property
    def _type_size(self) -> float:
        return self.cells.type_size(set(self._texts.values()))

    @cached_property
    def _used(self) -> list[float]:
        """The ranks above 0, ascending, each once."""
        return sorted({value for value in self._values.values() if value})

    @cached_property
    def _norm(self) -> Normalize:
        """From the lowest to the highest rank that is not 0; one rank alone gets a colour from the middle."""
        low, high = (self._used[0], self._used[-1]) if self._used else (1.0, 1.0)
        return Normalize(low, high) if low < high else Normalize(low - 1, high + 1)

    @cached_property
    def _keys(self) -> list[Patch]:
        """Entries of the legend: what numbers and colour bar do not say."""
        keys = []
        if len(self._used) == 1 and not self._type_size:
            keys.append(Patch(facecolor=self._colour(self._used[0]), label=f"rank {self._used[0]:g}"))
        if 0 in self._values.values():
            keys.append(Patch(label="rank 0: no adapter", **ZERO))
        if len(self._values) < len(self.grid.rows) * len(self.grid.columns):
            keys.append(Patch(label="not a target", **MISSING))
        if any(len(names) > 1 for names in self.grid.cells.values()):
            keys.append(Patch(label="several modules in a cell: their mean", **NOTHING))
        return keys

    def _draw_cell(self, axes: Axes, row: int, column: int, x: float) -> None:
        value = self._values.get((row, column))
        if value is None:
            axes.add_patch(Rectangle((x, row), 1, 1, gid=f"missing:{row}:{column}", **MISSING))
            return
        gid = f"rank:{row}:{column}"
        if value:
            colour = self._colour(value)
            axes.add_patch(Rectangle((x, row), 1, 1, gid=gid, facecolor=colour, edgecolor="white", linewidth=0.5))
        else:
            colour = (1.0, 1.0, 1.0)
            axes.add_patch(Rectangle((x + 0.06, row + 0.06), 0.88, 0.88, gid=gid, **ZERO))
        if self._type_size:
            axes.text(
                x + 0.5,
                row + 0.5,
                self._texts[row, column],
                size=self._type_size,
                color="black" if _lightness(colour) > LIGHT else "white",
                ha="center",
                va="center_baseline",
            )

    def _colour(self, value: float) -> tuple[float, float, float]:
        red, green, blue, _ = COLOURS(float(self._norm(value)))
        return red, green, blue

    def _draw_colour_bar(self, axes: Axes) -> None:
        share = min(1.0, HIGHEST_BAR / self.cells.height)
        bar = axes.inset_axes((1 + 0.12 / self.cells.width, 1 - share, 0.12 / self.cells.width, share))
        steps = max(1, min(6, int(share * self.cells.height / 0.22)))
        colour_bar = axes.figure.colorbar(
            ScalarMappable(self._norm, COLOURS), cax=bar, label="rank", ticks=MaxNLocator(steps, integer=True)
        )
        colour_bar.outline.set_visible(False)
        if colour_bar.solids is not None:
            colour_bar.solids.set_edgecolor("face")  # no hairlines between its steps
        bar.tick_params(length=2, pad=2)

    def _draw_legend(self, axes: Axes) -> None:
        axes.legend(
            handles=self._keys,
            loc="upper left",
            bbox_to_anchor=(0, -(LABEL_HEIGHT + 0.2) / self.cells.height),
            ncols=len(self._keys),
            frameon=False,
            borderpad=0,
            borderaxespad=0,
            handlelength=1.6,
            handleheight=1.0,
            columnspacing=1.4,
        )


def _lightness(colour: tuple[float, float, float]) -> float:
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue
