"""Measures of the heat map: how large its cells, numbers and labels are, given how many there are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from matplotlib.textpath import TextPath

if TYPE_CHECKING:
    from collections.abc import Iterable

    from smartinit.report.grid import Grid

POINTS = 72  # per inch
LARGEST, SMALLEST = 8.0, 4.8  # type of the numbers, in points: smaller ones are left out
TICKS = 7.0  # type of the column labels
OTHER = "other"
LABEL_HEIGHT = 0.18  # of the column labels, in inches
NARROWEST_GAP = 0.4  # columns


@dataclass(frozen=True)
class Cells:
    """Roomy cells while they are few, smaller ones as they become many. Lengths are in inches."""

    grid: Grid

    @property
    def cell_width(self) -> float:
        """Of one cell."""
        return min(0.42, max(0.12, 13.6 / len(self.grid.columns)))

    @property
    def cell_height(self) -> float:
        """Of one cell."""
        return min(0.28, max(0.11, 24 / len(self.grid.rows)))

    @cached_property
    def left(self) -> tuple[float, ...]:
        """Where each column begins, in columns: that of the others stands a little apart."""
        return tuple(i + (self._gap if layer is None else 0.0) for i, layer in enumerate(self.grid.columns))

    @property
    def width(self) -> float:
        """Of all columns."""
        return self.cell_width * (self.left[-1] + 1)

    @property
    def height(self) -> float:
        """Of all rows."""
        return self.cell_height * len(self.grid.rows)

    @cached_property
    def column_labels(self) -> dict[int, str]:
        """Column -> label: every 1st, 2nd, 5th, … layer as room allows."""
        layers = self._layers
        labels = {len(layers): OTHER} if None in self.grid.columns else {}
        if not layers:
            return labels
        room = self.cell_width * POINTS / (text_width(str(layers[-1]), TICKS) + 6)
        step = next((n for n in (1, 2, 5, 10, 20) if n * room >= 1), 50)
        consecutive = layers[-1] - layers[0] < len(layers)
        shown = [i for i, layer in enumerate(layers) if (layer if consecutive else i) % step == 0]
        return {i: str(layers[i]) for i in shown} | labels

    def type_size(self, texts: Iterable[str]) -> float:
        """The largest type, in points, in which every text fits a cell; 0.0 if that would be too small to read."""
        widest = max((text_width(text, 1.0) for text in texts), default=1.0)
        size = min(LARGEST, 0.8 * self.cell_width * POINTS / widest, 0.7 * self.cell_height * POINTS)
        return size if size >= SMALLEST else 0.0

    @cached_property
    def _layers(self) -> list[int]:
        return [layer for layer in self.grid.columns if layer is not None]

    @cached_property
    def _gap(self) -> float:
        """Between the last layer and the column of the others, in columns: their labels have room side by side."""
        if not self._layers:
            return 0.0
        labels = (text_width(str(self._layers[-1]), TICKS) + text_width(OTHER, TICKS)) / 2 + 4
        return max(NARROWEST_GAP, labels / (self.cell_width * POINTS) - 1)


def text_width(text: str, size: float) -> float:
    """In points, in the font of the figure."""
    return float(TextPath((0, 0), text, size=size).get_extents().width)
